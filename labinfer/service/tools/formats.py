"""The forms in which models write calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from labinfer.service.schema.chat import Tool


class ToolCall(NamedTuple):
    """A call: the function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolFormat(NamedTuple):
    """A form of calls: the mark before them, the one behind (None: the end of the text), and what reads between.

    ``parse`` gives None for what is no call. ``special``: the mark is a special token, which texts leave out otherwise.
    ``whole``: a text that begins with ``{`` is a call too.
    """

    begin: str
    end: str | None
    parse: Callable[[str], list[ToolCall] | None]
    special: bool = False
    whole: bool = False


def call_of(value: Any) -> ToolCall | None:
    """``{"name": ..., "arguments" or "parameters": {...}}`` as a call."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], text)


def parse_json(text: str) -> list[ToolCall] | None:
    """One call or a list of calls."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = [call_of(each) for each in (value if isinstance(value, list) else [value])]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


_FUNCTION = re.compile(r"\s*<function=(?P<name>[^>\n]+)>(?P<body>.*?)(?:</function>\s*)?", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=(?P<name>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL)


def parse_tagged(text: str) -> list[ToolCall] | None:
    """Qwen3-Coder's tags, ``<function=NAME><parameter=NAME>VALUE</parameter></function>``, or JSON."""
    function = _FUNCTION.fullmatch(text)
    if function is None:
        return parse_json(text)
    arguments = {found["name"]: parameter_value(found["value"]) for found in _PARAMETER.finditer(function["body"])}
    return [ToolCall(function["name"], json.dumps(arguments, ensure_ascii=False))]


def parameter_value(text: str) -> Any:
    """A value that stands between tags: JSON where it is that, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse_mistral(text: str) -> list[ToolCall] | None:
    """Mistral's list of calls, or ``NAME[ARGS]{...}`` of its newer models."""
    name, mark, arguments = text.partition("[ARGS]")
    if not mark:
        return parse_json(text)
    value = parameter_value(arguments)
    return [ToolCall(name.strip(), json.dumps(value, ensure_ascii=False))] if isinstance(value, dict) else None


HERMES = ToolFormat("<tool_call>", "</tool_call>", parse_tagged)
MISTRAL = ToolFormat("[TOOL_CALLS]", None, parse_mistral, special=True)
LLAMA = ToolFormat("<|python_tag|>", None, parse_json, special=True, whole=True)


def detect_format(template: str | None) -> ToolFormat | None:
    """The form that a chat template knows, by the marks in it; None for one that knows nothing of tools."""
    if template is None or "tools" not in template:
        return None
    for known in (HERMES, MISTRAL):
        if known.begin in template:
            return known
    return LLAMA


def described(tools: Sequence[Tool]) -> str:
    """What a model is told of tools where its template says nothing of them."""
    listed = "\n".join(json.dumps(tool_schema(tool), ensure_ascii=False) for tool in tools)
    return (
        "You can call these functions:\n"
        f"<tools>\n{listed}\n</tools>\n"
        'To call one, write <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.'
    )


def tool_schema(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates read it."""
    return tool.model_dump(exclude_none=True)


def plain_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Messages for a template that knows nothing of tools: calls and results as text, tools in the system message."""
    found = [plain_message(message) for message in messages]
    text = described(tools)
    if found[0]["role"] == "system":
        return [{**found[0], "content": f"{found[0]['content']}\n\n{text}"}, *found[1:]]
    return [{"role": "system", "content": text}, *found]


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without calls or results, which stand in its text."""
    found = {"role": message["role"], "content": message["content"]}
    for call in message.get("tool_calls", ()):
        function = {name: call["function"][name] for name in ("name", "arguments")}
        found["content"] += f"<tool_call>{json.dumps(function, ensure_ascii=False)}</tool_call>"
    if message["role"] == "tool":
        found = {"role": "user", "content": f"<tool_response>{message['content']}</tool_response>"}
    return found
