"""How much the service takes on: requests beyond a bound are refused at once, none are lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from labinfer.service.errors import ApiError

MOST_SECONDS = 30


class Admission:
    """Counts the answers that are being made or waited for, at most ``limit``; none once ``draining``."""

    def __init__(self, limit: int) -> None:
        self.limit, self.active, self.draining = limit, 0, False
        self.refusals = {"queue_full": 0, "draining": 0}
        self.ends: deque[float] = deque(maxlen=64)

    def check(self, count: int = 1) -> None:
        """Refuse ``count`` more answers where there is no room for them."""
        if self.draining:
            self.refusals["draining"] += 1
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=5)
        if count > self.limit:
            raise ApiError(400, f"{count} answers in one request are more than the queue holds ({self.limit})")
        if self.active + count > self.limit:
            self.refusals["queue_full"] += 1
            message = f"the queue is full: {self.active} requests are waiting or running"
            raise ApiError(503, message, code="queue_full", retry_after=self.seconds())

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Take on ``count`` answers until the context ends."""
        self.check(count)
        self.active += count
        try:
            yield
        finally:
            self.active -= count
            self.ends.append(time.monotonic())

    def seconds(self) -> int:
        """About how long it takes until there is room: the usual time between the last ends, 1 at least."""
        if len(self.ends) < 2:
            return 1
        usual = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        return max(1, min(MOST_SECONDS, round(usual)))
