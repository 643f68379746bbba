"""The body of /v1/responses."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from labinfer.service.schema.base import Body, Part
from labinfer.service.schema.chat import IGNORED, ContentPart


class Item(Part):
    """A part of a conversation: a message, a call or its result; others, such as reasoning, are left out."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class TextFormat(Part):
    """The form of the answer."""

    type: str
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Part):
    """How the text is written."""

    format: TextFormat | None = None


class ResponsesRequest(Body):
    """A conversation to go on with; nothing of it is kept by the server."""

    REFUSED: ClassVar[dict[str, str]] = {
        "previous_response_id": "the server keeps no conversations: send all of it",
        "conversation": "the server keeps no conversations: send all of it",
        "background": "an answer is given at once",
        "prompt": "the server keeps no prompts",
        "top_logprobs": "use /v1/chat/completions",
    }
    ACCEPTED: ClassVar[frozenset[str]] = IGNORED | {"include", "reasoning", "truncation", "client_metadata"}

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | int | None = Field(default=None, ge=0, le=100)
    top_p: float | int | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=256)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
