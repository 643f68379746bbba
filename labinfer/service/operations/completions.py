"""/v1/completions: go on from texts or token ids."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from labinfer.runtime.request import Request
from labinfer.service.call import Call, Stream
from labinfer.service.errors import ApiError
from labinfer.service.generation import Generation, Piece
from labinfer.service.logprobs import completion_logprobs, prompt_logprobs
from labinfer.service.prompts import list_prompts, text_tokens
from labinfer.service.schema.completions import CompletionRequest
from labinfer.service.wire import DONE, event


@dataclass(slots=True)
class Text:
    """An answer as it grows; ``logprobs`` are the parts that were told."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Completion:
    """A call of the endpoint."""

    body: CompletionRequest
    generation: Generation
    echoes: list[str]
    head: dict[str, Any]
    choices: dict[int, Text] = field(default_factory=dict)

    def told(self, piece: Piece) -> dict[str, Any]:
        """The choice of a piece, which is added to the answer; an echo of the prompt goes before the first."""
        request = self.request(piece.index)
        text, logprobs = "", []
        if piece.index not in self.choices:
            self.choices[piece.index] = Text()
            if self.body.echo:
                text = self.echoes[piece.index // request.params.n]
                if self.body.logprobs is not None:
                    logprobs.append(
                        completion_logprobs(request.prompt, request.prompt_logprobs, 0, self.first_text(request))
                    )
        answer = self.choices[piece.index]
        if self.body.max_tokens != 0:
            if self.body.logprobs is not None:
                logprobs.append(
                    completion_logprobs(piece.token_ids, piece.logprobs or [], len(answer.text) + len(text))
                )
            text += piece.text
        answer.text += text
        answer.logprobs += logprobs
        answer.finish_reason = "length" if self.body.max_tokens == 0 and piece.finish_reason else piece.finish_reason
        answer.stop_reason = piece.stop_reason
        return self.choice(piece.index, text, logprobs, answer)

    def choice(self, index: int, text: str, logprobs: list[dict[str, Any]], answer: Text) -> dict[str, Any]:
        """A choice as clients read it."""
        joined = None
        if self.body.logprobs is not None:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            joined = {name: [value for part in logprobs for value in part[name]] for name in names}
        choice = {
            "index": index,
            "text": text,
            "logprobs": joined,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self.request(index).prompt_logprobs)
        return choice

    def request(self, index: int) -> Request:
        """The request that made an answer."""
        return self.generation.requests[index // self.generation.requests[0].params.n]

    def first_text(self, request: Request) -> str:
        """The text of a prompt's first token, which has no log-probability."""
        tokenizer = self.generation.service.tokenizer
        return tokenizer.decode([request.prompt[0]], skip_special_tokens=False)

    def usage(self) -> dict[str, Any]:
        """The tokens that were used; with ``max_tokens`` 0 the one that was made is not given."""
        if self.body.max_tokens == 0:
            self.generation.usage.completion = 0
        return self.generation.usage.body()

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        async with aclosing(self.generation.pieces()) as found:
            async for pieces in found:
                for piece in pieces:
                    self.told(piece)
        choices = [self.choice(i, each.text, each.logprobs, each) for i, each in sorted(self.choices.items())]
        return self.head | {"choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer in pieces."""
        options = self.body.stream_options
        usage, always = (options and options.include_usage), (options and options.continuous_usage_stats)
        async with aclosing(self.generation.pieces()) as found:
            async for pieces in found:
                chunk = self.head | {"choices": [self.told(piece) for piece in pieces]}
                if usage:
                    chunk["usage"] = self.usage() if always else None
                yield event(chunk)
                self.head.pop("warnings", None)  # once is enough
        if usage:
            yield event(self.head | {"choices": [], "usage": self.usage()})
        yield DONE


async def completions(call: Call, body: CompletionRequest) -> Any:
    """Answer a request."""
    completion = await asyncio.to_thread(prepare, call, body)
    return Stream(completion.events()) if body.stream else await completion.whole()


def prepare(call: Call, body: CompletionRequest) -> Completion:
    """Work out the requests to the engine."""
    service, options = call.service, call.service.options
    prompts = list_prompts(body.prompt, options.max_prompts)
    if body.stream and body.best_of is not None and body.best_of > (body.n or 1):
        raise ApiError(
            400, "best_of: the likeliest answers are known at the end only, not in a stream", param="best_of"
        )
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens: 0 needs echo", param="max_tokens", code="invalid_value")
    more = {"logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        if body.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs: echo with logprobs tells them", param="prompt_logprobs")
        more["prompt_logprobs"] = body.logprobs
    params = body.params(options, None if body.max_tokens is None else max(body.max_tokens, 1), **more)
    salt = f"{call.salt}{body.cache_salt or ''}"
    lora = service.adapters.get(body.model or "")
    requests = [
        Request(text_tokens(service, prompt, body.add_special_tokens), params, body.priority or 0, salt, lora=lora)
        for prompt in prompts
    ]
    echoes = (
        [prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt) for prompt in prompts]
        if body.echo
        else []
    )
    head: dict[str, Any] = {
        "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
        "model": body.model or service.name,
    }  # fmt: skip
    if call.warnings:
        head["warnings"] = call.warnings
    return Completion(body, Generation(call, requests, bool(body.stream)), echoes, head)
