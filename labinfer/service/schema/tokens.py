"""The bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from labinfer.service.schema.base import Body
from labinfer.service.schema.chat import Message, Tool


class TokenizeRequest(Body):
    """A text, or a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=4096)
    tools: list[Tool] | None = Field(default=None, max_length=256)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=32)
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Token ids."""

    tokens: list[int] = Field(max_length=1 << 20)
