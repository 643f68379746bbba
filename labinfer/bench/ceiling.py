"""What the machine itself can do: how fast threads read memory, and how fast numpy's BLAS multiplies."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

MATRIX = 2048
"""Rows and columns of the matrices multiplied: 16 MB each, where a BLAS reaches its speed."""


READ_BYTES = 6_000_000_000
"""Bytes read in one measurement, some 0.2 s: shorter ones follow the scheduler more than the memory."""

PAUSE_SECONDS = 0.01
"""Time for worker threads that still spin after a step to go to sleep, since they would hold a core."""


def read_bandwidth(memory: Sequence[np.ndarray], threads: int, rounds: int | None = None) -> float:
    """Bytes a second that ``threads`` threads read of ``memory``, byte arrays, going through them ``rounds`` times.

    A maximum of int32, which numpy finds with vector instructions, without the interpreter lock and writing nothing: as
    fast as a compiled loop of loads.
    """
    size = sum(array.nbytes for array in memory)
    count = rounds or max(1, READ_BYTES // max(size, 1_000_000))
    words = [array[: array.nbytes // 4 * 4].view(np.int32) for array in memory]
    parts = [part for array in words for part in np.array_split(array, threads)]

    def read(thread: int) -> None:
        for _ in range(count):
            for part in parts[thread::threads]:
                part.max(initial=0)

    helpers = [threading.Thread(target=read, args=(i,)) for i in range(1, threads)]
    time.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    for helper in helpers:
        helper.start()
    read(0)
    for helper in helpers:
        helper.join()
    return count * size / (time.perf_counter() - start)


def float32_flops() -> float:
    """Floating point operations a second of a float32 matrix product, the best of three.

    The BLAS uses as many threads as it was told before numpy was imported.
    """
    x = np.ones((MATRIX, MATRIX), np.float32)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - start)
    return float(2 * MATRIX**3 / min(seconds))
