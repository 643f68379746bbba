"""Loads a stage's weights from a checkpoint into one allocation on its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from labinfer.backends.base import Device
from labinfer.compiler.graph import Op, Transform, Weight
from labinfer.compiler.plan import Stage
from labinfer.errors import WeightsError
from labinfer.ops.formats import stored_bytes
from labinfer.runtime.variables import Parameter
from labinfer.runtime.weights import Checkpoint, dequantize

Progress = Callable[[int], None]
"""Called with the bytes just read from the checkpoint."""


class Parameters:
    """The weights of one stage, float32, in exactly the plan's bytes; ``by_name`` gives each as a ``Parameter``."""

    def __init__(
        self, stage: Stage, ops: list[Op], weights: Mapping[str, Weight], device: Device, checkpoint: Checkpoint,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.device = device
        self.buffer = device.allocate(stage.bytes.weights, "weights")
        self.by_name: dict[str, Parameter] = {}
        offset = 0
        try:
            for name in dict.fromkeys(name for op in ops for name in op.weights.values()):
                weight = weights[name]
                array = device.view(self.buffer, offset, weight.shape, "f32")
                read_weight(weight, checkpoint, device, array, progress)
                self.by_name[name] = Parameter(name, device.name, weight, array)
                offset += stored_bytes("f32", weight.shape)
        except BaseException:
            self.close()
            raise

    def arrays(self) -> dict[str, Any]:
        """The device array of every weight."""
        return {name: parameter.array for name, parameter in self.by_name.items()}

    def close(self) -> None:
        """Give the memory back."""
        self.by_name.clear()
        self.device.deallocate(self.buffer)


def read_weight(weight: Weight, checkpoint: Checkpoint, device: Device, array: Any, progress: Progress) -> None:
    """Fill the device ``array`` with ``weight``, widened to float32; a tensor that differs from the plan is an error."""
    for index, name in enumerate(weight.tensors()):
        info = checkpoint.tensors.get(name)
        shape = weight.shape if weight.stack is None else weight.shape[1:]
        stored = shape[::-1] if weight.transform.transpose else shape
        if info is None or info.shape != stored or info.format != weight.format:
            found = "is missing" if info is None else f"is {info.format}{list(info.shape)}"
            message = f"tensor '{name}' of {checkpoint.path} {found}, the plan says {weight.format}{list(stored)}"
            raise WeightsError("weights.changed", message, remedy="compile the plan again")
        values = dequantize(checkpoint.raw(name), info.format, info.shape)
        device.move_in(transformed(values, weight.transform), array if weight.stack is None else array[index])
        progress(info.nbytes)


def transformed(values: np.ndarray, transform: Transform) -> np.ndarray:
    """``values`` with its rows regrouped and axes transposed as ``transform`` says."""
    if transform.transpose:
        values = values.T
    if transform.rows:
        rest = values.shape[1:]
        axes = (*transform.order, *range(len(transform.rows), len(transform.rows) + len(rest)))
        values = values.reshape(*transform.rows, *rest).transpose(axes).reshape(-1, *rest)
    return values
