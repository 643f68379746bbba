"""The step batch on a device: fixed memory that every step is copied into, so that bound kernels always find it."""

from __future__ import annotations

from math import prod
from typing import Any

from labinfer.backends.base import Device
from labinfer.compiler.plan import Limits
from labinfer.ops.base import Step


class StepMemory:
    """Arrays at the plan's upper bounds; ``step`` shows as much of them as the present step uses."""

    def __init__(self, device: Device, limits: Limits) -> None:
        self.device = device
        self.buffer = device.allocate(limits.step_bytes, "step")
        self.arrays: dict[str, Any] = {}
        offset = 0
        for name, shape in limits.step_shapes.items():
            self.arrays[name] = device.view(self.buffer, offset, shape, "i32")
            offset += 4 * prod(shape)
        self.step = Step(**self.arrays, block_size=limits.block_size, max_num_seqs=limits.max_num_seqs)

    def load(self, step: Step) -> None:
        """Copy ``step``, whose arrays are numpy's, to the device."""
        for name, memory in self.arrays.items():
            host = getattr(step, name)
            used = memory[: len(host)]
            setattr(self.step, name, used)
            self.device.move_in(host, used[:, : host.shape[1]] if name == "block_table" else used)

    def close(self) -> None:
        """Give the memory back."""
        self.arrays.clear()
        self.device.deallocate(self.buffer)
