"""Measures how quickly layers are streamed to a device, and how much of that hides behind its computing."""

from __future__ import annotations

import time
from statistics import median

from labinfer.backends.base import capabilities
from labinfer.compiler.costs import StepShape, StreamProfile
from labinfer.compiler.plan import Plan
from labinfer.profile.measure import prepared_step, settle, warm_up
from labinfer.profile.quiet import Patience
from labinfer.profile.synthetic import SyntheticCheckpoint
from labinfer.runtime.cache import CacheOptions
from labinfer.runtime.cores import available_cores
from labinfer.runtime.model import Model
from labinfer.runtime.step_memory import StepBatch
from labinfer.runtime.streamed_window import StreamedWindow

STEP = StepShape.decode(1, 16)
RUNS, PAIRS = 9, 5
CACHE = CacheOptions(enable_prefix_caching=False)


def measure_streaming(resident: Plan, streamed: Plan, patience: Patience) -> StreamProfile:
    """The streaming of the one device of both plans, of which one streams layers from the host, in a decode step of one
    token.

    What it adds to a step of resident layers is copying, by itself or slower where it and computing disturb each other,
    less what hides behind computing.
    """
    with Model(streamed, SyntheticCheckpoint(streamed), cache=CACHE) as model:
        (loaded,) = model.stages
        assert loaded.streamed is not None
        copying = min(copy_seconds(loaded.streamed) for _ in range(RUNS))  # others can only make it longer
        computing, added = added_seconds(resident, model, patience, waits=False)
    copying = max(copying, added)
    overlap = (copying - added) / min(computing, copying)
    return StreamProfile(bandwidth=round(streamed.stages[0].bytes.host / copying), overlap=round(min(overlap, 1.0), 3))


def measure_stage_streaming(resident: Plan, streamed: Plan, patience: Patience) -> int:
    """Bytes a second by which streaming lengthens a stage that keeps to the cores of the calling thread, and waits as
    long for the other stages as it computes."""
    with Model(streamed, SyntheticCheckpoint(streamed), cache=CACHE) as model:
        _, added = added_seconds(resident, model, patience, waits=True)
    return round(streamed.stages[0].bytes.host / max(added, 1e-9))


def added_seconds(resident: Plan, model: Model, patience: Patience, waits: bool) -> tuple[float, float]:
    """Seconds of a step of resident layers, and what the layers that ``model`` streams add to it.

    Steps of both run in turn, since what else a machine does changes; with ``waits`` after a pause as long.
    """
    with Model(resident, SyntheticCheckpoint(resident), cache=CACHE) as kept:
        for each in (kept, model):
            warm_up(each)
        with prepared_step(kept, STEP) as one, prepared_step(model, STEP) as other:
            patience.wait()
            pairs = [(step_seconds(kept, one, waits), step_seconds(model, other, waits)) for _ in range(PAIRS)]
    return median(whole for whole, _ in pairs), median(longer - whole for whole, longer in pairs)


def step_seconds(model: Model, batch: StepBatch, waits: bool) -> float:
    """Median seconds of some steps."""
    settle(model, batch)
    seconds = [0.0]
    for _ in range(RUNS):
        if waits:
            time.sleep(seconds[-1])
        started = time.perf_counter()
        model.run(batch)
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def own_cores(plan: Plan) -> list[int]:
    """The cores that the one device of ``plan`` would keep to as a stage of a pipeline; none if these are all it could
    use, or if it does not compute on the host's."""
    ((name, device),) = plan.devices.items()
    cores = available_cores()
    if not device.threads or device.threads >= len(cores) or capabilities(name).processors(name) is not None:
        return []
    return cores[: device.threads]


def copy_seconds(streamed: StreamedWindow) -> float:
    """Seconds for bringing all layers once, with nothing else running; those that were on their way do not count."""
    for _ in range(2):
        started = time.perf_counter()
        for layer in streamed.layers:
            streamed.reach(layer)
        streamed.device.synchronize()
        streamed.end()
    return time.perf_counter() - started
