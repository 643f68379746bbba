"""Answers as they are made: what each request has made since the last time, and what all of it amounts to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from labinfer.errors import LabinferError
from labinfer.runtime.outputs import RequestOutput
from labinfer.runtime.request import Request
from labinfer.runtime.sampling import Logprob
from labinfer.service.errors import ApiError
from labinfer.service.service import Service


@dataclass(slots=True)
class Piece:
    """What answer ``index`` has got: text, tokens and their log-probabilities, and why it ended, if it did."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str | None
    stop_reason: int | str | None


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
    """Requests that are one call: ``pieces`` runs them, ``usage`` counts.

    The answers of request ``r`` have the indexes from ``r * n`` on.
    """

    service: Service
    requests: Sequence[Request]
    usage: Usage = field(default_factory=Usage)

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
        told: dict[int, tuple[int, int]] = {}
        try:
            async with aclosing(self.service.engine.stream(request)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    if output.finished or request.num_made == request.params.n:
                        pieces = new_pieces(output, told, number * request.params.n)
                        last = self.count(pieces, last)
                        if output.finished:
                            reason = output.finish_reason or reason
                            self.usage.prompt += len(request.prompt)
                            self.usage.cached += request.metrics.num_cached_tokens
                        if pieces:
                            yield pieces
        except LabinferError as error:
            reason = "error"
            self.service.metrics.failed(error)
            raise
        finally:
            if request.number >= 0:  # the engine took it
                self.service.metrics.ended(request, reason)

    def count(self, pieces: Sequence[Piece], last: float | None) -> float:
        """Count the tokens of ``pieces``; ``last`` is when there were some before. Gives the time."""
        tokens, now = sum(len(piece.token_ids) for piece in pieces), time.perf_counter()
        self.usage.completion += tokens
        self.service.metrics.told(tokens, None if last is None else now - last)
        return now


def new_pieces(output: RequestOutput, told: dict[int, tuple[int, int]], first: int) -> list[Piece]:
    """What ``output`` has beyond ``told``, the lengths of texts and tokens by answer, which are brought up to date."""
    pieces = []
    for index, each in enumerate(output.outputs):
        text, tokens = told.get(index, (0, 0))
        if tokens < 0:
            continue
        if each.finish_reason == "abort":
            raise ApiError(503, "the server stopped the request", code="aborted", retry_after=5)
        if len(each.text) > text or len(each.token_ids) > tokens or each.finish_reason is not None:
            logprobs = (each.logprobs or [])[tokens:]
            new = each.token_ids[tokens:]
            pieces.append(Piece(first + index, each.text[text:], new, logprobs, each.finish_reason, each.stop_reason))
            ended = each.finish_reason is not None
            told[index] = (len(each.text), -1 if ended else len(each.token_ids))
    return pieces
