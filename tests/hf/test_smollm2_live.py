"""SmolLM2-135M-Instruct against transformers, live: the dequantized weights of one GGUF file in both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer import catalogue

pytest.importorskip("torch", reason="the live comparison needs torch")
pytest.importorskip("transformers", reason="the live comparison needs transformers")

from transformers import LlamaForCausalLM

from . import smollm2

_GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text())

pytest.importorskip("numba", reason="hundreds of steps of a real model: on the CPU backend")

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def gguf() -> Path:
    path = catalogue.find("smollm2-135m").pulled()
    if path is None:
        pytest.skip("SmolLM2 is not in the cache: labinfer pull smollm2-135m")
    return path


@pytest.fixture(scope="module")
def model(gguf: Path) -> LlamaForCausalLM:
    return smollm2.build_model(gguf)


def test_greedy_tokens(gguf: Path, model: LlamaForCausalLM) -> None:
    prompts = [run["prompt"] for run in _GOLDEN["runs"]]
    results = labinfer.LLM(gguf, devices="cpu").generate(prompts, _greedy(128))
    for run, result in zip(_GOLDEN["runs"], results, strict=True):
        expected, margin = smollm2.greedy(model, run["prompt"], 128)
        assert list(result.token_ids) == expected, f"{run['text']!r}, smallest margin {margin:.1e}"


def test_perplexity_of_two_thousand_tokens(gguf: Path, model: LlamaForCausalLM) -> None:
    tokens = _GOLDEN["perplexity_tokens"]
    assert len(tokens) == 2000
    logits = labinfer.load(gguf, devices="cpu").logits(tokens)[:-1]
    highest = logits.max(axis=1)
    chosen = logits[np.arange(len(logits)), tokens[1:]]
    normaliser = np.log(np.exp(logits - highest[:, None]).sum(axis=1, dtype=np.float64)) + highest
    ours = np.exp((normaliser - chosen).mean())
    assert f"{ours:.4g}" == f"{np.exp(smollm2.negative_log_likelihood(model, tokens).mean()):.4g}"


def test_same_text_from_safetensors(gguf: Path, model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    smollm2.build_tokenizer(gguf).save(str(tmp_path / "tokenizer.json"))
    prompts = [run["text"] for run in _GOLDEN["runs"]]
    from_gguf = [result.text for result in labinfer.LLM(gguf, devices="cpu").generate(prompts, _greedy(32))]
    assert from_gguf == [result.text for result in labinfer.LLM(tmp_path, devices="cpu").generate(prompts, _greedy(32))]
    assert all(len(text) > 30 for text in from_gguf)


def _greedy(max_tokens: int) -> labinfer.SamplingParams:
    return labinfer.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
