"""A channel over TCP between hosts: whoever has no token cannot speak, and nothing can be changed or said twice.

Both ends prove that they know the cluster's token before anything else is read: the one that connects sends a nonce and
what the connection is for, the other a nonce of its own and an HMAC over all that, the first an HMAC in return. From
the token and the nonces each direction gets a key of its own. A frame is followed by an HMAC over it and a count, so
one that was changed, left out, repeated or recorded elsewhere closes the connection before anybody acts on it; until
then its sizes only say how much is read. What is sent can be read on the way, unless both ends have certificates: then
TLS begins after that, and frames go through it.
HMAC-SHA-256 (RFC 2104), cut to 128 bits (RFC 4868); processors that compute SHA-256 are quicker at it than at BLAKE2.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from labinfer.runtime.pipeline.transport.channel import VERSION, ChannelClosed, Distrusted, Header, Sections
from labinfer.runtime.pipeline.transport.tcp import Tcp

if TYPE_CHECKING:
    from labinfer.runtime.pipeline.transport.tls import Encrypted

HANDSHAKE_SECONDS = 2.0
"""How long a handshake may take, however little of it comes at a time."""

PURPOSE_BYTES = 16
_PLAIN, _ENCRYPTED = b"LABS", b"LABT"
_HELLO = struct.Struct(f"<4sH16s{PURPOSE_BYTES}s")
_ANSWER = struct.Struct("<4sH16s32s")
_SEAL_BYTES = 16


class Tls(NamedTuple):
    """How an end encrypts: PEM files with its ``certificate``, that one's ``key``, and the certificate of the authority
    (``ca``) that must have signed the other end's. ``called`` is the host that it has called, which that one names."""

    certificate: str
    key: str
    ca: str
    called: str = ""


class Credentials(NamedTuple):
    """What hosts of a cluster show each other: its token, and certificates if they encrypt what they say."""

    token: bytes
    tls: Tls | None = None


class Keys(NamedTuple):
    """What this end seals with, and what the other end does, 32 bytes each; and how both encrypt, if they do."""

    mine: bytes
    theirs: bytes
    tls: Tls | None = None


def connect(
    address: tuple[str, int], credentials: Credentials, purpose: bytes, seconds: float = HANDSHAKE_SECONDS
) -> tuple[socket.socket, Keys]:
    """A connection to who listens at ``address`` and knows our token, for ``purpose`` (at most 16 bytes).

    Raises ``ChannelClosed`` where nobody does, or does not answer within ``seconds``, and ``Distrusted`` where somebody
    has another token, or only one of both encrypts.
    """
    until, (token, tls) = time.monotonic() + seconds, credentials
    ours = _PLAIN if tls is None else _ENCRYPTED
    try:
        connection = socket.create_connection(address, seconds)
    except OSError as error:
        raise ChannelClosed(f"{address[0]}:{address[1]} cannot be reached: {error}") from None
    try:
        hello = _HELLO.pack(ours, VERSION, os.urandom(16), purpose)
        connection.sendall(hello)
        answer = _read(connection, _ANSWER.size, until)
        magic, version, _, proof = _ANSWER.unpack(answer)
        said = hello + answer[:-32]
        if magic not in (_PLAIN, _ENCRYPTED) or version != VERSION:
            raise ChannelClosed(f"{address[0]}:{address[1]} does not speak version {VERSION}")
        if not hmac.compare_digest(proof, _mac(token, b"listener", said)):
            message = f"{address[0]}:{address[1]} has another token"
            raise Distrusted("cluster.token", message, "give the cluster's: --token-file FILE")
        if magic != ours:
            message = f"{address[0]}:{address[1]} {'encrypts' if tls is None else 'does not encrypt'} connections"
            remedy = "start its agent with the same 'tls' in the cluster file: labinfer cluster down, then up"
            raise Distrusted("cluster.tls", message, remedy)
        connection.sendall(_mac(token, b"caller", said))
        connection.settimeout(None)
    except OSError as error:
        connection.close()
        raise ChannelClosed(str(error)) from None
    except ChannelClosed:
        connection.close()
        raise
    called = None if tls is None else tls._replace(called=address[0])
    return connection, Keys(_mac(token, b"from caller", said), _mac(token, b"from listener", said), called)


