"""TLS under the frames of a sealed channel: who listens on the way reads nothing, and both ends show certificates.

TLS 1.3 (RFC 8446) by Python's ``ssl``, with its state in memory and its bytes moved to and from the connection here, so
that one thread may send while another receives, for which OpenSSL's own sockets are not made. It begins in the process
that uses the channel, which is another than has accepted the connection, since its state cannot be handed on.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from labinfer.errors import LabinferError, Place
from labinfer.runtime.pipeline.transport.channel import ChannelClosed, Distrusted
from labinfer.runtime.pipeline.transport.sealed import Tls

_RECEIVED_BYTES = 1 << 16
_BELIEVED = b"\1"


def context_of(tls: Tls) -> ssl.SSLContext:
    """How an end behaves; the files are read anew, so that renewed certificates count. ``LabinferError`` if they are
    no certificate with its key and no authority."""
    if Path(tls.key).exists() and Path(tls.key).stat().st_mode & 0o077:
        remedy = f"chmod 600 {tls.key}"
        raise LabinferError("cluster.tls", "others can read the private key", place=Place(tls.key), remedy=remedy)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if tls.called else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if not tls.called:
        context.num_tickets = 0  # no session is ever resumed, and a channel brings frames only
    file = tls.ca
    try:
        context.load_verify_locations(file)
        file = f"{tls.certificate} with {tls.key}"
        context.load_cert_chain(tls.certificate, tls.key, password=str)  # which is empty: nobody is asked for one
    except OSError as error:  # as those of ssl are
        message, remedy = f"no certificates, as PEM, can be read from it: {error}", "see docs/cluster.md, Certificates"
        raise LabinferError("cluster.tls", message, place=Place(file), remedy=remedy) from None
    return context


class Encrypted:
    """What goes through ``connection``, as ``tls`` says: sends and receives as a socket does."""

    def __init__(self, connection: socket.socket, tls: Tls) -> None:
        self.connection, self.called = connection, tls.called
        self.incoming, self.outgoing, self.lock = ssl.MemoryBIO(), ssl.MemoryBIO(), threading.Lock()
        self.state = context_of(tls).wrap_bio(self.incoming, self.outgoing, not tls.called, tls.called or None)
        self.received = memoryview(bytearray(_RECEIVED_BYTES))

    @property
    def pending(self) -> bool:
        """Whether some of what has come was taken from the connection already, where waiting for that is in vain."""
        with self.lock:
            return self.state.pending() > 0 or self.incoming.pending > 0

    def agree(self, seconds: float) -> None:
        """Shake hands now; raises ``Distrusted`` where an end does not believe the certificate of the other.

        The listener has looked at the caller's last, so it says that it has.
        """
        self.connection.settimeout(seconds)
        try:
            if not self.called:
                self.sendmsg([_BELIEVED])
            elif self.recv_into(memoryview(bytearray(1))) == 0:
                raise ChannelClosed("the other end hung up")
            self.connection.settimeout(None)
        except ssl.SSLCertVerificationError as error:
            raise distrusted(f"the other end's certificate is refused: {error.verify_message}") from None
        except ssl.SSLError as error:
            told = (error.reason or str(error)).lower().replace("_", " ")
            refused = "the other end refuses this one's certificate" if "alert" in told else "there is no TLS"
            raise distrusted(f"{refused}: {told}") from None
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def sendmsg(self, parts: Sequence[memoryview | bytes]) -> int:
        """Send all ``parts``."""
        text = memoryview(b"".join(parts))
        done = 0
        while done < len(text):
            written = self._do(partial(self.state.write, text[done:]))
            if written == 0 and not self._listen(0):
                raise ConnectionResetError
            done += written
        return done

    def recv_into(self, into: memoryview, size: int = 0, flags: int = 0) -> int:
        """Wait for bytes, at most ``size`` if that is given, or as many as ``into`` has; 0 at the end."""
        size, done = size or len(into), 0
        while True:
            while done < size and (count := self._do(partial(self.state.read, size - done, into[done:]))):
                done += count
            if done or not self._listen(flags & socket.MSG_DONTWAIT):
                return done

    def _do(self, operation: Callable[[], Any]) -> int:
        """What ``operation`` gives, 0 where more must come first; the other end gets what it has for that."""
        said = b""
        try:
            with self.lock:
                try:
                    return int(operation())
                except ssl.SSLWantReadError:
                    return 0
                finally:
                    said = self.outgoing.read()
        finally:
            if said:
                self.connection.sendall(said)

    def _listen(self, flags: int) -> bool:
        """Take what has come, or wait for it; False at the end."""
        count = self.connection.recv_into(self.received, 0, flags)
        with self.lock:
            self.incoming.write(self.received[:count])
        return count > 0


def distrusted(message: str) -> Distrusted:
    """The error of an end whose certificate, or whose other end's, is refused."""
    remedy = "both ends need certificates of one authority that name their addresses and have not expired"
    return Distrusted("cluster.tls", message, remedy)
