"""The reference backend: every op by its own numpy reference."""

from collections.abc import Sequence

from labinfer.backends.base import Capabilities
from labinfer.ops.formats import stored_bytes


def weight_bytes(format: str, shape: Sequence[int]) -> int:
    """Weights are widened to float32."""
    return stored_bytes("f32", shape)


CAPABILITIES = Capabilities(parameters="f32", weight_bytes=weight_bytes)
