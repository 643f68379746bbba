"""Parts of a GPU: multiprocessors on which one device's kernels run, and nobody else's of another part.

A part is a green context of the driver (CUDA 12.4), which is made of groups of multiprocessors, all of one size: 16 on
an H100. It has streams of its own and the memory, modules and handles of the whole GPU. Caches and memory bandwidth
are not divided.
"""

from __future__ import annotations

import threading
from ctypes import Array, Structure, byref, c_char, c_int, c_uint, c_void_p
from functools import cache

from labinfer.backends.cuda import driver
from labinfer.errors import DoesNotFit

MULTIPROCESSORS, DEFAULT_STREAM, NON_BLOCKING = 1, 1, 1


class Resource(Structure):
    """CUdevResource (its first version), of multiprocessors."""

    _fields_ = (("type", c_int), ("internal", c_char * 92), ("count", c_uint), ("more", c_char * 44))


class Partition:
    """The groups of multiprocessors of GPU ``number``, and which of them no part has."""

    def __init__(self, number: int) -> None:
        self.number, self.device, self.lock = number, driver.device(number), threading.Lock()
        library, whole = driver.library(), Resource()
        if not hasattr(library, "cuGreenCtxStreamCreate"):
            major, minor = divmod(driver.driver_version() // 10, 100)
            message = f"the NVIDIA driver is for CUDA {major}.{minor}, parts of a GPU (green contexts) came with 12.5"
            raise DoesNotFit("device.share", message, remedy="a newer driver, or grant all of the GPU")
        driver.check(library.cuDeviceGetDevResource(self.device, byref(whole), MULTIPROCESSORS))
        finest = self.cut(whole, 1)
        coarser = self.cut(whole, 2 * finest[0].count)
        self.groups = max(finest, coarser, key=lambda groups: sum(group.count for group in groups))
        self.all, self.group_size, self.free = whole.count, self.groups[0].count, list(range(len(self.groups)))

    def cut(self, whole: Resource, multiprocessors: int) -> Array[Resource]:
        """As many groups of so many as there are; the driver keeps them within clusters, and some belong to none."""
        count, split = c_uint(), driver.library().cuDevSmResourceSplitByCount
        driver.check(split(None, byref(count), byref(whole), None, 0, multiprocessors))
        groups = (Resource * count.value)()
        driver.check(split(groups, byref(count), byref(whole), None, 0, multiprocessors))
        return groups

    def take(self, name: str, multiprocessors: int) -> Part:
        """That share of the groups for the device ``name``; the current context is the GPU's."""
        with self.lock:
            wanted = max(1, round(multiprocessors * len(self.groups) / self.all))
            if wanted > len(self.free):
                message = (
                    f"'{name}' should get {wanted * self.group_size} multiprocessors, "
                    f"{len(self.free) * self.group_size} are left of GPU {self.number}, in groups of {self.group_size}"
                )
                raise DoesNotFit("device.share", message, remedy="grant less, or close what else has a part")
            part = Part(self, self.free[:wanted])
            self.free = self.free[wanted:]
            return part

    def give_back(self, groups: list[int]) -> None:
        """Nobody has these groups any more."""
        with self.lock:
            self.free = sorted(self.free + groups)


class StreamHandle:
    """A stream that others than CuPy have made, by the protocol that CuPy asks for."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class Part:
    """Some ``groups`` of a partition."""

    def __init__(self, partition: Partition, groups: list[int]) -> None:
        self.partition, self.groups, self.streams = partition, groups, list[c_void_p]()
        self.multiprocessors = sum(partition.groups[group].count for group in groups)
        library, description, self.context = driver.library(), c_void_p(), c_void_p()
        chosen = (Resource * len(groups))(*(partition.groups[group] for group in groups))
        driver.check(library.cuDevResourceGenerateDesc(byref(description), chosen, len(groups)))
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
        self.partition.give_back(self.groups)


@cache
def partition_of(number: int) -> Partition:
    """The one partition of GPU ``number`` in this process."""
    return Partition(number)
