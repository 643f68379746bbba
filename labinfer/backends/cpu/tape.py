"""The tape: a table of int64 rows that every worker runs from top to bottom, one compiled loop for the whole step.

A row holds the address of a compiled step function, whether a barrier follows, and the step's arguments: addresses,
sizes, and float64 bits. The loop knows no op; step functions are compiled, or taken from the cache, when a plan first
needs them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import types

from labinfer.backends.cpu import isa
from labinfer.backends.cpu.isa import Value, njit
from labinfer.backends.cpu.simd import Emit, flag_get, flag_set, i64p, kernel, pause, sched_yield

ROW = 40
"""Numbers of a row: the function's address, the barrier flag, and up to 38 arguments."""

LINE = 64
"""Bytes of a cache line: flags of different threads never share one."""

SPINS_BEFORE_YIELD = 500


def _emit_step(e: Emit, code: Value, arguments: Value, sequences: Value, worker: Value, workers: Value) -> None:
    e.call_at(code, arguments, sequences, worker, workers)


_call_step = kernel(_emit_step)


@njit
def barrier(sync: int, worker: int, workers: int, turn: int) -> None:
    """Wait until every worker has reached ``turn``."""
    flag_set(sync + worker * LINE, turn)
    for other in range(workers):
        spins = 0
        while flag_get(sync + other * LINE) < turn:
            pause()
            spins += 1
            if spins > SPINS_BEFORE_YIELD:
                sched_yield()


@njit
def run_rows(table: int, rows: int, sequences: int, worker: int, workers: int, sync: int, turn: int) -> int:
    """Run the tape at address ``table`` as one of ``workers``; returns the barrier count it ends with."""
    for i in range(rows):
        row = table + i * ROW * 8
        head = i64p(row)
        _call_step(head[0], row + 16, sequences, worker, workers)
        if head[1]:
            turn += 1
            barrier(sync, worker, workers, turn)
    return turn


@njit
def share(count: int, worker: int, workers: int) -> tuple[int, int]:
    """The part [start, stop) of ``count`` equal items that ``worker`` takes."""
    return count * worker // workers, count * (worker + 1) // workers


_STEP = types.void(types.int64, types.int64, types.int64, types.int64)
_compiled: dict[Callable[..., None], Any] = {}


def step_code(function: Callable[..., None]) -> int:
    """The address of a step function ``(arguments, sequences, worker, workers)``, compiled now if it must be."""
    if function not in _compiled:
        _compiled[function] = isa.cfunc(_STEP, function)
    return int(_compiled[function].address)


def row(function: Callable[..., None], *arguments: float, then_wait: bool = True) -> list[int]:
    """A row of the tape; float arguments are stored as float64. ``then_wait``: a barrier follows."""
    if len(arguments) > ROW - 2:
        raise ValueError(f"{len(arguments)} arguments do not fit a row of the tape")
    numbers = [struct.unpack("q", struct.pack("d", a))[0] if isinstance(a, float) else int(a) for a in arguments]
    return [step_code(function), int(then_wait), *numbers]


def table(rows: Sequence[list[int]]) -> np.ndarray:
    """The rows as one int64 array [rows, ROW]; the last row always waits, so that a step ends for all workers."""
    result = np.zeros((len(rows), ROW), np.int64)
    for i, numbers in enumerate(rows):
        result[i, : len(numbers)] = numbers
    if len(rows):
        result[-1, 1] = 1
    return result
