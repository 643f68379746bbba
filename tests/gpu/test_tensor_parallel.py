"""GPUs that run a stage together: the tokens of one, the same bits every time, and nobody left waiting."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import labinfer
from labinfer.errors import LabinferError
from labinfer.ops.base import OPS, Call
from labinfer.runtime.manager import Manager
from labinfer.runtime.pipeline.device_engine import DeviceEngine
from tests.golden_models import assert_golden
from tests.tiny import GOLDEN

OPTIONS: dict[str, Any] = {"max_model_len": 64, "arena_effort_seconds": 0.05}
LLAMA = GOLDEN / "llama-llama3"
FAMILIES = [
    "llama-odd_heads_tied", "llama-llama3", "gemma3_text-linear_global", "qwen3-bias", "mixtral-window",
    "deepseek_v2-group_limited", "gpt2-untied_inner", "olmo2-odd_heads",
]  # fmt: skip
TWO = "cuda:0,cuda:1"


def load(two: Manager, path: Path, **options: Any) -> Any:
    """A model over both."""
    ranks = {"tensor_parallel_size": 2} if "tensor_split" not in options else {}
    return labinfer.load(path, devices=TWO, manager=two, **ranks, **OPTIONS | options)


@pytest.mark.parametrize("split", ["1,1", "3,1"])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_gpus_give_the_tokens_of_one(
    two: Manager, in_float32: Callable[[Path], Path], name: str, split: str
) -> None:
    with load(two, in_float32(GOLDEN / name), tensor_split=split) as model:
        assert isinstance(model.engine, DeviceEngine)
        assert_golden(model, name)


def test_ranks_in_threads_of_a_pipeline(two: Manager, in_float32: Callable[[Path], Path]) -> None:
    with load(two, in_float32(LLAMA), transport="local") as model:
        assert_golden(model, LLAMA.name)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_graphs_and_overlap_change_nothing(two: Manager, graphs: bool, overlap: bool) -> None:
    """Bitwise, three times over, for tokens that are chosen and that are drawn."""
    params = [
        labinfer.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
        labinfer.SamplingParams(temperature=1.2, seed=4, max_tokens=20, ignore_eos=True),
    ]
    devices = list(two.devices.values())
    was, found = [(device.graphs, device.overlap) for device in devices], []  # type: ignore[attr-defined]
    for changed in (False, True, False):
        for device, (with_graphs, overlaps) in zip(devices, was, strict=True):
            device.graphs = graphs if changed else with_graphs  # type: ignore[attr-defined]
            device.overlap = overlaps and (overlap or not changed)  # type: ignore[attr-defined]
        with load(two, GOLDEN / "qwen3-bias") as model:
            answers = model.generate([[3, 4, 5], list(range(20))], params)
            found.append(([each.token_ids for each in answers], model.logits(list(range(9))).tobytes()))
    assert found[0] == found[1] == found[2]


def test_the_host_draws_the_same_tokens(two: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[3, 4, 5], list(range(20)), [7]]
    params = [labinfer.SamplingParams(temperature=0.8, top_p=0.9, seed=n, max_tokens=12) for n in range(3)]
    with load(two, LLAMA) as model:
        expected = [each.token_ids for each in model.generate(prompts, params)]
    monkeypatch.setenv("LABINFER_OVERLAP", "0")
    with load(two, LLAMA) as model:
        assert not isinstance(model.engine, DeviceEngine)
        assert [each.token_ids for each in model.generate(prompts, params)] == expected


def test_each_gpu_holds_what_the_plan_says(two: Manager) -> None:
    before = [device.allocator.allocated for device in two.devices.values()]
    with load(two, LLAMA) as model:
        model.generate([[1, 2, 3]], labinfer.SamplingParams(max_tokens=3))
        for device, stage, others in zip(two.devices.values(), model.plan.stages, before, strict=True):
            assert device.allocator.allocated - others == stage.bytes.total
    assert [device.allocator.allocated for device in two.devices.values()] == before


def test_models_come_and_go_while_others_run(two: Manager) -> None:
    """Memory is given back and taken, and kernels are loaded, while the ranks of another model wait for each other."""
    params = labinfer.SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    prompts = [[3, 4, 5], list(range(12))]
    with load(two, LLAMA) as model, ThreadPoolExecutor(1) as thread:
        expected = [each.token_ids for each in model.generate(prompts, params)]
        over = threading.Event()

        def run() -> int:
            runs = 0
            while not over.is_set():
                assert [each.token_ids for each in model.generate(prompts, params)] == expected
                runs += 1
            return runs

        running = thread.submit(run)
        try:
            for name in ("qwen3-bias", "mixtral-window", "gpt2-untied_inner"):
                with load(two, GOLDEN / name) as other:
                    other.generate(prompts, params)
                gc.collect()
        finally:
            over.set()
        assert running.result() > 0


def test_who_listens_sees_the_rows_of_the_batch(two: Manager, in_float32: Callable[[Path], Path]) -> None:
    """Of ten sequences, which a decode step is filled up beyond; ranks beside the one that listens have as many."""
    params = labinfer.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts, seen = [[3, 4, token] for token in range(10)], list[int]()
    with load(two, in_float32(LLAMA), max_num_seqs=16) as model:
        expected = [each.token_ids for each in model.generate(prompts, params)]
        with model.listen("layers.1.attn.out.part", lambda array: seen.append(len(array))):
            assert [each.token_ids for each in model.generate(prompts, params)] == expected
    assert 10 in seen


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_a_rank_that_fails_is_told(two: Manager, rank: int) -> None:
    def fail(array: Any) -> None:
        raise ValueError("the listener fails")

    with load(two, LLAMA) as model:
        interpreter = model.groups[0].interpreters[rank]
        interpreter.listen("layers.1.attn.out.part", fail)
        with pytest.raises((LabinferError, ValueError), match="the listener fails"):
            model.logits([1, 2, 3])
        with pytest.raises(LabinferError, match="another rank of this stage has failed"):
            model.logits([1, 2, 3])


@pytest.mark.parametrize("graphs", [True, False])
def test_collectives_are_exact(two: Manager, monkeypatch: pytest.MonkeyPatch, graphs: bool) -> None:
    """Of few numbers and of many, in turns: sums in the order of ranks, and parts of unequal widths."""
    devices, random = list(two.devices.values()), np.random.default_rng(5)
    for device in devices:
        monkeypatch.setattr(device, "graphs", graphs)
    with (
        closing(devices[0].exchange(devices)) as exchange,
        ThreadPoolExecutor(1) as one,
        ThreadPoolExecutor(1) as other,
    ):
        for rows, width in [(1, 4096), (3, 5), (300, 1000), (1, 1), (8, 4096), (700, 77), (2, 16032), (37, 4096)] * 2:
            parts = [random.standard_normal((rows, width), np.float32) for _ in devices]
            residual = random.standard_normal((rows, width), np.float32)
            wide = random.standard_normal((rows, width + 3), np.float32)
            total = parts[0] + parts[1]
            sizes = (width, width + 3)
            cases: list[tuple[str, Sequence[np.ndarray], np.ndarray, Any]] = [
                ("all_reduce", parts, total, OPS["all_reduce"].Attrs()),
                ("all_reduce_add", parts, residual + total, None),
                ("all_gather", [parts[0], wide], np.concatenate([parts[0], wide], axis=1),
                 OPS["all_gather"].Attrs.model_validate({"sizes": sizes})),
            ]  # fmt: skip
            for kind, given, expected, attrs in cases:
                running = []
                for rank, (device, thread) in enumerate(zip(devices, (one, other), strict=True)):
                    run = collective(device, exchange.peers[rank], kind, attrs, given[rank], residual, expected.shape)
                    running.append(thread.submit(run))
                for each in running:
                    np.testing.assert_array_equal(each.result(), expected, err_msg=f"{kind} of {rows} x {width}")


def collective(
    device: Any, peers: Any, kind: str, attrs: Any, part: np.ndarray, residual: np.ndarray, shape: tuple[int, ...]
) -> Callable[[], np.ndarray]:
    """Runs one op of a rank, again and again; what it made."""
    buffer = device.allocate(part.nbytes + residual.nbytes + 4 * shape[0] * shape[1] + 1024, "test")
    x, y = device.view(buffer, 0, part.shape, "f32"), device.view(buffer, -(-part.nbytes // 256) * 256, shape, "f32")
    device.move_in(part, x)
    inputs: tuple[Any, ...] = (x,)
    inside: tuple[Call, ...] = ()
    if kind == "all_reduce_add":
        inside = (Call(None, (x,), peers=peers), Call(None, (None, None)))
        inputs = (x, y)
    call = Call(attrs, inputs, (y,), parts=inside, peers=peers)
    program = device.program([(device.F.kernels[kind], call)])

    def run() -> np.ndarray:
        device.ready(program)
        with peers.together():
            for _ in range(3):
                if kind == "all_reduce_add":
                    device.move_in(residual, y)
                program(0, 0)
        made: np.ndarray = device.move_out(y)
        device.deallocate(buffer)
        return made

    return run
