"""Parts of a GPU: multiprocessors on which one device's kernels run, and nobody else's of another part.

A part is a green context of the driver (CUDA 12.4), which is made of groups of multiprocessors, all of one size: 8 on
an H100. It has streams of its own and the memory, modules and handles of the whole GPU. Caches and memory bandwidth
are not divided.
"""

from __future__ import annotations

import threading
from ctypes import Structure, byref, c_char, c_int, c_uint, c_void_p
from functools import cache

from labinfer.backends.cuda import driver
from labinfer.errors import DoesNotFit

MULTIPROCESSORS, DEFAULT_STREAM, NON_BLOCKING = 1, 1, 1


class Resource(Structure):
    """CUdevResource (its first version), of multiprocessors."""

    _fields_ = (("type", c_int), ("internal", c_char * 92), ("count", c_uint), ("more", c_char * 44))


class Partition:
    """The multiprocessors of GPU ``number`` that no part has, in runs that can be cut."""

    def __init__(self, number: int) -> None:
        self.number, self.device, self.lock = number, driver.device(number), threading.Lock()
        library, self.whole = driver.library(), Resource()
        if not hasattr(library, "cuGreenCtxStreamCreate"):
            major, minor = divmod(driver.driver_version() // 10, 100)
            message = f"the NVIDIA driver is for CUDA {major}.{minor}, parts of a GPU (green contexts) came with 12.5"
            raise DoesNotFit("device.share", message, remedy="a newer driver, or grant all of the GPU")
        driver.check(library.cuDeviceGetDevResource(self.device, byref(self.whole), MULTIPROCESSORS))
        smallest, _ = self.cut(self.whole, 1)
        self.group_size, self.free, self.parts = smallest.count, [self.whole], 0

    def cut(self, run: Resource, multiprocessors: int) -> tuple[Resource, Resource]:
        """At least so many of a run, in whole groups, none if it has fewer; and the rest."""
        taken, rest, count = Resource(), Resource(), c_uint(1)
        split = driver.library().cuDevSmResourceSplitByCount
        driver.check(split(byref(taken), byref(count), byref(run), byref(rest), 0, multiprocessors))
        return taken, rest

    def take(self, name: str, multiprocessors: int) -> Part:
        """So many multiprocessors less what is no whole group; the current context is the GPU's."""
        with self.lock:
            wanted = max(1, multiprocessors // self.group_size) * self.group_size
            run = next((run for run in self.free if run.count >= wanted), None)
            taken, rest = self.cut(run, wanted) if run is not None else (Resource(), Resource())
            if run is None or taken.count < wanted:
                message = (
                    f"'{name}' should get {wanted} multiprocessors, {max(run.count for run in self.free)} are left of "
                    f"GPU {self.number}, in groups of {self.group_size}"
                )
                raise DoesNotFit("device.share", message, remedy="grant less, or close what else has a part")
            part = Part(self, taken)
            self.free[self.free.index(run)] = rest
            self.parts += 1
            return part

    def give_back(self, run: Resource) -> None:
        """Nobody has these multiprocessors any more; runs grow together when nobody has any."""
        with self.lock:
            self.parts -= 1
            self.free = [*self.free, run] if self.parts else [self.whole]


class StreamHandle:
    """A stream that others than CuPy have made, by the protocol that CuPy asks for."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class Part:
    """A run of multiprocessors of a partition."""

    def __init__(self, partition: Partition, run: Resource) -> None:
        self.partition, self.run, self.streams = partition, run, list[c_void_p]()
        self.multiprocessors = int(run.count)
        library, description, self.context = driver.library(), c_void_p(), c_void_p()
        driver.check(library.cuDevResourceGenerateDesc(byref(description), byref(run), 1))
        driver.check(library.cuGreenCtxCreate(byref(self.context), description, partition.device, DEFAULT_STREAM))

    def stream(self) -> StreamHandle:
        """A stream whose kernels run here; it does not wait for the default stream."""
        made = c_void_p()
        driver.check(driver.library().cuGreenCtxStreamCreate(byref(made), self.context, NON_BLOCKING, 0))
        self.streams.append(made)
        assert made.value is not None
        return StreamHandle(made.value)

    def close(self) -> None:
        """Give the multiprocessors back, once nothing runs on them."""
        for stream in self.streams:
            driver.check(driver.library().cuStreamDestroy_v2(stream))
        driver.check(driver.library().cuGreenCtxDestroy(self.context))
        self.partition.give_back(self.run)


@cache
def partition_of(number: int) -> Partition:
    """The one partition of GPU ``number`` in this process."""
    return Partition(number)
