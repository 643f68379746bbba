"""A ring of bytes in memory that sender and receiver share: between threads, or between processes over an unnamed file.

Each side counts the bytes it has written or read, and looks at the other's count only after a signal has woken it. The
signal's system calls order the memory accesses, so this needs no fences and spins nowhere. Nothing has a name that
could be left behind: the kernel takes the memory back with the last process that has it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Sequence

from labinfer.runtime.pipeline.transport.channel import Channel, ChannelClosed, arrived

_HEAD, _TAIL, _CLOSED = 0, 8, 16
_CONTROL = 192
"""Bytes before the ring itself: two counts and a flag, a cache line each (the indices count uint64)."""


class Signal:
    """Wakes who waits for it, now or later; several sets before a wait count once. An eventfd, or a pipe without."""

    def __init__(self, descriptors: Sequence[int] | None = None) -> None:
        if descriptors is None:
            descriptors = (os.eventfd(0),) if hasattr(os, "eventfd") else os.pipe()
        self.descriptors = tuple(descriptors)
        if len(self.descriptors) > 1:
            os.set_blocking(self.descriptors[1], False)

    def copy(self) -> Signal:
        """The same signal with descriptors of its own."""
        return Signal([os.dup(descriptor) for descriptor in self.descriptors])

    def set(self) -> None:
        """Wake the one who waits."""
        if len(self.descriptors) == 1:
            os.eventfd_write(self.descriptors[0], 1)
        else:
            with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
                os.write(self.descriptors[1], b"\0")

    def wait(self) -> None:
        """Return once it has been set since the last time."""
        if len(self.descriptors) == 1:
            os.eventfd_read(self.descriptors[0])
        else:
            os.read(self.descriptors[0], 1 << 16)

    def is_set(self, seconds: float | None) -> bool:
        """Whether ``wait`` would return at once; waits for that so long, or until it would (None)."""
        return arrived(self.descriptors[0], seconds)

    def release(self) -> None:
        """Close the descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()


def private_memory(capacity: int) -> mmap.mmap:
    """Memory for a ring within this process."""
    return mmap.mmap(-1, _CONTROL + capacity)


def shared_memory(capacity: int) -> tuple[mmap.mmap, int]:
    """Memory for a ring that a child process can map too, and its descriptor."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("labinfer")
    else:
        with tempfile.TemporaryFile() as unnamed:
            file = os.dup(unnamed.fileno())
    os.ftruncate(file, _CONTROL + capacity)
    return mmap.mmap(file, _CONTROL + capacity), file


class Ring(Channel):
    """An end of a ring. ``file`` is the descriptor of memory that other processes may map."""

    def __init__(self, memory: mmap.mmap, data: Signal, space: Signal, limit: int, file: int | None = None) -> None:
        super().__init__(limit)
        self.memory, self.data, self.space, self.file = memory, data, space, file
        self.leaves_process = file is not None
        whole = memoryview(memory)
        self.counts, self.ring = whole[:_CONTROL].cast("Q"), whole[_CONTROL:]
        self.position, self.known, self.told = 0, 0, 0  # own count; the other's, and own, as last seen and told

    @classmethod
    def attach(cls, descriptors: Sequence[int], limit: int) -> Ring:
        """The end in a child process."""
        file, *signals = descriptors
        half = len(signals) // 2
        memory = mmap.mmap(file, os.fstat(file).st_size)
        return cls(memory, Signal(signals[:half]), Signal(signals[half:]), limit, file)

    def other_end(self) -> Ring:
        """The other end in this process, with descriptors of its own."""
        file = None if self.file is None else os.dup(self.file)
        return Ring(self.memory, self.data.copy(), self.space.copy(), self.limit, file)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The memory's, if it can be shared, and those of both signals."""
        files = () if self.file is None else (self.file,)
        return files + self.data.descriptors + self.space.descriptors

    def write(self, parts: Sequence[memoryview]) -> None:
        """Copy ``parts`` into the ring and tell the receiver, in pieces where they are larger than the ring."""
        size = len(self.ring)
        for part in parts:
            done = 0
            while done < len(part):
                room = size - (self.position - self.known)
                if room == 0:
                    self._tell(_HEAD, self.data)
                    self.known = self._wait(self.space, _TAIL)
                    continue
                at = self.position % size
                count = min(len(part) - done, room, size - at)
                self.ring[at : at + count] = part[done : done + count]
                self.position += count
                done += count
        self._tell(_HEAD, self.data)

    def read(self, into: memoryview) -> None:
        """Copy from the ring as it is filled."""
        size, done = len(self.ring), 0
        while done < len(into):
            there = self.known - self.position
            if there == 0:
                self._tell(_TAIL, self.space)
                self.known = self._wait(self.data, _HEAD)
                continue
            at = self.position % size
            count = min(len(into) - done, there, size - at)
            into[done : done + count] = self.ring[at : at + count]
            self.position += count
            done += count

    def done(self, parts: Sequence[memoryview]) -> None:
        """Tell the sender that there is room again."""
        self._tell(_TAIL, self.space)

    def ready(self, seconds: float | None = 0.0) -> bool:
        """See ``Channel.ready``; it may return sooner."""
        if self.known == self.position and self.data.is_set(seconds):  # perhaps by bytes that were read already
            self.known = self._wait(self.data, _HEAD)
        return self.known > self.position

    def _tell(self, place: int, signal: Signal) -> None:
        if self.position != self.told:
            self.counts[place] = self.told = self.position
            signal.set()

    def _wait(self, signal: Signal, place: int) -> int:
        if not self.counts[_CLOSED]:
            signal.wait()
        if self.counts[_CLOSED]:
            raise ChannelClosed
        return self.counts[place]

    def close(self) -> None:
        """Set the flag and wake both sides."""
        if self.data.descriptors:
            self.counts[_CLOSED] = 1
            self.data.set()
            self.space.set()

    def release(self) -> None:
        """Close the descriptors of this end and let go of its memory."""
        if self.data.descriptors:
            self.data.release()
            self.space.release()
            del self.counts, self.ring, self.memory
        if self.file is not None:
            os.close(self.file)
            self.file = None
