"""The reference device: numpy, float32, one thread of Python. Slow on purpose; what it computes is what is right."""

from __future__ import annotations

from typing import Any

import numpy as np

from labinfer.backends.base import Allocator, Buffer, Device, FunctionTable, Kernel
from labinfer.ops.base import OPS, Call, OpSpec
from labinfer.ops.dequantization import dequantize

DTYPES = {"f32": np.float32, "i32": np.int32}


class HostAllocator(Allocator):
    """Ordinary memory of the process."""

    def reserve(self, nbytes: int) -> Any:
        """A zeroed byte array."""
        try:
            return np.zeros(nbytes, np.uint8)
        except ValueError:  # beyond what any machine can address
            raise MemoryError from None


class ReferenceDevice(Device):
    """Runs every op by its own reference, on ordinary memory, with weights widened to float32."""

    def __init__(self, name: str, memory_limit: int | None = None) -> None:
        super().__init__(name)
        self.allocator = HostAllocator(memory_limit)
        kernels = {kind: reference_kernel(spec) for kind, spec in OPS.items() if not spec.view}
        kernels["linear"] = linear
        self.F = FunctionTable(kernels, lambda shape, dtype: np.empty(shape, DTYPES[dtype]))

    def view(
        self, buffer: Buffer, offset: int, shape: tuple[int, ...], dtype: str, row_bytes: int | None = None
    ) -> Any:
        """A numpy array over the buffer's bytes."""
        kind = np.dtype(DTYPES[dtype])
        strides: tuple[int, ...] | None = None
        if row_bytes is not None and len(shape) == 2:
            strides = (row_bytes, kind.itemsize)
        return np.ndarray(shape, kind, buffer.memory, offset, strides)

    def parameter(self, buffer: Buffer, offset: int, format: str, shape: tuple[int, ...]) -> Any:
        """A float32 array."""
        return self.view(buffer, offset, shape, "f32")

    def store(self, parameter: Any, raw: Any, format: str, shape: tuple[int, ...], index: int | None) -> None:
        """Widen to float32."""
        np.copyto(parameter if index is None else parameter[index], dequantize(raw, format, shape))

    def move_in(self, host: Any, destination: Any) -> None:
        """A copy."""
        np.copyto(destination, host)

    def move_out(self, source: Any) -> Any:
        """A copy."""
        return np.array(source)

    def fill(self, buffer: Buffer, byte: int) -> None:
        """Set every byte."""
        buffer.memory[:] = byte

    def memory(self) -> tuple[int, int]:
        """Free and total memory of the machine, or of the limit."""
        import os

        page = os.sysconf("SC_PAGE_SIZE")
        free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
        limit = self.allocator.limit
        return (free, total) if limit is None else (limit - self.allocator.allocated, limit)

    @property
    def compute_share(self) -> float:
        """All of it."""
        return 1.0

    def describe(self) -> str:
        """What it is."""
        return f"numpy {np.__version__}, float32, for reference"


def reference_kernel(spec: OpSpec) -> Kernel:
    """The kernel that runs an op's own reference and copies its results out."""

    def run(call: Call) -> None:
        for out, result in zip(call.outputs, spec.reference(call), strict=True):
            out[...] = result

    return run


def linear(call: Call) -> None:
    """``x @ weight.T + bias``, straight into the output."""
    out = call.outputs[0]
    np.matmul(call.inputs[0], call.weights["weight"].T, out=out)
    if "bias" in call.weights:
        out += call.weights["bias"]
