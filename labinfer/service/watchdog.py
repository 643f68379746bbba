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
    """Watches the steps of a service's engines; ``look`` is called again and again.

    An engine stands still when it has something to do and has ended no step for ``stall_seconds``. Then the service
    is neither ready nor healthy, until a step ends after all, and every thread's stack is in the log, once.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.moved = dict.fromkeys(service.engines, (0.0, time.perf_counter()))  # the last step, and when it was seen

    def look(self) -> None:
        """See whether there was progress."""
        now = time.perf_counter()
        for engine, (last, _) in self.moved.items():
            newest = engine.stats[-1].time if engine.stats else 0.0
            if newest != last or not engine.busy:
                self.moved[engine] = newest, now
        stalled = any(now - seen > self.service.options.stall_seconds for _, seen in self.moved.values())
        if self.service.stalled and not stalled:
            _log.warning("the engine goes on")
        elif stalled and not self.service.stalled:
            _log.error("the engine makes no progress; the stacks of all threads:\n%s", stacks())
        self.service.stalled = stalled


def stacks() -> str:
    """Where each thread is, as the log tells it: ``faulthandler`` would hold all of them up until it is read."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = sys._current_frames().items()
    return "\n".join(
        f"Thread {names.get(each, each)}:\n{''.join(traceback.format_stack(frame))}" for each, frame in found
    )
