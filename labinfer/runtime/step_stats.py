"""What a step computed, and how long it took."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from labinfer.runtime.batch import Part
from labinfer.runtime.step_costs import StepCosts


class StepStats(NamedTuple):
    """One step: when it ended (``time.perf_counter``), how long it took, and what it computed.

    Of its ``num_tokens``, ``num_decodes`` were the last ones of their sequences and ``num_proposed`` guesses after
    them, of which ``num_accepted`` were right; the others belong to prompts. Of ``num_steps`` in one call, each with as
    many tokens, this is one, and ``seconds`` its part. ``predicted_seconds`` is what such steps took until then.
    """

    time: float
    seconds: float
    num_sequences: int
    num_tokens: int
    num_decodes: int
    num_waiting: int
    num_proposed: int = 0
    num_accepted: int = 0
    num_steps: int = 1
    predicted_seconds: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts."""
        return self.num_tokens - self.num_decodes - self.num_proposed


def step_stats(part: Part, seconds: float, num_waiting: int, num_accepted: int, costs: StepCosts) -> StepStats:
    """The statistics of a step that has just computed ``part``; ``costs`` are those of the steps before it."""
    now, sequences = time.perf_counter(), len(part.rows)
    if part.decodes:
        each, predicted = seconds / part.steps, costs.decode_seconds(sequences)
        return StepStats(now, each, sequences, sequences, sequences, num_waiting, 0, 0, part.steps, predicted)
    tokens, counts, proposed = int(part.counts.sum()), part.counts, 0
    if part.proposed is not None:
        counts, proposed = counts - part.proposed, int(part.proposed.sum())
    decodes = int(np.count_nonzero((counts == 1) & (part.new == 1)))  # a piece of a prompt may be one token too
    predicted = costs.step_seconds(decodes, tokens - decodes)
    return StepStats(now, seconds, sequences, tokens, decodes, num_waiting, proposed, num_accepted, 1, predicted)
