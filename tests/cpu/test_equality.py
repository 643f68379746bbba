"""The CPU backend's tokens do not depend on company, pieces, blocks, reuse, preemption or overlap either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import labinfer
from labinfer import SamplingParams, catalogue

from ..tiny import GOLDEN
from ..workload import TOKENS, Ask, alone, together, workload

WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "blocks of 64": {"block_size": 64},
    "recompute": {"max_num_seqs": 4},
    "swap": {"max_num_seqs": 4, "swap_space": 0.01},
    "overlap": {},
}
NAMES = ("llama-llama3", "gemma3_text-linear_global", "mixtral-window", "deepseek_v2-group_limited")


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_each_request_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asks = GOLDEN / name, workload(32, 96)
    expected = alone(folder, asks, devices="cpu")
    for way, options in WAYS.items():
        monkeypatch.setenv("LABINFER_OVERLAP", "1" if way == "overlap" else "0")
        with labinfer.LLM(folder, devices="cpu", **{"max_num_seqs": 32, **options}) as llm:
            if llm.cache.swap is not None:
                llm.engine.costs.prompt_seconds = lambda tokens: float("inf")  # type: ignore[method-assign]
            assert together(llm, asks, preempt=way in ("recompute", "swap")) == expected, way


@pytest.fixture(scope="module")
def gguf() -> Path:
    path = catalogue.find("smollm2-135m").pulled()
    if path is None:
        pytest.skip("SmolLM2 is not in the cache: labinfer pull smollm2-135m")
    return path


PROMPTS = [run["prompt"] for run in json.loads((GOLDEN / "smollm2.json").read_text())["runs"]]


@pytest.fixture(scope="module")
def smollm2_alone(gguf: Path) -> list[list[int]]:
    """The greedy and the seeded answers to ``PROMPTS``, one by one."""
    return alone(gguf, smollm2_asks(), devices="cpu", max_model_len=256)


def smollm2_asks() -> list[Ask]:
    seeded = [{"temperature": 0}, {"temperature": 0.7, "top_p": 0.9, "seed": 1}]
    kinds = [SamplingParams(**each, max_tokens=TOKENS, ignore_eos=True) for each in seeded]
    return [Ask(prompt, params) for params in kinds for prompt in PROMPTS]


def test_seeded_tokens_of_smollm2_in_any_company(gguf: Path) -> None:
    options: dict[str, Any] = {"devices": "cpu", "max_model_len": 700}
    knobs = {"temperature": 1.0, "max_tokens": TOKENS, "ignore_eos": True}
    lengths = (5, 600, 20, 520, *[7, 9, 30] * 5)
    prompts = [(PROMPTS[number % 5] * 90)[:length] for number, length in enumerate(lengths)]
    asks = [Ask(prompt, SamplingParams(**knobs, seed=seed)) for seed, prompt in enumerate(prompts)]
    expected = alone(gguf, asks, **options)
    for size in (511, 512):
        with labinfer.LLM(gguf, max_num_seqs=24, max_num_batched_tokens=size, **options) as llm:
            assert together(llm, asks) == expected, size


SMOLLM2_WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    **{f"chunk {size}": {"max_num_batched_tokens": size} for size in (1, 7, 511, 512)},
    "blocks of 64": {"block_size": 64},
    "no reuse": {"enable_prefix_caching": False},
    "recompute": {"max_num_seqs": 3},
    "swap": {"max_num_seqs": 3, "swap_space": 0.1},
    "overlap": {},
    "guesses": {"speculative_config": {"prompt_lookup_min": 1}},
}


@pytest.mark.parametrize("way", SMOLLM2_WAYS)
def test_tokens_of_smollm2(
    way: str, gguf: Path, smollm2_alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABINFER_OVERLAP", "1" if way == "overlap" else "0")
    monkeypatch.setenv("LABINFER_SPECULATION", "1")  # whether it pays or not
    with labinfer.LLM(gguf, devices="cpu", max_model_len=256, **SMOLLM2_WAYS[way]) as llm:
        if llm.cache.swap is not None:
            llm.engine.costs.prompt_seconds = lambda tokens: float("inf")  # type: ignore[method-assign]
        assert together(llm, smollm2_asks(), preempt=way in ("swap", "recompute")) == smollm2_alone
