"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from labinfer.service.schema.base import Part
from labinfer.service.schema.sampling import SamplingBody

IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "verbosity", "reasoning_effort", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "moderation", "prediction",
    }
)  # fmt: skip
"""Fields of OpenAI's that are about its own service, or hints that an answer may follow or not."""


class ContentPart(Part):
    """A part of a message; texts are read."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Function(Part):
    """A function that the model calls, with its arguments as JSON text."""

    name: str = Field(max_length=256)
    arguments: str = ""


class ToolCall(Part):
    """A call that an earlier answer has made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Part):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionDefinition(Part):
    """What a model is told of a function."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    """A tool: a function."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Part):
    """The function that must be called."""

    name: str


class NamedTool(Part):
    """``tool_choice`` by name."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingBody):
    """A conversation to go on with."""

    REFUSED: ClassVar[dict[str, str]] = SamplingBody.REFUSED | {
        "functions": "use 'tools'",
        "function_call": "use 'tool_choice'",
        "audio": "the models read and write text",
        "web_search_options": "the service does not search",
        "chat_template": "the model's own is used",
        "documents": "put them into a message",
        "echo": "use /v1/completions",
        "continue_final_message": "use /v1/completions",
    }
    ACCEPTED: ClassVar[frozenset[str]] = IGNORED

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=32)
