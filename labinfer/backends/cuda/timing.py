"""What each of several calls takes, on the GPU's own clock."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import cupy

from labinfer.backends.cuda import driver
from labinfer.backends.cuda.tape import Row, Runnable, Tape

if TYPE_CHECKING:
    from labinfer.backends.cuda.device import CudaDevice

WARM = 3
"""Runs until a tape is a graph that has run: eager, captured, replayed."""


class TimedCalls:
    """Calls by their rows and the arrays these point to.

    With an event between them kernels do not overlap, so the times of such a run tell only how what the whole takes,
    run as always, is shared among the calls.
    """

    def __init__(self, device: CudaDevice, calls: Sequence[tuple[Sequence[Row | Runnable], Sequence[Any]]]) -> None:
        self.device = device
        self.whole = Tape(device, [row for rows, _ in calls for row in rows], [kept for _, kept in calls])
        self.parts = [Tape(device, rows, kept) for rows, kept in calls]
        self.events = [cupy.cuda.Event() for _ in range(len(calls) + 1)]
        self.ends = cupy.cuda.Event(), cupy.cuda.Event()
        for _ in range(WARM):
            self.whole()
        self.graph = device.capture(self.run_parts)

    def run_parts(self, stream: int) -> None:
        """Put all calls on a stream that is being captured, with an event before, between and after them."""
        driver.record(self.events[0].ptr, stream, driver.EXTERNAL)
        for part, event in zip(self.parts, self.events[1:], strict=True):
            part.run(stream)
            driver.record(event.ptr, stream, driver.EXTERNAL)

    def run(self) -> list[float]:
        """Seconds of each call; their sum is what all take together."""
        self.device.use()
        stream, (start, end) = self.device.stream, self.ends
        start.record(stream)
        self.whole()
        end.record(stream)
        self.graph.launch(stream)
        self.device.synchronize()
        whole = cupy.cuda.get_elapsed_time(start, end) / 1e3
        alone = [cupy.cuda.get_elapsed_time(before, after) for before, after in pairwise(self.events)]
        return [whole * each / sum(alone) for each in alone]
