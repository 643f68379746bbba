"""The body of /v1/messages, in Anthropic's form."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from labinfer.service.schema.base import Body, Part


class Block(Part):
    """A part of a message: text, a call, or the result of one."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[dict[str, Any]] | None = None


class Turn(Part):
    """A message of the conversation."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class ToolDefinition(Part):
    """What the model is told of a tool."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any]


class Choice(Part):
    """Whether and which tool is called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(Body):
    """A conversation whose tokens are counted."""

    ACCEPTED: ClassVar[frozenset[str]] = frozenset({"metadata", "service_tier", "thinking", "context_management"})

    messages: list[Turn] = Field(min_length=1, max_length=4096)
    system: str | list[Block] | None = None
    tools: list[ToolDefinition] | None = Field(default=None, max_length=256)
    tool_choice: Choice | None = None


class MessagesRequest(CountRequest):
    """A conversation to go on with."""

    REFUSED: ClassVar[dict[str, str]] = {
        "mcp_servers": "the service calls no servers",
        "container": "the service runs no code",
        "output_format": "use /v1/chat/completions",
    }

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    temperature: float | int | None = Field(default=None, ge=0, le=1)
    top_p: float | int | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    stream: bool | None = None
