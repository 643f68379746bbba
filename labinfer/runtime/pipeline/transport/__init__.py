"""How frames get from one stage to the next: ``local`` between threads, ``shm`` and ``tcp`` between processes.

``open_channel`` makes the two ends of a channel. An end says what a child process needs to ``attach`` to it. Between
hosts a channel is a TCP connection that is ``Sealed``.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from labinfer.errors import UsageError, did_you_mean
from labinfer.runtime.pipeline.transport.channel import Channel, ChannelClosed, Distrusted, Header, Sections
from labinfer.runtime.pipeline.transport.ring import Ring, Signal, private_memory, shared_memory
from labinfer.runtime.pipeline.transport.sealed import Credentials, Keys, Sealed, Tls
from labinfer.runtime.pipeline.transport.tcp import Tcp, connected_sockets

TRANSPORTS = ("local", "shm", "tcp")
"""``local`` keeps all stages in this process; the others give each a process of its own."""

__all__ = [
    "TRANSPORTS", "Channel", "ChannelClosed", "Credentials", "Distrusted", "Header", "Keys", "Sealed", "Sections",
    "Tls", "attach", "check_transport", "open_channel",
]  # fmt: skip


def check_transport(name: str) -> str:
    """``name`` if it is a transport; else a ``UsageError``."""
    if name not in TRANSPORTS:
        remedy = did_you_mean(name, TRANSPORTS) or f"transports: {', '.join(TRANSPORTS)}"
        raise UsageError("pipeline.transport", f"there is no transport '{name}'", remedy=remedy)
    return name


def open_channel(transport: str, capacity: int, limit: int) -> tuple[Channel, Channel]:
    """The sending and the receiving end of a channel that holds about ``capacity`` bytes, in frames up to ``limit``."""
    if transport == "tcp":
        one, other = connected_sockets()
        return Tcp(one, limit), Tcp(other, limit)
    memory, file = shared_memory(capacity) if transport == "shm" else (private_memory(capacity), None)
    sender = Ring(memory, Signal(), Signal(), limit, file)
    return sender, sender.other_end()


def attach(transport: str, descriptors: Sequence[int], limit: int, keys: Keys | None = None) -> Channel:
    """An end in a child process, from the ``descriptors`` that the parent's end names, and ``keys`` if it is sealed."""
    if keys is not None:
        return Sealed(socket.socket(fileno=descriptors[0]), limit, keys)
    if transport == "tcp":
        return Tcp(socket.socket(fileno=descriptors[0]), limit)
    return Ring.attach(descriptors, limit)
