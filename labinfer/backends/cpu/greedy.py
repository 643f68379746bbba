"""Greedy decoding without the host: a tape that ends by choosing each row's token and moving the step on to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from labinfer.backends.base import Kernel
from labinfer.backends.cpu.emitter import address, stride
from labinfer.backends.cpu.tape import Row, Tape
from labinfer.ops.base import Call, Step

if TYPE_CHECKING:
    from labinfer.backends.cpu.device import CpuDevice

STEPS = ("best_step", "advance_step")
"""The kernels that such a tape needs beside those of its calls."""


class GreedyDecode:
    """Runs decode steps one after another in one call: each takes the likeliest tokens of the one before.

    ``calls`` compute a step, ``logits`` [rows, vocab] is what they end in, ``steps`` are its arrays, one for each cache
    group.
    """

    def __init__(
        self, device: CpuDevice, calls: Sequence[tuple[Kernel, Call]], logits: Any, steps: Sequence[Step]
    ) -> None:
        self.device, self.step = device, steps[0]
        rows, vocab = logits.shape
        lanes, found = np.empty((device.threads, 32), np.float32), np.empty((2, rows, device.threads), np.float32)
        groups = [(address(step.block_table), stride(step.block_table), address(step.slot_mapping)) for step in steps]
        self.where, described = np.zeros(1, np.int64), np.array(groups, np.int64)
        tape, kept = device.rows(calls)
        best = address(found[0]), address(found[1])
        tape.append(Row("best_step", (address(logits), stride(logits), vocab, address(lanes), *best)))
        moved = self.step.token_ids, self.step.positions, self.step.context_len, self.step.total_len
        where, size = address(self.where), self.step.block_size
        tape.append(Row("advance_step", (*best, where, *map(address, moved), size, len(groups), address(described))))
        self.tape, self.kept = Tape(tape), (lanes, found, described, kept)

    def run(self, count: int, rows: int) -> np.ndarray:
        """Run the step of ``rows`` rows that lies in its arrays, and ``count`` - 1 after it, whose blocks are listed.

        The tokens made, int32 [count, rows]; see ``GreedyRun``.
        """
        made = np.empty((count, rows), np.int32)
        self.where[0] = address(made)
        self.tape.fill(rows, rows)
        self.device.workers.run(self.tape.address, self.tape.length, rows, count)
        return made
