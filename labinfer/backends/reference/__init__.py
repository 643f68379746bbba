"""The reference backend: every op by its own numpy reference."""

from collections.abc import Sequence
from typing import Any

from labinfer import __version__
from labinfer.backends.base import Capabilities, host_fingerprint
from labinfer.ops.formats import stored_bytes


def weight_bytes(format: str, shape: Sequence[int]) -> int:
    """Weights are widened to float32."""
    return stored_bytes("f32", shape)


def fingerprint(threads: int | None) -> dict[str, Any]:
    """The machine and this version."""
    return host_fingerprint("reference", __version__, None)


CAPABILITIES = Capabilities(parameters="f32", weight_bytes=weight_bytes, fingerprint=fingerprint)
