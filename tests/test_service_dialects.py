"""The same conversation through /v1/responses and /v1/messages, by the official clients."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from .service import KEY, Served, api_fixture

TOOL = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}

RESULT = {"type": "tool_result", "content": [{}]}


api = api_fixture("byte_model", max_model_len=2048, max_num_batched_tokens=256)


def named_events(api: Served, path: str, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    answer = api.http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append((value["type"], value))
    return found


def chat_text(api: Served, messages: list[dict[str, Any]], **body: Any) -> str:
    answer = api.http.post("/v1/chat/completions", json={"messages": messages, **body}).json()
    text: str = answer["choices"][0]["message"]["content"]
    return text


def test_a_response_is_what_the_chat_says(api: Served, client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = chat_text(api, messages, temperature=0, max_tokens=8)
    found = client.responses.create(
        model="tiny", input="Hi", instructions="Be brief.", temperature=0, max_output_tokens=8
    )
    assert found.output_text == expected
    assert found.usage is not None
    assert found.usage.output_tokens == 8
    assert found.status == "incomplete"
    with client.responses.stream(
        model="tiny", input=[{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        instructions="Be brief.", temperature=0, max_output_tokens=8,
    ) as stream:  # fmt: skip
        text = "".join(each.delta for each in stream if each.type == "response.output_text.delta")
    assert text == expected


def test_the_events_of_a_response_come_in_openais_order(api: Served) -> None:
    events = named_events(api, "/v1/responses", input="Hi", temperature=0, max_output_tokens=4)
    assert [value["sequence_number"] for _, value in events] == list(range(len(events)))
    names = list(dict.fromkeys(name for name, _ in events))
    assert names == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    final = events[-1][1]["response"]
    assert final["output"][0]["content"][0]["text"] == "".join(
        value["delta"] for name, value in events if name == "response.output_text.delta"
    )


def test_a_forced_call_reaches_both_forms(api: Served, client: openai.OpenAI) -> None:
    tool = {"type": "function", "name": "weather", "parameters": TOOL, "strict": True}
    answer = client.responses.create(
        model="tiny", input="Rome?", tools=[tool], temperature=0, max_output_tokens=400,  # type: ignore[list-item]
        tool_choice={"type": "function", "name": "weather"},
    )  # fmt: skip
    [call] = answer.output
    assert call.type == "function_call"
    assert call.name == "weather"
    found = api.http.post(
        "/v1/messages",
        json={
            "max_tokens": 400, "messages": [{"role": "user", "content": "Rome?"}], "temperature": 0,
            "tools": [{"name": "weather", "input_schema": TOOL}], "tool_choice": {"type": "tool", "name": "weather"},
        },
    ).json()  # fmt: skip
    [block] = found["content"]
    assert (block["type"], block["name"]) == ("tool_use", "weather")
    if answer.status == "completed":
        assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
        assert block["input"] == json.loads(call.arguments)
        assert found["stop_reason"] == "tool_use"


def test_calls_and_results_of_a_response_are_messages_of_a_chat(api: Served) -> None:
    items = [
        {"role": "user", "content": "Rome?"},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "warm"},
    ]
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "warm"},
    ]
    function = {"name": "weather", "parameters": TOOL}
    tools = [{"type": "function", **function}, {"type": "web_search"}]
    expected = chat_text(api, messages, temperature=0, max_tokens=8, tools=[{"type": "function", "function": function}])
    body = {
        "input": items,
        "tools": tools,
        "temperature": 0,
        "max_output_tokens": 8,
        "store": False,
        "client_metadata": {},
    }
    found = api.http.post("/v1/responses", json=body).json()
    assert found["output"][0]["content"][0]["text"] == expected
    assert found["warnings"] == ["a tool of type 'web_search' was left out"]


def test_a_message_is_what_the_chat_says(api: Served) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = chat_text(api, messages, temperature=0, max_tokens=8)
    body = {"model": "tiny", "max_tokens": 8, "system": "Be brief.", "messages": messages[1:], "temperature": 0}
    headers = {"x-api-key": KEY, "authorization": ""}
    found = api.http.post("/v1/messages", json=body | {"metadata": {"user_id": "u"}}, headers=headers).json()
    assert found["warnings"] == ["'metadata' has no effect here"]
    assert found["content"] == [{"type": "text", "text": expected}]
    assert found["stop_reason"] == "max_tokens"
    assert found["usage"]["output_tokens"] == 8
    events = named_events(api, "/v1/messages", **body)
    names = list(dict.fromkeys(name for name, _ in events))
    assert names == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    deltas = [value["delta"]["text"] for name, value in events if name == "content_block_delta"]
    assert "".join(deltas) == expected
    counted = api.http.post("/v1/messages/count_tokens", json={"system": "Be brief.", "messages": messages[1:]}).json()
    usage = found["usage"]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_a_stop_sequence_is_told(api: Served) -> None:
    body: dict[str, Any] = {"max_tokens": 20, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    text = api.http.post("/v1/messages", json=body).json()["content"][0]["text"]
    found = api.http.post("/v1/messages", json={**body, "stop_sequences": [text[5]]}).json()
    assert found["stop_reason"] == "stop_sequence"
    assert found["stop_sequence"] == text[5]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "Hi", "previous_response_id": "resp_1"}),
        ("/v1/responses", {"input": []}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("/v1/responses", {"input": "Hi", "text": {"format": {"type": "xml"}}}),
        ("/v1/responses", {"input": "Hi", "tools": [{"type": "function"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "a"}], "temperature": 2}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [RESULT]}]}),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(api: Served, path: str, body: dict[str, Any]) -> None:
    answer = api.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json().get("type") == ("error" if path == "/v1/messages" else None)
