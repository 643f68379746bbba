"""The formats weights are stored in: plain numbers and ggml's block formats. Sizes only; no arithmetic.

A block format cuts each row into blocks of ``block_size`` elements that share one or two float16 scales; layouts follow
ggml (ggml-common.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from labinfer.errors import WeightsError, did_you_mean


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """A storage format: ``block_size`` elements take ``block_bytes`` bytes; a plain number is a block of one."""

    name: str
    block_size: int
    block_bytes: int


_PLAIN = {
    "f64": 8, "i64": 8, "u64": 8, "f32": 4, "i32": 4, "u32": 4, "f16": 2, "bf16": 2, "i16": 2, "u16": 2, "i8": 1, "u8":
    1, "bool": 1,
}  # fmt: skip

_BLOCKS = {
    "q8_0": (32, 2 + 32),  # d, 32 int8
    "q4_0": (32, 2 + 16),  # d, 32 nibbles
    "q4_1": (32, 2 + 2 + 16),  # d, m, 32 nibbles
    "q5_0": (32, 2 + 4 + 16),  # d, 32 fifth bits, 32 nibbles
    "q5_1": (32, 2 + 2 + 4 + 16),  # d, m, 32 fifth bits, 32 nibbles
    "q4_k": (256, 2 + 2 + 12 + 128),  # d, dmin, 8 six-bit scales and minima, 256 nibbles
    "q5_k": (256, 2 + 2 + 12 + 32 + 128),  # d, dmin, scales and minima, 256 fifth bits, 256 nibbles
    "q6_k": (256, 128 + 64 + 16 + 2),  # 256 nibbles, 256 bit pairs, 16 int8 scales, d
}

FORMATS: dict[str, StoredFormat] = {name: StoredFormat(name, 1, size) for name, size in _PLAIN.items()} | {
    name: StoredFormat(name, *block) for name, block in _BLOCKS.items()
}


def stored_bytes(format: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of ``shape`` takes in ``format``.

    Raises WeightsError for an unknown format, or a last dimension that is not a whole number of blocks.
    """
    stored = FORMATS.get(format)
    if stored is None:
        remedy = did_you_mean(format, FORMATS) or "known formats: " + ", ".join(FORMATS)
        raise WeightsError("weights.unsupported-format", f"unknown stored format '{format}'", remedy=remedy)
    row = shape[-1] if shape else 1
    if row % stored.block_size:
        message = f"rows of {row} elements are not a multiple of the {stored.block_size} elements in a {format} block"
        raise WeightsError("weights.corrupt", message)
    return math.prod(shape) // stored.block_size * stored.block_bytes
