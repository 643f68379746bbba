"""A channel over a TCP connection, without Nagle's delay."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from labinfer.runtime.pipeline.transport.channel import Channel, ChannelClosed, arrived


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
                sent = self.connection.sendmsg(left)
                while left and sent >= len(left[0]):
                    sent -= len(left.pop(0))
                if sent:
                    left[0] = left[0][sent:]
        except OSError:
            raise ChannelClosed from None

    def read(self, into: memoryview) -> None:
        """Receive until ``into`` is full."""
        done = 0
        try:
            while done < len(into):
                count = self.connection.recv_into(into[done:], len(into) - done, socket.MSG_WAITALL)
                if count == 0:
                    raise ChannelClosed
                done += count
        except OSError:
            raise ChannelClosed from None

    def ready(self) -> bool:
        """Whether bytes, or the end, have arrived."""
        return arrived(self.connection)

    def close(self) -> None:
        """Shut the connection down."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Close the socket."""
        self.connection.close()
