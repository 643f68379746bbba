"""Notices when the engine stands still, and writes down where."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback

from labinfer.service.service import Service

_log = logging.getLogger(__name__)


class Watchdog:
    """Watches the engine's steps; ``look`` is called again and again.

    The engine stands still when it has something to do and has ended no step for ``stall_seconds``. Then the service
    is neither ready nor healthy, until a step ends after all, and every thread's stack is in the log, once.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.moved, self.last = service, time.perf_counter(), 0.0

    def look(self) -> None:
        """See whether there was progress."""
        engine, now = self.service.engine, time.perf_counter()
        last = engine.stats[-1].time if engine.stats else 0.0
        if last != self.last or not engine.busy:
            self.last, self.moved = last, now
            if self.service.stalled:
                _log.warning("the engine goes on")
            self.service.stalled = False
        elif not self.service.stalled and now - self.moved > self.service.options.stall_seconds:
            self.service.stalled = True
            _log.error("the engine makes no progress; the stacks of all threads:\n%s", stacks())


def stacks() -> str:
    """Where each thread is, as the log tells it: ``faulthandler`` would hold all of them up until it is read."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = sys._current_frames().items()
    return "\n".join(
        f"Thread {names.get(each, each)}:\n{''.join(traceback.format_stack(frame))}" for each, frame in found
    )
