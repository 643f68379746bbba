"""When ranks launch a step, and when the driver may be asked for what can wait for a GPU.

The kernels of a rank wait, on its GPU, for those of the others. While one rank has launched and another has not, a call
that waits for that GPU (to give memory back, load a module, make a graph) may never return, and may keep whoever should
launch waiting inside the driver. So ranks get ready, meet, and only then launch; and such calls, of any model and any
thread, are made while nobody launches. What all ranks have launched ends by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Launches:
    """The ranks of this process that launch, and the calls that must not come in between."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.ranks, self.pauses = 0, 0
        self.here = threading.local()  # ``launching``: whether this thread is one of the ranks

    def begin(self, ranks: int) -> None:
        """From now on so many ranks launch, each in ``rank``; waits for the calls that are on their way.

        It waits for the ranks of other stages and models too: all GPUs must have them in the same order.
        """
        with self.changed:
            self.changed.wait_for(lambda: not self.pauses and not self.ranks)
            self.ranks = ranks

    @contextmanager
    def rank(self) -> Iterator[None]:
        """Within, one of the ranks that have begun launches, and does nothing else."""
        self.here.launching = True
        try:
            yield
        finally:
            self.here.launching = False
            with self.changed:
                self.ranks -= 1
                self.changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, no rank launches, and all that begin wait; what a listener does within ``rank`` is its own affair."""
        if getattr(self.here, "launching", False):
            yield
            return
        with self.changed:
            self.changed.wait_for(lambda: not self.ranks)
            self.pauses += 1
        try:
            yield
        finally:
            self.resume()

    def try_pause(self) -> bool:
        """``paused`` until ``resume``, unless that takes time: for finalizers, which are called anywhere."""
        if not self.changed.acquire(blocking=False):
            return False
        try:
            self.pauses += not self.ranks
            return not self.ranks
        finally:
            self.changed.release()

    def resume(self) -> None:
        """Ranks may launch again."""
        with self.changed:
            self.pauses -= 1
            self.changed.notify_all()


LAUNCHES = Launches()
"""Of this process: a call of the driver may wait for any of its GPUs."""
