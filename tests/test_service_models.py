"""What is asked for by another name or for another thing than text: adapters of the model, and its embeddings."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from labinfer import LoRARequest, SamplingParams
from labinfer.errors import LabinferError
from labinfer.service.errors import ApiError
from labinfer.service.operations.embeddings import last_hidden_state
from labinfer.service.options import ServiceOptions
from labinfer.service.service import Service
from labinfer.service.services import Services

from .adapters import save_adapter
from .service import KEY, Served, served

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    return LoRARequest("french", save_adapter(tmp_path_factory.mktemp("adapters") / "french", tiny_model))


@pytest.fixture(scope="module")
def api(tiny_model: Path, adapter: LoRARequest) -> Iterator[Served]:
    with served(tiny_model, {"max_loras": 1, "max_lora_rank": 4}, adapters=[adapter]) as running:
        yield running


def post(api: Served, path: str, **body: Any) -> Any:
    answer = api.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def hidden(api: Served, prompt: list[int], lora: LoRARequest | None = None) -> np.ndarray:
    """The last hidden state of each token, as listeners of the model see it."""
    rows: list[np.ndarray] = []
    with api.model.listen("final", rows.append), api.model.session(lora) as session:
        session.append(prompt)
    return np.concatenate(rows)


def test_adapters_are_models_with_a_parent(api: Served) -> None:
    listed = api.http.get("/v1/models").json()["data"]
    assert [(each["id"], each["parent"]) for each in listed] == [("tiny", None), ("french", "tiny")]
    assert api.http.get("/v1/models/french").json() == listed[1]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_the_name_of_the_model_chooses_the_adapter(api: Served, adapter: LoRARequest, path: str) -> None:
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "w5 w6"}], **GREEDY}
    if path == "/v1/completions":
        ask = {"prompt": "w5 w6", **GREEDY}
    elif path == "/v1/responses":
        ask = {"input": "w5 w6", "temperature": 0, "max_output_tokens": 8}
    plain, adapted = (post(api, path, model=name, **ask) for name in ("tiny", "french"))
    assert (plain["model"], adapted["model"]) == ("tiny", "french")
    changing = ("model", "id", "created", "created_at")
    assert {k: v for k, v in plain.items() if k not in changing} != {
        k: v for k, v in adapted.items() if k not in changing
    }


def test_a_completion_of_an_adapter_is_the_engines(api: Served, adapter: LoRARequest) -> None:
    [choice] = post(api, "/v1/completions", model="french", prompt=[5, 6], **GREEDY)["choices"]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert choice["text"] == api.model.generate([5, 6], params, lora_request=adapter)[0].text


def test_metrics_tell_which_adapters_are_in_use(api: Served) -> None:
    seen = []

    def scrape(logits: np.ndarray) -> None:
        if not seen:
            seen.append(api.http.get("/metrics").text)

    with api.model.listen(api.model.plan.stages[-1].outputs[-1], scrape):
        post(api, "/v1/completions", model="french", prompt=[5, 6], **GREEDY)
    labels = 'max_lora="1",running_lora_adapters="french",waiting_lora_adapters=""'
    assert f"vllm:lora_requests_info{{{labels}}}" in seen[0]


@pytest.mark.parametrize("wrong", ["twice", "missing"])
def test_adapters_that_cannot_be_served_are_told_at_the_start(api: Served, adapter: LoRARequest, wrong: str) -> None:
    given = [adapter, adapter] if wrong == "twice" else [LoRARequest("x", "/nowhere")]
    with pytest.raises(LabinferError, match="same name" if wrong == "twice" else "cannot open"):
        Services(Service(api.model, ServiceOptions(), adapters=given))


@pytest.mark.parametrize("model", ["tiny", "french"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_pooled_hidden_state(api: Served, adapter: LoRARequest, model: str, pooling: str) -> None:
    prompts = [list(range(5, 45)), [7]]
    found = post(api, "/v1/embeddings", model=model, input=prompts, pooling=pooling)
    assert found["usage"] == {"prompt_tokens": 41, "total_tokens": 41}
    assert found["model"] == model
    for prompt, each in zip(prompts, found["data"], strict=True):
        rows = hidden(api, prompt, adapter if model == "french" else None)
        expected = rows[-1] if pooling == "last" else rows.mean(0)
        np.testing.assert_allclose(each["embedding"], expected / np.linalg.norm(expected), atol=1e-5)


def test_the_official_client_reads_embeddings(api: Served) -> None:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0) as client:
        found = client.embeddings.create(model="tiny", input=["w5 w6", "w7"])  # asks for base64
    plain = post(api, "/v1/embeddings", input=["w5 w6", "w7"])
    near = [pytest.approx(each["embedding"], abs=1e-6) for each in plain["data"]]
    assert [each.embedding for each in found.data] == near
    coded = post(api, "/v1/embeddings", input="w7", encoding_format="base64")["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == pytest.approx(found.data[1].embedding, abs=1e-6)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("dimensions", {"dimensions": 3}),
        ("pooling", {"pooling": "max"}),
        ("encoding_format", {"encoding_format": "hex"}),
        ("input", {"input": [[5]] * 200}),
        ("prompt", {"input": [[]]}),
        ("prompt", {"input": [5] * 200}),
    ],
    ids=str,
)
def test_what_cannot_be_embedded_is_refused(api: Served, field: str, body: dict[str, Any]) -> None:
    answer = api.http.post("/v1/embeddings", json={"input": "w5", **body})
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]


def test_a_model_without_a_last_hidden_state_says_so(api: Served) -> None:
    [stage] = api.model.plan.stages
    assert last_hidden_state([stage]) == "final"
    with pytest.raises(ApiError, match="no embeddings"):
        last_hidden_state([stage.model_copy(update={"schedule": []})])
