"""The service as OpenAI's clients see it."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest

from labinfer import SamplingParams
from labinfer.service.app import OPERATIONS

from .service import Served, api_fixture

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "w5 w6"}], **GREEDY}


api = api_fixture("tiny_model")


def post(api: Served, path: str, **body: Any) -> Any:
    answer = api.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(api: Served, path: str, **body: Any) -> list[Any]:
    answer = api.http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def error(api: Served, path: str, status: int, **body: Any) -> dict[str, Any]:
    answer = api.http.post(path, json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert found.keys() >= {"message", "type", "param", "code"}
    return found


def test_models_tells_how_long_a_sequence_may_be(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 128
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_chat_gives_the_tokens_of_the_engine(api: Served) -> None:
    found = post(api, "/v1/chat/completions", **CHAT)
    tokenizer = api.service.tokenizer
    prompt = tokenizer.encode_chat(CHAT["messages"])  # type: ignore[arg-type]
    expected = api.model.generate(prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0]
    [choice] = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        len(prompt),
        6,
        len(prompt) + 6,
    )


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_has_openais_order_and_the_text_of_the_whole(api: Served, n: int) -> None:
    body = {**CHAT, "n": n, "seed": 7, "temperature": 1.0}
    whole = post(api, "/v1/chat/completions", **body)
    chunks = events(api, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 6 * n
    for index in range(n):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["delta"] == {}
        assert own[-1]["finish_reason"] == "length"
        assert {choice["finish_reason"] for choice in own[:-1]} == {None}
        text = "".join(choice["delta"]["content"] for choice in own[:-1])
        assert text == whole["choices"][index]["message"]["content"]


def test_usage_can_be_told_all_the_time(api: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(api, "/v1/chat/completions", **CHAT, stream_options=options)
    told = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert told == sorted(told)
    assert told[-1] == 6


def test_cached_tokens_of_a_prompt_are_counted(api: Served) -> None:
    prompt = list(range(5, 45))
    post(api, "/v1/completions", prompt=prompt, **GREEDY)
    again = post(api, "/v1/completions", prompt=prompt, **GREEDY)
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
    apart = post(api, "/v1/completions", prompt=prompt, cache_salt="mine", **GREEDY)
    assert apart["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "w5"}], max_completion_tokens=4, stream=True, temperature=0
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    whole = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "w5"}], max_completion_tokens=4, temperature=0
    )
    assert text == whole.choices[0].message.content
    assert whole._request_id is not None


def test_completions_take_texts_and_token_ids(api: Served) -> None:
    texts = post(api, "/v1/completions", prompt=["w5 w6", "w7"], n=2, **GREEDY)
    ids = post(api, "/v1/completions", prompt=[[5, 6], [7]], n=2, **GREEDY)
    assert [choice["index"] for choice in texts["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in texts["choices"]] == [choice["text"] for choice in ids["choices"]]
    assert texts["usage"]["prompt_tokens"] == 3
    one = post(api, "/v1/completions", prompt=[7], **GREEDY)
    assert one["choices"][0]["text"] == texts["choices"][2]["text"]
    chunks = events(api, "/v1/completions", prompt=["w5 w6", "w7"], **GREEDY)
    pieces = [choice for chunk in chunks for choice in chunk["choices"]]
    for index, expected in ((0, texts["choices"][0]), (1, texts["choices"][2])):
        assert "".join(piece["text"] for piece in pieces if piece["index"] == index) == expected["text"]


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_scores_the_prompt_as_the_model_does(api: Served, max_tokens: int) -> None:
    prompt = [5, 9, 30, 12]
    found = post(api, "/v1/completions", prompt=prompt, echo=True, logprobs=1, temperature=0, max_tokens=max_tokens)
    [choice] = found["choices"]
    scores = choice["logprobs"]
    logits = api.model.logits(prompt).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert scores["token_logprobs"][0] is None
    given = scores["token_logprobs"][1:4]
    assert np.allclose(given, [expected[place, token] for place, token in enumerate(prompt[1:])], atol=1e-4)
    assert scores["tokens"][:4] == ["w5", "w9", "w30", "w12"]
    assert scores["text_offset"][0] == 0
    assert choice["text"].startswith("w5 w9 w30 w12")
    assert {len(each) for each in scores.values()} == {4 + max_tokens}
    assert found["usage"]["completion_tokens"] == max_tokens


def test_prompt_logprobs_are_the_models(api: Served) -> None:
    prompts = [[5, 9, 30, 12], [7, 8]]
    found = post(api, "/v1/completions", prompt=prompts, prompt_logprobs=2, **GREEDY)
    for prompt, choice in zip(prompts, found["choices"], strict=True):
        logits = api.model.logits(prompt).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        first, *others = choice["prompt_logprobs"]
        assert first is None
        for place, (token, told) in enumerate(zip(prompt[1:], others, strict=True)):
            assert np.isclose(told[str(token)]["logprob"], expected[place, token], atol=1e-4)
            assert told[str(token)]["decoded_token"] == f"w{token}"
            assert {1, 2} <= {each["rank"] for each in told.values()}
    chat = post(api, "/v1/chat/completions", **CHAT, prompt_logprobs=0)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_chat_logprobs_have_as_many_likeliest_as_asked_for(api: Served) -> None:
    chunks = events(api, "/v1/chat/completions", **CHAT, logprobs=True, top_logprobs=3)
    streamed = [each for c in chunks if c["choices"][0]["logprobs"] for each in c["choices"][0]["logprobs"]["content"]]
    whole = post(api, "/v1/chat/completions", **CHAT, logprobs=True, top_logprobs=3)
    content = whole["choices"][0]["logprobs"]["content"]
    assert content == streamed
    assert len(content) == 6
    for each in content:
        assert bytes(each["bytes"]).decode() == each["token"]
        top = [other["logprob"] for other in each["top_logprobs"]]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert each["logprob"] == top[0]


def test_a_stop_text_ends_an_answer_and_is_never_shown(api: Served) -> None:
    text = post(api, "/v1/completions", prompt="w5", **GREEDY)["choices"][0]["text"]
    words = text.split()
    stop = words[2]
    found = post(api, "/v1/completions", prompt="w5", stop=[stop], **GREEDY)["choices"][0]
    assert found["finish_reason"] == "stop"
    assert found["stop_reason"] == stop
    assert stop not in found["text"]
    chunks = events(api, "/v1/completions", prompt="w5", stop=stop, **GREEDY)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == found["text"]


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "regex", "regex": " (w7|w8)"}},
        {"response_format": {"type": "grammar", "grammar": 'start: " w7" | " w8"'}},
        {"structured_outputs": {"choice": [" w7", " w8"]}},
    ],
    ids=str,
)
def test_a_form_is_kept(api: Served, form: dict[str, Any]) -> None:
    found = post(api, "/v1/chat/completions", **{**CHAT, "ignore_eos": False, **form})["choices"][0]
    assert found["finish_reason"] == "stop"
    assert found["message"]["content"].strip() in ("w7", "w8")


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
        {"response_format": {"type": "json_object"}},  # the tiny vocabulary has no braces
        {"response_format": {"type": "text"}, "structured_outputs": {"regex": "("}},
        {"response_format": {"type": "regex", "regex": "w7"}, "structured_outputs": {"choice": ["w7"]}},
        {"structured_outputs": {"xml": "a"}},
    ],
    ids=str,
)
def test_a_form_that_cannot_be_kept_is_a_client_error(api: Served, form: dict[str, Any]) -> None:
    error(api, "/v1/chat/completions", 400, **CHAT, **form)


def test_max_tokens_is_cut_to_the_room_there_is(api: Served) -> None:
    found = post(api, "/v1/completions", prompt=[5] * 100, max_tokens=32000, ignore_eos=True)
    assert found["usage"]["total_tokens"] == 128
    assert found["choices"][0]["finish_reason"] == "length"


def test_a_prompt_too_long_is_refused_with_counts(api: Served) -> None:
    found = error(api, "/v1/completions", 400, prompt=[5] * 200)
    assert found["code"] == "context_length_exceeded"
    assert "200" in found["message"]
    assert "128" in found["message"]


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("temperature", {"temperature": "1"}),
        ("temperature", {"temperature": -1}),
        ("temperature", {"temperature": True}),
        ("top_p", {"top_p": 0}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -5}),
        ("max_tokens", {"max_tokens": 1.5}),
        ("n", {"n": 17}),
        ("stop", {"stop": ["a", "b", "c", "d", "e"]}),
        ("stop", {"stop": [""]}),
        ("seed", {"seed": 1 << 70}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("logit_bias", {"logit_bias": {"64": 1}}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "boss", "content": "w5"}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("audio", {"audio": {"voice": "x"}}),
        ("response_format", {"response_format": {"type": "xml"}}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 30}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"messages": []}}),
        ("guided_json", {"guided_json": {"type": "object"}}),
        ("mirostat", {"mirostat": 2}),
        ("use_beam_search", {"use_beam_search": True}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": 8}),
        ("continue_final_message", {"continue_final_message": True}),
        ("prompt_logprobs", {"prompt_logprobs": 2, "stream": True}),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_field_is_named(api: Served, field: str, body: dict[str, Any]) -> None:
    found = error(api, "/v1/chat/completions", 400, **{**CHAT, **body})
    assert field in (found["param"] or "") or field in found["message"]


def test_unknown_fields_are_ignored_and_said(api: Served) -> None:
    found = post(api, "/v1/chat/completions", **CHAT, frobnicate=1, store=False, prompt_cache_key="k", user="u")
    assert found["warnings"] == [
        "'frobnicate' is unknown and was ignored", "'prompt_cache_key' has no effect here", "'user' has no effect here",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "w5"})], ids=str
)
def test_a_stream_says_once_what_was_ignored(api: Served, path: str, body: dict[str, Any]) -> None:
    answer = api.http.post(path, json={**body, "max_tokens": 4, "stream": True, "user": "u"})
    assert answer.status_code == 200, answer.text
    assert answer.text.count("'user' has no effect here") == 1


def test_another_model_is_not_found(api: Served, client: openai.OpenAI) -> None:
    assert error(api, "/v1/completions", 404, model="gpt-4", prompt="w5")["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{", b"null", b'{"prompt": NaN}', b'{"prompt": "a", "temperature": 1e999}', b'"\\ud800"',
        b"[" * 100_000, b'{"prompt": "a"} x', b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", b"\xff\xfe",
        b'{"prompt": "\xff"}', b'{"prompt": {"a": 1}}', b'{"prompt": [1, "a"]}', b'{"prompt": [-1]}',
        b'{"prompt": [64]}', b'{"prompt": [true]}',
    ],
)  # fmt: skip
def test_a_bad_body_is_a_client_error(api: Served, data: bytes) -> None:
    answer = api.http.post("/v1/completions", content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_tokenize_and_detokenize_are_inverse(api: Served) -> None:
    found = post(api, "/tokenize", prompt="w5 w6", return_token_strs=True)
    assert found == {"count": 2, "max_model_len": 128, "tokens": [5, 6], "token_strs": ["w5", "w6"]}
    assert post(api, "/detokenize", tokens=[5, 6]) == {"prompt": "w5 w6"}
    chat = post(api, "/tokenize", messages=CHAT["messages"])
    assert chat["tokens"] == api.service.tokenizer.encode_chat(CHAT["messages"])  # type: ignore[arg-type]
    error(api, "/tokenize", 400, prompt="a", messages=CHAT["messages"])


def test_seeded_answers_are_the_same_alone_and_together(api: Served) -> None:
    body = {"temperature": 1.0, "seed": -3, "max_tokens": 8, "ignore_eos": True}
    alone = post(api, "/v1/completions", prompt=[9, 10], **body)["choices"][0]["text"]
    together = post(api, "/v1/completions", prompt=[[9, 10]] + [[n, 6] for n in range(20, 40)], **body)
    assert together["choices"][0]["text"] == alone


def test_the_openapi_document_describes_every_path(api: Served) -> None:
    found = api.http.get("/openapi.json").json()
    assert {(method, path) for path, item in found["paths"].items() for method in item} == {
        (each.method.lower(), each.path.replace(":path", "")) for each in OPERATIONS
    }
    schemas = found["components"]["schemas"]
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(found)))
    assert references <= schemas.keys()
    chat = {"$ref": "#/components/schemas/ChatRequest", "components": found["components"]}
    jsonschema.validate(CHAT, chat)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**CHAT, "temperature": "1"}, chat)
