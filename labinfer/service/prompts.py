"""What a model reads: messages and texts of a request as token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from labinfer.errors import UsageError
from labinfer.service.errors import ApiError
from labinfer.service.literal_text import encode_chat
from labinfer.service.schema.chat import ChatRequest, ContentPart, Message
from labinfer.service.service import Service
from labinfer.service.tools.choice import ToolUse
from labinfer.service.tools.formats import plain_messages, tool_schema

ROLES = {"developer": "system", "function": "tool"}
"""Roles that templates know under another name."""

RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "tokenize", "return_dict", "source", "self"})
"""Names that ``chat_template_kwargs`` cannot give: the service gives them, or they are of transformers' function."""


def message_text(content: str | Sequence[ContentPart] | None, place: str) -> str:
    """The text of a message."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "input_text", "output_text", "refusal") or text is None:
            where = f"{place}.content[{number}]"
            message = f"{where}: this model reads text only, not '{part.type[:40]}'"
            raise ApiError(400, message, param=where, code="unsupported_content")
        texts.append(text)
    return "\n".join(texts)


def template_message(message: Message, number: int) -> dict[str, Any]:
    """A message as chat templates read it."""
    found: dict[str, Any] = {"role": ROLES.get(message.role, message.role)}
    found["content"] = message_text(message.content, f"messages[{number}]")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": arguments_of(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def arguments_of(text: str) -> Any:
    """The arguments of an earlier call as an object, which templates write in their own way; else as the text it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def chat_tokens(service: Service, body: ChatRequest, use: ToolUse) -> list[int]:
    """Token ids of a conversation in which the tools of ``use`` can be called."""
    messages = [template_message(message, number) for number, message in enumerate(body.messages)]
    variables = body.chat_template_kwargs or {}
    if taken := RESERVED & variables.keys():
        raise ApiError(400, f"chat_template_kwargs cannot give '{min(taken)}'", param="chat_template_kwargs")
    if body.add_generation_prompt is not None:
        variables = {**variables, "add_generation_prompt": body.add_generation_prompt}
    if use.tools and not use.known:
        messages = plain_messages(messages, use.tools)
    elif use.tools:
        variables = {**variables, "tools": [tool_schema(tool) for tool in use.tools]}
    return encode_chat(service.tokenizer, messages, **variables)


def text_tokens(service: Service, prompt: str | list[int], add_special_tokens: bool | None) -> list[int]:
    """Token ids of a prompt."""
    if isinstance(prompt, str):
        return service.tokenizer.encode(prompt, add_special_tokens=add_special_tokens is not False)
    return prompt


def list_prompts(
    prompt: str | list[str] | list[int] | list[list[int]], most: int, field: str = "prompt"
) -> list[str | list[int]]:
    """The prompts of a request, which it gives as ``field``."""
    listed: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
    if not listed:
        raise UsageError("run.prompt", "there is no prompt")
    if len(listed) > most:
        message = f"{field}: at most {most} prompts are allowed in a request, got {len(listed)}"
        raise ApiError(400, message, param=field)
    return listed
