"""Collectives among the ranks of a tensor-parallel group, on the memory that ``ops.base.Peers`` describes.

Every worker of a rank takes a share of the columns. They offer it (``offer``), and after a barrier worker 0 raises the
rank's count; each worker then waits for the counts of all ranks and reads its share of their parts.
"""

from __future__ import annotations

from typing import NamedTuple

from labinfer.backends.cpu.driver import SPINS_BEFORE_YIELD, share
from labinfer.backends.cpu.elementwise import add, copy_rows
from labinfer.backends.cpu.isa import njit
from labinfer.backends.cpu.simd import flag_get, flag_set, i64p, pause, sched_yield, usleep
from labinfer.backends.cpu.tape import LINE

SPINS_BEFORE_SLEEP, NAP = 5_000, 50
"""A rank that waits for longer, some milliseconds, looks every so many microseconds: more ranks may run than cores."""


class Group(NamedTuple):
    """This rank, how many there are, and where ``flags``, ``parts`` (of ``part_bytes`` each) and ``turns`` lie."""

    rank: int
    ranks: int
    flags: int
    parts: int
    part_bytes: int
    turns: int


@njit
def turn_of(group: Group, worker: int) -> int:
    """The turn that ``worker`` is in: one more than it has finished."""
    finished: int = i64p(group.turns + worker * LINE)[0]
    return finished + 1


@njit
def part_of(group: Group, turn: int, rank: int) -> int:
    """Where the part of ``rank`` lies in this turn."""
    return group.parts + ((turn & 1) * group.ranks + rank) * group.part_bytes


@njit
def columns_of(n: int, worker: int, workers: int) -> tuple[int, int]:
    """The columns [start, stop) of ``n`` that ``worker`` takes: whole cache lines."""
    start, stop = share((n + 15) // 16, worker, workers)
    return min(start * 16, n), min(stop * 16, n)


@njit
def offer(group: Group, x: int, x_stride: int, rows: int, n: int, worker: int, workers: int) -> None:
    """Write this worker's columns of ``x`` [rows, n] to this rank's part."""
    start, stop = columns_of(n, worker, workers)
    target = part_of(group, turn_of(group, worker), group.rank) + 4 * start
    if start < stop:
        copy_rows(x + 4 * start, x_stride, target, n, stop - start, 0, rows)


@njit
def meet(group: Group, worker: int) -> int:
    """Wait until every rank has offered its part, or one has left; returns the turn, which is over for ``worker``."""
    turn = turn_of(group, worker)
    if worker == 0:
        flag_set(group.flags + group.rank * LINE, turn)
    for rank in range(group.ranks):
        spins = 0
        while flag_get(group.flags + rank * LINE) < turn and flag_get(group.flags + group.ranks * LINE) == 0:
            pause()
            spins += 1
            if spins > SPINS_BEFORE_SLEEP:
                usleep(NAP)
            elif spins > SPINS_BEFORE_YIELD:
                sched_yield()
    i64p(group.turns + worker * LINE)[0] = turn
    return turn


@njit
def all_reduce(group: Group, y: int, y_stride: int, rows: int, n: int, worker: int, workers: int) -> None:
    """``y`` [rows, n]: the sum of all parts, in the order of ranks."""
    turn = meet(group, worker)
    start, stop = columns_of(n, worker, workers)
    if start < stop:
        target, first = y + 4 * start, part_of(group, turn, 0) + 4 * start
        copy_rows(first, n, target, y_stride, stop - start, 0, rows)
        for rank in range(1, group.ranks):
            part = part_of(group, turn, rank) + 4 * start
            add(target, y_stride, part, n, target, y_stride, stop - start, 0, rows)


@njit
def all_gather(group: Group, y: int, y_stride: int, rows: int, sizes: int, worker: int, workers: int) -> None:
    """``y``: all parts side by side; ``sizes`` int64 [ranks] says how many columns each has."""
    turn, offset = meet(group, worker), 0
    for rank in range(group.ranks):
        n = i64p(sizes)[rank]
        start, stop = columns_of(n, worker, workers)
        if start < stop:
            part = part_of(group, turn, rank) + 4 * start
            copy_rows(part, n, y + 4 * (offset + start), y_stride, stop - start, 0, rows)
        offset += n


def offer_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, x, x_stride, n, then a Group."""
    p = i64p(a)
    offer(Group(p[4], p[5], p[6], p[7], p[8], p[9]), p[1], p[2], p[0], p[3], worker, workers)


def all_reduce_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, y, y_stride, n, then a Group."""
    p = i64p(a)
    all_reduce(Group(p[4], p[5], p[6], p[7], p[8], p[9]), p[1], p[2], p[0], p[3], worker, workers)


def all_gather_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, y, y_stride, sizes, then a Group."""
    p = i64p(a)
    all_gather(Group(p[4], p[5], p[6], p[7], p[8], p[9]), p[1], p[2], p[0], p[3], worker, workers)
