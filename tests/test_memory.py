"""Memory: exactly the plan's bytes while a model is open, none of it after, whatever happened in between."""

from __future__ import annotations

import gc
import json
import os
import tracemalloc
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import labinfer
from labinfer.backends.base import Allocator
from labinfer.backends.host import HostAllocator
from labinfer.backends.reference.device import ReferenceDevice
from labinfer.errors import DoesNotFit, LabinferError, WeightsError
from labinfer.ops.formats import stored_bytes
from labinfer.replanning import with_layers
from labinfer.runtime.manager import Manager
from labinfer.runtime.stage import Kept, LoadedStage
from labinfer.runtime.weights import open_checkpoint

from .tiny import FOLDERS, GOLDEN, tensors, tiny_plan


def allocated(manager: Manager) -> dict[str, int]:
    return {name: device.allocator.allocated for name, device in manager.devices.items()}


@pytest.mark.parametrize("devices", ["reference", "reference,reference:1"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_plans_bytes_exactly(folder: Path, devices: str) -> None:
    manager = Manager()
    with labinfer.load(folder, devices=devices, manager=manager, max_num_batched_tokens=20) as model:
        for stage in model.plan.stages:
            taken: dict[str, int] = {}
            for buffer in manager.devices[stage.device].allocator.buffers:
                taken[buffer.label] = buffer.nbytes
            bytes_ = stage.bytes
            assert taken == {
                "weights": bytes_.weights, "kv cache": bytes_.kv_cache, "arena": bytes_.arena, "step": bytes_.step
            }  # fmt: skip
            assert manager.grants.on(stage.device) == bytes_.total
        expected = {stage.device: stage.bytes.total for stage in model.plan.stages}
        assert allocated(manager) == expected
        model.logits(list(range(30)))
        assert allocated(manager) == expected
        assert {name: device.allocator.peak for name, device in manager.devices.items()} == expected
    assert not any(allocated(manager).values())
    assert not any(device.allocator.buffers for device in manager.devices.values())
    assert not manager.grants.given


def test_a_stage_takes_over_the_layers_that_it_has_and_no_byte_more_than_either_plan_says() -> None:
    folder, manager = GOLDEN / "gemma3_text-linear_global", Manager()
    before = labinfer.compile(folder, devices="reference,reference:1")
    with_more, with_fewer = with_layers(before, [5, 2], folder), with_layers(before, [2, 5], folder)
    device, checkpoint = manager.device("reference"), open_checkpoint(folder)
    with closing(checkpoint), ExitStack() as stack:
        kept: Kept = {}
        for plan in (before, with_more, with_fewer, before):
            loaded: list[int] = []
            there, names = device.allocator.allocated, {each.name for group in kept for each in group}
            device.allocator.peak = there
            stage = LoadedStage(plan, 0, device, kept=kept)
            stage.load(checkpoint, loaded.append, lambda *_: None)
            bytes_ = plan.stages[0].bytes
            assert device.allocator.allocated == bytes_.total
            assert device.allocator.peak == max(there, bytes_.total)
            used = {weight for each in stage.parameters for weight in each.weights}
            sizes = {weight.name: stored_bytes(weight.format, weight.shape) for weight in used}
            assert stage.kept_bytes == sum(size for name, size in sizes.items() if name in names)
            assert sum(loaded) == sum(sizes.values()) - stage.kept_bytes
            fresh = stack.enter_context(closing(LoadedStage(plan, 0, ReferenceDevice("reference"))))
            fresh.load(checkpoint, lambda _: None, lambda *_: None)
            expected = {name: array for each in fresh.parameters for name, array in each.arrays().items()}
            arrays = {name: array for each in stage.parameters for name, array in each.arrays().items()}
            assert arrays.keys() == expected.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, expected[name])
            kept = stage.rest()
            assert device.allocator.allocated == bytes_.weights
        for left in kept.values():
            left.close()
    assert not any(allocated(manager).values())


def test_models_share_devices_and_leave_each_other_alone() -> None:
    manager = Manager()
    first = labinfer.load(GOLDEN / "llama-llama3", manager=manager)
    second = labinfer.load(GOLDEN / "gpt2-untied_inner", manager=manager)
    expected = first.logits([1, 2, 3])
    assert allocated(manager) == {"reference": sum(m.plan.stages[0].bytes.total for m in (first, second))}
    second.close()
    np.testing.assert_array_equal(first.logits([1, 2, 3]), expected)
    first.close()
    assert allocated(manager) == {"reference": 0}


def damage(folder: Path, change: dict[str, np.ndarray | None]) -> None:
    """Change tensors of the tiny checkpoint on disk."""
    left = {name: array for name, array in (tensors() | change).items() if array is not None}
    save_file(left, folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [{"layers.1.out": None}, {"layers.2.out": np.zeros((8, 9), np.float32)}, {"head": np.zeros((16, 8), np.float16)}],
    ids=["missing", "shape", "format"],
)
@pytest.mark.parametrize("devices", ["reference", "reference,reference:1"])
def test_a_load_that_fails_midway_gives_all_back(tmp_path: Path, change: dict[str, Any], devices: str) -> None:
    path, data = tiny_plan(tmp_path, devices=devices)
    damage(tmp_path, change)
    del data["source"]["sha256"]["weights"]  # let it come as far as reading the weights
    path.write_text(json.dumps(data))
    manager = Manager()
    before = open_files()
    with pytest.raises(WeightsError) as caught:
        labinfer.load(path, manager=manager)
    assert (caught.value.code, caught.value.exit_code) == ("weights.changed", 5)
    assert not any(allocated(manager).values())
    assert not manager.grants.given
    del caught
    gc.collect()
    assert open_files() == before


@pytest.mark.parametrize("label", ["weights", "kv cache", "step", "arena"])
def test_an_allocation_that_fails_gives_all_back(tmp_path: Path, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = tiny_plan(tmp_path, devices="reference,reference:1")
    manager, allocate = Manager(), Allocator.allocate

    def failing(self: Allocator, nbytes: int, wanted: str) -> Any:
        if wanted == label and self is manager.devices["reference:1"].allocator:
            raise DoesNotFit("device.memory", "full")
        return allocate(self, nbytes, wanted)

    manager.device("reference:1")
    monkeypatch.setattr(Allocator, "allocate", failing)
    with pytest.raises(DoesNotFit):
        labinfer.load(path, manager=manager)
    assert not any(allocated(manager).values())
    assert not manager.grants.given


def test_a_device_with_too_little_memory(tmp_path: Path) -> None:
    path, data = tiny_plan(tmp_path)
    needed = sum(data["stages"][0]["bytes"].values())
    for memory in (needed - 1, needed):
        manager = Manager(devices={"reference": ReferenceDevice("reference", memory)})
        if memory < needed:
            with pytest.raises(DoesNotFit) as caught:
                labinfer.load(path, manager=manager)
            assert (caught.value.code, caught.value.exit_code) == ("device.memory", 4)
        else:
            labinfer.load(path, manager=manager).close()
        assert allocated(manager) == {"reference": 0}


def test_a_quota_is_kept(tmp_path: Path) -> None:
    path, data = tiny_plan(tmp_path)
    needed = sum(data["stages"][0]["bytes"].values())
    manager = Manager(quotas={"reference": 2 * needed - 1})
    first = labinfer.load(path, manager=manager)
    with pytest.raises(DoesNotFit) as caught:
        labinfer.load(path, manager=manager)
    assert caught.value.code == "device.quota"
    first.close()
    labinfer.load(path, manager=manager).close()
    assert not manager.grants.given


def test_memory_beyond_the_machine_does_not_fit() -> None:
    for nbytes in (1 << 50, 1 << 62, 1 << 63, 1 << 80):
        with pytest.raises(DoesNotFit):
            HostAllocator().allocate(nbytes, "everything")


def test_giving_back_twice_is_an_error() -> None:
    allocator = HostAllocator()
    buffer = allocator.allocate(8, "once")
    allocator.deallocate(buffer)
    with pytest.raises(KeyError):
        allocator.deallocate(buffer)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_two_hundred_models_leave_nothing(tmp_path: Path) -> None:
    path, _ = tiny_plan(tmp_path, max_num_batched_tokens=8, max_model_len=64)

    def cycle(count: int) -> None:
        for _ in range(count):
            with labinfer.load(path) as model:
                model.logits([1, 2, 3])

    def grown(count: int) -> int:
        """Bytes that Python has more after so many models."""
        before = tracemalloc.take_snapshot()
        cycle(count)
        gc.collect()
        after = tracemalloc.take_snapshot()
        return sum(change.size_diff for change in after.compare_to(before, "filename"))

    cycle(20)
    gc.collect()
    files, memory = open_files(), resident()
    tracemalloc.start()
    # Python's table of interned strings doubles once in a while, by megabytes: what models leave is in both halves.
    halves = [grown(100), grown(100)]
    tracemalloc.stop()
    assert min(halves) < 100_000  # the models left behind would be 10 MB, their plans 2 MB
    assert resident() - memory < 40_000_000
    assert open_files() == files


def test_a_model_without_a_with_goes_with_its_last_reference(tmp_path: Path) -> None:
    path, _ = tiny_plan(tmp_path)
    files = open_files()
    for _ in range(5):
        labinfer.load(path).logits([1])
    gc.collect()
    assert open_files() == files


def test_failed_loads_leave_no_files_open(tmp_path: Path) -> None:
    path, data = tiny_plan(tmp_path)
    data["source"]["sha256"]["map"] = "0"
    path.write_text(json.dumps(data))
    files = open_files()
    for _ in range(20):
        with pytest.raises(LabinferError):
            labinfer.load(path)
    gc.collect()
    assert open_files() == files
