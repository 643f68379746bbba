"""The tape: a table of int64 rows that every worker runs from top to bottom, one compiled loop for the whole step.

A row holds the address of a step function, whether a barrier follows, and the step's arguments: addresses, sizes, and
float64 bits. It is written with the names of kernels, whose addresses ``table`` fills in, and with counts of tokens and
logit rows, which ``Tape.fill`` fills in for each step: nothing else in a row depends on a step's size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from labinfer.backends.cpu import machine_code
from labinfer.ops.activations import FUNCTIONS
from labinfer.ops.base import Dim

ROW = 40
"""Numbers of a row: the function's address, the barrier flag, and up to 38 arguments."""

LINE = 64
"""Bytes of a cache line: flags of different threads never share one."""

ACTIVATION_CODES = {name: code for code, name in enumerate(FUNCTIONS)}
"""The number that stands for an activation on a tape."""

ACCUMULATE = 1
"""Bit of the ``mode`` of a product: add to ``y`` what stands there."""


@dataclass(frozen=True, slots=True)
class Count:
    """An argument that every step sets: ``factor`` times its tokens (symbol T) or its rows of logits (R).

    Until then it is ``bound``, that of the arrays the tape is bound to.
    """

    symbol: Dim
    factor: int
    bound: int


Argument = float | str | Count
"""A number, the name of a kernel, which stands for its address, or what each step sets."""


@dataclass(frozen=True, slots=True)
class Row:
    """A step function by name with its arguments; floats are stored as float64. ``then_wait``: a barrier follows."""

    step: str
    arguments: tuple[Argument, ...]
    then_wait: bool = True

    def __post_init__(self) -> None:
        if len(self.arguments) > ROW - 2:
            raise ValueError(f"{len(self.arguments)} arguments do not fit a row of the tape")

    def numbers(self) -> list[int]:
        """The row as it stands on the tape."""
        return [machine_code.address(self.step), int(self.then_wait), *map(_number, self.arguments)]


def _number(argument: Argument) -> int:
    if isinstance(argument, str):
        return machine_code.address(argument)
    if isinstance(argument, Count):
        return argument.bound
    if isinstance(argument, float):
        return int(struct.unpack("q", struct.pack("d", argument))[0])
    return int(argument)


def kernels_of(rows: Iterable[Row]) -> list[str]:
    """The names of all kernels that the rows call, each once."""
    named = [[row.step, *(each for each in row.arguments if isinstance(each, str))] for row in rows]
    return list(dict.fromkeys(name for names in named for name in names))


def table(rows: Sequence[Row]) -> np.ndarray:
    """The rows as one int64 array [rows, ROW]; the last row always waits, so that a step ends for all workers."""
    machine_code.prepare(kernels_of(rows))
    result = np.zeros((len(rows), ROW), np.int64)
    for i, row in enumerate(rows):
        numbers = row.numbers()
        result[i, : len(numbers)] = numbers
    if len(rows):
        result[-1, 1] = 1
    return result


class Tape:
    """Rows as a table that runs steps of any size it is bound for: ``fill`` writes the numbers that a step sets."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.table = table(rows)
        self.address, self.length = self.table.ctypes.data, len(self.table)
        counts = [
            (i * ROW + 2 + j, argument.factor * (argument.symbol == "T"), argument.factor * (argument.symbol == "R"))
            for i, row in enumerate(rows)
            for j, argument in enumerate(row.arguments)
            if isinstance(argument, Count)
        ]
        self.places, self.per_token, self.per_row = np.array(counts, np.int64).reshape(-1, 3).T
        self.filled: tuple[int, int] | None = None

    def fill(self, tokens: int, rows: int) -> None:
        """Get ready for a step of ``tokens`` tokens and ``rows`` rows of logits."""
        if self.filled != (tokens, rows):
            self.table.reshape(-1)[self.places] = self.per_token * tokens + self.per_row * rows
            self.filled = tokens, rows
