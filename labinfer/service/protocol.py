"""A connection, with the limits that uvicorn lacks: size and number of headers, time to send them, and requests that
could be read in two ways.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from labinfer.service.options import ServiceOptions

REFUSALS = {
    408: b"Request Timeout",
    400: b"Bad Request",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


class Connection(HttpToolsProtocol):  # type: ignore[misc]  # uvicorn counts as untyped
    """One connection; ``options`` are set by ``connection_class``."""

    options: ServiceOptions

    def connection_made(self, transport: Any) -> None:
        """A client has come; it has some seconds to say what it wants."""
        super().connection_made(transport)
        self.header_bytes, self.timer = 0, None
        self.surplus = len(self.connections) > self.options.max_connections  # told so once it has asked
        if len(self.connections) > 2 * self.options.max_connections:
            transport.abort()
            return
        self.wait_for_header()

    def wait_for_header(self) -> None:
        """Close the connection unless a whole header comes soon."""
        self.timer = self.loop.call_later(self.options.header_seconds, self.refuse, 408)

    def connection_lost(self, problem: Exception | None) -> None:
        """The client has gone."""
        self.stop_timer()
        super().connection_lost(problem)

    def stop_timer(self) -> None:
        """The header is there, or will never be."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if not self.transport.is_closing():
            super().data_received(data)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self.scope["labinfer.abort"] = self.transport.abort
        self.header_bytes = 0
        if self.timer is None:
            self.wait_for_header()

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        self.count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self.count(len(name) + len(value) + 4)
        super().on_header(name, value)
        if len(self.headers) > self.options.max_headers:
            self.refuse(431)

    def count(self, nbytes: int) -> None:
        """Bytes of the header; too many end the connection."""
        self.header_bytes += nbytes
        if self.header_bytes > self.options.max_header_bytes:
            self.refuse(431)

    def on_headers_complete(self) -> None:
        """The header is whole: take the request on, if it can be read in one way only."""
        self.stop_timer()
        if self.transport.is_closing():
            return
        if self.surplus:
            self.refuse(503, b"retry-after: 1\r\n")
            return
        names = [name for name, _ in self.headers]
        ambiguous = b"transfer-encoding" in names and b"content-length" in names
        doubled = any(names.count(name) > 1 for name in (b"host", b"content-length", b"transfer-encoding"))
        if ambiguous or doubled or not self.url.startswith(b"/"):
            self.refuse(400)
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if not self.transport.is_closing():
            super().on_message_complete()

    def refuse(self, status: int, header: bytes = b"") -> None:
        """Say why, and close the connection."""
        self.stop_timer()
        if not self.transport.is_closing():
            head = b"HTTP/1.1 %d %s\r\nconnection: close\r\ncontent-length: 0\r\n" % (status, REFUSALS[status])
            self.transport.write(head + header + b"\r\n")
            self.transport.close()


def connection_class(options: ServiceOptions) -> type[asyncio.Protocol]:
    """Connections with these limits."""
    return type("LimitedConnection", (Connection,), {"options": options})
