"""Weights that do not fit a device: layers that are copied into a window of it just before they are computed.

While one is computed, a thread copies the next one into the other slot, and after the last of a step the first of the
next step. Layers come from host memory, in the device's own layout, or from the checkpoint on disk, packed anew each
time. They come in pieces: whoever has to wait for a layer brings some of them itself. Where a device computes with all
cores, nothing is copied or packed meanwhile: all of them bring each layer when it is reached. The disk needs no core:
the system is told which layer is next, and reads it meanwhile.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from math import prod
from queue import Empty, SimpleQueue

from labinfer.backends.base import Device
from labinfer.compiler.graph import Weight
from labinfer.compiler.plan import Stage
from labinfer.errors import LabinferError
from labinfer.runtime.parameters import Progress, store_tensor
from labinfer.runtime.streamed_window import SLOTS, StreamedWindow
from labinfer.runtime.weights import Checkpoint
from labinfer.runtime.weights.tensor_reader import TensorReader

Piece = Callable[[], object]
"""Brings a part of a layer."""


@dataclass(slots=True)
class Arrival:
    """A layer on its way: threads that bring it take ``pieces`` in turn; one that fails spoils it."""

    layer: int
    pieces: Iterator[Piece]
    problem: BaseException | None = None

    def bring(self) -> None:
        """Bring pieces until none is left. What is wrong with one is kept; an interrupt goes on."""
        try:
            for piece in self.pieces:
                piece()
        except BaseException as error:
            self.problem = error
            for _ in self.pieces:  # which would be brought later, over another layer
                pass
            if not isinstance(error, Exception):
                raise


class StreamedWeights(StreamedWindow):
    """Layers that threads of the host bring."""

    def __init__(self, stage: Stage, matrices: Mapping[int, Sequence[Weight]], device: Device) -> None:
        super().__init__(stage, matrices, device)
        self.from_disk = stage.streamed_from == "disk"
        self.pieces: dict[int, list[Piece]] = {}
        self.reader: TensorReader | None = None
        self.coming = Arrival(self.layers[0], iter(()))
        self.arrived = SimpleQueue[Arrival]()
        self.free = [SimpleQueue[None]() for _ in range(SLOTS)]
        for each in self.free:
            each.put(None)
        self.ahead = not device.fills_host  # else a thread would take the cores that compute
        self.closing = False
        self.thread: threading.Thread | None = None
        self.helping = device.loaders - 1 if self.from_disk and not self.ahead else 0
        self.helpers = ThreadPoolExecutor(max(1, self.helping), thread_name_prefix="labinfer-weights")

    def load(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """See ``StreamedWindow.load``."""
        if self.from_disk:
            self.reader = TensorReader(checkpoint)
            self.pieces = {layer: self.disk_pieces(layer, checkpoint, self.reader) for layer in self.layers}
        else:
            self.pieces = {layer: self.host_pieces(layer, checkpoint, progress) for layer in self.layers}
        if self.ahead:
            self.thread = threading.Thread(target=self.run, name="labinfer-weights", daemon=True)
            self.thread.start()

    def host_pieces(self, layer: int, checkpoint: Checkpoint, progress: Progress) -> list[Piece]:
        """Copies of parts of a layer's bytes."""
        copy, target = self.host_copy(layer, checkpoint, progress)
        count = ((self.ahead and self.device.copy_bytes) or self.sizes[layer]) // 4
        starts = range(0, len(copy), count)
        return [self.device.copier(copy[at : at + count], target[at : at + count]) for at in starts]

    def disk_pieces(self, layer: int, checkpoint: Checkpoint, reader: TensorReader) -> list[Piece]:
        """Reading and packing of a layer's tensors, the longest first, so that threads end at about the same time."""
        return [
            partial(store_tensor, each, index, checkpoint, reader.read, self.device)
            for each in sorted(self.by_layer[layer], key=lambda each: -prod(each.weight.shape))
            for index in range(len(each.weight.tensors()))
        ]

    def run(self) -> None:
        """Bring one layer after another as slots become free, until closed."""
        for layer in itertools.cycle(self.layers):
            self.free[self.slot(layer)].get()
            if self.closing:
                return
            self.coming = arrival = Arrival(layer, iter(self.pieces[layer]))
            self.expect_next(layer)
            arrival.bring()
            self.arrived.put(arrival)

    def expect_next(self, layer: int) -> None:
        """Have the system read from disk what comes after ``layer``."""
        if self.reader is not None:
            following = self.layers[(self.places[layer] + 1) % len(self.layers)]
            for name in (name for each in self.by_layer[following] for name in each.weight.tensors()):
                self.reader.expect(name)

    def reach(self, layer: int | None) -> None:
        """See ``StreamedWindow.reach``."""
        if layer == self.current:
            return
        self.end()
        if layer in self.places and not self.ahead:
            self.current = layer
            self.complete(self.bring(layer))
        while layer in self.places and layer != self.current:  # those that a step which failed did not reach go first
            self.end()
            arrival = self.wait()
            self.current = arrival.layer
            if layer == self.current:
                self.complete(arrival)

    def wait(self) -> Arrival:
        """The layer that is next, once it has arrived; until then, pieces are brought here too."""
        try:
            return self.arrived.get_nowait()
        except Empty:
            self.coming.bring()
            return self.arrived.get()

    def bring(self, layer: int) -> Arrival:
        """Bring the layer that was reached, with the threads that help."""
        arrival = Arrival(layer, iter(self.pieces[layer]))
        helping = [self.helpers.submit(arrival.bring) for _ in range(self.helping)]
        self.expect_next(layer)
        try:
            arrival.bring()
        finally:
            wait(each for each in helping if not each.cancel())
        return arrival

    def complete(self, arrival: Arrival) -> None:
        """Bring a layer once more if something was wrong with it; if it still is, that ends the step."""
        if arrival.problem is None:
            return
        problem = self.bring(arrival.layer).problem
        if isinstance(problem, LabinferError):
            raise problem
        if problem is not None:
            message = f"layer {arrival.layer} could not be streamed to '{self.device.name}': {problem}"
            raise LabinferError("run.stream-failed", message) from problem

    def end(self) -> None:
        """See ``StreamedWindow.end``."""
        if self.current is not None:
            layer, self.current = self.current, None
            if self.ahead:
                self.free[self.slot(layer)].put(None)

    def close(self) -> None:
        """End the thread and give the memory back."""
        self.closing = True
        for each in self.free:
            each.put(None)
        if self.thread is not None:
            self.thread.join()
        self.helpers.shutdown()
        if self.reader is not None:
            self.reader.close()
        self.pieces.clear()
        super().close()
