"""Memory of the CPU device: exactly the plan's bytes, nothing more in a step, nothing left after, threads included."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from safetensors.numpy import save_file

import labinfer
from labinfer.backends.cpu.workers import Workers
from labinfer.errors import DoesNotFit, LabinferError
from labinfer.runtime.batch import part_of
from labinfer.runtime.manager import Manager
from labinfer.runtime.model import Model
from tests.tiny import FOLDERS, GOLDEN, tensors, tiny_plan

LABELS = {"weights": "weights", "kv cache": "kv_cache", "arena": "arena", "step": "step", "rope tables": "tables"}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_plans_bytes_exactly(folder: Path, kv_dtype: str) -> None:
    manager = Manager()
    options = {"max_num_batched_tokens": 20, "max_model_len": 64, "kv_dtype": kv_dtype, "arena_effort_seconds": 0.05}
    with labinfer.load(folder, devices="cpu", manager=manager, **options) as model:
        allocator, [stage] = manager.devices["cpu"].allocator, model.plan.stages
        model.logits(list(range(30)))
        taken = dict.fromkeys(LABELS.values(), 0)
        for buffer in allocator.buffers:
            taken[LABELS[buffer.label]] += buffer.nbytes
        assert taken == {name: getattr(stage.bytes, name) for name in taken}
        assert allocator.allocated == allocator.peak == stage.bytes.total
    gc.collect()
    assert allocator.allocated == 0
    assert not allocator.buffers
    manager.close()


def decode(model: Model, steps: int) -> None:
    """A sequence decoded over and over: the steps of an engine without its requests."""
    row = model.batch.add([1, 2, 3])
    model.compute(part_of(row, 2, 0))
    part = part_of(row, 1, 1)
    assert model.batch.grow(part) is None
    step = model.batch.step(part)
    for _ in range(steps):
        model.run(step)
    model.batch.remove(row)


def test_a_step_allocates_nothing() -> None:
    with labinfer.load(GOLDEN / "llama-llama3", devices="cpu", threads=2, max_model_len=64) as model:
        decode(model, 50)
        gc.collect()
        tracemalloc.start()
        try:
            decode(model, 20)
            before, used = tracemalloc.take_snapshot(), tracemalloc.get_traced_memory()[0]
            decode(model, 1000)
            gc.collect()
            after, left = tracemalloc.take_snapshot(), tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        own = [tracemalloc.Filter(True, "*/labinfer/*")]
        grown = after.filter_traces(own).compare_to(before.filter_traces(own), "lineno")
        assert sum(change.size_diff for change in grown) < 12_000, grown[:5]  # a thousand objects would be 16,000
        assert left - used < 500_000  # the first snapshot itself is in it
        memory, started, count = resident(), time.monotonic(), 0
        while count < 10_000 and time.monotonic() - started < 15:
            decode(model, 500)
            count += 500
        assert count >= 1000
        assert resident() - memory < 2_000_000


def test_loading_and_closing_leaves_nothing(tmp_path: Path) -> None:
    path, _ = tiny_plan(tmp_path, devices="cpu", threads=3, max_num_batched_tokens=8, max_model_len=64)
    before = set(threading.enumerate())

    def cycle(count: int) -> None:
        for _ in range(count):
            with labinfer.load(path) as model:
                model.logits([1, 2, 3])
                assert len(set(threading.enumerate()) - before) == 2

    cycle(10)
    gc.collect()
    files, memory = len(os.listdir("/proc/self/fd")), resident()
    cycle(50)
    gc.collect()
    assert set(threading.enumerate()) <= before
    assert len(os.listdir("/proc/self/fd")) == files
    assert resident() - memory < 10_000_000


def test_a_model_closes_what_it_opened(tmp_path: Path) -> None:
    path, _ = tiny_plan(tmp_path, devices="cpu", threads=2)
    before = set(threading.enumerate())
    model = labinfer.load(path)
    model.close()
    model.close()
    assert not model.manager.devices
    assert set(threading.enumerate()) <= before


def test_threads_go_with_their_owner() -> None:
    before = set(threading.enumerate())
    workers = Workers(3)
    made = set(threading.enumerate()) - before
    assert len(made) == 2
    del workers
    gc.collect()
    for thread in made:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("why", ["weights", "memory"])
def test_a_load_that_fails_leaves_nothing(tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tiny_plan(tmp_path, devices="cpu", threads=3)
    before = set(threading.enumerate())
    manager = Manager()
    if why == "memory":
        device = manager.device("cpu", 3)
        device.allocator.limit = sum(data["stages"][0]["bytes"].values()) - 1
    else:
        (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    for _ in range(3):
        with pytest.raises(DoesNotFit if why == "memory" else LabinferError):
            labinfer.load(path, manager=manager)
    assert all(device.allocator.allocated == 0 for device in manager.devices.values())
    assert not manager.grants.given
    manager.close()
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_a_load_that_fails_midway_ends_its_threads(tmp_path: Path) -> None:
    """The weights are found wanting once the device, and its threads, are there."""
    path, data = tiny_plan(tmp_path, devices="cpu", threads=3)
    before = set(threading.enumerate())
    left = tensors()
    left["layers.1.out"] = np.zeros((8, 9), np.float32)
    save_file(left, tmp_path / "model" / "model.safetensors")
    del data["source"]["sha256"]["weights"]
    path.write_text(json.dumps(data))
    for _ in range(3):
        with pytest.raises(LabinferError) as caught:
            labinfer.load(path)
        assert caught.value.code == "weights.changed"
    gc.collect()
    assert set(threading.enumerate()) <= before
