"""Ranks that run a stage together: the tokens of one device, for every family, split, transport and kind of device."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import labinfer
from labinfer import catalogue
from labinfer.backends.cuda.layout import exchange_bytes
from labinfer.compiler.fold import unfold_ops, unfold_states, unfold_weights
from labinfer.compiler.graph import Part, Transform
from labinfer.compiler.plan import load_plan
from labinfer.compiler.shares import apportion, cut_heads, width
from labinfer.compiler.verify_plan import verify_plan
from labinfer.errors import DoesNotFit, Errors, LabinferError, UsageError
from labinfer.ops.formats import FORMATS
from labinfer.runtime.parameters import transformed
from labinfer.runtime.peers import SharedPeers

from .choosing import choosing
from .golden_models import assert_golden
from .tiny import GOLDEN

FAMILIES = sorted(expected.parent.name for expected in GOLDEN.glob("*/expected.npz"))
CANNOT = {("phi3-longrope_attention_factor", "1,1,1"), ("phi3-longrope_crossed", "1,1,1")}
"""Models of two heads do not go to three ranks."""
GREEDY = labinfer.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
UNEQUAL = ("llama-odd_heads_tied", "mixtral-window", "deepseek_v2-group_limited", "gpt2-untied_inner", "qwen3-bias")
LLAMA = GOLDEN / "llama-llama3"


def devices(ranks: int, kind: str = "reference") -> str:
    return ",".join(f"{kind}:{rank}" for rank in range(ranks))


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, split) for name in FAMILIES for split in ("1,1", "1,1,1")), *((name, "3,1") for name in UNEQUAL)],
)
def test_every_family_has_the_tokens_of_one_device(name: str, split: str) -> None:
    named = devices(split.count(",") + 1)
    if (name, split) in CANNOT:
        with pytest.raises(DoesNotFit, match="2 heads cannot be shared out among 3 ranks"):
            labinfer.compile(GOLDEN / name, devices=named, tensor_split=split)
        return
    with labinfer.load(GOLDEN / name, devices=named, tensor_split=split) as model:
        assert_golden(model, name)


@pytest.mark.parametrize("name", ["llama-odd_heads_tied", "deepseek_v2-group_limited"])
@pytest.mark.parametrize("transport", ["local", "shm"])
def test_ranks_within_a_pipeline(name: str, transport: str) -> None:
    with labinfer.load(GOLDEN / name, devices=devices(4), tensor_parallel_size=2, transport=transport) as model:
        assert [stage.rank for stage in model.plan.stages] == [0, 1, 0, 1]
        assert len(model.plan.groups) == 2
        assert_golden(model, name)


@pytest.mark.parametrize("name", ["mixtral-window", "llama-odd_heads_tied", "deepseek_v2-group_limited"])
def test_ranks_on_the_cpu(name: str) -> None:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    with labinfer.load(GOLDEN / name, devices=devices(2, "cpu"), tensor_parallel_size=2, threads=2) as model:
        assert_golden(model, name)


@pytest.mark.parametrize("name", ["llama-odd_heads_tied", "mixtral-window"])
def test_ranks_that_choose_tokens_themselves(name: str) -> None:
    """Each rank of devices that do chooses all tokens: those of the host, drawn ones too."""
    prompts, params = [[3, 4], [5] * 9], labinfer.SamplingParams(temperature=1.1, seed=3, max_tokens=9, logprobs=1)
    free = labinfer.SamplingParams(temperature=1.1, seed=4, max_tokens=9, ignore_eos=True)
    options: dict[str, Any] = {"devices": devices(2), "tensor_parallel_size": 2}
    with labinfer.load(GOLDEN / name, **options) as model:
        expected = [answer.token_ids for answer in model.generate(prompts, [params, free])]
    with choosing() as samplers, labinfer.load(GOLDEN / name, **options) as model:
        assert model.pipeline is None
        assert_golden(model, name)
        assert [answer.token_ids for answer in model.generate(prompts, [params, free])] == expected
        first, second = samplers
        assert first.chosen == second.chosen > 0
        assert first.fed == second.fed > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_beside_the_others_ends_the_step_for_all(rank: int) -> None:
    def fail(_: Any) -> None:
        raise UsageError("test.failed", "the listener fails")

    with choosing(), labinfer.load(LLAMA, devices=devices(2), tensor_parallel_size=2) as model:
        model.interpreters[rank].listen("layers.1.attn.out.part", fail)
        with pytest.raises(UsageError, match="the listener fails"):
            model.logits([1, 2, 3])
        with pytest.raises(LabinferError, match="another rank of this stage has failed"):
            model.logits([1, 2, 3])


def test_all_ranks_are_ready_before_any_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With listeners too, and then all ranks have just the rows of the batch, though devices fill them up otherwise."""
    did: list[tuple[str, int]] = []
    rows: dict[int, list[int]] = {0: [], 1: []}
    exchange = SharedPeers.exchange

    @contextmanager
    def together(peers: SharedPeers) -> Iterator[None]:
        did.append(("ready", peers.rank))
        meeting.wait(60)
        did.append(("runs", peers.rank))
        yield

    def counted(peers: SharedPeers, part: np.ndarray, columns: Sequence[int]) -> list[np.ndarray]:
        rows[peers.rank].append(len(part))
        return exchange(peers, part, columns)

    meeting = threading.Barrier(2)
    monkeypatch.setattr(SharedPeers, "together", together)
    monkeypatch.setattr(SharedPeers, "exchange", counted)
    prompts = [[3, 4, 5], [7], [8, 9], [1, 2], [6]]
    with choosing(), labinfer.load(LLAMA, devices=devices(2), tensor_parallel_size=2) as model:
        for listens in (False, True):
            seen: list[int] = []
            with model.listen("layers.1.attn.out", lambda x: seen.append(len(x))) if listens else nullcontext():  # noqa: B023
                model.generate(prompts, GREEDY)
            assert rows[0] == rows[1]
            assert (5 in seen) == listens
            assert (8 in rows[0]) != listens
            rows[0].clear()
            rows[1].clear()
        for step in range(0, len(did), 4):
            assert [what for what, _ in did[step : step + 4]] == ["ready", "ready", "runs", "runs"]


