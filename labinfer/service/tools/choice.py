"""``tool_choice``: whether calls are read from a text, or are all that can be written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from labinfer.runtime.sampling import StructuredOutputs
from labinfer.service.errors import ApiError
from labinfer.service.schema.chat import ChatRequest, NamedTool, Tool
from labinfer.service.tools.formats import HERMES, ToolFormat, detect_format
from labinfer.service.tools.reader import CallReader, ListReader, NamedReader, PlainReader, Reader


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request's tools mean: those the model is told of, how it writes calls, and what reads them.

    ``known``: the chat template knows tools. ``structure`` is the form that the answer must have.
    """

    tools: Sequence[Tool] = ()
    form: ToolFormat = HERMES
    known: bool = True
    structure: StructuredOutputs | None = None
    reader: Callable[[], Reader] = PlainReader


def tool_use(body: ChatRequest, template: str | None) -> ToolUse:
    """What ``body`` asks for, for a model with this chat template."""
    tools, choice = body.tools or [], body.tool_choice
    if not tools:
        if choice is not None and choice not in ("none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return ToolUse()
    if choice == "none":
        return ToolUse()
    form = detect_format(template)
    use = ToolUse(tools, form or HERMES, known=form is not None)
    if choice is None or choice == "auto":
        return replace(use, reader=lambda: CallReader(use.form))
    if body.structure() is not None:
        raise ApiError(400, "a tool that must be called leaves no room for response_format", param="tool_choice")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        tool = next((each for each in tools if each.function.name == name), None)
        if tool is None:
            raise ApiError(400, f"tool_choice: there is no tool '{name[:64]}'", param="tool_choice")
        return replace(use, structure=json_structure(parameters(tool)), reader=lambda: NamedReader(name))
    schema = calls_schema(tools, body.parallel_tool_calls is not False)
    return replace(use, structure=json_structure(schema), reader=ListReader)


def parameters(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments."""
    return tool.function.parameters or {"type": "object"}


def json_structure(schema: dict[str, Any]) -> StructuredOutputs:
    """JSON of ``schema``, whose own references work."""
    return StructuredOutputs(json=json.dumps(schema))


def calls_schema(tools: Sequence[Tool], several: bool) -> dict[str, Any]:
    """The JSON schema of a list of calls; definitions, which references name from the root, move there."""
    definitions: dict[str, dict[str, Any]] = {}
    calls = []
    for tool in tools:
        schema = dict(parameters(tool))
        for kind in ("$defs", "definitions"):
            for name, value in schema.pop(kind, {}).items():
                if definitions.setdefault(kind, {}).setdefault(name, value) != value:
                    raise ApiError(400, f"tools: two of them define '{name[:64]}' differently", param="tools")
        properties = {"name": {"const": tool.function.name}, "arguments": schema}
        calls.append(
            {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        )
    most = {} if several else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, **definitions}
