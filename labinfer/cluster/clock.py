"""How far another host's clock is ahead of ours, from what both say to each other anyway."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, TypeGuard

SAMPLES = 64
"""Measurements that count: those of the last 16 seconds, within which clocks hardly drift."""


class PeerClock:
    """The clock of the other end of a connection: ``offset`` is its seconds less ours, 0 until it was measured.

    Each message says when it was sent, which one was heard last, and how long ago. That bounds the difference of the
    clocks by the time on the way, so the measurement with the shortest way counts (NTP, RFC 5905, sections 8 and 10).
    """

    def __init__(self) -> None:
        self.samples: deque[tuple[float, float]] = deque(maxlen=SAMPLES)  # seconds on the way there and back, offset
        self.heard: tuple[float, float] | None = None  # when the last message was sent, by theirs, and came, by ours
        self.offset = 0.0

    def stamp(self, now: float) -> dict[str, float]:
        """What a message sent ``now`` says."""
        if self.heard is None:
            return {"sent": now}
        sent, came = self.heard
        return {"sent": now, "heard": sent, "held": now - came}

    def hear(self, message: Mapping[str, Any], now: float) -> None:
        """Take what a message that came ``now`` says; one without numbers says nothing."""
        sent, heard, held = (message.get(name) for name in ("sent", "heard", "held"))
        if not is_time(sent):
            return
        self.heard = sent, now
        if is_time(heard) and is_time(held):
            self.samples.append((now - heard - held, ((sent - held - heard) + (sent - now)) / 2))
            self.offset = min(self.samples)[1]


def is_time(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a number of seconds."""
    return isinstance(value, float) and math.isfinite(value)
