"""The tape: what ops become on this device, a list of launches, run one by one at first and then as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labinfer.backends.base import Kernel
from labinfer.backends.cuda.compile import Source
from labinfer.ops.base import Call, Step

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

    def ready(self) -> None:
        """Before the first run: make the graph, which loads what is loaded lazily, if only for that."""
        if self.graph is None and not self.runs:
            graph = self.device.capture(self.run)
            self.graph = graph if self.device.graphs else None

    def __call__(self) -> None:
        """Run once. Unless it is ready, the first run is eager, as of many sizes there is one only, and the second is
        captured on its way.
        """
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


def sequences_of(step: Step | None) -> int:
    """Sequences of a step."""
    return 1 if step is None else len(step.context_len)


class Tapes:
    """A device's program: its calls as one tape for each number of sequences, made when it is first needed."""

    def __init__(self, device: CudaDevice, calls: Sequence[tuple[Kernel, Call]]) -> None:
        self.device, self.calls = device, calls
        self.step = next((call.step for _, call in calls if call.step is not None), None)
        self.tapes: dict[int, Tape] = {}

    def tape(self) -> Tape:
        """That of the present step."""
        self.device.use()
        sequences = sequences_of(self.step)
        tape = self.tapes.get(sequences)
        if tape is None:
            tape = self.tapes[sequences] = Tape(self.device, *self.device.rows(self.calls, sequences))
        return tape

    def __call__(self, tokens: int, rows: int) -> None:
        """See ``Program``; sizes are those of the calls' arrays."""
        self.tape()()
