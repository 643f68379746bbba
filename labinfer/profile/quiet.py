"""Other work on the machine: it only ever makes a measurement longer, so measuring waits for it, within limits."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from labinfer.errors import UsageError

WINDOW_SECONDS = 0.05
FOREIGN_SHARE = 0.1
"""The part of the processors that others may use while something is measured."""


def busy_seconds() -> float | None:
    """Seconds of processor time that everything else on the machine has used; None where nobody says."""
    with suppress(OSError, ValueError, AttributeError), open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
        own = os.times()
        total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return total - own.user - own.system
    return None


class Foreign:
    """Watches the share of the processors that others use from now on."""

    def __init__(self) -> None:
        self.started, self.busy = time.perf_counter(), busy_seconds()

    def share(self) -> float:
        """That share so far; 0 where nobody says."""
        busy, seconds = busy_seconds(), time.perf_counter() - self.started
        if busy is None or self.busy is None or not seconds:
            return 0.0
        return max(0.0, busy - self.busy) / seconds / (os.cpu_count() or 1)


DEFAULT_PATIENCE = 30.0


class Patience:
    """Seconds that may be spent in waiting for others, all measurements together; ``LABINFER_PATIENCE``, else 30."""

    def __init__(self, seconds: float | None = None) -> None:
        self.left = stated_patience() if seconds is None else seconds

    def wait(self) -> None:
        """Return when nobody else is busy, or no patience is left."""
        while self.left > 0:
            foreign = Foreign()
            time.sleep(WINDOW_SECONDS)
            if foreign.share() <= FOREIGN_SHARE:
                return
            self.left -= WINDOW_SECONDS


def stated_patience() -> float:
    """What the environment says; a ``UsageError`` unless it is a number of seconds."""
    text = os.environ.get("LABINFER_PATIENCE", "")
    try:
        return max(0.0, float(text)) if text else DEFAULT_PATIENCE
    except ValueError:
        raise UsageError("profile.patience", f"LABINFER_PATIENCE is '{text}', no number of seconds") from None
