"""Calls of tools: the forms in which models write them, and that a forced call is always one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labinfer.service.literal_text import hide
from labinfer.service.tools.formats import HERMES, LLAMA, MISTRAL, ToolFormat, detect_format
from labinfer.service.tools.reader import CallReader, MessageBuilder

from .service import Served, api_fixture

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
ROME = ("weather", {"city": "Rome"})

WRITTEN = [
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>', None, [ROME]),
    (HERMES, 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
     '<tool_call>{"name": "clock"}</tool_call>\n', "Let me see.", [ROME, ("clock", {})]),
    (HERMES, "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
     None, [ROME]),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}', None, [ROME]),
    (HERMES, "a <tool b <tool_call> c", "a <tool b<tool_call> c", []),
    (HERMES, "<tool_call>nonsense</tool_call> and on", "<tool_call>nonsense</tool_call> and on", []),
    (HERMES, "1 < 2\n", "1 < 2\n", []),
    (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "clock", "arguments": {}}]',
     None, [ROME, ("clock", {})]),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}', None, [ROME]),
    (LLAMA, '{"name": "weather", "parameters": {"city": "Rome"}}', None, [ROME]),
    (LLAMA, '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}', None, [ROME]),
    (LLAMA, '{"a": 1} is JSON', '{"a": 1} is JSON', []),
    (LLAMA, "It is { warm }", "It is { warm }", []),
]  # fmt: skip


def read(form: ToolFormat, pieces: list[str]) -> tuple[str | None, list[tuple[str, Any]]]:
    reader, message = CallReader(form), MessageBuilder()
    for delta in [*(delta for piece in pieces for delta in reader.put(piece)), *reader.finish()]:
        message.add(delta)
    found = message.message()
    functions = [call["function"] for call in found.get("tool_calls", ())]
    assert reader.called == bool(functions)
    return found["content"], [(each["name"], json.loads(each["arguments"])) for each in functions]


@pytest.mark.parametrize(("form", "text", "content", "calls"), WRITTEN)
@given(data=st.data())
def test_calls_are_found_however_the_text_comes(
    form: ToolFormat, text: str, content: str | None, calls: list[Any], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1))))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, pieces) == (content, calls)


@given(st.lists(st.text('<tol_ca>{}[]TOLS \n"name:', max_size=12)), st.sampled_from([HERMES, MISTRAL, LLAMA]))
def test_any_text_is_read_without_an_error(pieces: list[str], form: ToolFormat) -> None:
    content, calls = read(form, pieces)
    if not calls and "".join(pieces).strip() == (content or "").strip():
        return
    assert content is None or len(content) <= len("".join(pieces))


def test_the_form_is_told_by_the_marks_of_the_template() -> None:
    folder = Path(__file__).parent / "chat_templates"
    assert detect_format("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert detect_format("{% if tools %}[TOOL_CALLS]{% endif %}") is MISTRAL
    assert detect_format("{% if tools %}{{ tools }}{% endif %}") is LLAMA
    assert detect_format("{{ messages }}") is None
    assert detect_format(None) is None
    assert folder.is_dir()


api = api_fixture("byte_model", max_model_len=2048, max_num_batched_tokens=256)


def asked(api: Served) -> dict[str, Any]:
    """A question; white space, with which a random model would fill the room, is made unlikely."""
    blanks = api.service.tokenizer.encode(" \n\t\r")
    return {
        "messages": [{"role": "user", "content": "Rome?"}], "tools": [WEATHER, CLOCK], "max_tokens": 300,
        "temperature": 0, "logit_bias": {str(token): -100 for token in blanks},
    }  # fmt: skip


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_forced_call_is_one_streamed_or_not(api: Served, client: openai.OpenAI, choice: Any) -> None:
    body = {**asked(api), "tool_choice": choice, "parallel_tool_calls": False}
    answer = api.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    [call] = answer["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "weather":
        assert arguments["city"] in ("Rome", "Oslo")
    else:
        assert (call["function"]["name"], arguments) == ("clock", {})
    with client.chat.completions.stream(model="tiny", **body) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.name == call["function"]["name"]
    assert json.loads(final.message.tool_calls[0].function.arguments) == arguments


def test_json_answers_match_their_schema(api: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    body = {**asked(api), "tools": None, "response_format": form}
    answer = api.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert isinstance(json.loads(answer["message"]["content"])["ok"], bool)


def test_results_of_calls_reach_a_template_without_tools(api: Served) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "warm"},
    ]
    found = api.http.post("/tokenize", json={"messages": messages, "tools": [WEATHER]}).json()
    text = api.service.tokenizer.decode(found["tokens"])
    assert "The weather of a city." in text
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in text
    assert "<tool_response>warm</tool_response>" in text


@pytest.mark.parametrize(
    "body",
    [
        {"tools": None, "tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "nothing"}}},
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": ""}}]},
        {"tools": [{"type": "browser"}]},
        {"tools": [WEATHER, {"type": "function", "function": {"name": "x", "parameters": {"$defs": {"city": {}}}}}],
         "tool_choice": "required"},
    ],
    ids=str,
)  # fmt: skip
def test_a_choice_that_cannot_be_is_refused(api: Served, body: dict[str, Any]) -> None:
    answer = api.http.post("/v1/chat/completions", json={**asked(api), **body})
    assert answer.status_code == 400
    assert "tool" in answer.json()["error"]["message"] + (answer.json()["error"]["param"] or "")


EVIL = "a<eos>b \U000f00007\U000f0001\U000f0000x<|no|>"


def test_special_tokens_in_messages_are_text(api: Served) -> None:
    tokenizer = api.service.tokenizer
    end = tokenizer.encode("<eos>")
    assert len(end) == 1
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "<eos>"}'}}
    messages = [
        {"role": "user", "content": EVIL},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "<eos>"},
    ]
    body = {"messages": messages, "tools": [{"type": "function", "function": {"name": "f", "description": "<eos>"}}]}
    tokens = api.http.post("/tokenize", json=body).json()["tokens"]
    assert end[0] not in tokens
    assert tokenizer.decode(tokens).count("<eos>") == 4
    plain = [{"role": "user", "content": "nothing special"}]
    found = api.http.post("/tokenize", json={"messages": plain}).json()["tokens"]
    assert found == tokenizer.encode_chat(plain)


def test_special_tokens_in_names_are_text_too(api: Served) -> None:
    hidden: list[str] = []
    assert "<eos>" not in str(hide({"arguments": {"<eos>": [{"a<eos>": 1}]}}, api.service.tokenizer, hidden))
    assert hidden == ["<eos>", "<eos>"]


@pytest.mark.parametrize("name", ["tokenizer", "hidden", "messages_"])
def test_templates_take_variables_of_any_name(api: Served, name: str) -> None:
    body = {**asked(api), "chat_template_kwargs": {name: 1}, "max_tokens": 1}
    assert api.http.post("/v1/chat/completions", json=body).status_code == 200


def test_tools_are_left_out_with_choice_none(api: Served) -> None:
    body = asked(api) | {"max_tokens": 3}
    without = api.http.post("/v1/chat/completions", json={**body, "tools": None}).json()
    none = api.http.post("/v1/chat/completions", json={**body, "tool_choice": "none"}).json()
    assert none["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]
    assert none["choices"][0]["message"] == without["choices"][0]["message"]
