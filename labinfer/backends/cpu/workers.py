"""Persistent worker threads that run one tape together: they spin while steps follow one another and sleep otherwise.

The calling thread is worker 0. A step is announced by one store to a shared counter, ops are separated by a spin
barrier (under 0.1 microseconds for two threads), and a worker that has spun for about a millisecond goes to sleep in
Python.

The compiled half is ``driver``. Ctrl-C may stop the caller between any two lines of Python. So announcing a step,
running it and keeping the barrier's count is one compiled call, and whatever may fail comes before it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from ctypes import c_int64

import numpy as np

from labinfer.backends.cpu import machine_code
from labinfer.backends.cpu.tape import LINE

GO, AWAKE, CALLED, STOP, TABLE, ROWS, SEQUENCES, TIMES, TURN = 0, 8, 16, 24, 25, 26, 27, 28, 29
"""Places in the control block, counted in int64; what is written while others spin has a cache line of its own.

``GO`` counts steps, ``AWAKE`` the spinning workers; with ``CALLED`` set no worker goes to sleep; ``TURN`` is worker 0's
barrier count.
"""


class Workers:
    """``count`` threads, the caller's included; ``run`` executes a tape on all of them and returns when it is done."""

    def __init__(self, count: int) -> None:
        machine_code.prepare(["serve", "lead", "announce"])
        self.lead = machine_code.function("lead", c_int64, *[c_int64] * 8)
        serve = machine_code.function("serve", None, *[c_int64] * 5)
        announce = machine_code.function("announce", None, c_int64)
        self.count = count
        self.control, self.sync = _aligned(32), _aligned(8 * count)
        self.at = self.control.ctypes.data, self.sync.ctypes.data
        self.turn = threading.Lock()
        self.asleep = threading.Semaphore(0)
        self.threads = [
            threading.Thread(
                target=_work, args=(serve, self.control, self.sync, self.asleep, worker, count), daemon=True
            )
            for worker in range(1, count)
        ]
        for thread in self.threads:
            thread.start()
        self.stop = weakref.finalize(self, _stop, announce, self.control, self.asleep, count - 1)
        _all.add(self)

    def run(self, table: int, rows: int, sequences: int, times: int = 1) -> None:
        """Run ``rows`` rows of the tape at address ``table`` for ``times`` steps of ``sequences`` sequences."""
        control, sync = self.at
        with self.turn:
            asleep = self.lead(control, sync, self.count, table, rows, sequences, times, 0)
            if asleep:
                self.asleep.release(asleep)
                self.lead(control, sync, self.count, table, rows, sequences, times, 1)

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


def _stop(announce: Callable[..., int], control: np.ndarray, asleep: threading.Semaphore, sleepers: int) -> None:
    """Have all worker threads end, asleep or not."""
    control[STOP] = 1
    announce(control.ctypes.data)
    if sleepers:
        asleep.release(sleepers)


def _work(
    serve: Callable[..., int],
    control: np.ndarray,
    sync: np.ndarray,
    asleep: threading.Semaphore,
    worker: int,
    count: int,
) -> None:
    """A worker thread; it keeps the memory it spins on alive, and not the ``Workers``."""
    state = np.zeros(2, np.int64)
    while not control[STOP]:
        asleep.acquire()
        serve(control.ctypes.data, sync.ctypes.data, worker, count, state.ctypes.data)


def _aligned(count: int) -> np.ndarray:
    raw = np.zeros(count + 8, np.int64)
    start = (-raw.ctypes.data % LINE) // 8
    return raw[start : start + count]
