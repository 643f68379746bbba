"""Measures how quickly layers are streamed to a device, and how much of that hides behind its computing."""

from __future__ import annotations

import time

from labinfer.compiler.costs import DeviceProfile, Measured, StepShape, StreamProfile
from labinfer.compiler.costs.plans import predict_plan
from labinfer.compiler.plan import Plan
from labinfer.profile.measure import measure_step, warm_up
from labinfer.profile.quiet import Patience
from labinfer.profile.synthetic import SyntheticCheckpoint
from labinfer.runtime.cache import CacheOptions
from labinfer.runtime.model import Model
from labinfer.runtime.streamed_window import StreamedWindow

STEP = StepShape.decode(1, 16)
RUNS = 5


def measure_streaming(plan: Plan, profile: DeviceProfile, patience: Patience) -> StreamProfile:
    """The streaming of the one device of ``plan``, which streams layers from the host, in a decode step of one token.

    What it adds to a step of resident layers, by the ``profile`` of them, is copying, by itself or slower where it and
    computing disturb each other, less what hides behind computing.
    """
    (stage,) = plan.stages
    (resident,) = predict_plan(plan, {stage.device: Measured(profile)}, {}, STEP)
    with Model(plan, SyntheticCheckpoint(plan), cache=CacheOptions(enable_prefix_caching=False)) as model:
        warm_up(model)
        (loaded,) = model.stages
        assert loaded.streamed is not None
        copying = min(copy_seconds(loaded.streamed) for _ in range(RUNS))  # others can only make it longer
        added = measure_step(model, STEP, patience).whole - resident.total
    copying = max(copying, added)
    overlap = (copying - added) / min(resident.seconds, copying)
    return StreamProfile(bandwidth=round(stage.bytes.host / copying), overlap=round(min(overlap, 1.0), 3))


def copy_seconds(streamed: StreamedWindow) -> float:
    """Seconds for bringing all layers once, with nothing else running; those that were on their way do not count."""
    for _ in range(2):
        started = time.perf_counter()
        for layer in streamed.layers:
            streamed.reach(layer)
        streamed.device.synchronize()
        streamed.end()
    return time.perf_counter() - started
