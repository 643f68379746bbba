"""The tokens of a request do not depend on company, pieces, blocks, reuse, preemption, overlap or guesses."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import labinfer

from .tiny import FOLDERS, GOLDEN
from .workload import alone, together, workload

VOCAB = 96
SEQUENCES: dict[str, Any] = {"max_num_seqs": 32}
WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    **{f"chunk {size}": {"max_num_batched_tokens": size} for size in (1, 2, 7, 64, 511, 512)},
    "blocks of 1": {"block_size": 1},
    "blocks of 64": {"block_size": 64},
    "no reuse": {"enable_prefix_caching": False},
    "recompute": {"max_num_seqs": 4},
    "swap": {"max_num_seqs": 4, "swap_space": 0.01},
    "overlap": {},
    "guesses": {"speculative_config": {"prompt_lookup_min": 1, "num_speculative_tokens": 3}},
    "guesses of itself": {"speculative_config": {"num_speculative_tokens": 3}},
    "overlap, small": {"num_blocks": 40, "block_size": 4, "max_num_batched_tokens": 23, "swap_space": 0.01},
}
"""Options of the model for each way of running the same requests."""


@cache
def expected(folder: Path, count: int) -> list[list[int]]:
    return alone(folder, workload(count, VOCAB))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)  # all ways of one: it is expected once
def test_tokens_of_each_request_alone(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABINFER_OVERLAP", "1" if "overlap" in way else "0")
    monkeypatch.setenv("LABINFER_SPECULATION", "1")  # whether it pays or not
    count = 32 if way in ("batch", "overlap") else 8
    options = {**SEQUENCES, **WAYS[way]}
    if way == "guesses of itself":
        options["speculative_config"] = {**options["speculative_config"], "model": folder}
    with labinfer.LLM(folder, **options) as llm:
        if llm.cache.swap is not None:
            llm.engine.costs.prompt_seconds = lambda tokens: float("inf")  # type: ignore[method-assign]
        preempt = way in ("recompute", "swap")
        assert together(llm, workload(count, VOCAB), preempt) == expected(folder, 32)[:count]
        if preempt:
            assert llm.engine.scheduler.num_preemptions > 2
            assert (way == "swap") == (llm.cache.swap is not None and llm.cache.swap.num_out > 0)
        if way == "guesses of itself":
            assert llm.engine.speculation is not None
            assert llm.engine.speculation.counted.accepted > 0
        if way == "batch":
            assert max(step.num_sequences for step in llm.engine.stats) == 32


@pytest.mark.parametrize("size", [511, 512])
@pytest.mark.parametrize("name", ["llama-llama3", "gemma3_text-linear_global", "mixtral-window", "qwen3-bias"])
def test_a_prompt_longer_than_a_step(name: str, size: int, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    asks = workload(4, VOCAB, lengths=(600, 520, 1100, 513))
    whole = alone(folder, asks, max_num_batched_tokens=1200)
    with labinfer.LLM(folder, **SEQUENCES, max_num_batched_tokens=size) as llm:
        assert together(llm, asks) == whole
        assert max(step.num_tokens for step in llm.engine.stats) == size
