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


pytestmark = pytest.mark.timeout(900)  # 128 steps of a real model in numpy


@pytest.fixture(scope="module")
def gguf() -> Path:
    path = catalogue.find("smollm2-135m").pulled()
    if path is None:
        pytest.skip("SmolLM2 is not in the cache: labinfer pull smollm2-135m")
    return path


@pytest.fixture(scope="module")
def llm(gguf: Path) -> labinfer.LLM:
    return labinfer.LLM(gguf)


def test_greedy_tokens(llm: labinfer.LLM) -> None:
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    results = llm.generate([run["prompt"] for run in _GOLDEN["runs"]], sampling)
    for run, result in zip(_GOLDEN["runs"], results, strict=True):
        assert list(result.token_ids) == run["generated"], run["text"]


def test_text_in_text_out(llm: labinfer.LLM) -> None:
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    runs = [run for run in _GOLDEN["runs"] if "<|im_start|>" not in run["text"]]
    assert runs
    results = llm.generate([run["text"] for run in runs], sampling)
    for run, result in zip(runs, results, strict=True):
        assert list(result.token_ids) == run["generated"][:24]
        assert run["continuation"].startswith(result.text.rstrip("�"))


def test_perplexity(gguf: Path) -> None:
    tokens = _GOLDEN["perplexity_tokens"][:256]
    logits = labinfer.load(gguf).logits(tokens)
    assert perplexity(logits, tokens) == pytest.approx(_GOLDEN["perplexity"]["256"], rel=2e-5)


def perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    """exp of the mean negative log likelihood of tokens[1:] under logits float32 [len(tokens), vocab]."""
    total = 0.0
    for row, token in zip(logits[:-1], tokens[1:], strict=True):
        values = row.astype(np.float64)
        total += np.log(np.exp(values - values.max()).sum()) + values.max() - values[token]
    return float(np.exp(total / (len(tokens) - 1)))
