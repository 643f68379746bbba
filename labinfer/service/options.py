"""How a service is run."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """Everything about a service but its models.

    ``api_keys`` are the keys of which a client needs one. ``allowed_hosts`` are the names that a ``Host`` header may
    have, whatever the port; none allows all. ``max_queue`` requests wait, beside those that a step computes. Times are
    in seconds. ``otlp_traces_endpoint`` is the address of a collector for OpenTelemetry's spans.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_queue: int = 256
    max_connections: int = 1024
    max_body_bytes: int = 32 << 20
    max_header_bytes: int = 64 << 10
    max_headers: int = 100
    max_stops: int = 4
    max_choices: int = 16
    max_prompts: int = 128
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    write_seconds: float = 30.0
    keep_alive_seconds: float = 15.0
    drain_seconds: float = 30.0
    stall_seconds: float = 60.0
    log_format: str = "text"
    otlp_traces_endpoint: str | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return is_loopback(self.host)

    @property
    def hosts(self) -> frozenset[str]:
        """The names that a ``Host`` header may have; empty for all. Against DNS rebinding."""
        names = (*LOOPBACK_NAMES, self.host) if self.loopback else ()
        return frozenset(name.lower() for name in (*self.allowed_hosts, *names))

    @property
    def url(self) -> str:
        """Where the service is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether ``host`` is an address, or a name, of this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
