"""/v1/responses: OpenAI's newer form of a conversation, without a memory: each request brings all of it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from labinfer.service.call import Call, Stream
from labinfer.service.errors import ApiError
from labinfer.service.operations.chat import Chat, prepare
from labinfer.service.schema.chat import ChatRequest
from labinfer.service.schema.responses import Item, ResponsesRequest
from labinfer.service.wire import event

Event = tuple[str, dict[str, Any]]


@dataclass(slots=True)
class ResponseWriter:
    """The answer as it grows: ``take`` gives the events of what is new; ``response`` is what there is so far."""

    chat: Chat
    response: dict[str, Any]
    number: int = 0
    texts: list[str] = field(default_factory=list)

    def events(self, *told: Event) -> bytes:
        """Events with their numbers."""
        parts = []
        for name, payload in told:
            parts.append(event({"type": name, "sequence_number": self.number, **payload}, name))
            self.number += 1
        return b"".join(parts)

    def begin(self) -> bytes:
        """The first events."""
        start = {**self.response, "output": [], "status": "in_progress"}
        return self.events(("response.created", {"response": start}), ("response.in_progress", {"response": start}))

    def take(self, choice: dict[str, Any]) -> list[Event]:
        """What a choice of a chat's chunk says."""
        found: list[Event] = []
        if text := choice["delta"].get("content"):
            found += self.open_message()
            self.texts.append(text)
            found.append(
                ("response.output_text.delta", {**self.place(), "content_index": 0, "delta": text, "logprobs": []})
            )
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                found += self.close()
                found += self.open(function_call(call))
            if more := call["function"]["arguments"]:
                self.texts.append(more)
                found.append(("response.function_call_arguments.delta", {**self.place(), "delta": more}))
        if choice["finish_reason"] is not None:
            found += self.close()
            self.finish(choice["finish_reason"])
            kind = "incomplete" if choice["finish_reason"] == "length" else "completed"
            found.append((f"response.{kind}", {"response": self.response}))
        return found

    def place(self) -> dict[str, Any]:
        """Which item an event is about."""
        output = self.response["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}

    def open(self, item: dict[str, Any]) -> list[Event]:
        """A new item."""
        self.response["output"].append(item)
        self.texts = []
        return [("response.output_item.added", {"output_index": len(self.response["output"]) - 1, "item": dict(item)})]

    def open_message(self) -> list[Event]:
        """A message, unless one is being written."""
        output = self.response["output"]
        if output and output[-1]["type"] == "message" and output[-1]["status"] == "in_progress":
            return []
        item = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        opened = [*self.close(), *self.open(item)]
        return [*opened, ("response.content_part.added", {**self.place(), "content_index": 0, "part": part("")})]

    def close(self) -> list[Event]:
        """The item that was written is complete."""
        output = self.response["output"]
        if not output or output[-1]["status"] != "in_progress":
            return []
        item, text = output[-1], "".join(self.texts)
        item["status"] = "completed"
        if item["type"] == "message":
            item["content"] = [part(text)]
            done = {**self.place(), "content_index": 0}
            told: list[Event] = [
                ("response.output_text.done", {**done, "text": text, "logprobs": []}),
                ("response.content_part.done", {**done, "part": part(text)}),
            ]
        else:
            item["arguments"] = text
            told = [
                ("response.function_call_arguments.done", {**self.place(), "name": item["name"], "arguments": text})
            ]
        return [*told, ("response.output_item.done", {"output_index": len(output) - 1, "item": item})]

    def finish(self, reason: str) -> None:
        """The answer is complete."""
        usage = self.chat.generation.usage
        cut = reason == "length"
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.completion,
            },
        }

    async def told(self) -> AsyncGenerator[list[Event], None]:
        """The events of the whole answer."""
        async with aclosing(self.chat.generation.pieces()) as found:
            async for pieces in found:
                yield [told for piece in pieces for choice in self.chat.chunks(piece) for told in self.take(choice)]

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer in events."""
        begun = False
        async with aclosing(self.told()) as found:
            async for told in found:
                yield (b"" if begun else self.begin()) + self.events(*told)
                begun = True

    def failure(self, error: ApiError) -> bytes:
        """The event of a stream that fails on the way."""
        self.response |= {"status": "failed", "error": {"code": error.code or "server_error", "message": error.message}}
        return self.events(("response.failed", {"response": self.response}))


def part(text: str) -> dict[str, Any]:
    """The text of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def function_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call, as an item that begins."""
    return {
        "id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress", "call_id": call["id"],
        "name": call["function"]["name"], "arguments": "",
    }  # fmt: skip


async def responses(call: Call, body: ResponsesRequest) -> Any:
    """Answer a request."""
    chat = await asyncio.to_thread(prepare, call, chat_request(call, body))
    response = {
        "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": float(int(time.time())),
        "status": "in_progress", "error": None, "incomplete_details": None, "model": chat.head["model"], "output": [],
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "metadata": {},
        "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None, "store": False,
        "temperature": body.temperature, "top_p": body.top_p, "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [], "text": {"format": {"type": "text"}}, "usage": None,
    }  # fmt: skip
    if call.warnings:
        response["warnings"] = call.warnings
    writer = ResponseWriter(chat, response)
    if body.stream:
        return Stream(writer.stream(), writer.failure)
    async with aclosing(writer.told()) as found:
        async for _ in found:
            pass
    return writer.response


def chat_request(call: Call, body: ResponsesRequest) -> ChatRequest:
    """The same as a chat."""
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages += list(chat_messages(items))
    tools = []
    for tool in body.tools or []:
        if tool.get("type") == "function":
            names = ("name", "description", "parameters", "strict")
            tools.append({"type": "function", "function": {name: tool[name] for name in names if name in tool}})
        else:
            call.warnings.append(f"a tool of type '{str(tool.get('type'))[:40]}' was left out")
    choice = body.tool_choice
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name", "")}}
    chat: dict[str, Any] = {
        "model": body.model, "messages": messages, "tools": tools or None, "stream": body.stream,
        "tool_choice": choice if tools else None, "parallel_tool_calls": body.parallel_tool_calls,
        "max_completion_tokens": body.max_output_tokens, "temperature": body.temperature, "top_p": body.top_p,
    }  # fmt: skip
    if body.text is not None and (form := body.text.format) is not None and form.type != "text":
        chat["response_format"] = {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_}}
    return ChatRequest.model_validate(chat)


def chat_messages(items: list[Item]) -> Iterator[dict[str, Any]]:
    """Messages of a chat; calls that follow each other are one message."""
    calls: list[dict[str, Any]] = []
    for item in items:
        if item.type == "function_call":
            function = {"name": item.name or "", "arguments": item.arguments or ""}
            calls.append({"id": item.call_id, "type": "function", "function": function})
            continue
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}
            calls = []
        if item.type == "function_call_output":
            yield {"role": "tool", "tool_call_id": item.call_id, "content": content_of(item.output)}
        elif item.role is not None:
            yield {"role": item.role, "content": content_of(item.content)}
    if calls:
        yield {"role": "assistant", "content": None, "tool_calls": calls}


def content_of(content: Any) -> Any:
    """A content as plain data."""
    return [each.model_dump(exclude_none=True) for each in content] if isinstance(content, list) else content