def accept(connection: socket.socket, credentials: Credentials) -> tuple[bytes, Keys]:
    """What a caller wants and the keys of its connection; raises ``ChannelClosed`` for one without the token."""
    until, (token, tls) = time.monotonic() + HANDSHAKE_SECONDS, credentials
    ours = _PLAIN if tls is None else _ENCRYPTED
    try:
        hello = _read(connection, _HELLO.size, until)
        magic, version, _, purpose = _HELLO.unpack(hello)
        if magic not in (_PLAIN, _ENCRYPTED) or version != VERSION:
            raise ChannelClosed(f"the caller does not speak version {VERSION}")
        head = _ANSWER.pack(ours, VERSION, os.urandom(16), b"")[:-32]
        said = hello + head
        connection.sendall(head + _mac(token, b"listener", said))
        if not hmac.compare_digest(_read(connection, 32, until), _mac(token, b"caller", said)):
            raise ChannelClosed("the caller has another token")
        connection.settimeout(None)
    except OSError as error:
        raise ChannelClosed(str(error)) from None
    return purpose.rstrip(b"\0"), Keys(_mac(token, b"from listener", said), _mac(token, b"from caller", said), tls)


class Sealed(Tcp):
    """An end of a connection whose two ends have shaken hands; it can send and receive."""

    def __init__(self, connection: socket.socket, limit: int, keys: Keys) -> None:
        super().__init__(connection, limit)
        self.keys = keys
        self._mine, self._theirs = (hmac.new(key, digestmod="sha256") for key in (keys.mine, keys.theirs))
        self._sent = self._received = 0
        self._seal = self._begun(self._mine, 0)  # of the next frame that is sent
        self._expected: hmac.HMAC | None = None  # of the next that is received, once it is waited for
        self._found = memoryview(bytearray(_SEAL_BYTES))
        self._likely: tuple[Header, int, list[memoryview]] | None = None  # the next frame, perhaps, and its bytes
        self.encrypted: Encrypted | None = None
        if keys.tls is not None:
            from labinfer.runtime.pipeline.transport.tls import Encrypted

            self.way = self.encrypted = Encrypted(connection, keys.tls)

    def agree(self, seconds: float) -> None:
        """See ``Channel.agree``: where frames are encrypted, each end looks at the other's certificate."""
        if self.encrypted is not None:
            self.encrypted.agree(seconds)

    def ready(self, seconds: float | None = 0.0) -> bool:
        """See ``Channel.ready``."""
        return (self.encrypted is not None and self.encrypted.pending) or super().ready(seconds)

    def _begun(self, key: hmac.HMAC, count: int) -> hmac.HMAC:
        seal = key.copy()
        seal.update(count.to_bytes(8, "little"))
        return seal

    def write(self, parts: Sequence[memoryview]) -> None:
        """Send a frame, and its seal behind it."""
        for part in parts:
            self._seal.update(part)
        super().write([*parts, memoryview(self._seal.digest())[:_SEAL_BYTES]])
        self._sent += 1
        self._seal = self._begun(self._mine, self._sent)

    def expect(self, kind: int, tag: int, sections: Sequence[memoryview]) -> None:
        """See ``Channel.expect``."""
        frame = self.pack(kind, tag, sections)
        header = Header(kind, tag, tuple(section.nbytes for section in sections))
        self._likely = header, sum(map(len, frame)), frame
        self._expected = self._begun(self._theirs, self._received)

    def receive(self, place: Sections) -> Header:
        """See ``Channel.receive``; quick where the frame is the one that was expected and has come as a whole."""
        likely, self._likely = self._likely, None
        if likely is not None:
            header, size, [head, *sections] = likely
            start, end = self._start, self._start + size
            if end + _SEAL_BYTES <= self._stop and self._buffer[start : start + len(head)] == head:
                self._check([self._buffer[start:end]], self._buffer[end : end + _SEAL_BYTES])
                self._start = end + _SEAL_BYTES
                start += len(head)
                for section in sections:
                    section[:] = self._buffer[start : start + len(section)]
                    start += len(section)
                return header
        return super().receive(place)

    def done(self, parts: Sequence[memoryview]) -> None:
        """Close the connection if the frame that was read is not what the other end sent."""
        self.read(self._found)
        self._check(parts, self._found)

    def _check(self, parts: Sequence[memoryview], found: memoryview) -> None:
        seal = self._expected or self._begun(self._theirs, self._received)
        for part in parts:
            seal.update(part)
        if not hmac.compare_digest(seal.digest()[:_SEAL_BYTES], found):
            self.close()
            raise ChannelClosed("a frame was forged or repeated")
        self._received += 1
        self._expected = None


def _mac(token: bytes, label: bytes, said: bytes) -> bytes:
    return hmac.digest(token, label + b"\0" + said, "sha256")


def _read(connection: socket.socket, count: int, until: float) -> bytes:
    received = b""
    while len(received) < count:
        left = until - time.monotonic()
        if left <= 0:
            raise ChannelClosed("the other end took too long")
        connection.settimeout(left)
        more = connection.recv(count - len(received))
        if not more:
            raise ChannelClosed("the other end hung up")
        received += more
    return received
