"""A channel: frames of bytes in order, from one sender to one receiver.

A frame is a preamble (magic, version, kind, tag, number of sections), the sections' sizes as uint64, and the sections
themselves, little-endian throughout. What is in them is for the two ends to know; both read the same plan.
"""

from __future__ import annotations

import select
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from labinfer.errors import LabinferError

VERSION = 1
MAGIC = b"LABI"
MAX_SECTIONS = 256
_PREAMBLE = struct.Struct("<4sHHQII")


class Header(NamedTuple):
    """What a frame is (``kind``), which step it belongs to (``tag``), and the bytes of each section."""

    kind: int
    tag: int
    sizes: tuple[int, ...]


Sections = Callable[[Header], Iterator[memoryview]]
"""Called with a frame's header: yields a writable buffer for each section, of its size.

It is asked for the next buffer when the one before is filled, so it may look at what has come.
"""


class ChannelClosed(Exception):
    """The channel was closed, here or at the other end."""


def arrived(file: int | socket.socket) -> bool:
    """Whether bytes of ``file``, or its end, can be read at once; ``select.select`` knows 1,024 files only."""
    found = select.poll()
    found.register(file, select.POLLIN)
    return bool(found.poll(0))


class Channel(ABC):
    """One end of a channel. A frame may have ``limit`` bytes; larger ones, and what is no frame, are refused."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._preamble = memoryview(bytearray(_PREAMBLE.size))

    def send(self, kind: int, tag: int, sections: Sequence[memoryview]) -> None:
        """Send a frame of byte views; waits while the channel is full. Raises ``ChannelClosed``."""
        sizes = [section.nbytes for section in sections]
        if len(sizes) > MAX_SECTIONS or sum(sizes) > self.limit:
            message = f"a frame of {len(sizes)} sections and {sum(sizes)} bytes is more than the {self.limit} allowed"
            raise LabinferError("transport.frame", message)
        head = _PREAMBLE.pack(MAGIC, VERSION, kind, tag, len(sizes), 0) + struct.pack(f"<{len(sizes)}Q", *sizes)
        self.write(self.sealed([memoryview(head), *(section for section in sections if section.nbytes)]))

    def receive(self, place: Sections) -> Header:
        """Wait for a frame and put its sections where ``place`` says. Raises ``ChannelClosed``.

        What ``place`` raises is raised after the rest of the frame was read, so the next frame can be received.
        """
        header = self._header()
        buffers, problem = place(header), None
        for index, size in enumerate(header.sizes):
            try:
                buffer = next(buffers)
                if buffer.nbytes != size:
                    raise LabinferError("transport.frame", f"section {index} has {size} bytes, not {buffer.nbytes}")
            except Exception as error:
                self._skip(header.sizes[index:])
                problem = error
                break
            if size:
                self.read(buffer)
                self.check()
        self.done()
        if problem is None:
            next(buffers, None)  # lets the place finish
            return header
        raise problem

    def _header(self) -> Header:
        self.read(self._preamble)
        magic, version, kind, tag, count, _ = _PREAMBLE.unpack(self._preamble)
        if magic != MAGIC or version != VERSION or count > MAX_SECTIONS:
            raise LabinferError("transport.frame", f"this is no frame of version {VERSION}")
        table = memoryview(bytearray(8 * count))
        if count:
            self.read(table)
        self.check()
        sizes = struct.unpack(f"<{count}Q", table)
        if sum(sizes) > self.limit:
            raise LabinferError("transport.frame", f"a frame of {sum(sizes)} bytes, at most {self.limit} are allowed")
        return Header(kind, tag, sizes)

    def _skip(self, sizes: Sequence[int]) -> None:
        scratch = memoryview(bytearray(min(max(sizes), 1 << 16)))
        for size in filter(None, sizes):
            for done in range(0, size, len(scratch)):
                self.read(scratch[: size - done])
            self.check()

    def sealed(self, parts: list[memoryview]) -> list[memoryview]:
        """``parts`` as they travel: the header, and each section that is not empty."""
        return parts

    def check(self) -> None:  # noqa: B027  only a sealed connection has to
        """A header or a section was read: raise ``ChannelClosed`` if the other end did not write it."""

    @abstractmethod
    def write(self, parts: Sequence[memoryview]) -> None:
        """Send all bytes of ``parts``, one after another."""

    @abstractmethod
    def read(self, into: memoryview) -> None:
        """Fill ``into``."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether a frame, or the end, has arrived."""

    @property
    @abstractmethod
    def descriptors(self) -> tuple[int, ...]:
        """The file descriptors that a child process inherits to ``attach`` to this end."""

    def done(self) -> None:  # noqa: B027  only a ring has to be told
        """The whole frame was read."""

    @abstractmethod
    def close(self) -> None:
        """Wake whoever waits at either end with ``ChannelClosed``."""

    @abstractmethod
    def release(self) -> None:
        """Give this process's descriptors and memory back; the other end goes on."""
