"""The CPU device: packed weights, and whole steps run as one compiled tape by persistent threads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from labinfer.backends.base import Buffer, FunctionTable, Kernel
from labinfer.backends.cpu import isa
from labinfer.backends.cpu.emit import EMITTERS, Emitter, PackedWeight
from labinfer.backends.cpu.layout import packed_bytes
from labinfer.backends.cpu.machine import default_threads
from labinfer.backends.cpu.panels import pack
from labinfer.backends.cpu.rope import rope_tables
from labinfer.backends.cpu.sampling import sample, sampling_workspace_bytes
from labinfer.backends.cpu.tape import table
from labinfer.backends.cpu.workers import Workers
from labinfer.backends.host import DTYPES, HostDevice
from labinfer.ops.base import Call
from labinfer.ops.dequantization import dequantize


class CpuKernel:
    """An op kind of a device; called, it runs one op by itself."""

    def __init__(self, device: CpuDevice, kind: str) -> None:
        self.device, self.kind = device, kind

    def __call__(self, call: Call) -> None:
        """Run one op."""
        self.device.program([(self, call)])()


class CpuDevice(HostDevice):
    """Runs ops at the speed of memory. ``threads`` workers share every op; ``digits`` 1 trades exactness for speed."""

    def __init__(self, name: str, memory_limit: int | None = None, threads: int | None = None, digits: int = 2) -> None:
        super().__init__(name, memory_limit)
        self.threads, self.digits = threads or default_threads(), digits
        self.loaders = self.threads
        self.workers = Workers(self.threads)
        self.tables: weakref.WeakValueDictionary[Any, np.ndarray] = weakref.WeakValueDictionary()
        self.latents: set[int] = set()
        self.sampling = np.empty(0, np.uint8)
        kernels = {kind: CpuKernel(self, kind) for kind in EMITTERS}
        self.F = FunctionTable(kernels, lambda shape, dtype: np.empty(shape, DTYPES[dtype]))

    def parameter(self, buffer: Buffer, offset: int, format: str, shape: tuple[int, ...]) -> Any:
        """A vector as float32; a matrix, or a stack of them, in panels."""
        if len(shape) == 1:
            return self.view(buffer, offset, shape, "f32")
        size = packed_bytes(format, shape[-2], shape[-1])
        memory = buffer.memory[offset : offset + prod(shape[:-2]) * size]
        return PackedWeight(memory, format, shape[-2], shape[-1], size)

    def store(self, parameter: Any, raw: Any, format: str, shape: tuple[int, ...], index: int | None) -> None:
        """Pack the stored bytes into panels, or widen a vector."""
        if isinstance(parameter, PackedWeight):
            start = (index or 0) * parameter.nbytes
            pack(format, raw, shape[0], shape[1], parameter.memory[start : start + parameter.nbytes])
        else:
            np.copyto(parameter, dequantize(raw, format, shape))

    def rope_table(self, attrs: Any, length: int, weights: Mapping[str, Any]) -> np.ndarray:
        """Cosines and sines for positions below ``length``, made once for all layers that turn alike."""
        factors = [weights.get(name) for name in ("freq_factors", "long_freq_factors")]
        key = (attrs, length, *(None if f is None else f.tobytes() for f in factors))
        table = self.tables.get(key)
        if table is None:
            made = rope_tables(attrs, length, *factors)
            buffer = self.allocate(made.nbytes, "rope tables")
            table = self.view(buffer, 0, made.shape, "f32")
            np.copyto(table, made)
            weakref.finalize(table, self.deallocate, buffer)
            self.tables[key] = table
        return table

    def program(self, calls: Sequence[tuple[Kernel, Call]]) -> Callable[[], None]:
        """The calls as one tape, run by all workers in one compiled loop."""
        kinds = [kernel.kind for kernel, _ in calls if isinstance(kernel, CpuKernel)]
        for (_, call), kind in zip(calls, kinds, strict=True):  # who reads a cache decides how it is written
            if kind == "mla_attention":
                self.latents.add(id(call.cache))
            elif kind == "attention":
                self.latents.discard(id(call.cache))
        rows, kept = [], []
        for (_, call), kind in zip(calls, kinds, strict=True):
            emitter = Emitter(self, call)
            EMITTERS[kind](emitter, call)
            rows += emitter.rows
            kept += emitter.kept
        tape = table(rows)
        workers, at, count = self.workers, tape.ctypes.data, len(tape)
        step = calls[0][1].step

        def run() -> None:
            workers.run(at, count, 0 if step is None else len(step.context_len))
            _ = tape, kept  # the rows, and what they point to, live as long as what runs them

        return run

    def draw(self, logits: np.ndarray, temperature: float, top_k: int, top_p: float, random: float) -> int:
        """A token from one row of logits, without sorting the vocabulary (see ``sampling``)."""
        size = sampling_workspace_bytes(len(logits))
        if self.sampling.size < size:
            self.sampling = np.empty(size + 64, np.uint8)
        return int(
            sample(logits.ctypes.data, len(logits), temperature, top_k, top_p, random, self.sampling.ctypes.data)
        )

    def close(self) -> None:
        """End the threads."""
        self.workers.close()

    @property
    def compute_share(self) -> float:
        """The part of the cores it uses."""
        return min(1.0, self.threads / default_threads())

    def describe(self) -> str:
        """What it is."""
        return f"{self.threads} threads, {isa.LEVEL}{' with bf16' if isa.HAS_BF16 else ''}"
