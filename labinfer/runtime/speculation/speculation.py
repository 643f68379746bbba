"""Adds guesses to a step, and keeps those that the model makes itself.

A step computes the last token of a sequence and the guesses after it, with logits for each. Row by row, each token is
sampled as it would be without guesses: with its own random number, and with penalties, processors and grammar as the
tokens before it left them. A guess is kept if it is what was sampled; after the first that is not, the rest is thrown
away. So the tokens are those of a run without speculation at any temperature, not merely as likely. The rejection
sampling of Leviathan et al. (2023) keeps more guesses of a draft that samples on its own; a draft that draws with the
same random numbers makes up for that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from labinfer.runtime.batch import Part
from labinfer.runtime.request import Sequence
from labinfer.runtime.scheduler import Scheduler
from labinfer.runtime.speculation.payoff import Payoff
from labinfer.runtime.step_stats import StepStats

Take = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``take(rows, logits)`` makes a token for each of ``rows``, as the engine does without guesses, and returns them."""


class Proposer(Protocol):
    """Where guesses come from: at most ``num_tokens`` for a sequence."""

    num_tokens: int

    def propose(self, sequences: Listing[Sequence], most: Listing[int]) -> list[np.ndarray]:
        """Up to ``most`` tokens, 1 or more, that may come next in each of ``sequences``, int32."""

    def release(self) -> None:
        """Give back what is held for sequences that do not run any more."""

    def close(self) -> None:
        """Give back everything."""


@dataclass(slots=True)
class SpeculationCounters:
    """What happened so far: how often a sequence was guessed, how many tokens, and how many of them were right."""

    drafts: int = 0
    proposed: int = 0
    accepted: int = 0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a sequence with guesses got in a step: 1 without any that are right."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0


class Speculation:
    """Speculation in the steps of ``scheduler``, by ``proposer``.

    It pauses where it does not pay, unless ``LABINFER_SPECULATION=1``.
    """

    def __init__(self, proposer: Proposer, scheduler: Scheduler) -> None:
        self.proposer, self.scheduler, self.batch = proposer, scheduler, scheduler.batch
        self.payoff, self.counted = Payoff(os.environ.get("LABINFER_SPECULATION") == "1"), SpeculationCounters()
        self.accepted = 0  # in the last step

    def extend(self, part: Part) -> Part:
        """``part`` with guesses, as far as the budgets and the free blocks that it leaves go."""
        batch, room = self.batch, self.room(part)
        chosen = room.nonzero()[0]
        if not len(chosen):
            return part
        rows, proposed = part.rows[chosen].tolist(), np.zeros_like(part.counts)
        guesses = self.proposer.propose([self.scheduler.owners[row] for row in rows], room[chosen].tolist())
        for index, row, tokens in zip(chosen.tolist(), rows, guesses, strict=True):
            known, proposed[index] = int(batch.num_tokens[row]), len(tokens)
            batch.token_ids[row, known : known + len(tokens)] = tokens
        if not proposed.any():
            return part
        longer = Part(part.rows, part.counts + proposed, part.wanted + proposed, part.new, proposed=proposed)
        if batch.grow(longer) is not None:
            batch.blocks.shrink(part.rows, batch.num_computed[part.rows] + part.counts)
            return part
        self.counted.drafts += int(np.count_nonzero(proposed))
        self.counted.proposed += int(proposed.sum())
        return longer

    def room(self, part: Part) -> np.ndarray:
        """How many guesses each sequence of ``part`` may have: 0 for those that do not decode or are captured."""
        batch, rows, limits = self.batch, part.rows, self.scheduler.limits
        if self.payoff.paused:
            return np.zeros_like(part.counts)
        known = batch.num_tokens[rows]
        decodes = (part.counts == 1) & (part.new == 1)
        for index in decodes.nonzero()[0].tolist():
            request = self.scheduler.owners[int(rows[index])].request
            decodes[index] = not request.capture and known[index] > len(request.prompt)
        spare = limits.max_num_batched_tokens - int(part.counts.sum())
        spare = min(spare, limits.max_logits_rows - int(part.wanted.sum()))
        most = min(self.proposer.num_tokens, spare // max(1, int(np.count_nonzero(decodes))))
        room = np.minimum(most, batch.end[rows] - known - 1)
        # Where keys depend on the length of the text, guesses, which leave it open, must not pass the bound.
        if (bound := batch.blocks.recompute_after) is not None:
            room = np.where(known > bound, room, np.minimum(room, bound - known))
        if (bound := batch.blocks.reuse_until) is not None:
            room = np.minimum(room, bound - known)
        return np.where(decodes, np.maximum(room, 0), 0)

    def verify(self, part: Part, logits: np.ndarray, take: Take) -> None:
        """Make the tokens of ``part``: one of each sequence, and one more for each guess that is right."""
        assert part.proposed is not None
        batch, made, self.accepted = self.batch, part.new > 0, 0
        batch.num_computed[part.rows] -= part.proposed
        rows, left = part.rows[made], part.proposed[made]
        at = (np.cumsum(part.wanted) - 1)[made] - left
        while len(rows):
            guesses = batch.token_ids[rows, batch.num_tokens[rows] - 1]
            right = (take(rows, logits[at]) == guesses) & (left > 0)
            right &= [self.scheduler.owners[row].finish_reason is None for row in rows.tolist()]
            rows, left, at = rows[right], left[right] - 1, at[right] + 1
            batch.num_computed[rows] += 1
            batch.num_tokens[rows] += 1
            self.accepted += len(rows)
        batch.blocks.shrink(part.rows, batch.num_computed[part.rows])
        self.counted.accepted += self.accepted

    def observe(self, stats: StepStats) -> None:
        """A step went so; one with a part of a prompt does not tell what guesses cost."""
        plain = self.scheduler.costs.decode_seconds(stats.num_decodes)
        if stats.num_prompt_tokens or plain is None:
            return
        if stats.num_proposed:
            self.payoff.step(stats.num_decodes, stats.num_accepted, stats.seconds, plain)
        else:
            self.payoff.plain_step()


def speculation_of(proposer: Proposer | None, scheduler: Scheduler) -> Speculation | None:
    """The speculation of an engine; None without a proposer, or with ``LABINFER_SPECULATION=0``."""
    return Speculation(proposer, scheduler) if proposer and os.environ.get("LABINFER_SPECULATION") != "0" else None
