"""Device memory by CuPy, and copies from pinned host memory."""

from __future__ import annotations

import threading
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from labinfer.backends.base import Allocator, Lane
from labinfer.backends.cuda import driver
from labinfer.backends.cuda.launches import LAUNCHES

SLOT_BYTES, SLOTS = 4 << 20, 8
"""Pieces of pinned memory that copies to the device go through in turn."""


class CudaAllocator(Allocator):
    """Plain device memory: no pool, so that what is counted is what is taken. Cleared in the order of ``stream``."""

    def __init__(self, number: int, stream: Any, limit: int | None = None) -> None:
        super().__init__(limit)
        self.number, self.stream = number, stream
        self.unused: list[Any] = []  # memory that could not be given back at once

    def reserve(self, nbytes: int) -> Any:
        """Zeroed device memory, which ``release`` gives back whoever still has arrays over it."""
        size = max(nbytes, 1)
        with LAUNCHES.paused():
            self.give_back()
            runtime.setDevice(self.number)
            try:
                at = runtime.malloc(size)
            except runtime.CUDARuntimeError as error:
                raise MemoryError from error
        runtime.memsetAsync(at, 0, size, self.stream.ptr)
        return cupy.cuda.UnownedMemory(at, size, None, self.number)

    def release(self, memory: Any) -> None:
        """Give it back, once the device has done what it was asked for; when ranks launch, before more is reserved."""
        self.unused.append(memory)
        if LAUNCHES.try_pause():
            self.give_back()
            LAUNCHES.resume()

    def give_back(self) -> None:
        """Free what is unused."""
        while self.unused:
            runtime.free(self.unused.pop().ptr)


class PinnedRing:
    """Copies host arrays to the device in the order of a stream: each through the next free piece of pinned memory."""

    @LAUNCHES.paused()
    def __init__(self, stream: Any) -> None:
        self.stream, self.lock = stream, threading.Lock()
        self.memory = cupy.cuda.alloc_pinned_memory(SLOT_BYTES * SLOTS)
        self.bytes = np.frombuffer(self.memory, np.uint8, SLOT_BYTES * SLOTS)
        self.events = [cupy.cuda.Event(block=False, disable_timing=True) for _ in range(SLOTS)]
        self.slot, self.used = 0, 0

    def copy(self, host: np.ndarray, target: int, rows: int, row_bytes: int, target_row: int) -> None:
        """``rows`` rows of ``host``, uint8 without gaps, to address ``target``, there ``target_row`` bytes apart."""
        per_piece = max(1, SLOT_BYTES // max(row_bytes, 1))
        with self.lock:
            if target_row == row_bytes:  # one piece of memory: cut anywhere
                for start in range(0, rows * row_bytes, SLOT_BYTES):
                    size = min(SLOT_BYTES, rows * row_bytes - start)
                    at = self.stage(host[start : start + size])
                    runtime.memcpyAsync(target + start, at, size, runtime.memcpyHostToDevice, self.stream.ptr)
                return
            for row in range(0, rows, per_piece):
                count = min(per_piece, rows - row)
                at = self.stage(host[row * row_bytes : (row + count) * row_bytes])
                runtime.memcpy2DAsync(
                    target + row * target_row, target_row, at, row_bytes, row_bytes, count,
                    runtime.memcpyHostToDevice, self.stream.ptr,
                )  # fmt: skip

    def stage(self, host: np.ndarray) -> int:
        """Put bytes into pinned memory; where they are."""
        if self.used + host.nbytes > SLOT_BYTES:
            driver.record(self.events[self.slot].ptr, self.stream.ptr)
            self.slot, self.used = (self.slot + 1) % SLOTS, 0
            self.events[self.slot].synchronize()
        start = self.slot * SLOT_BYTES + self.used
        self.bytes[start : start + host.nbytes] = host
        self.used += -(-host.nbytes // 64) * 64
        return int(self.memory.ptr) + start


class CopyLane(Lane):
    """A stream of copies beside the ``compute`` stream of GPU ``number``."""

    def __init__(self, number: int, compute: Any) -> None:
        self.number, self.compute = number, compute
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def send(self, host: Any, destination: Any) -> Any:
        """See ``Lane.send``."""
        runtime.setDevice(self.number)
        self.stream.wait_event(mark(self.compute))
        source, target = host.ctypes.data, destination.data.ptr
        runtime.memcpyAsync(target, source, host.nbytes, runtime.memcpyHostToDevice, self.stream.ptr)
        return mark(self.stream)

    def hold(self, ticket: Any) -> None:
        """See ``Lane.hold``."""
        runtime.setDevice(self.number)
        self.compute.wait_event(ticket)


def mark(stream: Any) -> Any:
    """An event: what the stream, of the current GPU, was asked for so far is done."""
    event = cupy.cuda.Event(block=False, disable_timing=True)
    driver.record(event.ptr, stream.ptr)
    return event
