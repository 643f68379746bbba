"""Greedy decoding without the host: a tape that ends by choosing each row's token and moving the step on.

The host only launches graphs, as many ahead as it likes, and reads the tokens at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from labinfer.backends.base import Kernel
from labinfer.backends.cuda.arguments import stride
from labinfer.backends.cuda.compile import Source
from labinfer.backends.cuda.tape import Row, Runnable, Tape
from labinfer.ops.base import Call, Step

if TYPE_CHECKING:
    from labinfer.backends.cuda.device import CudaDevice

PARTS = 128
"""Blocks that look for the best of a row."""


class GreedyDecode:
    """Decodes the step that lies in ``steps`` (one for each cache group) on: every sequence has one token in it.

    ``calls`` compute the step, ``logits`` [rows, vocab] is what they end in. Block tables must already list the blocks
    of all tokens to come, ``length`` of each row at most are kept.
    """

    def __init__(
        self,
        device: CudaDevice,
        calls: Sequence[tuple[Kernel, Call]],
        logits: Any,
        steps: Sequence[Step],
        length: int,
    ) -> None:
        rows, vocab = logits.shape
        self.device, self.rows = device, rows
        self.buffer = device.allocate(4 * rows * (length + 2 * PARTS + 1), "greedy decoding")
        self.made = device.view(self.buffer, 0, (rows, length), "i32")
        self.count = device.view(self.buffer, self.made.nbytes, (rows,), "i32")
        at = self.made.nbytes + self.count.nbytes
        values = device.view(self.buffer, at, (rows, PARTS), "f32")
        tokens = device.view(self.buffer, at + values.nbytes, (rows, PARTS), "i32")
        tape, kept = device.rows(calls, rows)
        source, step = Source("greedy"), steps[0]
        found = (logits, stride(logits), vocab, values, tokens)
        tape.append(Row(source, "argmax", (rows, PARTS, 1), 256, found))
        moved = (
            values, tokens, PARTS, step.token_ids, step.positions, step.context_len, step.total_len, self.made, length,
            self.count,
        )  # fmt: skip
        tape.append(Row(source, "advance", (rows, 1, 1), 32, moved))
        tape += [slots_row(source, each, rows) for each in steps]
        self.tape = Tape(device, tape, kept)

    def run(self, count: int) -> None:
        """Queue ``count`` steps; returns before they are done."""
        self.device.use()
        for _ in range(count):
            self.tape()

    def tokens(self) -> np.ndarray:
        """What has been made so far, int32 [rows, at most ``length``]."""
        count = int(self.device.move_out(self.count)[0])
        made: np.ndarray = self.device.move_out(self.made)
        return made[:, :count]

    def close(self) -> None:
        """Give the memory back."""
        self.device.deallocate(self.buffer)


def slots_row(source: Source, step: Step, rows: int) -> Row | Runnable:
    """The row that finds where the next tokens go in a group's cache."""
    arguments = (step.positions, step.block_table, stride(step.block_table), step.block_size, rows, step.slot_mapping)
    return Row(source, "slots", (-(-rows // 32), 1, 1), 32, arguments)
