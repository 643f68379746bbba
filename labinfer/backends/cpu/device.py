"""The CPU device: packed weights, and whole steps run as one compiled tape by persistent threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from math import gcd, prod
from typing import Any

import numpy as np

from labinfer.backends.base import Buffer, FunctionTable, Kernel, Program
from labinfer.backends.cpu import features, greedy, machine_code
from labinfer.backends.cpu.crossover import tune
from labinfer.backends.cpu.emit import EMITTERS
from labinfer.backends.cpu.emitter import Emitter
from labinfer.backends.cpu.layout import packed_bytes
from labinfer.backends.cpu.machine import default_threads
from labinfer.backends.cpu.packed_weight import PackedWeight, pack
from labinfer.backends.cpu.tape import Row, Tape, kernels_of
from labinfer.backends.cpu.workers import Workers
from labinfer.backends.cpu.workspace import scratch_bytes
from labinfer.backends.host import DTYPES, HostDevice
from labinfer.backends.rope_tables import RopeTables
from labinfer.backends.sampling import GreedyRun
from labinfer.errors import UsageError
from labinfer.ops.base import Call, KernelBounds, KernelOptions, Step, TensorType
from labinfer.ops.dequantization import dequantize


class CpuKernel:
    """An op kind of a device; called, it runs one op by itself."""

    def __init__(self, device: CpuDevice, kind: str) -> None:
        self.device, self.kind = device, kind

    def __call__(self, call: Call) -> None:
        """Run one op; arrays that kernels cannot read in place are copied, scratch memory is made.

        Matrices must be in panels (``Device.parameter`` and ``store``): a ``UsageError`` says so.
        """
        weights = {name: _weight(self.kind, name, weight) for name, weight in call.weights.items()}
        call = replace(call, inputs=tuple(map(_readable, call.inputs)), weights=weights)
        call.workspace = self.workspace(call)
        self.device.program([(self, call)])(0, 0)

    def workspace(self, call: Call) -> np.ndarray | None:
        """Scratch memory for one call, as a plan would reserve it."""
        types = [TensorType(x.shape, "i32" if x.dtype.kind == "i" else "f32") for x in call.inputs]
        panels = [weight for weight in call.weights.values() if isinstance(weight, PackedWeight)]
        formats = tuple((weight.format, (weight.rows, weight.columns)) for weight in panels)
        sequences = 1 if call.step is None else len(call.step.context_len)
        tokens, threads = len(call.inputs[0]), self.device.threads
        bounds = KernelBounds(
            self.kind, (call.attrs,), tuple(types), formats, tokens, tokens, sequences, threads, call.options
        )
        raw = np.empty(scratch_bytes(bounds) // 4 + 16, np.int32)
        return raw[-(raw.ctypes.data // 4) % 16 :]


def _readable(x: Any) -> np.ndarray:
    """``x`` as rows of float32 or int32, each without gaps."""
    x = np.asarray(x)
    x = x.astype(np.int32 if x.dtype.kind in "iub" else np.float32, copy=False)
    return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)


def _weight(kind: str, name: str, weight: Any) -> Any:
    """A weight as kernels take it: panels as they are, a vector as float32."""
    if isinstance(weight, PackedWeight):
        return weight
    if np.ndim(weight) != 1:
        message = f"'{name}' of '{kind}' is a plain array; this device multiplies with weights in panels"
        raise UsageError(
            "run.weight-layout", message, remedy="make one with device.parameter(...) and device.store(...)"
        )
    return np.ascontiguousarray(weight, np.float32)


class CpuDevice(HostDevice):
    """Runs ops at the speed of memory. ``threads`` workers share every op."""

    decodes_alone = True

    def __init__(self, name: str, memory_limit: int | None = None, threads: int | None = None) -> None:
        super().__init__(name, memory_limit)
        self.threads = threads or default_threads()
        self.loaders = self.threads
        self.fills_host = self.threads >= default_threads()
        self.workers = Workers(self.threads)
        self.rope_tables = RopeTables(self)
        self.latents: set[int] = set()
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
            matrices = parameter.memory.reshape(-1, parameter.nbytes)
            if index is not None:
                matrices = matrices[index : index + 1]
            for matrix, part in zip(matrices, raw.reshape(len(matrices), -1), strict=True):
                pack(format, part, shape[-2], shape[-1], matrix)
        else:
            np.copyto(parameter, dequantize(raw, format, shape))

    def copier(self, host: Any, destination: Any) -> Callable[[], None]:
        """A copy of four-byte numbers without gaps; by all workers, where they would be disturbed by another thread."""
        if not self.fills_host:
            return super().copier(host, destination)
        count = gcd(host.size, 64)  # parts, which the workers share
        part = host.size // count
        tape = Tape([Row("copy_step", (count, host.ctypes.data, part, destination.ctypes.data, part, part))])

        def copy() -> None:
            self.run_tape(tape, None)
            _ = host, destination  # live as long as what copies them

        return copy

    def rows(
        self, calls: Sequence[tuple[Kernel, Call]], clock: np.ndarray | None = None
    ) -> tuple[list[Row], list[np.ndarray]]:
        """The rows of the tape for ``calls``, and the arrays they point to that nothing else keeps.

        With a ``clock``, int64 [calls + 1], the first worker notes there when it starts and when each call is done.
        """
        kinds = [kernel.kind for kernel, _ in calls if isinstance(kernel, CpuKernel)]
        for (_, call), kind in zip(calls, kinds, strict=True):  # who reads a cache decides how it is written
            if kind == "mla_attention":
                self.latents.add(id(call.cache))
            elif kind == "attention":
                self.latents.discard(id(call.cache))
        rows, kept = list[Row](), list[np.ndarray]()
        if clock is not None:
            rows.append(Row("clock_step", (clock.ctypes.data,)))
        for number, ((_, call), kind) in enumerate(zip(calls, kinds, strict=True), 1):
            emitter = Emitter(self, call)
            EMITTERS[kind](emitter, call)
            rows += emitter.rows
            kept += emitter.kept
            if clock is not None:
                rows[-1] = replace(rows[-1], then_wait=True)  # the clock is read when all workers are done
                rows.append(Row("clock_step", (clock.ctypes.data + 8 * number,), then_wait=False))
        return rows, kept

    def prepare(
        self, steps: Sequence[tuple[Sequence[tuple[Kernel, Call]], int]], progress: Callable[[int, int], None]
    ) -> None:
        """Compile what is missing of the kernels that ``steps`` need."""
        calls = [call for calls, _ in steps for call in calls]
        machine_code.prepare([*kernels_of(self.rows(calls)[0]), *greedy.STEPS], progress)

    def bound_for(self, count: int, limit: int, options: KernelOptions) -> int:
        """The most that are multiplied by the same kernels as ``count``."""
        return min((fewest - 1 for fewest in options.matrix_unit.values() if count < fewest <= limit), default=limit)

    def program(self, calls: Sequence[tuple[Kernel, Call]]) -> Program:
        """The calls as one tape, run by all workers in one compiled loop."""
        rows, kept = self.rows(calls)
        tape, step = Tape(rows), calls[0][1].step

        def run(tokens: int, rows: int) -> None:
            tape.fill(tokens, rows)
            self.run_tape(tape, step)
            _ = kept  # what the rows point to lives as long as what runs them

        return run

    def greedy_decode(self, calls: Sequence[tuple[Kernel, Call]], logits: Any, steps: Sequence[Step]) -> GreedyRun:
        """The calls as one tape that chooses the tokens too, run as often as wanted in one compiled loop."""
        return greedy.GreedyDecode(self, calls, logits, steps).run

    def run_tape(self, tape: Tape, step: Step | None) -> None:
        """Run ``tape`` for ``step``."""
        self.workers.run(tape.address, tape.length, 0 if step is None else len(step.context_len))

    def timed(self, calls: Sequence[tuple[Kernel, Call]]) -> Callable[[], Sequence[float]]:
        """The calls as one tape with a clock between them: they run as always, in one compiled loop."""
        clock = np.zeros(len(calls) + 1, np.int64)
        rows, kept = self.rows(calls, clock)
        tape, step = Tape(rows), calls[0][1].step

        def run() -> list[float]:
            self.run_tape(tape, step)
            seconds: list[float] = (np.diff(clock) * self.cycle_seconds).tolist()
            _ = kept
            return seconds

        return run

    @cached_property
    def cycle_seconds(self) -> float:
        """Seconds of a tick of the clock that ``timed`` reads, against the system's, over 50 ms."""
        ticks = np.zeros(1, np.int64)
        note = Tape([Row("clock_step", (ticks.ctypes.data,))])
        self.run_tape(note, None)
        before, start = int(ticks[0]), time.perf_counter()
        time.sleep(0.05)
        self.run_tape(note, None)
        return (time.perf_counter() - start) / (int(ticks[0]) - before)

    def tune(self, formats: Iterable[str]) -> None:
        """From how many tokens on the matrix unit pays."""
        tune(formats)

    def close(self) -> None:
        """End the threads."""
        self.workers.close()

    @property
    def compute_share(self) -> float:
        """The part of the cores it uses."""
        return min(1.0, self.threads / default_threads())

    def describe(self) -> str:
        """What it is."""
        extra = " and a matrix unit" if features.has_matrix_unit() else ""
        return f"{self.threads} threads, {features.LEVEL}{extra}"
