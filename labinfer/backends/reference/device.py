"""The reference device: numpy, float32, one thread of Python. Slow on purpose; what it computes is what is right."""

from __future__ import annotations

from typing import Any

import numpy as np

from labinfer.backends.base import Buffer, FunctionTable, Kernel
from labinfer.backends.host import DTYPES, HostDevice
from labinfer.ops.base import OPS, Call, OpSpec
from labinfer.ops.dequantization import dequantize


class ReferenceDevice(HostDevice):
    """Runs every op by its own reference, on ordinary memory, with weights widened to float32."""

    def __init__(self, name: str, memory_limit: int | None = None, threads: int | None = None) -> None:
        super().__init__(name, memory_limit, threads)
        kernels = {kind: reference_kernel(spec) for kind, spec in OPS.items() if not spec.view}
        kernels["linear"] = linear
        self.F = FunctionTable(kernels, lambda shape, dtype: np.empty(shape, DTYPES[dtype]))

    def parameter(self, buffer: Buffer, offset: int, format: str, shape: tuple[int, ...]) -> Any:
        """A float32 array."""
        return self.view(buffer, offset, shape, "f32")

    def store(self, parameter: Any, raw: Any, format: str, shape: tuple[int, ...], index: int | None) -> None:
        """Widen to float32."""
        np.copyto(parameter if index is None else parameter[index], dequantize(raw, format, shape))

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
