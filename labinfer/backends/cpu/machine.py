"""How many threads to use on this machine; imports nothing that compiles."""

from __future__ import annotations

import os


def default_threads() -> int:
    """Physical cores this process may use: its CPU affinity and the cgroup's quota, hyper-threads counted once.

    ``LABINFER_THREADS`` overrides it.
    """
    if (forced := os.environ.get("LABINFER_THREADS", "")).isdigit() and int(forced) > 0:
        return int(forced)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = len({_core(cpu) for cpu in allowed})
    return max(1, min(cores, _quota() or cores))


def _core(cpu: int) -> str:
    """Which physical core a CPU belongs to: its lowest-numbered sibling."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
            return file.read().replace("-", ",").split(",")[0].strip()
    except OSError:
        return str(cpu)


def _quota() -> int | None:
    """Whole CPUs of the cgroup's quota, or None without one."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None
