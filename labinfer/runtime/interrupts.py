"""Ctrl-C between two steps, never within one: a step cut in the middle would leave the cache's books wrong."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class HeldInterrupt:
    """A handler of SIGINT that notes the first signal until ``check``; the next one does not wait."""

    def __init__(self, usual: Handler) -> None:
        self.usual, self.noted = usual, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal came."""
        if self.noted:
            self.usual(number, frame)
        self.noted = True

    def check(self) -> None:
        """Do now what the signal that came meanwhile does, usually raise ``KeyboardInterrupt``."""
        if self.noted:
            self.noted = False
            self.usual(signal.SIGINT, None)


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Within the context Ctrl-C waits for its end, or for a call of the function that is given.

    For the main thread, the only one that signals interrupt; elsewhere, and where SIGINT has no handler of Python's,
    nothing changes.
    """
    usual = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if isinstance(usual, HeldInterrupt):
        yield usual.check
        return
    if not callable(usual):
        yield lambda: None
        return
    held = HeldInterrupt(usual)
    signal.signal(signal.SIGINT, held)
    try:
        yield held.check
    finally:
        signal.signal(signal.SIGINT, usual)
        held.check()
