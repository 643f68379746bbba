"""Several decode steps in one call, on a device that chooses the likeliest tokens itself.

Between two steps the host takes longer than it computes: weights have passed through the caches, and what the host needs
comes from far away. So a few steps run at a time where nothing needs the host in between. Tokens are the same, they
come in bunches. Known as multi-step scheduling.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from labinfer.runtime.batch import Part
from labinfer.runtime.scheduler import Scheduler

if TYPE_CHECKING:
    from labinfer.runtime.model import Model
    from labinfer.runtime.speculation.speculation import Take

STEPS, SECONDS = 4, 0.01
"""Steps in one call at most, and how long they may take: so long a new request, or an end, may have to wait."""


class MultiStep:
    """Decides how many steps of ``scheduler`` run in one call on the only stage of ``model``."""

    def __init__(self, model: Model, scheduler: Scheduler) -> None:
        [self.interpreter] = model.interpreters
        self.scheduler, self.batch = scheduler, scheduler.batch

    def extend(self, part: Part) -> Part:
        """``part`` as several steps where that can be; its rows then own blocks for all of them."""
        steps = self.steps(part)
        if steps < 2:
            return part
        rows, batch = part.rows, self.batch
        if batch.grow(Part(rows, steps * part.counts, part.wanted, part.new)) is not None:
            batch.blocks.shrink(rows, batch.num_computed[rows] + part.counts)
            return part
        return part._replace(steps=steps)

    def steps(self, part: Part) -> int:
        """How many steps ``part`` may be: nobody waits, no row ends before the last, and each takes the likeliest."""
        batch, rows, scheduler = self.batch, part.rows, self.scheduler
        if not part.decodes or scheduler.waiting or self.interpreter.listeners:
            return 1
        seconds = scheduler.costs.decode_seconds(len(rows))
        if seconds is None or 2 * seconds > SECONDS or not batch.plain[rows].all() or batch.scored[rows].any():
            return 1
        for row in rows[batch.watched[rows]].tolist():
            if scheduler.owners[row].request.metrics.first_token_time is None:  # others may branch off
                return 1
        return min(STEPS, int(SECONDS / seconds), int((batch.end[rows] - batch.num_tokens[rows]).min()))

    def take(self, part: Part, made: np.ndarray, take: Take) -> None:
        """Make the tokens ``made``, int32 [steps, rows], of ``part``; those after the end of a sequence are dropped."""
        batch, rows, owners = self.batch, part.rows, self.scheduler.owners
        goes_on = np.ones(len(rows), np.bool_)
        for step, tokens in enumerate(made):
            if step:
                goes_on[goes_on] = [owners[row].finish_reason is None for row in rows[goes_on].tolist()]
                batch.num_computed[rows[goes_on]] += 1
                batch.num_tokens[rows[goes_on]] += 1
            take(rows[goes_on], tokens[goes_on, None])


def multi_step_of(model: Model, scheduler: Scheduler) -> MultiStep | None:
    """The multi-step scheduling of an engine; None where a device cannot, or with ``LABINFER_MULTI_STEP=0``."""
    if os.environ.get("LABINFER_MULTI_STEP") == "0" or model.pipeline is not None or len(model.interpreters) != 1:
        return None
    [interpreter] = model.interpreters
    able = interpreter.device.decodes_alone and interpreter.streamed is None
    return MultiStep(model, scheduler) if able and model.batch.blocks.recompute_after is None else None
