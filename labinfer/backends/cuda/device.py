"""The CUDA device: memory, weights, and tapes of kernels that are replayed as CUDA graphs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from labinfer.extras import missing

try:
    import cupy
    from cupy.cuda import Stream, runtime
except ModuleNotFoundError:
    raise missing("cupy") from None

from labinfer.backends.base import Buffer, Device, FunctionTable, Kernel, Lane, Program
from labinfer.backends.cuda import compile, cublas, driver, gpu_number, nvrtc
from labinfer.backends.cuda.emit import EMITTERS, Emitted, emit_calls
from labinfer.backends.cuda.launches import LAUNCHES
from labinfer.backends.cuda.layout import BATCH_TOKENS, FEW_TOKENS, matrix_bytes
from labinfer.backends.cuda.memory import CopyLane, CudaAllocator, PinnedRing, mark
from labinfer.backends.cuda.partition import partition_of
from labinfer.backends.cuda.peers import CudaExchange
from labinfer.backends.cuda.sampler import SAMPLER, CudaSampler
from labinfer.backends.cuda.tape import Row, Runnable, Tapes, sequences_of
from labinfer.backends.cuda.timing import TimedCalls
from labinfer.backends.cuda.weights import CudaWeight, pack
from labinfer.backends.cuda.workspace import scratch_bytes
from labinfer.backends.rope_tables import RopeTables
from labinfer.errors import DoesNotFit
from labinfer.ops.base import Call, KernelBounds, TensorType
from labinfer.ops.dequantization import dequantize

DTYPES = {"f32": np.float32, "i32": np.int32, "f16": np.float16, "bf16": np.uint16}

MAX_SAMPLED_TOKENS = 1 << 19
"""Of a vocabulary that ``sample.cu`` chooses from: weights are up to 2^44."""

OLDEST = 80
"""The first compute capability whose tensor cores take bf16, times ten."""


class CudaKernel:
    """An op kind of a device; called, it runs one op by itself."""

    def __init__(self, device: CudaDevice, kind: str) -> None:
        self.device, self.kind = device, kind

    def __call__(self, call: Call) -> None:
        """Run one op, with scratch memory made for it. Arrays are the device's own."""
        types = [TensorType(x.shape, "i32" if x.dtype.kind == "i" else "f32") for x in call.inputs]
        matrices = [weight for weight in call.weights.values() if isinstance(weight, CudaWeight)]
        formats = tuple((weight.format, (weight.rows, weight.columns)) for weight in matrices)
        tokens, sequences = len(call.inputs[0]), sequences_of(call.step)
        bounds = KernelBounds(self.kind, (call.attrs,), tuple(types), formats, tokens, tokens, sequences, 1)
        with self.device.device:
            call = replace(call, workspace=cupy.empty(scratch_bytes(bounds) // 4, np.int32))
            self.device.program([(self, call)])(0, 0)
            self.device.synchronize()


class CudaDevice(Device):
    """One GPU, or ``threads`` of its multiprocessors (see ``partition``).

    ``LABINFER_CUDA_GRAPHS=0`` turns graphs off, ``LABINFER_CUDA_OVERLAP=0`` the overlap of kernels.
    """

    loaders = 4
    overlaps = True

    @LAUNCHES.paused()
    def __init__(self, name: str, memory_limit: int | None = None, threads: int | None = None) -> None:
        super().__init__(name, memory_limit, threads)
        self.number = gpu_number(name)
        check_driver(self.number)
        self.device = cupy.cuda.Device(self.number)
        self.device.use()
        self.capability = int(self.device.compute_capability)
        if self.capability < OLDEST:
            message = f"'{name}' has compute capability {self.capability / 10}, the kernels need {OLDEST / 10}"
            raise DoesNotFit("device.too-old", message, remedy="compile for another device")
        self.arch = f"sm_{self.capability}{'a' * (self.capability == 90)}"  # Hopper has products that no later GPU has
        self.part = partition_of(self.number).take(name, threads) if threads else None
        self.all_multiprocessors = int(self.device.attributes["MultiProcessorCount"])
        self.multiprocessors = self.part.multiprocessors if self.part else self.all_multiprocessors
        self.graphs = os.environ.get("LABINFER_CUDA_GRAPHS") != "0"
        self.overlap = os.environ.get("LABINFER_CUDA_OVERLAP") != "0" and self.capability >= 90
        self.clusters = self.bulk_copies = self.capability >= 90
        # Without a part not non_blocking: CuPy's own operations, on stream 0, keep the order.
        self.stream = Stream.from_external(self.part.stream()) if self.part else Stream()
        self.recorder = Stream.from_external(self.part.stream()) if self.part else Stream(non_blocking=True)
        self.allocator = CudaAllocator(self.number, self.stream, memory_limit)
        self.ring = PinnedRing(self.stream)
        self.mirrors: dict[int, np.ndarray] = {}  # pinned memory, by the address of the array it is for
        self.neighbours: dict[int, bool] = {}  # whether this GPU reaches the memory of others
        self.blas = cublas.Blas(self.part.multiprocessors if self.part else 0) if cublas.library() else None
        self.functions: dict[tuple[compile.Source, str], driver.Function] = {}
        self.modules: dict[compile.Source, Any] = {}
        self.rope_tables = RopeTables(self)
        kernels = {kind: CudaKernel(self, kind) for kind in EMITTERS}
        self.F = FunctionTable(kernels, lambda shape, dtype: cupy.empty(shape, DTYPES[dtype]))

    def use(self) -> None:
        """Let what this thread asks of CuPy be for this GPU, in the order of the device's work."""
        self.device.use()
        self.stream.use()

    # Memory

    def view(
        self, buffer: Buffer, offset: int, shape: tuple[int, ...], dtype: str, row_bytes: int | None = None
    ) -> Any:
        """A CuPy array over the buffer's bytes; bf16 as uint16."""
        kind = np.dtype(DTYPES[dtype])
        strides = (row_bytes, kind.itemsize) if row_bytes is not None and len(shape) == 2 else None
        return cupy.ndarray(shape, kind, cupy.cuda.MemoryPointer(buffer.memory, offset), strides)

    def move_in(self, host: Any, destination: Any) -> None:
        """A copy through pinned memory, in the order of the device's work; ``host`` can change at once."""
        array = np.ascontiguousarray(host, destination.dtype)
        if array.shape != destination.shape:
            raise ValueError(f"an array of shape {array.shape} does not go to one of {destination.shape}")
        if array.size == 0:
            return
        rows = 1 if destination.flags.c_contiguous else len(array)
        row_bytes = array.nbytes // rows
        self.use()
        target_row = row_bytes if rows == 1 else destination.strides[0]
        self.ring.copy(array.reshape(-1).view(np.uint8), destination.data.ptr, rows, row_bytes, target_row)

    def move_out(self, source: Any, out: Any = None) -> Any:
        """A copy, once the device's work before it is done."""
        self.use()
        made = np.empty(source.shape, source.dtype) if out is None else out
        target = made if made.flags.c_contiguous else np.empty(source.shape, source.dtype)
        if source.flags.c_contiguous or source.ndim != 2:
            rows = cupy.ascontiguousarray(source)
            self.enqueue_copy(target.ctypes.data, rows.data.ptr, rows.nbytes)
        else:
            row_bytes = source.shape[1] * source.itemsize
            runtime.memcpy2DAsync(
                target.ctypes.data, row_bytes, source.data.ptr, source.strides[0], row_bytes, len(source),
                runtime.memcpyDeviceToHost, self.stream.ptr,
            )  # fmt: skip
        self.synchronize()
        if target is not made:
            np.copyto(made, target)
        return made

    def enqueue_copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between two addresses, of the host or the GPU, in the order of the device's work."""
        runtime.memcpyAsync(target, source, nbytes, runtime.memcpyDefault, self.stream.ptr)

    def host_array(self, source: Any) -> Any:
        """A copy in pinned memory, which is kept for the place that ``source`` has on the device."""
        mirror = self.mirrors.get(source.data.ptr)
        if mirror is None or mirror.nbytes < source.nbytes:
            mirror = self.mirrors[source.data.ptr] = self.host_memory(1 << (source.nbytes - 1).bit_length())
        return self.move_out(source, mirror[: source.nbytes].view(source.dtype).reshape(source.shape))

    def deallocate(self, buffer: Buffer) -> None:
        """Give memory back, and the pinned memory for places in it."""
        start = buffer.memory.ptr
        for place in [each for each in self.mirrors if start <= each < start + buffer.nbytes]:
            del self.mirrors[place]
        super().deallocate(buffer)

    def copy(self, source: Any, destination: Any) -> None:
        """A copy without gaps, in the order of the device's work."""
        self.use()
        self.enqueue_copy(destination.data.ptr, source.data.ptr, source.nbytes)

    def move_all_in(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Straight from pinned memory, and one wait for all."""
        self.use()
        for host, destination in pairs:
            self.enqueue_copy(destination.data.ptr, host.ctypes.data, host.nbytes)
        self.synchronize()

    def move_all_out(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Straight to pinned memory, and one wait for all."""
        self.use()
        for source, out in pairs:
            self.enqueue_copy(out.ctypes.data, source.data.ptr, source.nbytes)
        self.synchronize()

    def move_from(self, device: Device, source: Any, destination: Any) -> None:
        """From another GPU, or another part of this one, without the host where they can reach each other."""
        if not isinstance(device, CudaDevice) or not (source.flags.c_contiguous and destination.flags.c_contiguous):
            super().move_from(device, source, destination)
            return
        device.use()
        made = mark(device.stream)
        self.reach(device.number)
        self.stream.wait_event(made)
        runtime.memcpyPeerAsync(
            destination.data.ptr, self.number, source.data.ptr, device.number, source.nbytes, self.stream.ptr
        )
        copied = mark(self.stream)
        device.stream.wait_event(copied)

    def reach(self, number: int) -> bool:
        """Use this GPU, and let it reach the memory of GPU ``number`` where that is possible; whether it is."""
        self.use()
        if number not in self.neighbours:
            self.neighbours[number] = number == self.number or bool(runtime.deviceCanAccessPeer(self.number, number))
            if self.neighbours[number] and number != self.number:
                driver.enable_peer(number)
        return self.neighbours[number]

    def exchange(self, devices: Sequence[Device]) -> CudaExchange:
        """Mailboxes in the memory of each."""
        return CudaExchange([device for device in devices if isinstance(device, CudaDevice)])

    def lane(self) -> Lane:
        """Copies on a stream of their own."""
        self.use()
        return CopyLane(self.number, self.stream)

    def host_memory(self, nbytes: int) -> Any:
        """Pinned memory."""
        try:
            with LAUNCHES.paused():
                memory = cupy.cuda.alloc_pinned_memory(max(nbytes, 1))
        except (runtime.CUDARuntimeError, MemoryError, OverflowError):
            raise DoesNotFit("host.memory", f"the machine has no {nbytes} bytes for cache blocks") from None
        made = np.frombuffer(memory, np.uint8, nbytes)
        made[:] = 0
        return made

    def fill(self, buffer: Buffer, byte: int) -> None:
        """Set every byte."""
        self.use()
        runtime.memsetAsync(buffer.memory.ptr, byte, buffer.nbytes, self.stream.ptr)

    def parameter(self, buffer: Buffer, offset: int, format: str, shape: tuple[int, ...]) -> Any:
        """A vector as float32; a matrix, or a stack of them, as ``layout`` says."""
        if len(shape) == 1:
            return self.view(buffer, offset, shape, "f32")
        size = matrix_bytes(format, shape[-2], shape[-1])
        pointer = cupy.cuda.MemoryPointer(buffer.memory, offset)
        memory = cupy.ndarray((prod(shape[:-2]) * size,), np.uint8, pointer)
        return CudaWeight(memory, format, shape[-2], shape[-1], size)

    def store(self, parameter: Any, raw: Any, format: str, shape: tuple[int, ...], index: int | None) -> None:
        """Lay the stored bytes out, or widen a vector, and copy them in."""
        if not isinstance(parameter, CudaWeight):
            self.move_in(dequantize(raw, format, shape), parameter)
            return
        first, count = (0, prod(shape[:-2])) if index is None else (index, 1)
        for number, part in enumerate(raw.reshape(count, -1), first):
            packed = pack(format, part, *shape[-2:])
            at = number * parameter.nbytes
            self.move_in(packed, parameter.memory[at : at + packed.nbytes])

    # Tapes

    def rows(self, calls: Sequence[tuple[Kernel, Call]], sequences: int) -> tuple[list[Row | Runnable], list[Any]]:
        """The rows of the tape for ``calls``, and what they point to that nothing else keeps."""
        each = self.rows_of_each(calls, sequences)
        return [row for rows, _ in each for row in rows], [kept for _, kept in each]

    def rows_of_each(self, calls: Sequence[tuple[Kernel, Call]], sequences: int) -> list[Emitted]:
        """The same for each of ``calls`` by itself, as it is among the others."""
        kinds = [kernel.kind for kernel, _ in calls if isinstance(kernel, CudaKernel)]
        return emit_calls(self, list(zip(kinds, (call for _, call in calls), strict=True)), sequences)

    def prepare(
        self, steps: Sequence[tuple[Sequence[tuple[Kernel, Call]], int]], progress: Callable[[int, int], None]
    ) -> None:
        """Compile what is missing of the kernels that ``steps`` need, and of those that choose tokens."""
        self.use()
        rows = [row for calls, sequences in steps for row in self.rows(calls, sequences)[0]]
        sources = [row.source for row in rows if isinstance(row, Row)]
        compile.build([SAMPLER, *sources], self.arch, progress)

    def decodes_for(self, count: int, limit: int) -> int:
        """The next multiple of 8, of 16 from 64 on; the kernels for few tokens are not given more."""
        multiple = 1 if count <= FEW_TOKENS else 8 if count <= 64 else 16
        return min(-(-count // multiple) * multiple, limit)

    def kinds_of_decode(self, limit: int) -> Sequence[int]:
        """Powers of two and ``limit``: how many tokens kernels are for, and into how many parts attention is split."""
        return sorted({1 << n for n in range(limit.bit_length())} | {limit})

    def kinds_of_prompt(self, limit: int) -> Sequence[int]:
        """Powers of two up to ``BATCH_TOKENS``: kernels for more are cuBLAS's, or those of the largest step."""
        return [1 << n for n in range(1, BATCH_TOKENS.bit_length()) if 1 << n <= limit]

    def program(self, calls: Sequence[tuple[Kernel, Call]]) -> Program:
        """The calls as one tape for each number of sequences."""
        return Tapes(self, calls)

    def ready(self, program: Program) -> None:
        """The graph of the present step's tape."""
        if isinstance(program, Tapes):
            program.tape().ready()

    def timed(self, calls: Sequence[tuple[Kernel, Call]]) -> Callable[[], Sequence[float]]:
        """Events between the calls, in one graph, and the time of the whole without them."""
        self.use()
        step = next((call.step for _, call in calls if call.step is not None), None)
        return TimedCalls(self, self.rows_of_each(calls, sequences_of(step))).run

    def sampler(self, rows: int, vocab_size: int, groups: int = 1) -> CudaSampler | None:
        """What chooses tokens here, if their ids leave room for sums of their weights in 63 bits."""
        return CudaSampler(self, rows, vocab_size, groups) if vocab_size < MAX_SAMPLED_TOKENS else None

    def reaches(self, device: Device) -> bool:
        """Whether both are GPUs, or parts of some, that are joined."""
        return isinstance(device, CudaDevice) and self.reach(device.number)

    def launch(self, row: Row, overlap: bool) -> driver.Launch:
        """A row with its kernel, compiled and loaded when it is the first; ``overlap``: with the kernel before it."""
        function = self.functions.get((row.source, row.kernel))
        if function is None:
            module = self.modules.get(row.source)
            if module is None:
                module = self.modules[row.source] = driver.load_module(compile.cubin(row.source, self.arch))
            function = self.functions[row.source, row.kernel] = driver.Function(module, row.kernel)
        return driver.Launch(
            function, row.grid, row.threads, row.shared, row.arguments, overlap and self.overlap, row.cluster
        )

    @LAUNCHES.paused()
    def capture(self, run: Callable[[int], None]) -> Any:
        """A CUDA graph of what ``run(stream)`` puts on a stream."""
        with self.recorder:
            self.recorder.begin_capture()
            try:
                run(self.recorder.ptr)
            finally:
                graph = self.recorder.end_capture()
        graph.upload(self.stream)
        return graph

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.stream.synchronize()

    @LAUNCHES.paused()
    def close(self) -> None:
        """Give back what is held beside buffers."""
        self.use()
        self.synchronize()
        if self.blas:
            self.blas.close()
            self.blas = None
        for module in self.modules.values():
            driver.check(driver.library().cuModuleUnload(module))
        self.modules.clear()
        self.functions.clear()
        self.mirrors.clear()
        if self.part:
            cupy.cuda.Stream.null.use()  # this thread's may be one of the part's
            self.part.close()
            self.part = None

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all, of the device or of the limit."""
        self.device.use()
        limit = self.allocator.limit
        return driver.free_memory() if limit is None else (limit - self.allocator.allocated, limit)

    @property
    def compute_share(self) -> float:
        """The part of the multiprocessors that are granted."""
        return self.multiprocessors / self.all_multiprocessors

    def describe(self) -> str:
        """What it is."""
        of_all = f" of {self.all_multiprocessors}" if self.part else ""
        return f"{driver.gpu_name(self.number)}, {self.multiprocessors}{of_all} multiprocessors, {self.arch}"


def check_driver(number: int) -> None:
    """Raise ``DoesNotFit`` without a driver new enough for CuPy, or without device ``number``."""
    supported, wanted = driver_supports(), int(runtime.runtimeGetVersion())
    if supported // 1000 < wanted // 1000:
        message = (
            f"the NVIDIA driver supports CUDA {supported // 1000}, the installed CuPy is for CUDA {wanted // 1000}"
        )
        remedy = f"pip install 'labinfer[cuda{supported // 1000}]', or a newer driver"
        raise DoesNotFit("device.cuda-major", message, remedy=remedy)
    if nvrtc.version()[0] != wanted // 1000:
        message = f"NVRTC is of CUDA {nvrtc.version()[0]}, CuPy of CUDA {wanted // 1000}"
        raise DoesNotFit("device.cuda-major", message, remedy="install the packages of one CUDA major only")
    count = int(runtime.getDeviceCount())
    if number >= count:
        raise DoesNotFit("device.missing", f"there is no 'cuda:{number}': this machine has {count} NVIDIA GPUs")


def driver_supports() -> int:
    """The CUDA version of the driver, which is started if it is not yet."""
    driver.start()
    return driver.driver_version()
