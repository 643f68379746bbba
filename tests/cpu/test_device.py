"""The CPU device by hand: ops called through its function table, errors, poison, taps, forks and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import labinfer
from labinfer.backends.cpu.device import CpuDevice
from labinfer.backends.cpu.emitter import Emitter
from labinfer.backends.cpu.layout import weight_bytes
from labinfer.backends.reference.device import ReferenceDevice
from labinfer.errors import LabinferError, UsageError
from labinfer.ops.base import Call, Step
from labinfer.ops.dequantization import dequantize
from tests.cpu.weights import stored_weight
from tests.tiny import FOLDERS, GOLDEN

PROMPT = list(range(3, 30))
RNG = np.random.default_rng(0)


def load(folder: Path, **options: Any) -> labinfer.LLM:
    options = {"max_model_len": 64, "arena_effort_seconds": 0.05, "max_num_batched_tokens": 10} | options
    return labinfer.load(folder, devices=options.pop("devices", "cpu"), **options)


@pytest.fixture(scope="module")
def cpu() -> Iterator[CpuDevice]:
    device = CpuDevice("cpu", threads=2)
    yield device
    device.close()


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def packed(device: CpuDevice, format: str, rows: int, columns: int, experts: int = 0) -> tuple[Any, np.ndarray]:
    """A matrix, or a stack of them, as the device wants it, and the same as float32."""
    shape = (experts, rows, columns) if experts else (rows, columns)
    raw = stored_weight(format, rows * max(1, experts), columns)
    buffer = device.allocate(weight_bytes(format, shape), "by hand")
    weight = device.parameter(buffer, 0, format, shape)
    device.store(weight, raw, format, shape, None)
    return weight, dequantize(raw, format, shape)


def agree(actual: np.ndarray, expected: np.ndarray, bound: float = 2e-6) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * float(np.abs(expected).max()))


def test_ops_with_vectors_by_hand(cpu: CpuDevice) -> None:
    reference, x, other = ReferenceDevice("reference"), normal(5, 40), normal(5, 40)
    w, b = normal(40), normal(40)
    calls: list[tuple[str, tuple[np.ndarray, ...], dict[str, Any]]] = [
        ("rms_norm", (x,), {"weight": w, "eps": 1e-5}),
        ("rms_norm", (x,), {"eps": 1e-5}),
        ("layer_norm", (x,), {"weight": w, "bias": b, "eps": 1e-5}),
        ("add", (x, other), {}),
        ("scale", (x,), {"by": 0.3}),
        ("softcap", (x,), {"cap": 2.0}),
        ("activation", (x,), {"function": "gelu"}),
        ("glu", (x, other), {"function": "silu"}),
        ("rope", (x, np.arange(5, dtype=np.int32)), {"head_dim": 20, "theta": 10000.0}),
    ]
    for kind, inputs, named in calls:
        agree(cpu.F.call(kind, *inputs, **named), reference.F.call(kind, *inputs, **named))


def test_arrays_that_kernels_cannot_read_in_place(cpu: CpuDevice) -> None:
    wide, weight = RNG.standard_normal((40, 5)), RNG.standard_normal(80)[::2]
    expected = ReferenceDevice("reference").F.rms_norm(
        wide.T.astype(np.float32), weight=weight.astype(np.float32), eps=1e-5
    )
    agree(cpu.F.rms_norm(wide.T, weight=weight, eps=1e-5), expected)
    window = normal(5, 100)[:, 10:50]
    agree(cpu.F.add(window, window), 2 * window)


@pytest.mark.parametrize("format", ["f32", "f16", "q8_0", "q4_k"])
def test_matrices_in_panels(cpu: CpuDevice, format: str) -> None:
    weight, plain = packed(cpu, format, 33, 256)
    x, bias = normal(3, 256), normal(33)
    made = cpu.F.linear(x, weight=weight, bias=bias, out_features=33)
    agree(made, x @ plain.T + bias, 2e-4)
    ids = np.array([0, 32, 7], np.int64)
    rows = cpu.F.embedding(ids, weight=weight, num_embeddings=33, embedding_dim=256)
    np.testing.assert_allclose(rows, plain[ids], rtol=1e-6, atol=1e-7)


def test_experts_by_hand(cpu: CpuDevice) -> None:
    x, reference = normal(6, 32), ReferenceDevice("reference")
    stacks = {name: packed(cpu, "f16", rows, columns, 4) for name, rows, columns in (
        ("gate", 64, 32), ("up", 64, 32), ("down", 32, 64))}  # fmt: skip
    router, plain = packed(cpu, "f32", 4, 32)
    ids, weights = cpu.F.router(x, weight=router, num_experts=4, top_k=2, normalize=True)
    expected = reference.F.router(x, weight=plain, num_experts=4, top_k=2, normalize=True)
    np.testing.assert_array_equal(ids, expected[0])
    agree(weights, expected[1])
    named = {"num_experts": 4, "expert_size": 64, "function": "silu"}
    made = cpu.F.moe(x, ids, weights, **{name: pair[0] for name, pair in stacks.items()}, **named)
    agree(made, reference.F.moe(x, *expected, **{name: pair[1] for name, pair in stacks.items()}, **named), 1e-5)


def test_attention_by_hand(cpu: CpuDevice) -> None:
    """Two sequences of 5 and 3 tokens, written and read."""
    numbers = np.arange(8, dtype=np.int32)
    step = Step(
        token_ids=numbers, positions=np.r_[0:5, 0:3].astype(np.int32), query_start=np.array([0, 5, 8], np.int32),
        context_len=np.array([5, 3], np.int32), total_len=np.array([5, 3], np.int32),
        block_table=np.array([[1], [0]], np.int32), slot_mapping=np.r_[16:21, 0:3].astype(np.int32),
        logits_rows=numbers, block_size=16,
    )  # fmt: skip
    q, k, v = normal(8, 80), normal(8, 40), normal(8, 40)
    made = []
    for device in (cpu, ReferenceDevice("reference")):
        cache = {name: np.zeros((32, 40), np.float32) for name in "kv"}
        device.F.kv_write(k, v, step=step, cache=cache)
        made.append(
            device.F.attention(q, step=step, cache=cache, num_heads=4, num_kv_heads=2, head_dim=20, scale=20**-0.5)
        )
    agree(*made)


def test_a_plain_matrix_is_refused(cpu: CpuDevice) -> None:
    with pytest.raises(UsageError) as caught:
        cpu.F.linear(normal(2, 8), weight=normal(4, 8), out_features=4)
    assert caught.value.code == "run.weight-layout"
    assert "device.store" in str(caught.value.remedy)


def test_an_op_without_a_kernel(cpu: CpuDevice) -> None:
    with pytest.raises(AttributeError, match="rms_norm"):
        cpu.F.rms_norn(normal(2, 8))


def test_too_little_scratch_memory_is_an_error(cpu: CpuDevice) -> None:
    emitter = Emitter(cpu, Call(None, (), workspace=np.zeros(32, np.int32)))
    emitter.take(100)
    with pytest.raises(LabinferError) as caught:
        emitter.take(1)
    assert caught.value.code == "run.workspace"


def test_a_plan_with_less_scratch_memory(tmp_path: Path) -> None:
    """An edited plan is refused, or stops with an error; it never writes where it must not."""
    plan = labinfer.compile(GOLDEN / "llama-llama3", devices="cpu", max_model_len=64)
    for stage in plan.stages:
        for block in stage.blocks.values():
            for op in block:
                if op.workspace:
                    op.workspace = (op.workspace[0], 64)
    path = tmp_path / "plan.json"
    path.write_text(plan.dump())
    with pytest.raises(LabinferError) as caught, labinfer.load(path) as model:
        model.logits(PROMPT)
    assert caught.value.code


@pytest.mark.parametrize("folder", FOLDERS[::2], ids=lambda folder: folder.name)
def test_poison_changes_no_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = []
    for poison in ("0", "1"):
        monkeypatch.setenv("LABINFER_POISON", poison)
        with load(folder) as model:
            logits.append(model.logits(PROMPT))
    np.testing.assert_array_equal(*logits)


def test_every_value_can_be_watched_and_replaced() -> None:
    """Plain values, those written over their operands, and those inside fused ops."""
    with load(GOLDEN / "llama-llama3") as model, load(GOLDEN / "llama-llama3", devices="reference") as reference:
        [interpreter], plain = model.interpreters, model.logits(PROMPT)
        assert interpreter.inner
        for name in [*interpreter.inner, *interpreter.slots]:
            seen: dict[str, list[np.ndarray]] = {"cpu": [], "reference": []}
            for each, key in ((model, "cpu"), (reference, "reference")):
                with each.listen(name, seen[key].append):
                    each.logits(PROMPT)
            agree(np.concatenate(seen["cpu"]), np.concatenate(seen["reference"]), 2e-5)
        for name in ("layers.0.attn.qkv.k", "layers.0.attn.out", "layers.1.h"):
            with model.listen(name, lambda array: array * 2), reference.listen(name, lambda array: array * 2):
                changed = model.logits(PROMPT)
                agree(changed, reference.logits(PROMPT), 2e-5)
                assert not np.array_equal(changed, plain)
        assert interpreter.inner_memory is None
        np.testing.assert_array_equal(model.logits(PROMPT), plain)


def test_workers_that_fell_asleep_wake_up() -> None:
    with load(GOLDEN / "llama-llama3", threads=3) as model:
        expected = model.logits(PROMPT)
        for pause in (0.0, 0.05, 0.002, 0.05, 0.001, 0.05):
            time.sleep(pause)
            np.testing.assert_array_equal(model.logits(PROMPT), expected)
        with model.session() as session:
            rows = [session.append([PROMPT[0]])]
            for token in PROMPT[1:8]:
                time.sleep(0.05)
                rows.append(session.append([token]))
        agree(np.concatenate(rows), expected[:8], 2e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_and_ends() -> None:
    code = (
        "import os, sys, numpy as np, labinfer\n"
        "model = labinfer.load(sys.argv[1], devices='cpu', threads=3, max_model_len=64)\n"
        "expected = model.logits([1, 2, 3])\n"
        "if os.fork() == 0:\n"
        "    same = np.array_equal(model.logits([1, 2, 3]), expected)\n"
        "    sys.exit(0 if same else 7)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 0\n"
        "if os.fork() == 0:\n"
        "    sys.exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 0\n"
        "assert np.array_equal(model.logits([1, 2, 3]), expected)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(GOLDEN / "llama-llama3")], timeout=120, check=False)
    assert done.returncode == 0


def run_until(timer: threading.Timer, model: labinfer.LLM) -> None:
    """Start ``timer``, whose signal may come before ``start`` is back, and run for a minute."""
    timer.start()
    started = time.perf_counter()
    while time.perf_counter() - started < 60:
        model.logits(PROMPT[:3])


def test_ctrl_c_stops_a_long_generation_and_the_model_goes_on() -> None:
    """Signals between and within steps: none may leave the workers in the middle of one."""
    with load(GOLDEN / "llama-llama3", threads=2) as model:
        expected = model.logits(PROMPT)
        for turn in range(60):
            timer = threading.Timer(0.002 + turn * 0.000_17, os.kill, (os.getpid(), signal.SIGINT))
            started = time.perf_counter()
            with pytest.raises(KeyboardInterrupt):
                run_until(timer, model)
            assert time.perf_counter() - started < 30
            assert model.blocks.usage == 0
        np.testing.assert_array_equal(model.logits(PROMPT), expected)
