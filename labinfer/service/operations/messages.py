"""/v1/messages: conversations in Anthropic's form."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from labinfer.service.call import Call, Stream
from labinfer.service.errors import ANTHROPIC_PATH, ApiError
from labinfer.service.operations.chat import Chat, prepare
from labinfer.service.prompts import arguments_of, chat_tokens
from labinfer.service.schema.chat import ChatRequest
from labinfer.service.schema.messages import Block, CountRequest, MessagesRequest, Turn
from labinfer.service.tools.choice import tool_use
from labinfer.service.wire import event

Event = dict[str, Any]


@dataclass(slots=True)
class MessageWriter:
    """The answer as it grows: ``take`` gives the events of what is new."""

    chat: Chat
    message: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    open: bool = False

    def take(self, choice: dict[str, Any]) -> list[Event]:
        """What a choice of a chat's chunk says."""
        found: list[Event] = []
        if text := choice["delta"].get("content"):
            if not self.open or self.message["content"][-1]["type"] != "text":
                found += self.begin({"type": "text", "text": ""})
            found.append(self.more(text, {"type": "text_delta", "text": text}))
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                found += self.begin(
                    {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
                )
            if text := call["function"]["arguments"]:
                found.append(self.more(text, {"type": "input_json_delta", "partial_json": text}))
        if choice["finish_reason"] is not None:
            found += self.end()
            found += self.finish(choice["finish_reason"], choice["stop_reason"])
        return found

    def begin(self, block: dict[str, Any]) -> list[Event]:
        """A new block."""
        found = self.end()
        self.message["content"].append(block)
        self.open, self.texts = True, []
        return [*found, {"type": "content_block_start", "index": self.index, "content_block": dict(block)}]

    def more(self, text: str, delta: dict[str, Any]) -> Event:
        """More of the block."""
        self.texts.append(text)
        return {"type": "content_block_delta", "index": self.index, "delta": delta}

    @property
    def index(self) -> int:
        """The block that is being written."""
        return len(self.message["content"]) - 1

    def end(self) -> list[Event]:
        """The block is complete."""
        if not self.open:
            return []
        block, text, self.open = self.message["content"][-1], "".join(self.texts), False
        if block["type"] == "text":
            block["text"] = text
        else:
            arguments = arguments_of(text)
            block["input"] = arguments if isinstance(arguments, dict) else {}  # of a call that was cut off
        return [{"type": "content_block_stop", "index": self.index}]

    def finish(self, reason: str, stop: int | str | None) -> list[Event]:
        """The answer is complete."""
        reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
        text = stop if isinstance(stop, str) else None
        end = {"stop_reason": "stop_sequence" if text else reasons.get(reason, "end_turn"), "stop_sequence": text}
        usage = self.usage()
        self.message |= {**end, "usage": usage}
        return [{"type": "message_delta", "delta": end, "usage": usage}, {"type": "message_stop"}]

    def usage(self) -> dict[str, int]:
        """The tokens of prompt and answer."""
        usage = self.chat.generation.usage
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_read_input_tokens": usage.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion,
        }

    async def told(self) -> AsyncGenerator[list[Event], None]:
        """The events of the whole answer."""
        async with aclosing(self.chat.generation.pieces()) as found:
            async for pieces in found:
                yield [told for piece in pieces for choice in self.chat.chunks(piece) for told in self.take(choice)]

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer in events."""
        start: list[Event] = [
            {"type": "message_start", "message": {**self.message, "content": [], "usage": self.usage()}}
        ]
        async with aclosing(self.told()) as found:
            async for told in found:
                yield b"".join([event(each, each["type"]) for each in [*start, *told]])
                start = []


def failure(error: ApiError) -> bytes:
    """The event of a stream that fails on the way."""
    return event(error.body(ANTHROPIC_PATH), "error")


async def messages(call: Call, body: MessagesRequest) -> Any:
    """Answer a request."""
    more = {
        "max_tokens": body.max_tokens, "stop": body.stop_sequences or None, "temperature": body.temperature,
        "top_p": body.top_p, "top_k": body.top_k, "stream": body.stream,
    }  # fmt: skip
    chat = await asyncio.to_thread(prepare, call, chat_request(body, more))
    message: dict[str, Any] = {
        "id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": chat.head["model"],
        "content": [], "stop_reason": None, "stop_sequence": None,
    }  # fmt: skip
    if call.warnings:
        message["warnings"] = call.warnings
    writer = MessageWriter(chat, message)
    if body.stream:
        return Stream(writer.stream(), failure)
    async with aclosing(writer.told()) as found:
        async for _ in found:
            pass
    return writer.message


async def count_tokens(call: Call, body: CountRequest) -> Any:
    """How many tokens a conversation has."""
    chat = chat_request(body, {})
    use = tool_use(chat, call.service.tokenizer.chat_template)
    return {"input_tokens": len(await asyncio.to_thread(chat_tokens, call.service, chat, use))}


def chat_request(body: CountRequest, more: dict[str, Any]) -> ChatRequest:
    """The same as a chat."""
    system = body.system if isinstance(body.system, str) or body.system is None else text_of(body.system)
    turns = [{"role": "system", "content": system}] if system else []
    turns += [message for turn in body.messages for message in chat_messages(turn)]
    choice: Any = None
    if body.tool_choice is not None and body.tools:
        named = {"type": "function", "function": {"name": body.tool_choice.name or ""}}
        choice = {"auto": "auto", "any": "required", "none": "none", "tool": named}[body.tool_choice.type]
        more = more | {"parallel_tool_calls": not body.tool_choice.disable_parallel_tool_use}
    tools = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
        }
        for tool in body.tools or []
    ]
    return ChatRequest.model_validate(
        {"model": body.model, "messages": turns, "tools": tools or None, "tool_choice": choice, **more}
    )


def text_of(blocks: list[Block]) -> str:
    """The text of blocks; what is no text is refused."""
    for block in blocks:
        if block.type != "text":
            raise ApiError(400, f"this model reads text only, not '{block.type[:40]}'", code="unsupported_content")
    return "\n".join(block.text or "" for block in blocks)


def chat_messages(turn: Turn) -> Iterator[dict[str, Any]]:
    """A message of Anthropic's as messages of a chat: results of calls are messages of their own."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    texts, calls = [], []
    for block in turn.content:
        if block.type == "tool_use":
            function = {"name": block.name or "", "arguments": json.dumps(block.input or {})}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif block.type == "tool_result":
            content = block.content or ""
            text = content if isinstance(content, str) else text_of([Block.model_validate(each) for each in content])
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
        elif block.type not in ("thinking", "redacted_thinking"):
            texts.append(block)
    if texts or calls:
        yield {"role": turn.role, "content": text_of(texts)} | ({"tool_calls": calls} if calls else {})
