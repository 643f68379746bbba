"""Layers that a device copies into its window by itself, beside its computing: the host only queues the copies."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from labinfer.backends.base import Device, Lane
from labinfer.compiler.graph import Weight
from labinfer.compiler.plan import Stage
from labinfer.runtime.parameters import Progress
from labinfer.runtime.streamed_weights import StreamedWeights
from labinfer.runtime.streamed_window import SLOTS, StreamedWindow
from labinfer.runtime.weights import Checkpoint


class QueuedWeights(StreamedWindow):
    """Layers from host memory, over a ``lane``. A copy is queued as soon as its slot is given up, so it follows what
    computes from there; what computes the layer follows its copy. Nobody waits on the host.
    """

    ahead = True

    def __init__(self, stage: Stage, matrices: Mapping[int, Sequence[Weight]], device: Device, lane: Lane) -> None:
        super().__init__(stage, matrices, device)
        self.lane = lane
        self.copies: dict[int, tuple[np.ndarray, Any]] = {}
        self.order = itertools.cycle(self.layers)
        self.upcoming = next(self.order)
        self.coming = deque[tuple[int, Any]]()  # layers on their way, with their tickets
        self.free = set(range(SLOTS))

    def load(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """See ``StreamedWindow.load``."""
        self.copies = {layer: self.host_copy(layer, checkpoint, progress) for layer in self.layers}
        self.fill()

    def fill(self) -> None:
        """Queue the copies of the layers that are next, as far as there are slots for them."""
        while (slot := self.slot(self.upcoming)) in self.free:
            self.free.remove(slot)
            self.coming.append((self.upcoming, self.lane.send(*self.copies[self.upcoming])))
            self.upcoming = next(self.order)

    def reach(self, layer: int | None) -> None:
        """See ``StreamedWindow.reach``."""
        if layer == self.current:
            return
        self.end()
        while layer in self.places and layer != self.current:  # those that a step which failed did not reach go first
            self.end()
            self.current, ticket = self.coming.popleft()
            self.lane.hold(ticket)

    def end(self) -> None:
        """See ``StreamedWindow.end``."""
        if self.current is not None:
            self.free.add(self.slot(self.current))
            self.current = None
            self.fill()

    def close(self) -> None:
        """Give the memory back, once nothing is copied any more."""
        while self.coming:
            self.lane.hold(self.coming.popleft()[1])
        self.device.synchronize()
        self.copies.clear()
        super().close()


def streamed_weights(stage: Stage, matrices: Mapping[int, Sequence[Weight]], device: Device) -> StreamedWindow:
    """The window of a stage that streams layers, as its device is best at; from disk, the host's threads bring them."""
    lane = device.lane() if stage.streamed_from == "host" else None
    return StreamedWeights(stage, matrices, device) if lane is None else QueuedWeights(stage, matrices, device, lane)
