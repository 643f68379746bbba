"""Weights that do not fit a device: layers that are copied into a window of it just before they are computed.

The window has two slots, and the streamed layers take them in turn: while one is computed, a thread copies the next
one, and after the last of a step the first of the next step. A layer always lies in the same slot, so tapes are bound
once. Layers come from host memory, in the device's own layout, or from the checkpoint on disk, packed anew each time.
They come in pieces: whoever has to wait for a layer brings some of them itself. Where a device computes with all cores,
nothing is copied meanwhile: its own threads copy each layer when it is reached.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from labinfer.backends.base import Device, capabilities
from labinfer.compiler.graph import Weight
from labinfer.compiler.plan import Stage
from labinfer.errors import InvalidFile, LabinferError
from labinfer.runtime.parameters import Progress, read_weight, store_tensor
from labinfer.runtime.variables import Parameter
from labinfer.runtime.weights import Checkpoint
from labinfer.runtime.weights.tensor_reader import TensorReader

SLOTS = 2

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


class StreamedWeights:
    """The matrices of a stage's streamed layers. Whoever runs a step calls ``reach`` before each layer's ops, and
    ``end`` after the last, whatever has happened.
    """

    def __init__(self, stage: Stage, matrices: Mapping[int, Sequence[Weight]], device: Device) -> None:
        self.device, self.from_disk = device, stage.streamed_from == "disk"
        self.layers = list(stage.streamed)
        self.places = {layer: index for index, layer in enumerate(self.layers)}
        self.slot_bytes = stage.bytes.window // SLOTS
        weight_bytes = capabilities(device.name).weight_bytes
        self.sizes = {
            layer: sum(weight_bytes(each.format, each.shape) for each in matrices.get(layer, ()))
            for layer in self.layers
        }
        if max(self.sizes.values()) > self.slot_bytes or not all(self.sizes.values()):
            message = f"the window of '{device.name}' has slots of {self.slot_bytes} bytes, layers take {self.sizes}"
            raise InvalidFile("plan.window", message, remedy="compile the plan again")
        self.window = device.allocate(stage.bytes.window, "window of streamed layers")
        self.by_layer: dict[int, list[Parameter]] = {}
        for layer in self.layers:
            offset = self.slot(layer) * self.slot_bytes
            self.by_layer[layer] = []
            for weight in matrices[layer]:
                array = device.parameter(self.window, offset, weight.format, weight.shape)
                self.by_layer[layer].append(Parameter(weight.name, device.name, weight, array))
                offset += weight_bytes(weight.format, weight.shape)
        self.pieces: dict[int, list[Piece]] = {}
        self.reader: TensorReader | None = None
        self.current: int | None = None
        self.coming = Arrival(self.layers[0], iter(()))
        self.arrived = SimpleQueue[Arrival]()
        self.free = [SimpleQueue[None]() for _ in range(SLOTS)]
        for each in self.free:
            each.put(None)
        self.ahead = self.from_disk or not device.fills_host  # else a thread would take the cores that compute
        self.closing = False
        self.thread: threading.Thread | None = None

    def slot(self, layer: int) -> int:
        """Where in the window a layer lies."""
        return self.places[layer] % SLOTS

    def arrays(self) -> dict[str, Any]:
        """The device array of every weight: right while its layer is reached."""
        return {each.name: each.array for listed in self.by_layer.values() for each in listed}

    def load(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Read all layers into host memory, if they come from there, and begin to stream."""
        if self.from_disk:
            self.reader = TensorReader(checkpoint)
            self.pieces = {layer: self.disk_pieces(layer, checkpoint, self.reader) for layer in self.layers}
        else:
            self.pieces = {layer: self.host_pieces(layer, checkpoint, progress) for layer in self.layers}
        if self.ahead:
            self.thread = threading.Thread(target=self.run, name="labinfer-weights", daemon=True)
            self.thread.start()

    def host_pieces(self, layer: int, checkpoint: Checkpoint, progress: Progress) -> list[Piece]:
        """Copies of a layer's bytes, which are read into host memory through its slot."""
        for parameter in self.by_layer[layer]:
            read_weight(parameter, checkpoint, self.device, progress)
        target = self.device.view(self.window, self.slot(layer) * self.slot_bytes, (self.sizes[layer] // 4,), "i32")
        copy = self.device.host_memory(self.sizes[layer]).view(np.int32)
        self.device.move_out(target, copy)
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
            arrival.bring()
            self.arrived.put(arrival)

    def reach(self, layer: int | None) -> None:
        """The ops that follow are those of ``layer``: wait for it, and let the one before be overwritten."""
        if layer == self.current:
            return
        self.end()
        if layer in self.places and not self.ahead:
            self.current = layer
            self.bring(layer)
        while layer in self.places and layer != self.current:  # those that a step which failed did not reach go first
            self.end()
            arrival = self.wait()
            self.current = arrival.layer
            if layer == self.current and arrival.problem is not None:
                self.bring(layer)  # once more

    def wait(self) -> Arrival:
        """The layer that is next, once it has arrived; until then, pieces are brought here too."""
        try:
            return self.arrived.get_nowait()
        except Empty:
            self.coming.bring()
            return self.arrived.get()

    def bring(self, layer: int) -> None:
        """Bring the layer that was reached; what is wrong ends the step."""
        arrival = Arrival(layer, iter(self.pieces[layer]))
        arrival.bring()
        if isinstance(arrival.problem, LabinferError):
            raise arrival.problem
        if arrival.problem is not None:
            message = f"layer {layer} could not be streamed to '{self.device.name}': {arrival.problem}"
            raise LabinferError("run.stream-failed", message) from arrival.problem

    def end(self) -> None:
        """Let the layer that was reached be overwritten."""
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
        if self.reader is not None:
            self.reader.close()
        self.by_layer.clear()
        self.pieces.clear()
        self.device.deallocate(self.window)
