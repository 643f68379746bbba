"""Persistent worker threads that run one tape together: they spin while steps follow one another and sleep otherwise.

The calling thread is worker 0. A step is announced by one store to a shared counter, ops are separated by a spin
barrier (under 0.1 microseconds for two threads), and a worker that has spun for about a millisecond goes to sleep in
Python.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np

from labinfer.backends.cpu.isa import njit
from labinfer.backends.cpu.simd import fetch_add, flag_get, i64p, pause
from labinfer.backends.cpu.tape import LINE, run_rows

GO, AWAKE, STOP, TABLE, ROWS, SEQUENCES = 0, 8, 16, 17, 18, 19
"""Places in the control block, counted in int64: the step counter and the number of spinning workers have own lines."""

SPINS_BEFORE_SLEEP = 40_000


@njit
def serve(control: int, sync: int, worker: int, workers: int, turn: int, seen: int) -> tuple[int, int]:
    """Run every announced tape; returns (turn, seen) when it is time to sleep, or to stop."""
    block = i64p(control)
    while True:
        spins = 0
        while flag_get(control + GO * 8) == seen:
            pause()
            spins += 1
            if spins > SPINS_BEFORE_SLEEP:
                fetch_add(control + AWAKE * 8, -1)
                if flag_get(control + GO * 8) == seen:
                    return turn, seen
                fetch_add(control + AWAKE * 8, 1)
                spins = 0
        seen += 1
        if block[STOP]:
            return turn, seen
        turn = run_rows(block[TABLE], block[ROWS], block[SEQUENCES], worker, workers, sync, turn)


class Workers:
    """``count`` threads, the caller's included; ``run`` executes a tape on all of them and returns when it is done."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.control = _aligned(32)
        self.sync = _aligned(8 * count)
        self.turn = 0
        self.asleep = threading.Semaphore(0)
        self.threads = [
            threading.Thread(target=_work, args=(weakref.ref(self), self.asleep, worker), daemon=True)
            for worker in range(1, count)
        ]
        for thread in self.threads:
            thread.start()

    def run(self, table: int, rows: int, sequences: int) -> None:
        """Run ``rows`` rows of the tape at address ``table`` for a step of ``sequences`` sequences."""
        control = self.control
        if self.threads:
            control[TABLE], control[ROWS], control[SEQUENCES] = table, rows, sequences
            flag_go(control.ctypes.data)
            sleeping = len(self.threads) - int(control[AWAKE])
            if sleeping > 0:
                self.asleep.release(sleeping)
        self.turn = run_rows(table, rows, sequences, 0, self.count, self.sync.ctypes.data, self.turn)

    def close(self) -> None:
        """End the threads."""
        self.control[STOP] = 1
        flag_go(self.control.ctypes.data)
        self.asleep.release(len(self.threads))
        for thread in self.threads:
            thread.join()
        self.threads = []


@njit
def flag_go(control: int) -> None:
    """Announce a step: what was written before is seen by every worker that sees the counter."""
    fetch_add(control + GO * 8, 1)


def _work(owner: weakref.ref[Workers], asleep: threading.Semaphore, worker: int) -> None:
    """A worker thread; it keeps the memory it spins on alive, and its owner not while it sleeps."""
    turn = seen = 0
    while True:
        asleep.acquire()
        workers = owner()
        if workers is None:
            return
        control, sync, count = workers.control, workers.sync, workers.count
        del workers
        fetch_awake(control.ctypes.data)
        turn, seen = serve(control.ctypes.data, sync.ctypes.data, worker, count, turn, seen)
        if control[STOP]:
            return


@njit
def fetch_awake(control: int) -> None:
    """Count this worker as spinning."""
    fetch_add(control + AWAKE * 8, 1)


def _aligned(count: int) -> np.ndarray:
    raw = np.zeros(count + 8, np.int64)
    start = (-raw.ctypes.data % LINE) // 8
    return raw[start : start + count]
