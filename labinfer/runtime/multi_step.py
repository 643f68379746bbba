"""Several decode steps in one call, on a device that chooses the likeliest tokens itself.

Between two steps the host takes longer than its work does otherwise: weights have passed through the caches, and what
it needs comes from far away. So a few steps run at a time where none needs the host before the last is done. The tokens
are the same; they come in bunches. Known as multi-step scheduling.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from labinfer.runtime.batch import Part

if TYPE_CHECKING:
    from labinfer.runtime.engine import Engine

STEPS, SECONDS = 8, 1 / 60
"""Steps in one call at most, and how long they may take together: whoever is new waits so long, or who ends meanwhile.

A screen shows what is new as often.
"""


class MultiStep:
    """Decides how many steps of ``engine`` run in one call, on the only stage of its model."""

    def __init__(self, engine: Engine) -> None:
        [self.interpreter] = engine.model.interpreters
        self.engine, self.batch, self.scheduler = engine, engine.batch, engine.scheduler

    def extend(self, part: Part) -> Part:
        """``part`` as several steps where that can be; its rows then own blocks for all of them."""
        steps = self.steps(part)
        if steps < 2:
            return part
        counts = part.counts * np.int32(steps)
        longer = part._replace(counts=counts, new=counts, steps=steps)
        if self.batch.grow(longer) is not None:
            self.batch.blocks.shrink(part.rows, self.batch.num_computed[part.rows] + part.counts)
            return part
        return longer

    def steps(self, part: Part) -> int:
        """How many steps ``part`` may be: nobody waits, no row ends by its length, and each takes the likeliest."""
        batch, rows, scheduler = self.batch, part.rows, self.scheduler
        if not part.decodes or scheduler.waiting or self.interpreter.listeners:
            return 1
        seconds = scheduler.costs.decode_seconds(len(rows))
        if seconds is None or 2 * seconds > SECONDS or not batch.plain[rows].all():
            return 1
        for row in rows[batch.watched[rows]].tolist():
            if scheduler.owners[row].request.metrics.first_token_time is None:  # others may branch off
                return 1
        return min(STEPS, int(SECONDS / seconds), int((batch.end[rows] - batch.num_tokens[rows]).min()) - 1)

    def take(self, part: Part, made: np.ndarray) -> None:
        """Make the tokens ``made``, int32 [steps, rows], of ``part``, which are counted already."""
        batch, rows = self.batch, part.rows
        places = batch.num_computed[rows] + np.arange(1 - len(made), 1)[:, None]
        batch.token_ids[rows, places] = made
        if self.engine.is_eos[made].any() or batch.watched[rows].any():
            self.take_each(rows, made)

    def take_each(self, rows: np.ndarray, made: np.ndarray) -> None:
        """``take`` where somebody must look: step by step; tokens after the end of a sequence are dropped."""
        batch, owners, left = self.batch, self.scheduler.owners, np.arange(len(rows))
        batch.num_computed[rows] -= len(made)
        batch.num_tokens[rows] -= len(made)
        for tokens in made:
            left = left[[owners[row].finish_reason is None for row in rows[left].tolist()]]
            batch.num_computed[rows[left]] += 1
            batch.num_tokens[rows[left]] += 1
            self.engine.take(rows[left], tokens[left, None])


def multi_step_of(engine: Engine) -> MultiStep | None:
    """The multi-step scheduling of an engine; None where the device cannot, or with ``LABINFER_MULTI_STEP=0``."""
    model = engine.model
    if os.environ.get("LABINFER_MULTI_STEP") == "0" or model.pipeline is not None or len(model.interpreters) != 1:
        return None
    able = model.interpreters[0].device.decodes_alone and model.interpreters[0].streamed is None
    return MultiStep(engine) if able and engine.batch.blocks.recompute_after is None else None
