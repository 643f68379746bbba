"""Waiting for frames that come regularly, as in every step of a decode: asleep until shortly before, then awake.

Who sleeps until a frame comes takes some 20 microseconds to wake up, and as long again to find its code and that of the
system out of the caches; at each stage, in each step. Looking for the frame instead costs ``EARLY + LATE`` of a core
that had nothing else to do, at most, and less where frames come as expected.
"""

from __future__ import annotations

import time

from labinfer.runtime.pipeline.transport.channel import Channel

EARLY, LATE = 100e-6, 100e-6
"""Seconds before and after a frame is expected in which it is looked for; a sleep may last 50 microseconds too long."""


class Arrivals:
    """Those of frames through ``channel``, each of which is expected after as long a wait as the last.

    Frames of this process are not looked for: who does so keeps its threads from running Python.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.usual = 0.0

    def wait(self) -> None:
        """Return when something has come, or is best waited for by receiving it."""
        if not self.channel.leaves_process:
            return
        began = time.monotonic()
        if not self.channel.ready(max(0.0, self.usual - EARLY)):
            until = began + self.usual + LATE
            while not self.channel.fetch():
                if time.monotonic() > until:
                    self.channel.ready(None)
                    break
        self.usual = time.monotonic() - began
