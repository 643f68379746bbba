"""Answers as they are made: what each request has made since the last time, and what all of it amounts to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from labinfer.errors import LabinferError
from labinfer.runtime.outputs import CompletionOutput, RequestOutput, RequestOutputKind
from labinfer.runtime.request import Request
from labinfer.service.call import Call
from labinfer.service.errors import ApiError
from labinfer.service.service import Service

Piece = CompletionOutput
"""What an answer, by the index that clients see, has got since the piece before, and why it ended, if it did."""


@dataclass(slots=True)
class Usage:
    """Tokens of prompts, those of them that the prefix cache had, and those of answers."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def body(self) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Generation:
    """The requests that ``call`` is for: ``pieces`` runs them, ``usage`` counts.

    The answers of request ``r`` have the indexes from ``r * n`` on. ``streamed``: somebody wants them as they are made.
    """

    call: Call
    requests: Sequence[Request]
    streamed: bool
    usage: Usage = field(default_factory=Usage)

    @property
    def service(self) -> Service:
        """What runs them."""
        return self.call.service

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """What is new, whenever there is something. Leaving the loop stops the requests."""
        with self.service.admission.admit(sum(request.num_made for request in self.requests)):
            if len(self.requests) == 1:
                async with aclosing(self.of_one(0)) as pieces:
                    async for each in pieces:
                        yield each
                return
            queue: asyncio.Queue[list[Piece] | BaseException | None] = asyncio.Queue()
            tasks = [asyncio.ensure_future(self.into(queue, number)) for number in range(len(self.requests))]
            try:
                running = len(tasks)
                while running:
                    found = await queue.get()
                    if isinstance(found, BaseException):
                        raise found
                    if found is None:
                        running -= 1
                    else:
                        yield found
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def into(self, queue: asyncio.Queue[list[Piece] | BaseException | None], number: int) -> None:
        """Put the pieces of one request on ``queue``, and None, or what it raised, at its end."""
        try:
            async with aclosing(self.of_one(number)) as pieces:
                async for each in pieces:
                    queue.put_nowait(each)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    async def of_one(self, number: int) -> AsyncGenerator[list[Piece], None]:
        """The pieces of one request."""
        request, reason, last = self.requests[number], "abort", None
        kind = RequestOutputKind.DELTA if self.streamed else RequestOutputKind.FINAL_ONLY
        try:
            async with aclosing(self.service.replicas.stream(request, kind)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    if any(each.finish_reason == "abort" for each in output.outputs):
                        raise ApiError(503, "the server stopped the request", code="aborted", retry_after=5)
                    last = self.count(output, last)
                    if output.finished:
                        reason = output.outputs[0].finish_reason or reason
                        self.usage.prompt += len(request.prompt)
                        self.usage.cached += request.metrics.num_cached_tokens
                    yield numbered(output, request, number * request.params.n)
        except LabinferError as error:
            reason = "error"
            self.service.metrics.failed(error)
            raise
        finally:
            if request.number >= 0:  # the engine took it
                self.service.metrics.ended(request, reason)
                if self.service.tracing is not None:
                    self.service.tracing.ended(request, reason, self.call.request_id, self.call.headers)

    def count(self, output: RequestOutput, last: float | None) -> float:
        """Count the tokens of ``output``; ``last`` is when there were some before. Gives the time."""
        tokens, now = sum(len(each.token_ids) for each in output.outputs), time.perf_counter()
        self.usage.completion += tokens
        self.service.metrics.told(tokens, None if last is None else now - last)
        return now


def numbered(output: RequestOutput, request: Request, first: int) -> list[Piece]:
    """The answers of ``output`` with indexes from ``first`` on; those of ``best_of`` by their place."""
    pieces = output.outputs
    if request.num_made > request.params.n:
        return [replace(each, index=first + place) for place, each in enumerate(pieces)]
    return [replace(each, index=first + each.index) for each in pieces] if first else pieces
