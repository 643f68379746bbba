"""Threads on chosen cores, where the system lets us choose (Linux)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def available_cores() -> list[int]:
    """The logical CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def stay_on(cores: Sequence[int]) -> None:
    """Keep the calling thread, and the threads and processes that it starts, on ``cores``; on all where it is empty."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def make_way() -> None:
    """Let those go first who wait for this core and are as urgent: in real time the system does not by itself."""
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_yield()


def call_on(cores: Sequence[int], call: Callable[[], Result]) -> Result:
    """``call()`` in a thread that stays on ``cores``."""
    with ThreadPoolExecutor(1, initializer=stay_on, initargs=(cores,)) as pool:
        return pool.submit(call).result()
