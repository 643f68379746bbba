"""Which sequences run in the next step: one budget of tokens, no phases.

A sequence has tokens and, of these, computed ones; every step lets some sequences catch up. Decoding is to catch up by
one token, a prompt does it in pieces, and one that was preempted starts anew. ``Policy`` decides, ``Scheduler`` keeps
the books.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Sequence as Listing
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from labinfer.compiler.plan import Limits
from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.batch import ONE, Batch, Part
from labinfer.runtime.lora import Adapters
from labinfer.runtime.request import Request, Sequence
from labinfer.runtime.shared_prefix import rows_behind, take_over
from labinfer.runtime.step_costs import StepCosts
from labinfer.runtime.swap import Swap


class Policy:
    """First come, first served within a priority; decoding goes before prompts, and the newest is preempted.

    A policy of your own replaces any of the three methods.
    """

    stall = 0.2
    """How much longer, as a part, a step may last for each prompt that is computed, while somebody waits for the tokens
    of others.

    On average: times of steps vary, and with one prompt the longest are to stay below 1.5 times. The more prompts, the
    more is gained by having them decode too: with a limit for all of them together few would ever decode at a time.
    """

    short, short_stall = 512, 1.0
    """Prompts of at most so many tokens, and the ``stall`` for each of them.

    They are over after a few steps. In small pieces they would cost more, and keep their place from one who decodes:
    where such prompts come all the time that is a tenth of all tokens.
    """

    soon = 0.25
    """Where the next prompt ends within this part of a step, no more of one is filled, if somebody waits for tokens.

    Of many short ends the first would come no sooner than the last.
    """

    def rank(self, sequence: Sequence) -> Any:
        """Asked once when a sequence begins to wait: the one with the smallest rank is admitted next."""
        return sequence.request.priority, sequence.request.number, sequence.index

    def split(self, remaining: np.ndarray, budget: int, prompt_budget: int) -> np.ndarray:
        """How many of its ``remaining`` tokens each running sequence computes in the next step; int32 both.

        Sequences stand in the order of their admission. Together they may compute ``budget`` tokens, and those that
        have more than one remaining ``prompt_budget``, so that the others need not wait long.
        """
        counts: np.ndarray = np.minimum(remaining, ONE)
        prompts = (remaining > ONE).nonzero()[0]
        if not len(prompts) and len(counts) <= budget:
            return counts
        counts[prompts] = 0
        counts[np.cumsum(counts) > budget] = 0
        left = min(budget - int(counts.sum()), prompt_budget)
        for index in prompts.tolist():
            counts[index] = min(int(remaining[index]), left)
            left -= int(counts[index])
        return counts

    def victim(self, running: Listing[Sequence]) -> Sequence:
        """Which sequence gives its blocks back when there are too few."""
        return max(running, key=self.rank)


class Unrunnable(Exception):
    """``sequence`` can never go on, for the reason ``error``: without one, sessions hold what it needs."""

    def __init__(self, sequence: Sequence, error: LabinferError | None = None) -> None:
        message = "no cache blocks or adapter slots are left: sessions hold them all"
        self.sequence, self.error = sequence, error or LabinferError("run.cache-full", message)


class Scheduler:
    """Keeps the waiting and the running sequences; ``schedule`` says what the next step computes.

    A sequence is admitted when there are a slot for its adapter and blocks for its tokens so far, and ``watermark`` of
    all blocks, and one for each running sequence, stay free; never for what it may yet become. When blocks run out
    nevertheless, one is preempted: it gives its slot back too, and gets one again when it goes on.
    """

    watermark = 0.01
    copies_in_order = False
    """Whether a block is copied after the steps before and before the steps after, also while some still run."""

    def __init__(
        self,
        batch: Batch,
        limits: Limits,
        policy: Policy,
        costs: StepCosts,
        swap: Swap | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.batch, self.limits, self.policy, self.costs, self.swap = batch, limits, policy, costs, swap
        self.adapters, self.max_len = adapters or Adapters(0, ()), limits.max_sequence_len
        self.checks_policy = type(policy).split is not Policy.split
        self.limits_stalls = os.environ.get("LABINFER_STALL") != "0"
        # More could not all make a token in each step, and the last of them would wait with blocks in their hands.
        self.max_running = min(limits.max_num_seqs, limits.max_logits_rows, limits.max_num_batched_tokens)
        self.waiting: list[tuple[Any, int, Sequence]] = []  # a heap
        self.running: list[Sequence] = []
        self.rows = np.zeros(0, np.intp)
        self.owners: dict[int, Sequence] = {}  # by row
        self.requests: dict[Sequence, Request] = {}  # of all that run or wait
        self.arrivals = count()
        self.num_preemptions = 0
        self.refused: tuple[Sequence, int] | None = None  # who found no room while so many blocks were free

    def wait(self, sequence: Sequence) -> None:
        """Queue a sequence that has no row."""
        self.requests[sequence] = sequence.request
        heapq.heappush(self.waiting, (self.policy.rank(sequence), next(self.arrivals), sequence))

    @property
    def sequences(self) -> list[Sequence]:
        """All that run or wait."""
        return [*self.running, *(sequence for _, _, sequence in self.waiting)]

    def schedule(self, ahead: bool = False) -> Part | None:
        """The next step, whose blocks are there; None when there is nothing to do, or nothing that can be done.

        ``ahead``: the step before it still runs, so sequences that end with that are left out, and none is preempted.
        Raises ``Unrunnable`` for a sequence that cannot go on although no other runs, or whose adapter cannot be read.
        """
        self.admit()
        behind: list[int] = []
        while self.running:
            part = self.split(ahead, behind)
            if part is None:
                return None
            if ahead and not self.copies_in_order and np.count_nonzero(self.batch.blocks.forked[part.rows]):
                return None
            if not part.decodes:
                if self.reuse(part):
                    continue
                if more := rows_behind(self.batch, self.rows, part):
                    behind += more
                    continue
            if self.batch.grow(part) is None:
                return part
            if ahead:
                return None
            victim = self.policy.victim(self.running)
            if len(self.running) == 1:
                raise Unrunnable(victim)
            self.preempt(victim)
            behind.clear()
        return None

    def reuse(self, part: Part) -> bool:
        """Let sequences of ``part`` take over what others have computed since these were admitted."""
        taken = take_over(self.batch, part.rows)
        for row, more in taken.items():
            metrics = self.owners[row].request.metrics
            if metrics.num_preemptions == 0:
                metrics.num_cached_tokens += more
        return bool(taken)

    def split(self, ahead: bool, behind: Listing[int] = ()) -> Part | None:
        """The budgets divided among the running sequences but for the rows ``behind``."""
        rows, limits = self.rows, self.limits
        if not (behind or ahead or self.checks_policy) and (part := self.batch.again(rows)) is not None:
            return part
        remaining = self.remaining(ahead)
        if behind:
            remaining[np.isin(rows, behind)] = 0
        only_decodes = not np.count_nonzero(remaining > ONE)
        prompts = limits.max_num_batched_tokens if only_decodes else self.prompt_budget(remaining)
        counts = self.policy.split(remaining, limits.max_num_batched_tokens, prompts)
        if self.checks_policy:
            check_split(counts, remaining, limits.max_num_batched_tokens)
        if self.batch.blocks.reuse_until is not None:
            counts = self.as_before(rows, counts)
        if only_decodes and np.count_nonzero(counts) == len(rows):
            return Part(rows, counts, counts, counts, decodes=True)
        wanted = self.wanted(rows, remaining, counts)
        chosen = counts.nonzero()[0]
        new = (counts == remaining).astype(np.int32)
        return Part(rows[chosen], counts[chosen], wanted[chosen], new[chosen]) if len(chosen) else None

    def as_before(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """``counts``, but tokens that an answer had before are computed one by one again, and the prompt without them.

        Where each length has its own angles (dynamic NTK), only that makes the keys that were there.
        """
        batch = self.batch
        lowered: np.ndarray = np.minimum(counts, np.maximum(batch.total_len[rows] - batch.num_computed[rows], 1))
        return lowered

    def remaining(self, ahead: bool) -> np.ndarray:
        """Tokens that each running sequence can compute in the next step, int32."""
        batch, rows = self.batch, self.rows
        remaining: np.ndarray = batch.num_tokens[rows] - batch.num_computed[rows]
        if ahead:
            remaining[batch.num_tokens[rows] >= batch.end[rows]] = 0
        return remaining

    def wanted(self, rows: np.ndarray, remaining: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Rows of logits for each sequence, int32; prompts that want all of theirs compute as many tokens as are left.

        One for every other sequence is always left, since no more of them run.
        """
        most, scored = self.limits.max_logits_rows, self.batch.scored[rows]
        wanted: np.ndarray = ((counts == remaining) & (counts > 0)).astype(np.int32)
        if scored.any():
            for index in scored.nonzero()[0].tolist():
                others = int(wanted.sum()) - int(wanted[index])
                counts[index] = wanted[index] = max(0, min(int(counts[index]), most - others))
        return wanted

    def prompt_budget(self, remaining: np.ndarray) -> int:
        """Tokens of prompts that a step may have: all that fit, unless somebody waits for the tokens of others."""
        policy, most = self.policy, self.limits.max_num_batched_tokens
        decoding, interactive = remaining == 1, self.batch.interactive[self.rows]
        if not self.limits_stalls or not interactive.any():
            return most
        if not interactive[decoding].any():
            soon = int(policy.soon * most)
            return soon if (remaining[remaining > 1][:1] <= soon).any() else most
        lengths = self.batch.num_tokens[self.rows[remaining > 1]]
        num_short = int(np.count_nonzero(lengths <= policy.short))
        stall = policy.short_stall * num_short + policy.stall * (len(lengths) - num_short)
        return self.costs.prompt_tokens(int(np.count_nonzero(decoding)), stall)

    def admit(self) -> None:
        """Move waiting sequences to the running ones while there is room."""
        if not self.waiting:
            return
        num_free = self.batch.blocks.num_free
        if self.running and self.refused == (self.waiting[0][2], num_free):
            return
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0][2]
            if not self.start(sequence):
                if not self.running:
                    raise Unrunnable(sequence)
                self.refused = sequence, num_free
                return
            heapq.heappop(self.waiting)

    def start(self, sequence: Sequence) -> bool:
        """Give ``sequence`` its adapter and a row; False without room for them."""
        try:
            given = self.adapters.give(sequence, sequence.request.lora)
        except LabinferError as error:
            raise Unrunnable(sequence, error) from None
        if given and not self.place(sequence):
            self.adapters.take(sequence)
            return False
        return given

    def place(self, sequence: Sequence) -> bool:
        """Give ``sequence`` a row, with what was swapped out of it or what is cached; False without room for it."""
        batch, request, metrics = self.batch, sequence.request, sequence.request.metrics
        adapter, cached, counted = self.adapters.salt(sequence), 0, replace(batch.blocks.counted)
        row = batch.add(sequence.saved, (request.cache_salt, *adapter) if request.cache_salt or adapter else ())
        if sequence.swapped is None and not request.computes_all:
            cached = batch.attach(row)
        if (self.running and not self.has_room(row)) or not self.swap_in(sequence, row):
            batch.remove(row)
            batch.blocks.counted = counted  # it will look again
            return False
        batch.end[row], batch.adapter[row] = self.longest(request), sequence.adapter
        batch.plain[row], batch.interactive[row] = sequence.state is None, request.interactive
        batch.scored[row] = request.params.prompt_logprobs is not None
        if batch.blocks.reuse_until is not None and len(sequence.saved) > batch.blocks.reuse_until:
            batch.total_len[row] = len(request.prompt)
        self.take(sequence, row)
        batch.watched[row] = sequence.watched
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time, metrics.num_cached_tokens = time.perf_counter(), cached
        return True

    def longest(self, request: Request) -> int:
        """Tokens that a sequence of ``request`` has when it must end."""
        return min(len(request.prompt) + (request.params.max_tokens or self.max_len), self.max_len)

    def take(self, sequence: Sequence, row: int) -> None:
        """``sequence`` runs in ``row`` from now on."""
        sequence.row, self.owners[row] = row, sequence
        self.running.append(sequence)
        self.rows = np.append(self.rows, row)

    def swap_in(self, sequence: Sequence, row: int) -> bool:
        """Fetch what was swapped out of ``sequence``, if anything; False without room."""
        if sequence.swapped is not None:
            if self.swap is None or not self.swap.swap_in(sequence.swapped, row):
                return False
            sequence.swapped, self.batch.num_computed[row] = None, sequence.num_computed
        return True

    def has_room(self, row: int) -> bool:
        """Whether ``row`` and all running sequences can have blocks for their tokens and leave enough free."""
        batch, blocks = self.batch, self.batch.blocks
        rows = np.append(self.rows, row)
        lengths = batch.num_tokens[rows].tolist()
        for limits, group, first in zip(self.limits.groups, blocks.groups, blocks.first, strict=True):
            missing = self.limits.blocks_needed(limits, *lengths) - int((blocks.counts[rows] - first[rows]).sum())
            if missing + len(self.running) + int(self.watermark * group.num_blocks) > group.num_free:
                return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take the row of a running sequence away: it waits again, in host memory or to be computed anew."""
        row, computed = sequence.row, int(self.batch.num_computed[sequence.row])
        if self.swap is not None and self.swap.seconds(row) < self.costs.prompt_seconds(computed):
            sequence.swapped, sequence.num_computed = self.swap.swap_out(row), computed
        self.leave(sequence)
        self.update()
        sequence.request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.wait(sequence)

    def restart(self) -> None:
        """Let all running sequences wait again: what was computed of them is lost."""
        for sequence in self.running:
            self.leave(sequence)
            sequence.request.metrics.num_preemptions += 1
            self.wait(sequence)
        self.update()

    def let_go(self) -> dict[Sequence, Request]:
        """All sequences, none of which runs, and their requests: others see to them from now on."""
        requests, self.requests, self.waiting, self.refused = self.requests, {}, [], None
        return requests

    def leave(self, sequence: Sequence) -> None:
        """Give the row and the adapter of a sequence back; it keeps its tokens. ``update`` afterwards."""
        self.refused = None
        self.adapters.take(sequence)
        if sequence.row >= 0:
            sequence.saved = sequence.token_ids.copy()
            del self.owners[sequence.row]
            self.batch.remove(sequence.row)
            sequence.row = -1

    def stop(self, sequences: Listing[Sequence]) -> None:
        """Take out sequences that have ended, wherever they are."""
        for sequence in sequences:
            self.leave(sequence)
            del self.requests[sequence]
            if sequence.swapped is not None and self.swap is not None:
                self.swap.drop(sequence.swapped)
                sequence.swapped = None
        self.update()
        if any(sequence.finish_reason for _, _, sequence in self.waiting):
            self.waiting = [entry for entry in self.waiting if entry[2].finish_reason is None]
            heapq.heapify(self.waiting)

    def fork(self, sequence: Sequence, into: Sequence) -> None:
        """Have ``into`` go on from where ``sequence`` is: in a row of its own, or waiting if all are taken."""
        if sequence.row >= 0 and len(self.running) < self.max_running:
            self.adapters.share(sequence, into)
            self.requests[into] = into.request
            self.take(into, self.batch.fork(sequence.row))
        else:
            into.saved = sequence.token_ids.copy()
            self.wait(into)

    def update(self) -> None:
        """Leave only sequences that have a row among the running ones."""
        self.running = [sequence for sequence in self.running if sequence.row >= 0]
        self.rows = np.array([sequence.row for sequence in self.running], np.intp)


def check_split(counts: Any, remaining: np.ndarray, budget: int) -> None:
    """Raise ``UsageError`` unless what a policy of the user's says is what ``Policy.split`` must."""
    wrong = None
    if not isinstance(counts, np.ndarray) or counts.shape != remaining.shape or counts.dtype.kind != "i":
        wrong = f"an array of {len(remaining)} whole numbers is wanted"
    elif (counts < 0).any() or (counts > remaining).any():
        wrong = f"each must be between 0 and what remains, {remaining.tolist()}"
    elif int(counts.sum()) > budget:
        wrong = f"they are more than the budget of {budget}"
    elif remaining.any() and not counts.any():
        wrong = "no sequence would ever go on"
    if wrong:
        raise UsageError("scheduler.split", f"the policy's split gave {counts!r:.60}: {wrong}")
