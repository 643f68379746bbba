"""Measures what a pipeline costs a step beside what its stages compute: the engine's part, the first stage's, the way
back of the logits."""

from __future__ import annotations

import time
from statistics import median

from labinfer.compiler.costs import CostTable, StepShape
from labinfer.compiler.plan import Plan
from labinfer.profile.grid import Grid
from labinfer.profile.measure import DIGITS, prepared_step, settle, warm_up
from labinfer.profile.quiet import Patience
from labinfer.profile.synthetic import SyntheticCheckpoint
from labinfer.runtime.cache import CacheOptions
from labinfer.runtime.model import Model

RUNS = 9


def measure_around(plan: Plan, grid: Grid, patience: Patience) -> CostTable:
    """What steps take in a pipeline of the one stage of ``plan``, beside that; the stage is a thread here."""
    cache, found = CacheOptions(enable_prefix_caching=False), CostTable()
    with Model(plan, SyntheticCheckpoint(plan), cache=cache, transport="local") as model:
        warm_up(model)
        for counts, shape_of, points in (
            (grid.decode, StepShape.decode, found.decode),
            (grid.prefill, StepShape.prefill, found.prefill),
        ):
            for count in counts:
                patience.wait()
                runs = around_runs(model, shape_of(count, 0))
                middle = median(runs)
                spread = median(abs(each - middle) for each in runs)
                points.append((count, 0, round(middle, DIGITS), round(spread, DIGITS)))
    return found


def around_runs(model: Model, shape: StepShape) -> list[float]:
    """Seconds of some runs of a step, less what its stage took of each."""
    assert model.pipeline is not None
    runs = []
    with prepared_step(model, shape) as batch:
        settle(model, batch)
        for _ in range(RUNS):
            started = time.perf_counter()
            model.run(batch)
            whole = time.perf_counter() - started
            [[began, ended]] = model.pipeline.spans[-1]
            runs.append(whole - (ended - began))
    return runs
