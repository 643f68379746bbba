"""/v1/chat/completions: go on with a conversation."""

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
from labinfer.service.logprobs import chat_logprobs
from labinfer.service.prompts import chat_tokens
from labinfer.service.schema.chat import ChatRequest
from labinfer.service.wire import DONE, event


@dataclass(slots=True)
class ChatAnswer:
    """An answer as it grows."""

    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def take(self, piece: Piece, top: int | None) -> list[dict[str, Any]] | None:
        """Add a piece; its log-probabilities with the ``top`` likeliest tokens, None where they are not wanted."""
        self.text += piece.text
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason
        if top is None:
            return None
        found: list[dict[str, Any]] = chat_logprobs(piece.token_ids, piece.logprobs, top)
        self.logprobs += found
        return found


@dataclass(slots=True)
class Chat:
    """A call of the endpoint; ``top`` are the likeliest tokens wanted, None without log-probabilities."""

    body: ChatRequest
    generation: Generation
    head: dict[str, Any]
    top: int | None
    answers: dict[int, ChatAnswer] = field(default_factory=dict)

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        async with aclosing(self.generation.pieces()) as found:
            async for pieces in found:
                for piece in pieces:
                    self.answers.setdefault(piece.index, ChatAnswer()).take(piece, self.top)
        choices = [self.choice(index, answer) for index, answer in sorted(self.answers.items())]
        return self.head | {"object": "chat.completion", "choices": choices, "usage": self.generation.usage.body()}

    def choice(self, index: int, answer: ChatAnswer) -> dict[str, Any]:
        """An answer as clients read it."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None if self.top is None else {"content": answer.logprobs, "refusal": None},
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer in pieces."""
        options = self.body.stream_options
        usage, always = (options and options.include_usage), (options and options.continuous_usage_stats)
        head = self.head | {"object": "chat.completion.chunk"}
        async with aclosing(self.generation.pieces()) as found:
            async for pieces in found:
                more = {"usage": self.generation.usage.body() if always else None} if usage else {}
                chunks = [chunk for piece in pieces for chunk in self.chunks(piece)]
                yield b"".join([event({**head, "choices": [chunk], **more}) for chunk in chunks])
        if usage:
            yield event(head | {"choices": [], "usage": self.generation.usage.body()})
        yield DONE

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The choices, each of a chunk of its own, that tell of a piece: who speaks, what is said, why it ended."""
        answer, found = self.answers.get(piece.index), []
        if answer is None:
            answer = self.answers[piece.index] = ChatAnswer()
            found.append(delta(piece.index, {"role": "assistant", "content": ""}))
        logprobs = answer.take(piece, self.top)
        if piece.text or logprobs:
            found.append(delta(piece.index, {"content": piece.text}, logprobs))
        if piece.finish_reason is not None:
            found.append(
                delta(piece.index, {}) | {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
            )
        return found


def delta(index: int, told: dict[str, Any], logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A choice of a chunk."""
    content = {"content": logprobs, "refusal": None} if logprobs else None
    return {"index": index, "delta": told, "logprobs": content, "finish_reason": None}


async def chat_completions(call: Call, body: ChatRequest) -> Any:
    """Answer a request."""
    call.service.check_model(body.model)
    chat = await asyncio.to_thread(prepare, call, body)
    return Stream(chat.events()) if body.stream else await chat.whole()


def prepare(call: Call, body: ChatRequest) -> Chat:
    """Work out the request to the engine."""
    service = call.service
    if body.best_of is not None:
        raise ApiError(400, "best_of: chats have no best_of", param="best_of")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = body.params(service.options, max_tokens, logprobs=top)
    salt = f"{call.salt}{body.cache_salt or ''}"
    request = Request(chat_tokens(service, body), params, body.priority or 0, salt)
    head: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name,
        "system_fingerprint": None,
    }  # fmt: skip
    if call.warnings:
        head["warnings"] = call.warnings
    return Chat(body, Generation(service, [request]), head, top)
