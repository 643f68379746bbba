"""The compiled loop behind ``workers``: every worker runs the tape's rows from top to bottom, with barriers between.

The loop knows no op: a row holds the address of a step function. See ``workers`` for the control block and ``tape``
for the rows.
"""

from __future__ import annotations

from labinfer.backends.cpu.isa import Value, njit
from labinfer.backends.cpu.simd import Emit, fetch_add, flag_get, flag_set, i64p, kernel, pause, sched_yield
from labinfer.backends.cpu.tape import LINE, ROW
from labinfer.backends.cpu.workers import AWAKE, CALLED, GO, ROWS, SEQUENCES, STOP, TABLE, TIMES, TURN

SPINS_BEFORE_YIELD, SPINS_BEFORE_SLEEP = 500, 40_000


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
def run_rows(block: Value, worker: int, workers: int, sync: int, turn: int) -> int:
    """Run the tape that control ``block`` announces as one of ``workers``; returns the barrier count it ends with."""
    table, rows, sequences = block[TABLE], block[ROWS], block[SEQUENCES]
    for _ in range(block[TIMES]):
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


@njit
def share_bytes(count: int, size: int, before: int, total: int, worker: int, workers: int) -> tuple[int, int]:
    """The part [start, stop) of ``count`` items of ``size`` bytes that lie ``before`` bytes into ``total`` bytes.

    The workers share all these bytes evenly; each takes the items that begin in its part.
    """
    first, last = share(total, worker, workers)
    start, stop = (first - before + size - 1) // size, (last - before + size - 1) // size
    return min(max(start, 0), count), min(max(stop, 0), count)


def serve(control: int, sync: int, worker: int, workers: int, state: int) -> None:
    """Run every announced tape, until it is time to sleep or to stop.

    ``state`` holds what the worker keeps from one call to the next: its barrier count, and the steps it has seen.
    """
    block, own = i64p(control), i64p(state)
    fetch_add(control + AWAKE * 8, 1)
    while True:
        spins = 0
        while flag_get(control + GO * 8) == own[1]:
            pause()
            spins += 1
            if spins % SPINS_BEFORE_YIELD == 0:
                sched_yield()
            if spins > SPINS_BEFORE_SLEEP:
                spins = 0
                fetch_add(control + AWAKE * 8, -1)
                # Adding 0 reads in one order with what others add; CALLED is cleared after GO, so it is read before.
                if fetch_add(control + CALLED * 8, 0) == 0 and flag_get(control + GO * 8) == own[1]:
                    return
                fetch_add(control + AWAKE * 8, 1)
        own[1] += 1
        if block[STOP]:
            return
        own[0] = run_rows(block, worker, workers, sync, own[0])


def lead(control: int, sync: int, workers: int, table: int, rows: int, sequences: int, times: int, woken: int) -> int:
    """Announce a tape and run it as worker 0, ``times`` times; returns 0.

    If some workers sleep, which are not being ``woken``, nothing runs: returns how many, and no other goes to sleep.
    """
    block = i64p(control)
    if not woken:
        fetch_add(control + CALLED * 8, 1)
        asleep: int = workers - 1 - fetch_add(control + AWAKE * 8, 0)
        if asleep > 0:
            return asleep
    block[TABLE], block[ROWS], block[SEQUENCES], block[TIMES] = table, rows, sequences, times
    fetch_add(control + GO * 8, 1)
    flag_set(control + CALLED * 8, 0)
    block[TURN] = run_rows(block, 0, workers, sync, block[TURN])
    return 0


def announce(control: int) -> None:
    """Say that something is to be done: what was written before is seen by all who see the counter."""
    fetch_add(control + GO * 8, 1)
