"""How much memory this process takes."""

from __future__ import annotations

import resource
import sys


def peak_rss() -> int:
    """The most memory this process has had at once, in bytes.

    Linux's own count starts anew with each program, while ``getrusage`` inherits that of the process that started it.
    """
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
