"""Random stored weights of every format, and buffers at aligned addresses, for the tests of the CPU backend."""

from __future__ import annotations

from math import prod

import numpy as np

from labinfer.ops.dequantization import dequantize
from labinfer.ops.formats import FORMATS, stored_bytes

Bytes = np.ndarray

SCALES_AT = {"q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}
"""Where a block has its float16 numbers; the others have one in front."""


def stored_weight(format: str, rows: int, columns: int, seed: int = 0) -> Bytes:
    """A weight as it stands in a file: random quants, scales of both signs and several sizes."""
    rng = np.random.default_rng([seed, rows, columns])
    if format in ("f32", "f16", "bf16"):
        numbers = (rng.standard_normal(rows * columns) * 0.05).astype(np.float32)
        if format == "bf16":
            return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return numbers.astype({"f32": np.float32, "f16": np.float16}[format]).view(np.uint8)
    blocks = rng.integers(0, 256, stored_bytes(format, (rows, columns)), np.uint8)
    blocks = blocks.reshape(-1, FORMATS[format].block_bytes)
    for at in SCALES_AT.get(format, (0,)):
        scales = rng.normal(0, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def lively(format: str, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Stored weights scaled so that a row's product is about as large as what it multiplies; norms near 1."""
    if len(shape) == 1:
        return (raw.view(np.float32) + 1).view(np.uint8)
    if FORMATS[format].block_size == 1:
        return raw
    scale = shape[-1] ** -0.5 / dequantize(raw, format, (prod(shape[:-1]), shape[-1])).std()
    blocks = raw.reshape(-1, FORMATS[format].block_bytes)
    for at in SCALES_AT.get(format, (0,)):
        blocks[:, at : at + 2] = (
            (blocks[:, at : at + 2].copy().view(np.float16) * scale).astype(np.float16).view(np.uint8)
        )
    return raw


def aligned(nbytes: int, fill: int = 0) -> Bytes:
    """uint8 [nbytes] at a multiple of 64."""
    raw = np.full(nbytes + 64, fill, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]
