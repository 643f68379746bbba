"""A channel: frames of bytes in order, from one sender to one receiver.

A frame is a preamble (magic, version, kind, tag, number of sections), the sections' sizes as uint64, and the sections
themselves, little-endian throughout. What is in them is for the two ends to know; both read the same plan.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from labinfer.errors import LabinferError

VERSION = 2
MAGIC = b"LABI"
MAX_SECTIONS = 256
_PREAMBLE = struct.Struct("<4sHHQII")


class Header(NamedTuple):
    """What a frame is (``kind``), which step it belongs to (``tag``), and the bytes of each section."""

    kind: int
    tag: int
    sizes: tuple[int, ...]


Sections = Callable[[Header], Sequence[memoryview]]
"""Called with a frame's header: a writable buffer for each section, of its size.

What is in them may be looked at once the whole frame was received.
"""


class ChannelClosed(Exception):
    """The channel was closed, here or at the other end."""


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
        problem: Exception | None = None
        try:
            buffers = place(header)
            sizes = tuple(buffer.nbytes for buffer in buffers)
            if sizes != header.sizes:
                raise LabinferError("transport.frame", f"sections of {header.sizes} bytes came, not of {sizes}")
        except Exception as error:
            problem = error
            self._skip(sum(header.sizes))
        else:
            for buffer in buffers:
                self.read(buffer)
        self.done()
        if problem is not None:
            raise problem
        return header

    def _header(self) -> Header:
        self.read(self._preamble)
        magic, version, kind, tag, count, _ = _PREAMBLE.unpack(self._preamble)
        if magic != MAGIC or version != VERSION or count > MAX_SECTIONS:
            raise LabinferError("transport.frame", f"this is no frame of version {VERSION}")
        table = memoryview(bytearray(8 * count))
        self.read(table)
        sizes = struct.unpack(f"<{count}Q", table)
        if sum(sizes) > self.limit:
            raise LabinferError("transport.frame", f"a frame of {sum(sizes)} bytes, at most {self.limit} are allowed")
        return Header(kind, tag, sizes)

    def _skip(self, nbytes: int) -> None:
        scratch = memoryview(bytearray(min(nbytes, 1 << 16)))
        for done in range(0, nbytes, len(scratch) or 1):
            self.read(scratch[: nbytes - done])

    def sealed(self, parts: list[memoryview]) -> list[memoryview]:
        """A frame as it travels: its header and each section that is not empty, and what vouches for them."""
        return parts

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

    def done(self) -> None:  # noqa: B027  a ring has to be told, and a sealed connection has to check
        """The whole frame was read: raises ``ChannelClosed`` if the other end did not write it."""

    @abstractmethod
    def close(self) -> None:
        """Wake whoever waits at either end with ``ChannelClosed``."""

    @abstractmethod
    def release(self) -> None:
        """Give this process's descriptors and memory back; the other end goes on."""
