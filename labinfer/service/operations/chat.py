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
from labinfer.service.logprobs import chat_logprobs, prompt_logprobs
from labinfer.service.prompts import chat_tokens
from labinfer.service.schema.chat import ChatRequest
from labinfer.service.tools.choice import ToolUse, tool_use
from labinfer.service.tools.reader import Delta, MessageBuilder, Reader
from labinfer.service.wire import DONE, event


@dataclass(slots=True)
class ChatAnswer:
    """An answer as it grows; ``reader`` finds the calls in its text."""

    reader: Reader
    message: MessageBuilder = field(default_factory=MessageBuilder)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def take(self, piece: Piece) -> list[Delta]:
        """Add a piece; what it says."""
        deltas = self.reader.put(piece.text)
        if piece.finish_reason is not None:
            deltas += self.reader.finish()
            calls = self.reader.called and piece.finish_reason == "stop"
            self.finish_reason = "tool_calls" if calls else piece.finish_reason
            self.stop_reason = piece.stop_reason
        for each in deltas:
            self.message.add(each)
        return deltas


@dataclass(slots=True)
class Chat:
    """A call of the endpoint; ``top`` are the likeliest tokens wanted, None without log-probabilities."""

    body: ChatRequest
    generation: Generation
    head: dict[str, Any]
    top: int | None
    use: ToolUse
    answers: dict[int, ChatAnswer] = field(default_factory=dict)

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        async with aclosing(self.generation.pieces()) as found:
            async for pieces in found:
                for piece in pieces:
                    self.chunks(piece)
        choices = [self.choice(index, answer) for index, answer in sorted(self.answers.items())]
        more = {}
        if self.body.prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(self.generation.requests[0].prompt_logprobs)
        usage = self.generation.usage.body()
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage, **more}

    def choice(self, index: int, answer: ChatAnswer) -> dict[str, Any]:
        """An answer as clients read it."""
        return {
            "index": index,
            "message": answer.message.message(),
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
                told = []
                for chunk in [chunk for piece in pieces for chunk in self.chunks(piece)]:
                    told.append(event({**head, "choices": [chunk], **more}))
                    head.pop("warnings", None)  # once is enough
                yield b"".join(told)
        if usage:
            yield event(head | {"choices": [], "usage": self.generation.usage.body()})
        yield DONE

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The choices, each of a chunk of its own, that tell of a piece: who speaks, what is said, why it ended."""
        found = []
        if piece.index not in self.answers:
            self.answers[piece.index] = ChatAnswer(self.use.reader())
            found.append(delta(piece.index, {"role": "assistant", "content": ""}))
        answer = self.answers[piece.index]
        logprobs = [] if self.top is None else chat_logprobs(piece.token_ids, piece.logprobs or [], self.top)
        answer.logprobs += logprobs
        deltas = answer.take(piece)
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        for number, each in enumerate(deltas):
            found.append(delta(piece.index, each, logprobs if number == 0 else None))
        if piece.finish_reason is not None:
            end = {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
            found.append(delta(piece.index, {}) | end)
        return found


def delta(index: int, told: dict[str, Any], logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A choice of a chunk."""
    content = {"content": logprobs, "refusal": None} if logprobs else None
    return {"index": index, "delta": told, "logprobs": content, "finish_reason": None}


async def chat_completions(call: Call, body: ChatRequest) -> Any:
    """Answer a request."""
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
    use = tool_use(body, service.tokenizer.chat_template)
    more: dict[str, Any] = {} if use.structure is None else {"structured_outputs": use.structure}
    if use.tools and use.form.special:
        more["skip_special_tokens"] = False
    params = body.params(service.options, max_tokens, logprobs=top, **more)
    salt = f"{call.salt}{body.cache_salt or ''}"
    lora = service.adapters.get(body.model or "")
    request = Request(chat_tokens(service, body, use), params, body.priority or 0, salt, lora=lora)
    head: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model or service.name,
        "system_fingerprint": None,
    }  # fmt: skip
    if call.warnings:
        head["warnings"] = call.warnings
    return Chat(body, Generation(call, [request], bool(body.stream)), head, top, use)
