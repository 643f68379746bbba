"""The CPU backend's tokens do not depend on company, pieces, blocks, reuse, preemption or overlap either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import labinfer
from labinfer import catalogue

from ..tiny import GOLDEN
from ..workload import alone, together, workload

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


@pytest.mark.parametrize("way", ["batch", "chunk 1", "chunk 7", "chunk 511", "blocks of 64", "swap", "overlap"])
def test_tokens_of_smollm2(gguf: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABINFER_OVERLAP", "1" if way == "overlap" else "0")
    asks = workload(8, 49152, (5, 30, 60, 17))
    options: dict[str, Any] = {
        "blocks of 64": {"block_size": 64}, "swap": {"max_num_seqs": 3, "swap_space": 0.1},
    }.get(way, {})  # fmt: skip
    if way.startswith("chunk"):
        options = {"max_num_batched_tokens": int(way.split()[1])}
    limits = {"devices": "cpu", "max_model_len": 128}
    with labinfer.LLM(gguf, **{**limits, **options}) as llm:
        if llm.cache.swap is not None:
            llm.engine.costs.prompt_seconds = lambda tokens: float("inf")  # type: ignore[method-assign]
        assert together(llm, asks, preempt=way == "swap") == smollm2_alone(gguf, asks)


_ALONE: dict[Path, list[list[int]]] = {}


def smollm2_alone(gguf: Path, asks: list[Any]) -> list[list[int]]:
    """The answers one by one, made once."""
    if gguf not in _ALONE:
        _ALONE[gguf] = alone(gguf, asks, devices="cpu", max_model_len=128)
    return _ALONE[gguf]
