"""Exact dequantization of stored weights to float32.

Block layouts and arithmetic follow ggml (ggml-common.h, dequantize_row_* in ggml-quants.c): scales are float16, every
operation is rounded to float32. Names and sizes of the formats are in ``labinfer.ops.formats``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from labinfer.errors import WeightsError
from labinfer.ops.formats import FORMATS, stored_bytes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 16  # dequantized at a time, so that temporaries stay in the cache

_PLAIN_DTYPES = {
    "f32": "<f4", "f16": "<f2", "bf16": "<u2", "f64": "<f8", "i8": "<i1", "i16": "<i2", "i32": "<i4", "i64": "<i8",
    "u8": "<u1", "u16": "<u2", "u32": "<u4", "u64": "<u8", "bool": "?",
}  # fmt: skip


def dequantize(raw: Bytes, format: str, shape: Sequence[int]) -> Floats:
    """The tensor stored in ``raw`` (uint8 [stored_bytes(format, shape)]) as a new float32 array of ``shape``.

    Raises WeightsError when ``raw`` has another size than ``format`` and ``shape`` ask for.
    """
    expected = stored_bytes(format, shape)
    if raw.dtype != np.uint8 or raw.size != expected:
        message = f"{format} of shape {list(shape)} takes {expected} bytes, {raw.nbytes} were given"
        raise WeightsError("weights.corrupt", message)
    stored = FORMATS[format]
    blocks = raw.reshape(-1, stored.block_bytes)
    out = np.empty((blocks.shape[0], stored.block_size), np.float32)
    step = CHUNK_ELEMENTS // stored.block_size
    kernel = _KERNELS.get(format)
    for start in range(0, blocks.shape[0], step):
        part = slice(start, start + step)
        if kernel is not None:
            kernel(blocks[part], out[part])
        else:
            _plain(blocks[part], out[part], format)
    return out.reshape(tuple(shape))


# Each kernel below turns blocks uint8 [n, block_bytes] into out float32 [n, block_size].


def _plain(blocks: Bytes, out: Floats, format: str) -> None:
    numbers = blocks.view(_PLAIN_DTYPES[format])
    if format == "bf16":  # the upper half of a float32
        np.left_shift(numbers, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = numbers


def _half(pair: Bytes) -> Floats:
    """float16 in the last two bytes of axis 1 as float32, keeping that axis with length 1."""
    return np.ascontiguousarray(pair).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, out: Floats) -> None:
    """``packed`` [..., m] to ``out`` [..., 2 m]: all the low nibbles, then all the high ones."""
    half = packed.shape[-1]
    np.bitwise_and(packed, 15, out=out[..., :half])
    np.right_shift(packed, 4, out=out[..., half:])


def _fifth_bits(packed: Bytes) -> Bytes:
    """``packed`` [n, 4] to [n, 32]: bit j of the little-endian word, worth 16."""
    return np.left_shift(np.unpackbits(packed, axis=1, bitorder="little"), 4, dtype=np.uint8)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks[:, :2]), out=out)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _half(blocks[:, :2])


def _q4_1(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks[:, :2])
    out += _half(blocks[:, 2:4])


def _q5_0(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 6:], out)
    out += _fifth_bits(blocks[:, 2:6])
    out -= 16
    out *= _half(blocks[:, :2])


def _q5_1(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 8:], out)
    out += _fifth_bits(blocks[:, 4:8])
    out *= _half(blocks[:, :2])
    out += _half(blocks[:, 2:4])


def k_scale_codes(blocks: Bytes) -> tuple[Bytes, Bytes]:
    """The six-bit scales and minima of the 8 sub-blocks of q4_k and q5_k, each uint8 [n, 8].

    Twelve bytes hold 8 + 8 six-bit numbers: the first four of each in the low bits of bytes 0..3 and 4..7; of the
    others, the low nibbles in bytes 8..11 and the two high bits on top of bytes 0..7.
    """
    first, second, nibbles = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (nibbles & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (nibbles >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima of those sub-blocks, each float32 [n, 8, 1]."""
    scales, minima = k_scale_codes(blocks)
    return (_half(blocks[:, :2]) * scales)[:, :, None], (_half(blocks[:, 2:4]) * minima)[:, :, None]


def _q4_k(blocks: Bytes, out: Floats) -> None:
    scales, minima = _k_scales(blocks)
    _nibbles(blocks[:, 16:].reshape(-1, 4, 32), out.reshape(-1, 4, 64))
    values = out.reshape(-1, 8, 32)
    values *= scales
    values -= minima


def _q5_k(blocks: Bytes, out: Floats) -> None:
    scales, minima = _k_scales(blocks)
    _nibbles(blocks[:, 48:].reshape(-1, 4, 32), out.reshape(-1, 4, 64))
    values = out.reshape(-1, 8, 32)
    # Byte j of the 32 holds the fifth bit of element j of each sub-block, one bit a sub-block.
    values += (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    values *= scales
    values -= minima


def _q6_k(blocks: Bytes, out: Floats) -> None:
    scales = blocks[:, 192:208].view(np.int8) * _half(blocks[:, 208:])
    _nibbles(blocks[:, :128].reshape(-1, 2, 64), out.reshape(-1, 2, 128))
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    values = out.reshape(-1, 2, 4, 32)
    values += (pairs >> shifts & 3) << 4
    values -= 32
    by_scale = out.reshape(-1, 16, 16)
    by_scale *= scales[:, :, None]


_KERNELS: dict[str, Callable[[Bytes, Floats], None]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
