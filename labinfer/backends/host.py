"""What devices in ordinary memory share: numpy arrays over byte buffers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from labinfer.backends.base import Allocator, Buffer, Device

DTYPES = {"f32": np.float32, "i32": np.int32, "f16": np.float16, "bf16": np.uint16}

ALIGNMENT = 4096
"""Bytes; a page, so that large buffers can be backed by huge pages and vector loads never straddle a line."""


class HostAllocator(Allocator):
    """Ordinary memory of the process."""

    def reserve(self, nbytes: int) -> Any:
        """A zeroed byte array that begins on a page."""
        try:
            raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
        except ValueError:  # beyond what any machine can address
            raise MemoryError from None
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + nbytes]


class HostDevice(Device):
    """A device whose memory numpy can see; what it computes with is left to the backend."""

    copy_bytes = 512 << 10  # far more than what taking a piece costs, and little to wait for

    def __init__(self, name: str, memory_limit: int | None = None, threads: int | None = None) -> None:
        super().__init__(name, memory_limit, threads)
        self.allocator = HostAllocator(memory_limit)

    def view(
        self, buffer: Buffer, offset: int, shape: tuple[int, ...], dtype: str, row_bytes: int | None = None
    ) -> Any:
        """A numpy array over the buffer's bytes."""
        kind = np.dtype(DTYPES[dtype])
        strides: tuple[int, ...] | None = None
        if row_bytes is not None and len(shape) == 2:
            strides = (row_bytes, kind.itemsize)
        return np.ndarray(shape, kind, buffer.memory, offset, strides)

    def move_in(self, host: Any, destination: Any) -> None:
        """A copy."""
        np.copyto(destination, host)

    def move_out(self, source: Any, out: Any = None) -> Any:
        """A copy."""
        if out is None:
            return np.array(source)
        np.copyto(out, source)
        return out

    def host_array(self, source: Any) -> Any:
        """The array itself."""
        return source

    def fill(self, buffer: Buffer, byte: int) -> None:
        """Set every byte."""
        buffer.memory[:] = byte

    def memory(self) -> tuple[int, int]:
        """Free and total memory of the machine, or of the limit."""
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
        limit = self.allocator.limit
        return (free, total) if limit is None else (limit - self.allocator.allocated, limit)
