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
    from labinfer.runtime.engine import Engine, Scheduled

STEPS, SECONDS = 8, 1 / 60
"""Steps in one call at most, and how long they may take together: so long a new request may have to wait.

A screen shows what is new as often.
"""

CALLS = 4
"""Calls one after another, where nobody hears of single tokens, until one may be the last or somebody asks."""


class MultiStep:
    """Decides how many steps of ``engine`` run without the host, on the only stage of its model."""

    def __init__(self, engine: Engine) -> None:
        [self.interpreter] = engine.model.interpreters
        self.engine, self.batch, self.scheduler = engine, engine.batch, engine.scheduler
        self.steps_in_call = 1

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
        watched = rows[batch.watched[rows]].tolist()
        for row in watched:
            if scheduler.owners[row].request.metrics.first_token_time is None:  # others may branch off
                return 1
        self.steps_in_call = min(STEPS, int(SECONDS / seconds))
        most = self.steps_in_call * (1 if watched else CALLS)
        return min(most, int((batch.end[rows] - batch.num_tokens[rows]).min()) - 1)

    def run(self, scheduled: Scheduled) -> tuple[Part, np.ndarray]:
        """Run the steps of a part; the part, of fewer where not all were, and the tokens made, int32 [steps, rows]."""
        part, each, calls = scheduled.part, self.steps_in_call, []
        counts = [min(each, part.steps - done) for done in range(0, part.steps, each)]
        for tokens in self.engine.model.decode(scheduled.batch, counts):
            calls.append(tokens)
            if self.engine.inbox or self.engine.is_eos[tokens].any():
                break
        made = np.concatenate(calls)
        return self.shorten(part, len(made)), made

    def shorten(self, part: Part, steps: int) -> Part:
        """``part`` as so many steps; what was counted for the others, and their blocks, are taken back."""
        if steps == part.steps:
            return part
        batch, rows, missing = self.batch, part.rows, part.counts - np.int32(steps)
        batch.num_computed[rows] -= missing
        batch.num_tokens[rows] -= missing
        batch.blocks.shrink(rows, batch.num_computed[rows])
        return part._replace(counts=part.counts - missing, new=part.new - missing, steps=steps)

    def take(self, rows: np.ndarray, made: np.ndarray) -> None:
        """Make the tokens ``made``, int32 [steps, rows], of ``rows``, which are counted already."""
        batch = self.batch
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