def test_gpus_exchange_parts_in_their_own_memory() -> None:
    """A plan needs no GPU."""
    plan = labinfer.compile(LLAMA, devices="cuda:0,cuda:1", tensor_parallel_size=2)
    for stage in plan.stages:
        assert (stage.bytes.peers, stage.bytes.exchange) == (0, exchange_bytes(2))
        parts = stage.bytes.model_dump(exclude={"peers", "host", "swap"})
        assert stage.bytes.total == sum(parts.values())
        assert {"all_reduce", "all_reduce_add", "all_gather"} <= {op.kind for op, _ in unfold_ops(stage)}
    verify_plan(plan, "plan")
    plan.stages[1].bytes.exchange = 0
    with pytest.raises(LabinferError, match="do not exchange their parts in one way"):
        verify_plan(plan, "plan")
    with pytest.raises(UsageError, match="cuda:0 and reference:0 cannot exchange parts"):
        labinfer.compile(LLAMA, devices="cuda:0,reference:0", tensor_parallel_size=2)
    with pytest.raises(DoesNotFit, match="9 GPUs cannot run a stage together"):
        exchange_bytes(9)


def test_gpus_in_several_processes_are_refused() -> None:
    plan = labinfer.compile(LLAMA, devices="cuda:0,cuda:1", tensor_parallel_size=2)
    with pytest.raises(UsageError, match="run in one process"):
        labinfer.load(plan, transport="shm")


def test_ranks_of_different_kinds_work_together() -> None:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    with labinfer.load(LLAMA, devices="reference,cpu", tensor_split="1,2", threads=1) as model:
        assert_golden(model, LLAMA.name)


@pytest.mark.parametrize("ranks", [2, 3])
def test_smollm2_in_processes_has_the_tokens_of_one_device(ranks: int) -> None:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    path = catalogue.find("smollm2-135m").pulled()
    if path is None:
        pytest.skip("SmolLM2 is not in the cache: labinfer pull smollm2-135m")
    prompts = ["Once upon a time", "The capital of France is"]
    greedy = labinfer.SamplingParams(temperature=0, max_tokens=16)
    limits: dict[str, Any] = {"max_model_len": 64, "threads": 1}
    with labinfer.load(path, devices="cpu", **limits) as model:
        alone = [answer.token_ids for answer in model.generate(prompts, greedy)]
    with labinfer.load(
        path, tensor_parallel_size=ranks, devices=devices(ranks, "cpu"), transport="shm", **limits
    ) as model:
        assert [answer.token_ids for answer in model.generate(prompts, greedy)] == alone


