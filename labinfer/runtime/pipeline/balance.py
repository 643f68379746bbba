"""Moving layers between the stages of a pipeline while it runs: when the measured steps say that it pays.

What counts is the slowest stage, which bounds the tokens per second of a pipeline that is full. A move costs a restart
of the stages, so it must gain much, in every one of the last windows of steps, and rest before the next one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from labinfer.compiler.fold import unfold_ops, unfold_weights
from labinfer.compiler.graph import Op
from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError
from labinfer.ops.formats import stored_bytes
from labinfer.runtime.batch import Part
from labinfer.runtime.pipeline.process import StageDied
from labinfer.runtime.pipeline.workers import ProcessFleet, StageProcesses

WINDOW, WINDOWS = 32, 3
"""Steps of a window, and windows that must agree."""

MIN_GAIN = 1.15
"""How many times quicker a move must make the slowest stage."""

PAYS_WITHIN = 300.0
"""Seconds within which a move must win back what the restart costs, and for which no other follows it."""


def beside_layers(plan: Plan) -> np.ndarray:
    """What each stage multiplies beside its layers, such as the vocabulary's matrix, in layers [stages]: a decode step
    takes as long as its weights have bytes."""
    weights, inside, beside = unfold_weights(plan), 0, list[int]()

    def nbytes(ops: Iterable[Op]) -> int:
        parts = [part for op in ops for part in op.primitives() if part.kind != "embedding"]
        used = [weights[name] for part in parts for name in part.weights.values()]
        return sum(stored_bytes(weight.format, weight.shape) for weight in used)

    for stage in plan.stages:
        ops = [op for op, _ in unfold_ops(stage)]
        inside += nbytes(op for op in ops if op.layer is not None)
        beside.append(nbytes(op for op in ops if op.layer is None))
    layers = sum(len(stage.layers) for stage in plan.stages)
    return np.array(beside) * (layers / max(inside, 1))


def balanced(layers: Sequence[int], beside: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """How many layers each stage should have, one at least, if its ``layers``, all alike, and what is as long as
    ``beside`` more take ``seconds`` now.

    Each layer goes where the stage is quickest with it, which makes the slowest stage as quick as can be.
    """
    each, counts = seconds / (layers + beside), np.ones(len(layers), np.int64)
    for _ in range(sum(layers) - len(layers)):
        counts[((counts + 1 + beside) * each).argmin()] += 1
    return counts


@dataclass(slots=True)
class Balance:
    """Decides whether layers should move, from what each step took in stages that have ``layers`` now, and ``beside``
    them what takes a decode step as long as so many layers [stages]."""

    layers: Sequence[int]
    beside: np.ndarray
    restart_seconds: float = 0.0
    moved_at: float = -math.inf
    steps: list[np.ndarray] = field(default_factory=list)

    def begin(self, layers: Sequence[int], beside: np.ndarray, restart_seconds: float) -> None:
        """Stages with ``layers`` and ``beside`` have been started, which took so long."""
        self.layers, self.beside, self.restart_seconds, self.steps = layers, beside, restart_seconds, []

    def observe(self, seconds: np.ndarray, ended: float, now: float) -> list[int] | None:
        """Take note of the ``seconds`` that each stage was busy with a step; if layers should move, how many each gets.

        Of the step's tokens a part, ``ended``, had logits computed; the others had no part in what is beside the
        layers. Steps are of many sizes, so what counts is the sum of a window.
        """
        self.steps.append(np.append(seconds, ended * seconds.sum()))
        if len(self.steps) < WINDOW * WINDOWS:
            return None
        sums = np.reshape(self.steps, (WINDOWS, WINDOW, -1)).sum(1)
        del self.steps[:WINDOW]
        windows = sums[:, :-1]
        beside = self.beside * sums[:, -1].sum() / windows.sum()
        counts = balanced(self.layers, beside, windows.sum(0))
        moved = windows * (counts + beside) / (self.layers + beside)
        gain = float((windows.max(1) / moved.max(1)).min())
        pays = gain >= MIN_GAIN and self.restart_seconds < (1 - 1 / gain) * PAYS_WITHIN
        if not pays or now - self.moved_at < PAYS_WITHIN:
            return None
        self.moved_at = now
        return [int(count) for count in counts]


@dataclass
class BalancedFleet(ProcessFleet):
    """Processes of this machine whose layers ``move(plan, layers of each stage)`` where ``Balance`` says so."""

    move: Callable[[Plan, Sequence[int]], Plan]
    balance: Balance = field(default_factory=lambda: Balance([], np.zeros(0)))
    plan: Plan | None = None  # what runs
    better: Plan | None = None  # what should run instead
    former: Plan | None = None  # what ran before, until the stages of a better one are started

    def start(self, plan: Plan) -> StageProcesses:
        """See ``Fleet.start``; where layers that moved do not start, another try has them back where they were."""
        began = time.monotonic()
        try:
            processes = super().start(plan)
        except LabinferError as error:
            if self.former is None:
                raise
            raise StageDied(error.code, error.message) from error
        self.plan, self.former = plan, None
        layers = [len(stage.layers) for stage in plan.stages]
        self.balance.begin(layers, beside_layers(plan), time.monotonic() - began)
        return processes

    def observe(self, times: np.ndarray, part: Part) -> None:
        """See ``Fleet.observe``; layers stay where they are if they do not fit where they should go."""
        ended = float(part.wanted.sum() / part.counts.sum())
        counts = self.balance.observe(times[:, 1] - times[:, 0], ended, time.monotonic())
        if counts is not None and self.plan is not None:
            with suppress(LabinferError):
                self.better = self.move(self.plan, counts)

    @property
    def improved(self) -> bool:
        """Whether layers should move."""
        return self.better is not None

    def replan(self, plan: Plan) -> Plan:
        """See ``Fleet.replan``."""
        if self.better is None:
            found, self.former = self.former or plan, None
        else:
            found, self.former, self.better = self.better, plan, None
        return found
