"""A path of the service as an ASGI application: read and check the body, do the work, answer, tell what went wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from labinfer.errors import LabinferError
from labinfer.service.call import Call, Disconnected, Receive, Scope, Send
from labinfer.service.errors import ApiError, of_engine, of_schema
from labinfer.service.schema.base import Body
from labinfer.service.services import Services
from labinfer.service.wire import read_json

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Operation:
    """What a path does. ``handler(call)``, or ``handler(call, body)`` where there is a ``body``, gives the answer.

    ``public`` ones need no API key. ``polled`` ones are asked for all the time: the log has no line about a good answer
    of theirs. ``query`` are the names that may stand in its address. ``threat`` says what could be done with it, for
    SECURITY.md.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    summary: str
    body: type[Body] | None = None
    public: bool = False
    polled: bool = False
    query: tuple[str, ...] = ()
    threat: str = "reads the state of the service"


class Endpoint:
    """Runs an operation until it has answered or its client has gone."""

    def __init__(self, services: Services, operation: Operation) -> None:
        self.services, self.operation = services, operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        call = Call(self.services, scope, receive, send)
        try:
            await self.run(call)
        except ApiError as error:
            await call.fail(error)
        except ValidationError as error:  # of a request that was written in another form
            await call.fail(of_schema(error))
        except LabinferError as error:
            _log.info("request %s: %s", call.request_id, error, extra={"request_id": call.request_id})
            await call.fail(of_engine(error))
        except Disconnected:
            scope["labinfer.gone"] = True
            scope["labinfer.abort"]()

    async def run(self, call: Call) -> None:
        """Read the request and answer it, unless the client goes away first."""
        body = self.checked(call, await call.body()) if self.operation.body else None
        call.service = self.services.of(body.model if body else call.query("model"))
        work = call.task = asyncio.ensure_future(self.answer(call, body))
        watch = asyncio.ensure_future(call.disconnect())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() or work.cancelled():
                raise Disconnected
            work.result()
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    def checked(self, call: Call, data: bytes) -> Body:
        """The body as its model."""
        assert self.operation.body is not None
        kind = call.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the body must be application/json, not '{kind[:100]}'")
        try:
            body = self.operation.body.model_validate(read_json(data))
        except ValidationError as error:
            raise of_schema(error) from None
        if ignored := body.ignored[:16]:
            call.warnings = ignored
            _log.info("request %s: %s", call.request_id, "; ".join(ignored), extra={"request_id": call.request_id})
        return body

    async def answer(self, call: Call, body: Body | None) -> None:
        """Do the work and send what it gives."""
        handler = self.operation.handler
        await call.reply(await (handler(call) if body is None else handler(call, body)))
