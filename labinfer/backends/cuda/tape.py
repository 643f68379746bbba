"""The tape: what ops become on this device, a list of launches, run one by one at first and then as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labinfer.backends.cuda.compile import Source

if TYPE_CHECKING:
    from labinfer.backends.cuda.device import CudaDevice

Runnable = Callable[[int], None]
"""Puts something on the stream with this handle."""


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel of a source by name, and what it is launched with (see ``driver.parameter``)."""

    source: Source
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    arguments: tuple[Any, ...]
    shared: int = 0
    cluster: tuple[int, int, int] = (1, 1, 1)


class Tape:
    """Rows bound to a device. All that varies from step to step lies in device memory, so the addresses hold."""

    def __init__(self, device: CudaDevice, rows: Sequence[Row | Runnable], kept: Sequence[Any]) -> None:
        self.device, self.rows, self.kept = device, rows, kept
        # The first kernel waits for all before it, so that the others may read what earlier steps left at once.
        self.runnables = [device.launch(row, i > 0) if isinstance(row, Row) else row for i, row in enumerate(rows)]
        self.graph: Any = None
        self.runs = 0

    def __call__(self) -> None:
        """Run once. The first run is eager, which loads what is loaded lazily; the second is captured on its way."""
        if self.graph is None and self.runs > 0 and self.device.graphs:
            self.graph = self.device.capture(self.run)
        self.runs += 1
        if self.graph is None:
            self.run(self.device.stream.ptr)
        else:
            self.graph.launch(self.device.stream)

    def run(self, stream: int) -> None:
        """Put every launch on a stream."""
        for runnable in self.runnables:
            runnable(stream)
