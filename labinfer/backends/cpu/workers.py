"""Persistent worker threads that run one tape together: they spin while steps follow one another and sleep otherwise.

The calling thread is worker 0. A step is announced by one store to a shared counter, ops are separated by a spin
barrier (under 0.1 microseconds for two threads), and a worker that has spun for about a millisecond goes to sleep in
Python.

Ctrl-C may stop the caller between any two lines of Python. So announcing a step, running it and keeping the barrier's
count is one compiled call, and whatever may fail comes before it.
"""

from __future__ import annotations

import os
import threading
import weakref

import numpy as np

from labinfer.backends.cpu.isa import njit
from labinfer.backends.cpu.simd import fetch_add, flag_get, flag_set, i64p, pause
from labinfer.backends.cpu.tape import LINE, run_rows

GO, AWAKE, CALLED, STOP, TABLE, ROWS, SEQUENCES, TURN = 0, 8, 16, 24, 25, 26, 27, 28
"""Places in the control block, counted in int64; what is written while others spin has a cache line of its own.

``GO`` counts steps, ``AWAKE`` the spinning workers; with ``CALLED`` set no worker goes to sleep; ``TURN`` is worker 0's
barrier count.
"""

SPINS_BEFORE_SLEEP = 40_000


@njit
def serve(control: int, sync: int, worker: int, workers: int, turn: int, seen: int) -> tuple[int, int]:
    """Run every announced tape; returns (turn, seen) when it is time to sleep, or to stop."""
    block = i64p(control)
    fetch_add(control + AWAKE * 8, 1)
    while True:
        spins = 0
        while flag_get(control + GO * 8) == seen:
            pause()
            spins += 1
            if spins > SPINS_BEFORE_SLEEP:
                spins = 0
                fetch_add(control + AWAKE * 8, -1)
                # Adding 0 reads in one order with what others add; CALLED is cleared after GO, so it is read before.
                if fetch_add(control + CALLED * 8, 0) == 0 and flag_get(control + GO * 8) == seen:
                    return turn, seen
                fetch_add(control + AWAKE * 8, 1)
        seen += 1
        if block[STOP]:
            return turn, seen
        turn = run_rows(block[TABLE], block[ROWS], block[SEQUENCES], worker, workers, sync, turn)


@njit
def call(control: int) -> int:
    """Keep spinning workers from going to sleep; returns how many are spinning."""
    fetch_add(control + CALLED * 8, 1)
    awake: int = fetch_add(control + AWAKE * 8, 0)
    return awake


@njit
def lead(control: int, sync: int, workers: int, table: int, rows: int, sequences: int) -> None:
    """Announce a tape and run it as worker 0."""
    block = i64p(control)
    block[TABLE], block[ROWS], block[SEQUENCES] = table, rows, sequences
    fetch_add(control + GO * 8, 1)
    flag_set(control + CALLED * 8, 0)
    block[TURN] = run_rows(table, rows, sequences, 0, workers, sync, block[TURN])


class Workers:
    """``count`` threads, the caller's included; ``run`` executes a tape on all of them and returns when it is done."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.control, self.sync = _aligned(32), _aligned(8 * count)
        self.at = self.control.ctypes.data, self.sync.ctypes.data
        self.turn = threading.Lock()
        self.asleep = threading.Semaphore(0)
        self.threads = [
            threading.Thread(target=_work, args=(self.control, self.sync, self.asleep, worker, count), daemon=True)
            for worker in range(1, count)
        ]
        for thread in self.threads:
            thread.start()
        self.stop = weakref.finalize(self, _stop, self.control, self.asleep, count - 1)
        _all.add(self)

    def run(self, table: int, rows: int, sequences: int) -> None:
        """Run ``rows`` rows of the tape at address ``table`` for a step of ``sequences`` sequences."""
        control, sync = self.at
        with self.turn:
            if self.threads:
                sleeping = len(self.threads) - call(control)
                if sleeping > 0:
                    self.asleep.release(sleeping)
            lead(control, sync, self.count, table, rows, sequences)

    def close(self) -> None:
        """End the threads."""
        self.stop()
        for thread in self.threads:
            thread.join()
        self.threads = []

    def forked(self) -> None:
        """In a child process, which has none of the threads, the caller does all the work."""
        self.stop.detach()
        self.turn = threading.Lock()
        self.count, self.threads = 1, []


def _forked() -> None:
    for workers in _all:
        workers.forked()


_all: weakref.WeakSet[Workers] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _stop(control: np.ndarray, asleep: threading.Semaphore, sleepers: int) -> None:
    """Have all worker threads end, asleep or not."""
    control[STOP] = 1
    fetch_go(control.ctypes.data)
    if sleepers:
        asleep.release(sleepers)


@njit
def fetch_go(control: int) -> None:
    """Announce that something is to be done: what was written before is seen by all who see the counter."""
    fetch_add(control + GO * 8, 1)


def _work(control: np.ndarray, sync: np.ndarray, asleep: threading.Semaphore, worker: int, count: int) -> None:
    """A worker thread; it keeps the memory it spins on alive, and not the ``Workers``."""
    turn = seen = 0
    at = control.ctypes.data, sync.ctypes.data
    while not control[STOP]:
        asleep.acquire()
        turn, seen = serve(*at, worker, count, turn, seen)


def _aligned(count: int) -> np.ndarray:
    raw = np.zeros(count + 8, np.int64)
    start = (-raw.ctypes.data % LINE) // 8
    return raw[start : start + count]
