"""Measures every op of a model inside whole steps, as the model runs them.

An op that runs by itself, again and again, finds its weights in a cache and is faster than it ever will be in a model.
So whole steps run, on memory as a plan lays it out, with a clock between the ops: each op then meets the caches as its
predecessor left them, and the times of all ops add up to that of the step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from labinfer.backends.base import fingerprint
from labinfer.compiler.costs import CostTable, DeviceProfile, Fingerprint, LinkProfile, Signer, StepShape
from labinfer.compiler.costs.plans import stage_signer
from labinfer.compiler.graph import Op
from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError
from labinfer.profile.grid import Grid
from labinfer.profile.links import measure_out
from labinfer.profile.quiet import FOREIGN_SHARE, Foreign, Patience
from labinfer.profile.synthetic import SyntheticCheckpoint
from labinfer.progress import Progress
from labinfer.runtime.batch import Part
from labinfer.runtime.cache import CacheOptions
from labinfer.runtime.model import Model
from labinfer.runtime.step_memory import StepBatch

BUDGET_SECONDS, FEWEST_RUNS, MOST_RUNS = 0.3, 3, 25
"""A step is run for so long until it counts, and for so long again, but then so many times at least and at most."""

MOST_TRIES = 4
DIGITS = 10
"""Decimals of seconds in a profile: a tenth of a nanosecond."""

QUIET, BUSY = 0.5, 0.1
"""Which quantile of the runs counts: the median, or a quick one where other programs are busy all the time, which can
only make a run longer."""


Runs = tuple[np.ndarray, list[np.ndarray]]
"""Seconds of each run of a whole step [runs], and of the ops of each stage [runs, ops]."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A step as measured: seconds of each run of the whole, the ops of each stage, and seconds of each run of these
    [runs, ops]. ``quantile`` of the runs is what counts."""

    runs: np.ndarray
    ops: list[list[Op]]
    op_runs: list[np.ndarray]
    quantile: float

    @property
    def whole(self) -> float:
        """Seconds of the whole step."""
        return float(np.quantile(self.runs, self.quantile))

    def of_stage(self, stage: int) -> np.ndarray:
        """Seconds of each op of a stage [ops], which add up to those of the stage.

        Medians of ops do not: what hits another op in each run is in none of them. All ops get their share of it.
        """
        runs = self.op_runs[stage]
        each = np.quantile(runs, self.quantile, axis=0)
        whole = np.quantile(runs.sum(axis=1), self.quantile)
        return np.asarray(each * (whole / each.sum() if each.sum() else 1.0))

    def of_ops(self, stage: int) -> list[tuple[Op, float]]:
        """Each op of a stage with its seconds."""
        return list(zip(self.ops[stage], self.of_stage(stage).tolist(), strict=True))

    def rest(self) -> float:
        """Seconds of the step beside its ops: each whole run is compared with the ops of the run after it, since what
        disturbs a machine lasts longer than both."""
        computing = sum(runs.sum(axis=1) for runs in self.op_runs)
        return float(np.median(self.runs - computing))


def measure_device(plan: Plan, grid: Grid, quick: bool, patience: Patience, progress: Progress) -> DeviceProfile:
    """The profile of the one device of ``plan``, which runs the whole model on made-up weights."""
    (name, device), (stage,) = next(iter(plan.devices.items())), plan.stages
    profile = DeviceProfile(device=Fingerprint(**fingerprint(name, device.threads)))
    with Model(plan, SyntheticCheckpoint(plan), cache=CacheOptions(enable_prefix_caching=False)) as model:
        warm_up(model)
        (interpreter,) = model.interpreters
        signer = stage_signer(plan, stage)
        profile.out = measure_out(interpreter.device)
        found: dict[tuple[str, str], dict[tuple[int, int], tuple[float, float]]] = defaultdict(dict)
        steps = grid.steps()
        for number, shape in enumerate(steps):
            progress(f"measuring {name}", number, len(steps))
            record(found, signer, shape, measure_step(model, shape, patience), plan.vocab_size, profile.out)
        progress(f"measuring {name}", len(steps), len(steps))
    for (signature, phase), points in found.items():
        listed = [(tokens, past, seconds, spread) for (tokens, past), (seconds, spread) in sorted(points.items())]
        table = profile.overhead if not signature else profile.ops.setdefault(signature, CostTable(quick=quick))
        setattr(table, phase, listed)
    return profile


def record(
    found: dict[tuple[str, str], dict[tuple[int, int], tuple[float, float]]],
    signer: Signer,
    shape: StepShape,
    times: StepTimes,
    vocab_size: int,
    out: LinkProfile,
) -> None:
    """Add what a step showed to the points of each signature and phase; the overhead has the empty signature.

    Ops of one signature count with their mean, so that sums stay sums.
    """
    (ops,), (runs,), seconds = times.ops, times.op_runs, times.of_stage(0)
    columns: dict[str, list[int]] = defaultdict(list)
    for number, op in enumerate(ops):
        columns[signer.signature(op)].append(number)
    for signature, numbers in columns.items():
        axis = signer.axis(ops[numbers[0]])
        count = shape.rows if axis == "rows" else shape.tokens
        key = (count, shape.past)
        phases = ["step"] if axis != "context" else ["decode", "prefill"] if shape.tokens == 1 else [shape.phase]
        for phase in phases:
            found[signature, phase].setdefault(key, mean_and_spread(runs[:, numbers], seconds[numbers]))
    rest = max(times.rest() - out.seconds(4 * shape.rows * vocab_size), 0.0)
    found["", "step"].setdefault((shape.tokens, 0), (round(rest, DIGITS), 0.0))


def mean_and_spread(runs: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """The mean over ops of their seconds [ops], and the median distance of runs [runs, ops] from these."""
    return round(float(seconds.mean()), DIGITS), round(float(np.median(np.abs(runs - seconds))), DIGITS)


def measure_step(model: Model, shape: StepShape, patience: Patience) -> StepTimes:
    """Run a step of this size, whole and with clocks between its ops in turn, on whatever the cache holds.

    It runs again while others are busy and ``patience`` lasts. A try while they were quiet counts alone, with its
    median; else all of them do.
    """
    with prepared_step(model, shape) as batch:
        timed = []
        for interpreter in model.interpreters:
            interpreter.step_memory.load(batch)
            bound, _ = interpreter.resolve(len(batch.token_ids), len(batch.logits_rows))
            listed = [(each.op, each.kernel, each.call) for each in bound if each.kernel is not None]
            program = interpreter.device.timed([(kernel, call) for _, kernel, call in listed])
            timed.append(([op for op, _, _ in listed], program))
        settle(model, batch)
        programs, tries, quiet = [program for _, program in timed], list[Runs](), False
        while not quiet and len(tries) < (MOST_TRIES if patience.left > 0 else 1):
            patience.wait()
            foreign = Foreign()
            tries.append(run_step(model, batch, programs))
            quiet = foreign.share() <= FOREIGN_SHARE
    counted = tries[-1:] if quiet else tries
    arrays = [np.concatenate(each) for each in zip(*(runs for _, runs in counted), strict=True)]
    whole = np.concatenate([runs for runs, _ in counted])
    return StepTimes(whole, [ops for ops, _ in timed], arrays, QUIET if quiet else BUSY)


def settle(model: Model, batch: StepBatch) -> None:
    """Run a step as often as it takes to become as quick as it will be: at least once, which binds its tape.

    After other steps, such as a prompt, the large cache of a CPU takes in the weights of a small model by and by:
    steps of one token get quicker by a fifth within the first 40.
    """
    started = time.perf_counter()
    while True:
        model.run(batch)
        if time.perf_counter() - started >= BUDGET_SECONDS:
            return


def run_step(model: Model, batch: StepBatch, programs: Sequence[Callable[[], Sequence[float]]]) -> Runs:
    """Run the whole and the clocked stages in turn."""
    whole: list[float] = []
    runs: list[list[np.ndarray]] = [[] for _ in programs]
    started = time.perf_counter()
    while len(whole) < FEWEST_RUNS or (len(whole) < MOST_RUNS and time.perf_counter() - started < BUDGET_SECONDS):
        start = time.perf_counter()
        model.run(batch)
        whole.append(time.perf_counter() - start)
        for seconds, program in zip(runs, programs, strict=True):
            seconds.append(np.array(program()))
    return np.array(whole), [np.array(each) for each in runs]


@contextmanager
def prepared_step(model: Model, shape: StepShape) -> Iterator[StepBatch]:
    """The batch of a step of this size: rows whose tokens before it count as computed, and own blocks."""
    batch, limits = model.batch, model.plan.limits
    count, random = shape.tokens // shape.sequences, np.random.default_rng(0)
    rows = [batch.add(random.integers(model.vocab_size, size=shape.past + count)) for _ in range(shape.sequences)]
    try:
        for row in rows:
            for start in range(0, shape.past, limits.max_num_batched_tokens):  # a window gives back what it passed
                grow(model, [row], min(limits.max_num_batched_tokens, shape.past - start))
                batch.num_computed[row] += min(limits.max_num_batched_tokens, shape.past - start)
                batch.commit(part_of_rows([row], 1))
        yield batch.step(grow(model, rows, count))
    finally:
        for row in rows:
            batch.remove(row)


def part_of_rows(rows: list[int], count: int) -> Part:
    """The next ``count`` tokens of each of ``rows``, with a row of logits for each."""
    ones = np.ones(len(rows), np.int32)
    return Part(np.array(rows), ones * np.int32(count), ones, ones, decodes=count == 1)


def grow(model: Model, rows: list[int], count: int) -> Part:
    """Give ``rows`` blocks for their next ``count`` tokens."""
    part = part_of_rows(rows, count)
    if model.batch.grow(part) is not None:
        raise LabinferError("run.cache-full", "the cache has too few blocks for the step to be measured")
    return part


def warm_up(model: Model) -> None:
    """Bring memory to the state it has in a service: pages of the cache that were never written are all one, and are
    read from a CPU's cache; and decoding is quicker, by a tenth on CPUs, after a prompt than before the first."""
    for cache in model.cache.arrays:
        cache.device.fill(cache.buffer, 0x3C)
    limits = model.plan.limits
    longest = min(limits.max_num_batched_tokens, limits.max_sequence_len)
    with prepared_step(model, StepShape.prefill(longest)) as batch:
        model.run(batch)
