"""One request and its answer, over ASGI."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from labinfer.errors import LabinferError
from labinfer.service.errors import ApiError, of_engine
from labinfer.service.wire import DONE, KEEP_ALIVE, event, json_bytes

if TYPE_CHECKING:
    from labinfer.service.service import Service
    from labinfer.service.services import Services

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

SSE_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"}


class Disconnected(Exception):
    """The client has gone away, or reads nothing any more."""


def openai_failure(error: ApiError) -> bytes:
    """How a stream of OpenAI's tells that it failed."""
    return event(error.body()) + DONE


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that is not JSON, or has a status of its own."""

    body: bytes
    content_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer in server-sent events; ``failure`` writes the error of one that fails on the way."""

    events: AsyncGenerator[bytes, None]
    failure: Callable[[ApiError], bytes] = openai_failure


class Call:
    """A request, with its headers by their names in lower case, and the way to answer it.

    ``service`` is the one that is asked, of all ``services``; the first until it is known. ``salt`` keeps the cached
    prompts of different API keys apart.
    """

    def __init__(self, services: Services, scope: Scope, receive: Receive, send: Send) -> None:
        self.services, self.scope, self.receive, self.send = services, scope, receive, send
        self.service: Service = services.of(None)
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.request_id: str = scope["labinfer.request_id"]
        self.salt: str = scope.get("labinfer.salt", "")
        self.warnings: list[str] = []
        self.started, self.writing, self.written = False, False, time.monotonic()
        self.task: asyncio.Task[None] | None = None  # what makes the answer
        self.comment: asyncio.Task[None] | None = None

    def query(self, name: str) -> str | None:
        """A value that stands in the address after ``?``."""
        values = parse_qs(self.scope["query_string"].decode("latin-1")).get(name)
        return values[0] if values else None

    async def body(self) -> bytes:
        """The whole body, within the limits of size and time."""
        options, parts, size = self.service.options, [], 0
        if int(self.headers.get("content-length", "0")) > options.max_body_bytes:
            raise self.too_large()
        try:
            async with asyncio.timeout(options.body_seconds):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > options.max_body_bytes:
                        raise self.too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, "the body took too long to arrive") from None

    def too_large(self) -> ApiError:
        """The error of a body beyond the limit."""
        return ApiError(413, f"the body is larger than {self.service.options.max_body_bytes} bytes")

    async def disconnect(self) -> None:
        """Wait until the client goes away."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of the answer."""
        self.started = True
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, body: bytes, more: bool = True) -> None:
        """Send a part of the answer; waits while the client does not read."""
        self.writing, self.written = True, time.monotonic()
        await self.send({"type": "http.response.body", "body": body, "more_body": more})
        self.writing = False

    async def reply(self, answer: object) -> None:
        """Answer with a ``Reply``, a ``Stream``, or anything that can be JSON."""
        if isinstance(answer, Stream):
            await self.stream(answer)
            return
        reply = answer if isinstance(answer, Reply) else Reply(json_bytes(answer))
        headers = {"content-type": reply.content_type, "content-length": str(len(reply.body)), **reply.headers}
        await self.start(reply.status, headers)
        await self.write(reply.body, more=False)

    async def fail(self, error: ApiError) -> None:
        """Answer with an error."""
        body = json_bytes(error.body(self.scope["path"]))
        await self.reply(Reply(body, status=error.status, headers=error.headers()))

    async def stream(self, stream: Stream) -> None:
        """Send events as they come. What fails before the first of them has a status of its own."""
        async with aclosing(stream.events) as events:
            try:
                async for data in events:
                    if not self.started:
                        await self.start(200, SSE_HEADERS)
                        self.service.open_streams.add(self)
                    await self.write(data)
            except (ApiError, LabinferError) as error:
                if not self.started:
                    raise
                told = {"request_id": self.request_id}
                _log.warning("request %s failed after its answer began: %s", self.request_id, error, extra=told)
                await self.write(stream.failure(error if isinstance(error, ApiError) else of_engine(error)))
            finally:
                self.service.open_streams.discard(self)
                if self.comment is not None:
                    self.comment.cancel()  # nothing comes behind the end
        await self.write(b"", more=False)

    def care(self, now: float) -> None:
        """Look after a stream: give up one that is not read, and send a comment on one that has been silent for long,
        so that nobody between takes it for dead.
        """
        options, silent = self.service.options, now - self.written
        if self.writing:
            if silent >= options.write_seconds and self.task is not None:
                self.task.cancel()
        elif silent >= options.keep_alive_seconds:  # in a task: a client that reads nothing holds up no other
            self.comment = asyncio.ensure_future(self.write(KEEP_ALIVE))
