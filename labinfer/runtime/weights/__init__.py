"""Checkpoints on disk: what tensors they hold, where, in which stored format, and how to turn them into float32."""

from labinfer.ops.formats import FORMATS, StoredFormat, stored_bytes
from labinfer.runtime.weights.checkpoint import Checkpoint, open_checkpoint, read_config
from labinfer.runtime.weights.dequantization import dequantize
from labinfer.runtime.weights.tensor_info import TensorInfo

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
