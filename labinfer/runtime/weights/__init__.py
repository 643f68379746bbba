"""Checkpoints on disk: what tensors they hold, where, in which stored format, and how to turn them into float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labinfer.ops.formats import FORMATS, StoredFormat, stored_bytes
from labinfer.runtime.weights.checkpoint import Checkpoint, open_checkpoint, read_config
from labinfer.runtime.weights.tensor_info import TensorInfo

if TYPE_CHECKING:
    from labinfer.ops.dequantization import dequantize

__all__ = [
    "FORMATS",
    "Checkpoint",
    "StoredFormat",
    "TensorInfo",
    "dequantize",
    "open_checkpoint",
    "read_config",
    "stored_bytes",
]


def __getattr__(name: str) -> Any:
    """``dequantize`` when it is asked for: it imports numpy, and compiling a plan should not."""
    if name != "dequantize":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from labinfer.ops.dequantization import dequantize

    return dequantize
