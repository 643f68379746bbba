"""Every op LABInfer knows. Importing this package fills ``OPS``; numpy is only imported when a reference runs."""

from labinfer.ops import attention, collectives, elementwise, linear, lora, moe, norm, rope, rows, split
from labinfer.ops.base import (
    OPS,
    Call,
    Dim,
    OpAttrs,
    OpSpec,
    Shape,
    ShapeMismatch,
    Step,
    TensorType,
    WeightSlot,
    spec_of,
)

__all__ = [
    "OPS",
    "Call",
    "Dim",
    "OpAttrs",
    "OpSpec",
    "Shape",
    "ShapeMismatch",
    "Step",
    "TensorType",
    "WeightSlot",
    "attention",
    "collectives",
    "elementwise",
    "linear",
    "lora",
    "moe",
    "norm",
    "rope",
    "rows",
    "spec_of",
    "split",
]
