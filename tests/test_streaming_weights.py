"""Layers streamed into a window of the device: the same tokens in less memory, and plans that say so."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer.backends.base import Lane
from labinfer.backends.reference.device import ReferenceDevice
from labinfer.compiler.residency import spread
from labinfer.compiler.verify_plan import verify_plan
from labinfer.errors import InvalidFile, LabinferError, UsageError, WeightsError
from labinfer.runtime.cores import available_cores
from labinfer.runtime.manager import Manager
from labinfer.runtime.pipeline.transport import TRANSPORTS
from labinfer.runtime.queued_weights import QueuedWeights
from labinfer.runtime.streamed_weights import Arrival

from .test_pipeline import DEVICES, greedy, on_one_device, prompts
from .tiny import GOLDEN, tiny_checkpoint, tiny_map, tiny_plan

HOSTED = "llama-llama3"
FAMILIES = ("llama-odd_heads_tied", "gemma3_text-linear_global", "mixtral-window", "deepseek_v2-group_limited")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stream_from", ["host", "disk"])
@pytest.mark.parametrize("layers", [1, 2, 100])
def test_tokens_are_those_of_resident_weights(name: str, stream_from: str, layers: int) -> None:
    with labinfer.load(GOLDEN / name, devices="reference", streamed_layers=layers, stream_from=stream_from) as model:
        assert greedy(model, prompts(name)) == on_one_device(name)


@pytest.mark.parametrize("transport", [None, *TRANSPORTS])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("streamed", [{}, {"stream_from": "host"}, {"stream_from": "disk"}], ids=str)
def test_tokens_are_the_same_over_stages_transports_and_residencies(
    transport: str | None, stages: int, streamed: dict[str, Any]
) -> None:
    name, devices = FAMILIES[0], DEVICES.split(",")[:stages]
    options: dict[str, Any] = {"transport": transport, **(streamed and {"streamed_layers": 2, **streamed})}
    with labinfer.load(GOLDEN / name, devices=",".join(devices), **options) as model:
        assert len(model.plan.stages) == stages
        assert all(bool(stage.streamed) == bool(streamed) for stage in model.plan.stages)
        assert greedy(model, prompts(name)) == on_one_device(name)


@pytest.mark.parametrize("transport", [None, *TRANSPORTS])
@pytest.mark.parametrize("devices", ["reference=0-0,cpu=1-2", "cpu=0-0,reference=1-2"])
def test_tokens_are_the_same_where_the_processor_of_the_host_computes_layers(
    devices: str, transport: str | None
) -> None:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    with labinfer.load(GOLDEN / HOSTED, devices=devices, transport=transport) as model:
        assert [stage.device for stage in model.plan.stages] == [each.split("=")[0] for each in devices.split(",")]
        assert greedy(model, prompts(HOSTED)) == on_one_device(HOSTED)


class HostLane(Lane):
    """Copies at the earliest moment that a device may, or at the latest."""

    def __init__(self, early: bool) -> None:
        self.early = early

    def send(self, host: Any, destination: Any) -> Any:
        copy = partial(np.copyto, destination, host)
        if self.early:
            copy()
        return (lambda: None) if self.early else copy

    def hold(self, ticket: Any) -> None:
        ticket()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3, 100])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_device_that_copies_by_itself_gives_the_tokens_of_resident_weights(
    name: str, layers: int, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReferenceDevice, "lane", lambda device: HostLane(early))
    with labinfer.load(GOLDEN / name, devices="reference", streamed_layers=layers) as model:
        assert isinstance(model.stages[0].streamed, QueuedWeights)
        assert greedy(model, prompts(name)) == on_one_device(name)
        expected = model.logits([1, 2, 3])

        def fail(array: np.ndarray) -> None:
            raise LabinferError("test.fails", "no")

        with model.listen("layers.0.attn.out", fail), pytest.raises(LabinferError):
            model.logits([1, 2, 3])
        np.testing.assert_array_equal(model.logits([1, 2, 3]), expected)


def test_the_device_holds_what_the_plan_says(tmp_path: Any) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plans = [labinfer.compile(tiny_map(tmp_path), weights=checkpoint, streamed_layers=count) for count in (0, 3)]
    resident, streamed = (plan.stages[0].bytes for plan in plans)
    layer = 4 * (3 * 8 * 8 + 8 * 8)
    assert (streamed.weights, streamed.host, streamed.window) == (resident.weights - 3 * layer, 3 * layer, 2 * layer)
    with closing(Manager()) as manager, labinfer.load(plans[1], manager=manager) as model:
        assert manager.devices["reference"].allocator.allocated == model.plan.stages[0].bytes.total


def test_a_failing_step_leaves_the_layers_in_order() -> None:
    with labinfer.load(GOLDEN / FAMILIES[0], streamed_layers=100) as model:
        expected = model.logits([1, 2, 3])
        for layer in range(2):

            def fail(array: np.ndarray) -> None:
                raise LabinferError("test.fails", "no")

            with model.listen(f"layers.{layer}.attn.out", fail), pytest.raises(LabinferError):
                model.logits([1, 2, 3])
            np.testing.assert_array_equal(model.logits([1, 2, 3]), expected)


def test_an_interrupted_wait_leaves_the_layers_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = tiny_plan(tmp_path, streamed_layers=3)
    with labinfer.load(path) as model:
        expected = model.logits([1, 2, 3])
        streamed = model.stages[0].streamed
        assert streamed is not None
        wait, waits, bring = streamed.wait, itertools.count(), Arrival.bring

        def slowly(arrival: Arrival) -> None:
            if threading.current_thread() is streamed.thread:
                time.sleep(0.02)
            bring(arrival)

        def interrupted() -> Arrival:
            if next(waits) == 1:  # for the second layer
                raise KeyboardInterrupt
            return wait()

        monkeypatch.setattr(Arrival, "bring", slowly)
        monkeypatch.setattr(streamed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.logits([1, 2, 3])
        for _ in range(3):
            np.testing.assert_array_equal(model.logits([1, 2, 3]), expected)


@pytest.mark.parametrize(
    "options", [{"devices": "reference"}, {"devices": "cpu", "threads": len(available_cores())}], ids=str
)
def test_a_file_that_cannot_be_read_ends_steps_until_it_can_be_read_again(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    if options["devices"] == "cpu":
        pytest.importorskip("numba", reason="the CPU backend needs numba")
    folder = Path(shutil.copytree(GOLDEN / FAMILIES[0], tmp_path / "model"))
    file, prompt = folder / "model.safetensors", [1, 2, 3]
    content = file.read_bytes()
    with labinfer.load(folder, streamed_layers=100, stream_from="disk", **options) as model:
        expected = greedy(model, [prompt])
        for _ in range(2):
            os.truncate(file, len(content) // 2)
            for _ in range(2):
                with pytest.raises(WeightsError) as error:
                    greedy(model, [prompt])
                assert error.value.code == "weights.truncated"
            file.write_bytes(content)
            assert greedy(model, [prompt]) == expected
        assert model.blocks.usage == 0


@pytest.mark.skipif(len(available_cores()) < 2, reason="needs two cores")
@pytest.mark.parametrize("threads", [1, len(available_cores())])
@pytest.mark.parametrize("stream_from", ["host", "disk"])
def test_layers_are_copied_ahead_unless_the_device_computes_with_all_cores(threads: int, stream_from: str) -> None:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    name = FAMILIES[0]
    options: dict[str, Any] = {"devices": "cpu", "threads": threads, "max_model_len": 64}
    with labinfer.load(GOLDEN / name, **options) as model:
        expected = greedy(model, prompts(name))
    with labinfer.load(GOLDEN / name, streamed_layers=100, stream_from=stream_from, **options) as model:
        streamed = model.stages[0].streamed
        assert streamed is not None
        assert (streamed.thread is not None) == (threads == 1)
        assert greedy(model, prompts(name)) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda stage: stage.streamed.append(7),
        lambda stage: stage.streamed.reverse(),
        lambda stage: stage.streamed.clear(),
        lambda stage: setattr(stage.bytes, "window", 0),
        lambda stage: setattr(stage.bytes, "window", 100),
    ],
)
def test_wrong_residencies_are_refused(tmp_path: Any, change: Callable[[Any], None]) -> None:
    plan = labinfer.compile(tiny_map(tmp_path), weights=tiny_checkpoint(tmp_path / "model"), streamed_layers=3)
    verify_plan(plan, "plan.json")
    change(plan.stages[0])
    with pytest.raises(InvalidFile) as error:
        verify_plan(plan, "plan.json")
    assert error.value.code == "plan.residency"


def test_a_window_too_small_for_a_layer_is_refused(tmp_path: Any) -> None:
    plan = labinfer.compile(tiny_map(tmp_path), weights=tiny_checkpoint(tmp_path / "model"), streamed_layers=3)
    plan.stages[0].bytes.window //= 2
    with pytest.raises(InvalidFile, match="slots of"):
        labinfer.load(plan)


@pytest.mark.parametrize("options", [{"streamed_layers": -1}, {"stream_from": "moon"}])
def test_wrong_options_are_refused(tmp_path: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        labinfer.compile(tiny_map(tmp_path), **options)


def test_layers_are_spread() -> None:
    assert spread(range(9), 3) == [1, 4, 7]
    assert spread(range(4), 4) == [0, 1, 2, 3]
    assert spread(range(4), 0) == []
