"""Whole models on the GPU: every family against transformers' logits, and greedy tokens of a real model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")  # the helpers of the CPU's tests

import labinfer
from labinfer.runtime.manager import Manager
from tests.cpu.test_models import OTHERS, batched, load
from tests.hf.agreement import assert_agree
from tests.tiny import FOLDERS, GOLDEN

WAYS = [
    {"fuse": "auto", "max_num_batched_tokens": 512},
    {"fuse": "none", "max_num_batched_tokens": 7},
    {"fuse": "auto", "max_num_batched_tokens": 24},
]


@pytest.fixture
def manager(gpu: Any) -> Manager:
    """A manager that has the session's device open."""
    return Manager(devices={"cuda": gpu})


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_golden(manager: Manager, folder: Path, way: dict[str, Any]) -> None:
    """Prompt and each decode step beside three other sequences; the greedy choice is transformers' own."""
    with np.load(folder / "expected.npz") as expected:
        prompt, generated = expected["prompt"].tolist(), expected["generated"].tolist()
        prompt_logits, step_logits = expected["prompt_logits"], expected["step_logits"]
    with load(folder, "cuda", manager=manager, **way) as model:
        prompts = [OTHERS[0], prompt, *OTHERS[1:]]
        logits = batched(model, prompts, [[1, 2, 3], generated[: len(step_logits)], [4] * 6, []])[1]
    assert_agree(logits[: len(prompt)], prompt_logits, "prompt")
    assert_agree(logits[len(prompt) :], step_logits, "decode")
    assert logits[len(prompt) - 1 : -1].argmax(1).tolist() == generated[: len(step_logits)]


def test_nothing_is_left_behind(manager: Manager, gpu: Any) -> None:
    before = gpu.allocator.allocated
    with load(GOLDEN / "llama-llama3", "cuda", manager=manager) as model:
        model.logits([1, 2, 3])
        assert gpu.allocator.allocated > before
    assert gpu.allocator.allocated == before


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_graphs_and_overlap_change_nothing(manager: Manager, gpu: Any, graphs: bool, overlap: bool) -> None:
    """Bitwise, three times over."""
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    found, was = [], (gpu.graphs, gpu.overlap)
    for settings in (was, (graphs, overlap and was[1]), was):
        gpu.graphs, gpu.overlap = settings
        with load(GOLDEN / "qwen3-bias", "cuda", manager=manager) as model:
            tokens = model.generate([[3, 4, 5], list(range(20))], sampling)
            found.append(([each.token_ids for each in tokens], model.logits(list(range(9))).tobytes()))
    gpu.graphs, gpu.overlap = was
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("model", ["smollm2-bf16", "smollm2-q8_0", "smollm2-q4_0", "smollm2-q4_1"])
def test_greedy_tokens_of_a_real_model(manager: Manager, model: str, kv_dtype: str) -> None:
    """Those of the CPU backend, as far as it goes: a tie that falls otherwise ends the comparison after ten tokens."""
    path = Path(os.environ.get("LABINFER_TEST_MODELS", "models")) / f"{model}.gguf"
    if not path.exists():
        pytest.skip(f"there is no {path}: set LABINFER_TEST_MODELS")
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    answers = []
    for device in ("cuda", "cpu"):
        with labinfer.load(path, devices=device, kv_dtype=kv_dtype, max_model_len=256) as llm:
            answers.append(list(llm.generate(["The capital of France is"], sampling)[0].token_ids))
    same = next((i for i, (a, b) in enumerate(zip(*answers, strict=True)) if a != b), 48)
    print(f"{model} {kv_dtype}: {same} of 48 tokens are the CPU's")
    assert same >= 10
