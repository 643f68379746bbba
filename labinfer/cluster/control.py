"""What a head and an agent say to each other: JSON objects, some with bytes behind them, over a sealed connection.

Both sides beat four times a second; one that hears nothing for a while takes the other for lost. Beats also tell how
far the two clocks are apart.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import Any

from labinfer.cluster.clock import PeerClock
from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.process import BEAT
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials, Header, Keys, Sealed
from labinfer.runtime.pipeline.transport.sealed import HANDSHAKE_SECONDS, connect

CONTROL = 16
"""The kind of frames that hold a message."""

CONTROL_PURPOSE = b"control"
"""What a connection of these messages is for, as whoever connects says."""

HOST_SILENCE = 1.5
"""Seconds after which a host that says nothing is taken for lost."""

MESSAGE_BYTES = 64 << 20
"""The largest message: a plan, or a piece of a checkpoint."""

ANSWER_SECONDS = 600.0
"""How long an answer may take: that to the last piece of a file waits until all of it was read again for its digest."""

END_SECONDS = 10.0
"""How long a thread is waited for whose connection was closed, or process killed: far longer than it should take."""

Address = tuple[str, int]


def open_control(address: Address, credentials: Credentials) -> Control:
    """A control connection to the agent at ``address``; raises ``ChannelClosed``, and ``Distrusted`` of that."""
    connection, keys = connect(address, credentials, CONTROL_PURPOSE)
    return Control(connection, keys, HOST_SILENCE)


class Control:
    """One end; ``silence`` seconds without a word from the other close it. Say things from any thread, hear in one.

    Silence is counted in own beats, so that a machine that was asleep, or too busy for both ends, does not count.
    """

    def __init__(self, connection: socket.socket, keys: Keys, silence: float) -> None:
        self.channel, self.saying = Sealed(connection, MESSAGE_BYTES, keys), threading.Lock()
        self.most_missed, self.missed = round(silence / BEAT), 0
        self.closed, self.clock = False, PeerClock()
        try:
            self.channel.agree(HANDSHAKE_SECONDS)
        except ChannelClosed:
            self.channel.release()
            raise
        self.beating = threading.Thread(target=self.beat, name="labinfer-beat", daemon=True)
        self.beating.start()

    def say(self, payload: bytes | memoryview = b"", **message: Any) -> None:
        """Send a message; raises ``ChannelClosed``."""
        with self.saying:
            sections = [memoryview(json.dumps(message).encode()), memoryview(payload)]
            self.channel.send(CONTROL, 0, sections)

    def hear(self, seconds: float | None = None) -> tuple[dict[str, Any], bytes]:
        """The next message that is no beat, and the bytes behind it; ``ChannelClosed`` if none comes in ``seconds``."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            if until is not None and not self.channel.ready(max(0.0, until - time.monotonic())):
                raise ChannelClosed(f"no answer came within {seconds:.0f} seconds")
            sections: list[bytearray] = []

            def place(header: Header, into: list[bytearray] = sections) -> list[memoryview]:
                into += [bytearray(size) for size in header.sizes]
                return [memoryview(each) for each in into]

            try:
                header = self.channel.receive(place)
                self.missed = 0
                message = json.loads(sections[0])
            except (LabinferError, ValueError, IndexError) as error:  # who has the token should know better
                raise ChannelClosed(f"no message: {error}") from None
            if header.kind != CONTROL or not isinstance(message, dict):
                raise ChannelClosed("no message of the control connection")
            if message.get("do") == "beat":
                self.clock.hear(message, time.monotonic())
            else:
                return message, bytes(sections[1]) if len(sections) > 1 else b""

    def ask(self, payload: bytes | memoryview = b"", **message: Any) -> dict[str, Any]:
        """Send a message and wait for the next that comes; an error that it tells of is raised."""
        self.say(payload, **message)
        answer, _ = self.hear(ANSWER_SECONDS)
        if "error" in answer:
            raise LabinferError("cluster.agent", str(answer["error"]))
        return answer

    def beat(self) -> None:
        """Until it is closed, or the other end is silent."""
        with contextlib.suppress(ChannelClosed):
            while not self.closed and self.missed < self.most_missed:
                # Who does not hear, since it reads a checkpoint, say, takes nobody for silent who has said something.
                self.missed = 0 if self.channel.ready() else self.missed + 1
                if self.saying.acquire(timeout=BEAT):  # not where something large is on its way to who does not read
                    try:
                        beat = json.dumps({"do": "beat", **self.clock.stamp(time.monotonic())}).encode()
                        self.channel.send(CONTROL, 0, [memoryview(beat)])
                    finally:
                        self.saying.release()
                time.sleep(BEAT)
        self.close()

    def close(self) -> None:
        """Wake both ends."""
        self.closed = True
        self.channel.close()

    def release(self) -> None:
        """Give the connection back; nobody hears any more."""
        self.close()
        if self.beating is not threading.current_thread():
            self.beating.join(END_SECONDS)
        self.channel.release()


def notice_cuts(connection: socket.socket) -> None:
    """Have the system close a connection whose other host cannot be reached for about three seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
