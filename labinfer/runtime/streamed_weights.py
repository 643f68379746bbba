"""Weights that do not fit a device: layers that are copied into a window of it just before they are computed.

The window has two slots, and the streamed layers take them in turn: while one is computed, a thread copies the next
one, and after the last of a step the first of the next step. A layer always lies in the same slot, so tapes are bound
once. Layers come from host memory, in the device's own layout, or from the checkpoint on disk, packed anew each time.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from labinfer.backends.base import Device, capabilities
from labinfer.compiler.graph import Weight
from labinfer.compiler.plan import Stage
from labinfer.errors import InvalidFile
from labinfer.runtime.parameters import Progress, read_weight
from labinfer.runtime.variables import Parameter
from labinfer.runtime.weights import Checkpoint

SLOTS = 2


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
        self.copies: dict[int, np.ndarray] = {}
        self.current: int | None = None
        self.next = 0  # place of the layer that arrives next
        self.arrived = threading.Semaphore(0)
        self.free = [threading.Semaphore(1) for _ in range(SLOTS)]
        self.closing = False
        self.problem: BaseException | None = None
        self.thread: threading.Thread | None = None

    def slot(self, layer: int) -> int:
        """Where in the window a layer lies."""
        return self.places[layer] % SLOTS

    def arrays(self) -> dict[str, Any]:
        """The device array of every weight: right while its layer is reached."""
        return {each.name: each.array for listed in self.by_layer.values() for each in listed}

    def load(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Read all layers into host memory, if they come from there, and begin to stream."""
        if not self.from_disk:
            for layer in self.layers:
                self.read(layer, checkpoint, progress)
                copy = self.copies[layer] = self.device.host_memory(self.sizes[layer]).view(np.int32)
                self.device.move_out(self.in_window(layer), copy)
        bring = (lambda layer: self.read(layer, checkpoint, lambda nbytes: None)) if self.from_disk else self.copy
        self.thread = threading.Thread(target=self.run, args=(bring,), name="labinfer-weights", daemon=True)
        self.thread.start()

    def read(self, layer: int, checkpoint: Checkpoint, progress: Progress) -> None:
        """Fill a layer's slot from the checkpoint."""
        for parameter in self.by_layer[layer]:
            read_weight(parameter, checkpoint, self.device, progress)

    def copy(self, layer: int) -> None:
        """Fill a layer's slot from host memory."""
        self.device.move_in(self.copies[layer], self.in_window(layer))

    def in_window(self, layer: int) -> Any:
        """A layer's bytes in its slot, as int32."""
        return self.device.view(self.window, self.slot(layer) * self.slot_bytes, (self.sizes[layer] // 4,), "i32")

    def run(self, bring: Callable[[int], None]) -> None:
        """Bring one layer after another as slots become free, until closed."""
        for layer in itertools.cycle(self.layers):
            self.free[self.slot(layer)].acquire()
            if self.closing:
                return
            try:
                bring(layer)
            except BaseException as error:  # told to whoever waits for the layer
                self.problem = error
            self.arrived.release()

    def reach(self, layer: int | None) -> None:
        """The ops that follow are those of ``layer``: wait for it, and let the one before be overwritten."""
        if layer == self.current:
            return
        self.end()
        while layer in self.places and layer != self.current:  # those that a step which failed did not reach go first
            self.end()
            self.arrived.acquire()
            self.current, self.next = self.layers[self.next], (self.next + 1) % len(self.layers)
            if self.problem is not None:
                raise self.problem

    def end(self) -> None:
        """Let the layer that was reached be overwritten."""
        if self.current is not None:
            layer, self.current = self.current, None
            self.free[self.slot(layer)].release()

    def close(self) -> None:
        """End the thread and give the memory back."""
        self.closing = True
        for each in self.free:
            each.release()
        if self.thread is not None:
            self.thread.join()
        self.by_layer.clear()
        self.copies.clear()
        self.device.deallocate(self.window)
