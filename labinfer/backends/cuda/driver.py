"""The CUDA driver, through ctypes: loads machine code and launches kernels, with programmatic dependent launch.

CuPy's own launches have no attributes; the structures here are those of cuda.h (``cuLaunchKernelEx``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_size_t,
    c_uint,
    c_uint64,
    c_void_p,
    create_string_buffer,
)  # fmt: skip
from functools import cache
from typing import Any

from labinfer.backends.cuda.launches import LAUNCHES
from labinfer.errors import DoesNotFit, LabinferError

PROGRAMMATIC_LAUNCH, CLUSTER = 6, 4
STATIC_SHARED, MAX_SHARED, CARVEOUT = 1, 8, 9
MULTIPROCESSORS = 16
EXTERNAL = 1
NO_DEVICE, PEER_ENABLED = 100, 704
UNASKED_SHARED = 48 << 10
"""Bytes of shared memory that a kernel gets without asking, its own variables included."""


class Attribute(Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_int), ("pad", c_int), ("value", c_uint * 16))


class Config(Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p),
        ("attributes", POINTER(Attribute)), ("count", c_uint),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """libcuda; ``DoesNotFit`` where there is no driver."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        remedy = "install NVIDIA's driver, or compile for another device"
        raise DoesNotFit("device.no-driver", "this machine has no NVIDIA driver", remedy=remedy) from None


def check(code: int) -> None:
    """Raise what the driver says of a failed call."""
    if code:
        text = c_char_p()
        library().cuGetErrorString(code, byref(text))
        reason = (text.value or b"unknown error").decode()
        raise LabinferError("cuda.failed", f"the CUDA driver reports error {code}: {reason}")


class Function:
    """A kernel on one device, from the machine code of its file."""

    @LAUNCHES.paused()
    def __init__(self, module: c_void_p, name: str) -> None:
        self.name, self.handle, own = name, c_void_p(), c_int()
        check(library().cuModuleGetFunction(byref(self.handle), module, name.encode()))
        check(library().cuFuncGetAttribute(byref(own), STATIC_SHARED, self.handle))
        self.shared = UNASKED_SHARED - own.value
        check(library().cuFuncSetAttribute(self.handle, CARVEOUT, 100))  # a change between kernels would drain the SMs

    @LAUNCHES.paused()
    def allow_shared(self, nbytes: int) -> None:
        """Let launches ask for ``nbytes`` of shared memory."""
        if nbytes > self.shared:
            check(library().cuFuncSetAttribute(self.handle, MAX_SHARED, nbytes))
            self.shared = nbytes


@LAUNCHES.paused()
def load_module(cubin: bytes) -> c_void_p:
    """Machine code in the current context."""
    module = c_void_p()
    check(library().cuModuleLoadData(byref(module), cubin))
    return module


def parameter(value: Any) -> Any:
    """A kernel's argument as C sees it: arrays (and None) by address, Python's numbers as int or float."""
    match value:
        case bool() | int():
            return c_int32(value)
        case float():
            return c_float(value)
        case None:
            return c_uint64(0)
        case Structure() | ctypes._SimpleCData():
            return value
    return c_uint64(value.data.ptr)


class Launch:
    """A kernel with everything it is launched with; calling it puts it on a stream."""

    def __init__(
        self,
        function: Function,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: Sequence[Any],
        overlap: bool,
        cluster: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        function.allow_shared(shared)
        self.function, self.kept = function, [parameter(value) for value in arguments]
        self.pointers = (c_void_p * len(self.kept))(*(ctypes.addressof(each) for each in self.kept))
        wanted: list[tuple[int, tuple[int, ...]]] = [(PROGRAMMATIC_LAUNCH, (1,))] * overlap
        wanted += [(CLUSTER, cluster)] * (cluster != (1, 1, 1))
        self.attributes = (Attribute * 2)()
        for attribute, (number, value) in zip(self.attributes, wanted, strict=False):
            attribute.id = number
            attribute.value[: len(value)] = value
        self.config = Config(grid, (threads, 1, 1), shared, None, self.attributes, len(wanted))

    def __call__(self, stream: int) -> None:
        """Launch on the stream with this handle."""
        self.config.stream = stream
        code = library().cuLaunchKernelEx(byref(self.config), self.function.handle, self.pointers, None)
        if code:
            check(code)


def start() -> None:
    """Start the driver if it is not yet; ``DoesNotFit`` without a GPU."""
    code = library().cuInit(0)
    if code == NO_DEVICE:
        raise DoesNotFit("device.missing", "this machine has no NVIDIA GPU", remedy="compile for another device")
    check(code)


def device(number: int) -> int:
    """The driver's handle of GPU ``number``."""
    start()
    handle = c_int()
    check(library().cuDeviceGet(byref(handle), number))
    return handle.value


def multiprocessors(number: int) -> int:
    """How many GPU ``number`` has."""
    count = c_int()
    check(library().cuDeviceGetAttribute(byref(count), MULTIPROCESSORS, device(number)))
    return count.value


def gpu_name(number: int) -> str:
    """The product name of GPU ``number``."""
    text = create_string_buffer(256)
    check(library().cuDeviceGetName(text, len(text), device(number)))
    return text.value.decode()


def driver_version() -> int:
    """The CUDA version the driver supports, as 1000 * major + 10 * minor."""
    version = c_int()
    check(library().cuDriverGetVersion(byref(version)))
    return version.value


@LAUNCHES.paused()
def enable_peer(number: int) -> None:
    """Let the current GPU use the memory of GPU ``number``; that it may already is no error."""
    context = c_void_p()
    check(library().cuDevicePrimaryCtxRetain(byref(context), device(number)))
    code = library().cuCtxEnablePeerAccess(context, 0)
    if code != PEER_ENABLED:
        check(code)


def record(event: int, stream: int, flags: int = 0) -> None:
    """Record an event; with ``EXTERNAL`` each time that the graph runs which the stream is being captured to.

    CuPy's own way keeps Python's lock while a stream that is full waits, for a rank that needs the lock to launch.
    """
    check(library().cuEventRecordWithFlags(c_void_p(event), c_void_p(stream), flags))


def free_memory() -> tuple[int, int]:
    """Bytes free and in all on the current device."""
    free, total = c_size_t(), c_size_t()
    check(library().cuMemGetInfo_v2(byref(free), byref(total)))
    return free.value, total.value
