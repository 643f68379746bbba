"""Which sequences run in the next step: first come, first served, under one token budget, prefill and decode alike."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from labinfer.runtime.lora import LoRARequest
from labinfer.runtime.model import Model
from labinfer.runtime.sampling_params import SamplingParams
from labinfer.runtime.sequence import Scheduled, Sequence


@dataclass(slots=True, eq=False)
class Request:
    """A prompt with its sampling parameters and its adapter, and what has been generated for it."""

    number: int
    prompt: list[int]
    params: SamplingParams
    lora: LoRARequest | None = None
    sequence: Sequence = field(init=False)
    random: np.random.Generator = field(init=False)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.sequence = Sequence(list(self.prompt), -1)
        self.random = np.random.default_rng(self.params.seed)

    @property
    def generated(self) -> list[int]:
        """Tokens made so far."""
        return self.sequence.token_ids[len(self.prompt) :]


class Scheduler:
    """Keeps the waiting and the running requests; ``schedule`` says what the next step computes.

    A request is admitted when the cache has room for all running ones to their full length, so none has to stop, and a
    slot is free for its adapter.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.limits = model, model.plan.limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Put ``request`` in the queue."""
        self.waiting.append(request)

    def admit(self) -> None:
        """Move waiting requests to the running ones while there is room."""
        blocks = self.model.blocks
        while self.waiting and len(self.running) < self.limits.max_num_seqs:
            request = self.waiting[0]
            if not self.model.adapters.give(request.sequence, request.lora):
                return
            row = request.sequence.row = blocks.open_row()
            if self.model.plan.recompute_after is None:  # one that starts anew needs its blocks to itself
                salt = self.model.adapters.salt(request.sequence)
                request.sequence.num_computed = blocks.attach(row, request.prompt, salt)
            self.running.append(request)
            if not self.has_room():
                self.running.pop()
                self.forget(request.sequence)
                return
            self.waiting.popleft()

    def has_room(self) -> bool:
        """Whether all running requests can go on to their full length."""
        blocks, longest = self.model.blocks, self.model.max_len
        rows = [request.sequence.row for request in self.running]
        lengths = [min(len(r.prompt) + (r.params.max_tokens or longest), longest) for r in self.running]
        for number, group in enumerate(self.limits.groups):
            held = sum(blocks.held(row, number) for row in rows)
            if self.limits.blocks_needed(group, *lengths) - held > blocks.groups[number].num_free:
                return False
        return True

    def forget(self, sequence: Sequence) -> None:
        """Give back the cache blocks and the adapter of ``sequence``, if it has any."""
        self.model.adapters.take(sequence)
        if sequence.row >= 0:
            self.model.blocks.close_row(sequence.row)
        sequence.row, sequence.num_computed = -1, 0

    def schedule(self) -> list[tuple[Request, Scheduled]]:
        """The parts of the next step: what each running sequence still has to compute, as far as the budgets go."""
        self.admit()
        tokens, rows = self.limits.max_num_batched_tokens, self.limits.max_logits_rows
        parts = []
        for request in self.running:
            sequence = request.sequence
            left = len(sequence.token_ids) - sequence.num_computed
            count = min(left, tokens)
            if count == 0 or (count == left and rows == 0):
                continue
            row = 1 if count == left else 0
            parts.append((request, Scheduled(sequence, count, row)))
            tokens, rows = tokens - count, rows - row
        return parts

    def finish(self, request: Request, reason: str) -> None:
        """Take ``request`` out, for whatever ``reason``, and give back what it has."""
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.forget(request.sequence)
