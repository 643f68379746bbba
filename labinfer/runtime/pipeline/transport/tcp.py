"""A channel over a TCP connection, without Nagle's delay."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from labinfer.runtime.pipeline.transport.channel import Channel, ChannelClosed, arrived

if TYPE_CHECKING:
    from labinfer.runtime.pipeline.transport.tls import Encrypted

_BUFFER_BYTES = 1 << 16


def connected_sockets() -> tuple[socket.socket, socket.socket]:
    """Two ends of one connection over the loopback interface; nothing listens any more when this returns."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
        sender = socket.create_connection(listener.getsockname())
        while True:
            receiver, peer = listener.accept()
            if peer == sender.getsockname():  # and no stranger who was quicker
                return sender, receiver
            receiver.close()


class Tcp(Channel):
    """An end of a connection."""

    def __init__(self, connection: socket.socket, limit: int) -> None:
        super().__init__(limit)
        self.connection = connection
        self.way: socket.socket | Encrypted = connection
        """What bytes are sent to and received from."""
        self._buffer, self._start, self._stop = memoryview(bytearray(_BUFFER_BYTES)), 0, 0
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """That of the socket."""
        return (self.connection.fileno(),)

    def write(self, parts: Sequence[memoryview]) -> None:
        """Send ``parts`` with as few system calls as the kernel lets us."""
        left = list(parts)
        try:
            while left:
                sent = self.way.sendmsg(left)
                while left and sent >= len(left[0]):
                    sent -= len(left.pop(0))
                if sent:
                    left[0] = left[0][sent:]
        except OSError:
            raise ChannelClosed from None

    def read(self, into: memoryview) -> None:
        """Receive until ``into`` is full; what comes in small pieces is taken from the system all at once."""
        done, size = 0, len(into)
        try:
            while done < size:
                if self._start == self._stop and size - done >= _BUFFER_BYTES:
                    count = self.way.recv_into(into[done:], size - done, socket.MSG_WAITALL)
                else:
                    if self._start == self._stop:
                        self._start, self._stop = 0, self.way.recv_into(self._buffer)
                    count = min(size - done, self._stop - self._start)
                    into[done : done + count] = self._buffer[self._start : self._start + count]
                    self._start += count
                if count == 0:
                    raise ChannelClosed
                done += count
        except OSError:
            raise ChannelClosed from None

    def ready(self, seconds: float | None = 0.0) -> bool:
        """See ``Channel.ready``."""
        return self._start < self._stop or arrived(self.connection, seconds)

    def fetch(self) -> bool:
        """See ``Channel.fetch``: asking for bytes takes no longer than asking whether there are any."""
        if self._start < self._stop:
            return True
        try:
            self._start, self._stop = 0, self.way.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:  # whoever reads is told
            pass
        return True

    def close(self) -> None:
        """Shut the connection down."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Close the socket."""
        self.connection.close()
