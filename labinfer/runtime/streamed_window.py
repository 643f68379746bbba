"""The window that streamed layers are copied into, on their device: what all ways of streaming have in common.

The window has two slots, and the streamed layers take them in turn. A layer always lies in the same slot, so tapes are
bound once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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


class StreamedWindow(ABC):
    """The matrices of a stage's streamed layers. Whoever runs a step calls ``reach`` before each layer's ops, and
    ``end`` after the last, whatever has happened.
    """

    ahead: bool
    """Whether layers come while others are computed."""

    def __init__(self, stage: Stage, matrices: Mapping[int, Sequence[Weight]], device: Device) -> None:
        self.device, self.layers = device, list(stage.streamed)
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
        self.current: int | None = None

    def slot(self, layer: int) -> int:
        """Where in the window a layer lies."""
        return self.places[layer] % SLOTS

    def arrays(self) -> dict[str, Any]:
        """The device array of every weight: right while its layer is reached."""
        return {each.name: each.array for listed in self.by_layer.values() for each in listed}

    def host_copy(self, layer: int, checkpoint: Checkpoint, progress: Progress) -> tuple[np.ndarray, Any]:
        """A layer's bytes in host memory, where they are read through its slot, and that slot: int32 of one size."""
        for parameter in self.by_layer[layer]:
            read_weight(parameter, checkpoint, self.device, progress)
        target = self.device.view(self.window, self.slot(layer) * self.slot_bytes, (self.sizes[layer] // 4,), "i32")
        copy = self.device.host_memory(self.sizes[layer]).view(np.int32)
        self.device.move_out(target, copy)
        return copy, target

    @abstractmethod
    def load(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Read all layers into host memory, if they come from there, and begin to stream."""

    @abstractmethod
    def reach(self, layer: int | None) -> None:
        """The ops that follow are those of ``layer``: wait for it, and let the one before be overwritten."""

    @abstractmethod
    def end(self) -> None:
        """Let the layer that was reached be overwritten."""

    def close(self) -> None:
        """Give the memory back."""
        self.by_layer.clear()
        self.device.deallocate(self.window)
