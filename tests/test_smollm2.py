"""SmolLM2-135M-Instruct against what transformers computed once from the same dequantized weights; needs the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer import catalogue

_GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "smollm2.json").read_text())


STEPS = {"cpu": 128, "reference": 32}
"""Greedy tokens compared on each device: numpy takes seconds for each."""


@pytest.fixture(scope="module")
def gguf() -> Path:
    path = catalogue.find("smollm2-135m").pulled()
    if path is None:
        pytest.skip("SmolLM2 is not in the cache: labinfer pull smollm2-135m")
    return path


@pytest.fixture(scope="module", params=STEPS)
def llm(gguf: Path, request: pytest.FixtureRequest) -> labinfer.LLM:
    if request.param == "cpu":
        pytest.importorskip("numba", reason="the CPU backend needs numba")
    return labinfer.LLM(gguf, devices=request.param)


def test_greedy_tokens(llm: labinfer.LLM) -> None:
    count = STEPS[next(iter(llm.plan.devices))]
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    results = llm.generate([run["prompt"] for run in _GOLDEN["runs"]], sampling)
    for run, result in zip(_GOLDEN["runs"], results, strict=True):
        assert list(result.token_ids) == run["generated"][:count], run["text"]


def test_blocks_of_one_token(gguf: Path) -> None:
    runs, sampling = _GOLDEN["runs"][:2], labinfer.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with labinfer.LLM(gguf, devices="reference", block_size=1, max_model_len=256) as llm:  # on the CPU 16 at least
        results = llm.generate([run["prompt"] for run in runs], sampling)
    assert [list(result.token_ids) for result in results] == [run["generated"][:6] for run in runs]


def test_speculation_changes_no_token(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    monkeypatch.setenv("LABINFER_SPECULATION", "1")
    options = {"devices": "cpu", "max_model_len": 512}
    prompts, answers = [run["prompt"] for run in _GOLDEN["runs"][:2]], []
    for config in (None, {"prompt_lookup_min": 1}, {"model": gguf}):
        with labinfer.LLM(gguf, speculative_config=config, **options) as model:
            for temperature in (0.0, 0.8):
                params = labinfer.SamplingParams(temperature=temperature, seed=1, max_tokens=64, ignore_eos=True)
                answers.append([result.token_ids for result in model.generate(prompts, params)])
            assert config is None or (model.engine.speculation and model.engine.speculation.counted.accepted > 0)
    assert answers[2:4] == answers[:2]
    assert answers[4:] == answers[:2]


@pytest.mark.parametrize(
    "options",
    [
        {"transport": "local"},
        {"transport": "shm"},
        {"transport": "tcp"},
        {"streamed_layers": 10},
        {"streamed_layers": 9, "stream_from": "disk"},
    ],
    ids=str,
)
def test_greedy_tokens_of_pipelines_and_streamed_layers(gguf: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    devices = "cpu:0,cpu:1" if "transport" in options else "cpu"
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with labinfer.LLM(gguf, devices=devices, threads=1, max_model_len=256, **options) as llm:
        results = llm.generate([run["prompt"] for run in _GOLDEN["runs"]], sampling)
    for run, result in zip(_GOLDEN["runs"], results, strict=True):
        assert list(result.token_ids) == run["generated"][:24], run["text"]


def test_text_in_text_out(llm: labinfer.LLM) -> None:
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    runs = [run for run in _GOLDEN["runs"] if "<|im_start|>" not in run["text"]]
    assert runs
    results = llm.generate([run["text"] for run in runs], sampling)
    for run, result in zip(runs, results, strict=True):
        assert list(result.token_ids) == run["generated"][:24]
        assert run["continuation"].startswith(result.text.rstrip("�"))


def test_perplexity(llm: labinfer.LLM) -> None:
    tokens = _GOLDEN["perplexity_tokens"][:256]
    found, expected = perplexity(llm.logits(tokens), tokens), _GOLDEN["perplexity"]["256"]
    assert f"{found:.4g}" == f"{expected:.4g}"
    if "reference" in llm.plan.devices:  # the CPU backend's activations have 15 bits where weights are quantized
        assert found == pytest.approx(expected, rel=2e-5)


def perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    """exp of the mean negative log likelihood of tokens[1:] under logits float32 [len(tokens), vocab]."""
    total = 0.0
    for row, token in zip(logits[:-1], tokens[1:], strict=True):
        values = row.astype(np.float64)
        total += np.log(np.exp(values - values.max()).sum()) + values.max() - values[token]
    return float(np.exp(total / (len(tokens) - 1)))
