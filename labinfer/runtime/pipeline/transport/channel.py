"""A channel: frames of bytes in order, from one sender to one receiver.

A frame is a preamble (magic, version, kind, tag, number of sections), the sections' sizes as uint64, and the sections
themselves, little-endian throughout. What is in them is for the two ends to know; both read the same plan.
"""

from __future__ import annotations

import select
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from labinfer.errors import LabinferError

VERSION = 3
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


SELECTABLE = 1024
"""Descriptors below this number can be waited for by the microsecond, with ``select``; others by the millisecond."""


class ChannelClosed(Exception):
    """The channel was closed, here or at the other end."""


class Distrusted(ChannelClosed):
    """The other end answers, but one of both does not believe what the other shows; ``code`` and ``remedy`` are those
    of an error that tells so."""

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.code, self.remedy = code, remedy


def arrived(file: int | socket.socket, seconds: float | None = 0.0) -> bool:
    """Whether bytes of ``file``, or its end, can be read; waits for them so long, or until they can be (None)."""
    descriptor = file if isinstance(file, int) else file.fileno()
    if descriptor < SELECTABLE:
        return bool(select.select([descriptor], [], [], seconds)[0])
    found = select.poll()
    found.register(descriptor, select.POLLIN)
    return bool(found.poll(None if seconds is None else 1e3 * seconds))


class Channel(ABC):
    """One end of a channel. A frame may have ``limit`` bytes; larger ones, and what is no frame, are refused."""

    leaves_process = True
    """Whether the other end may be in another process."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._head = memoryview(bytearray(_PREAMBLE.size + 8 * MAX_SECTIONS))

    def send(self, kind: int, tag: int, sections: Sequence[memoryview]) -> None:
        """Send a frame of byte views; waits while the channel is full. Raises ``ChannelClosed``."""
        self.write(self.pack(kind, tag, sections))

    def pack(self, kind: int, tag: int, sections: Sequence[memoryview]) -> list[memoryview]:
        """A frame as ``write`` sends it: its header, and the sections that are not empty, with what is in them then."""
        sizes = [section.nbytes for section in sections]
        if len(sizes) > MAX_SECTIONS or sum(sizes) > self.limit:
            message = f"a frame of {len(sizes)} sections and {sum(sizes)} bytes is more than the {self.limit} allowed"
            raise LabinferError("transport.frame", message)
        head = _PREAMBLE.pack(MAGIC, VERSION, kind, tag, len(sizes), 0) + struct.pack(f"<{len(sizes)}Q", *sizes)
        return [memoryview(head), *(section for section in sections if section.nbytes)]

    def receive(self, place: Sections) -> Header:
        """Wait for a frame and put its sections where ``place`` says. Raises ``ChannelClosed``.

        What ``place`` raises is raised after the rest of the frame was read, so the next frame can be received.
        """
        header = self._header()
        problem: Exception | None = None
        try:
            buffers = place(header)
            sizes = tuple(map(len, buffers))
            if sizes != header.sizes:
                raise LabinferError("transport.frame", f"sections of {header.sizes} bytes came, not of {sizes}")
        except Exception as error:
            problem = error
            buffers = [memoryview(bytearray(size)) for size in header.sizes]
        for buffer in buffers:
            self.read(buffer)
        self.done([self._head[: _PREAMBLE.size + 8 * len(buffers)], *buffers])
        if problem is not None:
            raise problem
        return header

    def _header(self) -> Header:
        self.read(self._head[: _PREAMBLE.size])
        magic, version, kind, tag, count, _ = _PREAMBLE.unpack_from(self._head)
        if magic != MAGIC or version != VERSION or count > MAX_SECTIONS:
            raise LabinferError("transport.frame", f"this is no frame of version {VERSION}")
        self.read(self._head[_PREAMBLE.size : _PREAMBLE.size + 8 * count])
        sizes = struct.unpack_from(f"<{count}Q", self._head, _PREAMBLE.size)
        if sum(sizes) > self.limit:
            raise LabinferError("transport.frame", f"a frame of {sum(sizes)} bytes, at most {self.limit} are allowed")
        return Header(kind, tag, sizes)

    @abstractmethod
    def write(self, parts: Sequence[memoryview]) -> None:
        """Send a frame, all bytes of its ``parts`` one after another."""

    @abstractmethod
    def read(self, into: memoryview) -> None:
        """Fill ``into``."""

    @abstractmethod
    def ready(self, seconds: float | None = 0.0) -> bool:
        """Whether a frame, or the end, has arrived; waits for it so long, or until it comes (None)."""

    def fetch(self) -> bool:
        """``ready`` at once, for the one thread that receives: it may take what has come from the system already."""
        return self.ready()

    def expect(self, kind: int, tag: int, sections: Sequence[memoryview]) -> None:  # noqa: B027  it need not help
        """Get ready for a frame that goes to ``sections``, so that little is left to do once it comes.

        It is received as any other, and another may come instead.
        """

    def agree(self, seconds: float) -> None:  # noqa: B027  most are ready
        """Get ready for frames, together with the other end, within so many ``seconds``; both ends call it before all
        else, at the same time. Raises ``ChannelClosed``, and ``Distrusted`` of that."""

    @property
    @abstractmethod
    def descriptors(self) -> tuple[int, ...]:
        """The file descriptors that a child process inherits to ``attach`` to this end."""

    def done(self, parts: Sequence[memoryview]) -> None:  # noqa: B027  a ring has to be told, a seal has to be checked
        """A whole frame was read, header and sections; raises ``ChannelClosed`` if the other end did not write it."""

    @abstractmethod
    def close(self) -> None:
        """Wake whoever waits at either end with ``ChannelClosed``."""

    @abstractmethod
    def release(self) -> None:
        """Give this process's descriptors and memory back; the other end goes on."""