def test_each_rank_has_only_its_part_of_weights_and_cache() -> None:
    whole = labinfer.compile(LLAMA, devices="reference")
    plan = labinfer.compile(LLAMA, devices=devices(2), tensor_parallel_size=2)
    one, other = plan.stages
    assert plan.tensor_split == [1, 1]
    assert one.bytes.weights == other.bytes.weights < 0.6 * whole.stages[0].bytes.weights
    assert one.bytes.kv_cache == other.bytes.kv_cache == whole.stages[0].bytes.kv_cache // 2
    assert unfold_weights(plan)["layers.0.q_proj@1"].part == Part(0, 32, ((16, 32),))
    assert {state.width for state in unfold_states(plan).values()} == {unfold_states(whole)["layers.0.kv"].width // 2}
    sums = [op for op, _ in unfold_ops(one) if op.kind == "all_reduce"]
    layers = 1 + max(op.layer for op in sums if op.layer is not None)
    assert len(sums) == 1 + 2 * layers  # of the embedding, attention and the network


def test_memory_is_what_the_plan_says() -> None:
    with labinfer.load(LLAMA, devices=devices(2), tensor_split="3,1", max_model_len=64) as model:
        for loaded in model.stages:
            assert loaded.device.allocator.allocated == loaded.stage.bytes.total


def test_a_rank_reads_only_its_slice_of_a_tensor() -> None:
    rng = np.random.default_rng(3)
    for format, columns in (("q4_0", 128), ("f32", 12)):
        block = FORMATS[format]
        raw = rng.integers(0, 256, 24 * columns // block.block_size * block.block_bytes, np.uint8)
        for transform in (Transform(), Transform((4, 3, 2), (1, 0, 2))):
            whole = transformed(raw, format, (24, columns), transform).reshape(24, -1, block.block_bytes)
            rows = transformed(raw, format, (24, columns), transform, Part(0, 24, ((6, 12), (0, 3))))
            assert np.array_equal(rows, np.concatenate([whole[6:12], whole[:3]]).reshape(-1))
            half = columns // 2
            part = transformed(raw, format, (24, columns), transform, Part(1, columns, ((half, columns),)))
            assert np.array_equal(part, whole[:, half // block.block_size :].reshape(-1))


@given(st.integers(1, 400), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_shares_are_whole_and_near_their_proportion(total: int, split: list[float]) -> None:
    if total < len(split):
        with pytest.raises(DoesNotFit):
            apportion(total, split, "heads")
        return
    counts = apportion(total, split, "heads")
    assert sum(counts) == total
    assert min(counts) >= 1
    for one, small in zip(counts, split, strict=True):
        assert all(one <= other for other, large in zip(counts, split, strict=True) if small < large)


@given(st.integers(1, 12), st.integers(1, 8), st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=6))
def test_every_query_head_meets_its_own_keys(kv_heads: int, group: int, split: list[int]) -> None:
    if kv_heads * group < len(split):
        return
    cut = cut_heads(kv_heads * group, kv_heads, 64, split)
    queries = [head for columns in cut.queries for head in range(*columns[0])]
    assert queries == list(range(kv_heads * group))
    for columns, keys in zip(cut.queries, cut.keys, strict=True):
        own = [head for start, stop in keys for head in range(start, stop)]
        each = width(columns) // len(own)
        assert each * len(own) == width(columns)
        assert [head // group for head in range(*columns[0])] == [head for head in own for _ in range(each)]


def test_blocks_are_not_cut() -> None:
    assert cut_heads(8, 8, 64, [1, 1], block=256).queries == (((0, 4),), ((4, 8),))
    with pytest.raises(DoesNotFit, match="blocks of 256"):
        cut_heads(9, 3, 64, [1, 1], block=256)


def test_a_rank_that_fails_ends_the_step_for_all() -> None:
    def fail(array: np.ndarray) -> None:
        raise ValueError("a listener's own fault")

    with labinfer.load(LLAMA, devices=devices(2), tensor_parallel_size=2) as model:
        with model.listen("layers.0.attn.out", fail), pytest.raises(LabinferError, match="a listener's own fault"):
            model.logits([1, 2, 3])
        with pytest.raises(LabinferError, match="another rank of this stage has failed"):
            model.logits([1, 2, 3])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_are_started_anew_once_one_has_died(rank: int) -> None:
    with labinfer.load(LLAMA, devices=devices(2), tensor_parallel_size=2, transport="shm") as model:
        assert model.pipeline is not None
        before = model.generate([[1, 2, 3]], GREEDY)[0].token_ids
        os.kill(model.pipeline.workers.stages[rank].process.pid, signal.SIGKILL)
        assert model.generate([[1, 2, 3]], GREEDY)[0].token_ids == before


def edited(tmp_path: Path, **changes: Any) -> Path:
    plan = labinfer.compile(LLAMA, devices=devices(2), tensor_parallel_size=2)
    file = tmp_path / "plan.json"
    file.write_text(plan.model_copy(update=changes).dump())
    return file


def test_a_plan_of_ranks_is_checked(tmp_path: Path) -> None:
    plan = load_plan(edited(tmp_path))
    for change, complaint in (
        ({"tensor_split": [1.0]}, "no groups"),
        ({"tensor_split": [1.0, 1.0, 1.0]}, "no groups"),
        ({"stages": plan.stages[::-1]}, "is rank 1, it should be rank 0"),
    ):
        with pytest.raises((Errors, LabinferError), match=complaint):
            load_plan(edited(tmp_path, **change))
    other = labinfer.compile(LLAMA, devices=devices(2), tensor_split="3,1")
    with pytest.raises((Errors, LabinferError), match="they would wait forever"):
        load_plan(edited(tmp_path, stages=[plan.stages[0], other.stages[1]]))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"tensor_parallel_size": 0}, "limits.range"),
        ({"tensor_split": "3,x"}, "limits.tensor-split"),
        ({"tensor_split": [1, -1]}, "limits.tensor-split"),
        ({"tensor_split": "3,1", "tensor_parallel_size": 3}, "limits.tensor-split"),
        ({"tensor_parallel_size": 2, "devices": "reference"}, "device.list"),
        ({"tensor_parallel_size": 2, "devices": "reference,reference:1", "max_loras": 1}, "shard.adapters"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as failure:
        labinfer.compile(LLAMA, **options)
    assert failure.value.code == code


def test_a_model_of_several_ranks_does_not_speculate() -> None:
    with pytest.raises(UsageError, match="does not speculate"):
        labinfer.load(LLAMA, devices=devices(2), tensor_parallel_size=2, speculative_config={"method": "ngram"})
