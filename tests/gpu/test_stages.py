"""GPUs that run one stage after another, all of whose work is queued: the tokens of one GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba")

import labinfer
from labinfer import SamplingParams
from labinfer.runtime.manager import Manager
from labinfer.runtime.pipeline.device_engine import DeviceEngine
from tests.golden_models import assert_golden
from tests.tiny import GOLDEN

OPTIONS: dict[str, Any] = {"devices": "cuda:0,cuda:1", "max_model_len": 64, "arena_effort_seconds": 0.05}
LLAMA = GOLDEN / "llama-llama3"
KNOBS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 4},
    {"temperature": 1.2, "seed": 5, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 6, "logprobs": 2},
    {"temperature": 1.1, "seed": 7, "n": 3},
]


@pytest.mark.parametrize("name", ["llama-llama3", "qwen3-bias", "gemma3_text-linear_global", "mixtral-window"])
def test_two_stages_give_the_tokens_of_one(two: Manager, in_float32: Callable[[Path], Path], name: str) -> None:
    with labinfer.load(in_float32(GOLDEN / name), manager=two, **OPTIONS) as model:
        assert isinstance(model.engine, DeviceEngine)
        assert len(model.stages) == 2
        assert_golden(model, name)


@pytest.mark.parametrize(
    "limits", [{}, {"max_num_batched_tokens": 24, "max_num_seqs": 12}, {"num_blocks": 12}], ids=str
)
def test_many_requests_of_all_kinds(
    two: Manager, in_float32: Callable[[Path], Path], limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [list(range(index, index + 1 + 5 * (index % 4))) for index in range(20)]
    params = [SamplingParams(max_tokens=12, ignore_eos=True, **KNOBS[index % len(KNOBS)]) for index in range(20)]
    found = []
    for overlap in ("1", "0"):  # without, the host chooses the tokens
        monkeypatch.setenv("LABINFER_OVERLAP", overlap)
        with labinfer.load(in_float32(LLAMA), manager=two, **OPTIONS | limits) as model:
            results = model.generate(prompts, params)
            found.append([[list(answer.token_ids) for answer in result.outputs] for result in results])
            model.blocks.check_integrity()
            assert model.blocks.usage == 0
    assert found[0] == found[1]


def test_each_gpu_holds_what_the_plan_says(two: Manager) -> None:
    before = [device.allocator.allocated for device in two.devices.values()]
    with labinfer.load(LLAMA, manager=two, **OPTIONS) as model:
        model.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
        for device, stage, others in zip(two.devices.values(), model.plan.stages, before, strict=True):
            assert device.allocator.allocated - others == stage.bytes.total
    assert [device.allocator.allocated for device in two.devices.values()] == before
