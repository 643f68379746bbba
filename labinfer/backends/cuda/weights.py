"""Weights in the layout of ``layout``: a matrix in device memory, and how stored bytes become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labinfer.backends.cuda.layout import pitch
from labinfer.errors import WeightsError
from labinfer.ops.dequantization import k_scale_codes
from labinfer.ops.formats import FORMATS, stored_bytes

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CudaWeight:
    """A matrix, or a stack of them one after another, each ``nbytes`` long, in ``memory``, uint8 on the device."""

    memory: Any
    format: str
    rows: int
    columns: int
    nbytes: int

    @property
    def address(self) -> int:
        """The address of the first matrix."""
        return int(self.memory.data.ptr)


def pack(format: str, raw: Bytes, rows: int, columns: int) -> Bytes:
    """A stored matrix (uint8, as in the file) in the device's layout: uint8 of at most ``layout.matrix_bytes``."""
    expected = stored_bytes(format, (rows, columns))
    if raw.dtype != np.uint8 or raw.size != expected:
        message = f"{format} of shape [{rows}, {columns}] takes {expected} bytes, {raw.nbytes} were given"
        raise WeightsError("weights.corrupt", message)
    if format in _PLANES:
        planes = _PLANES[format](raw.reshape(-1, FORMATS[format].block_bytes))
        return np.concatenate([_interleaved(plane.reshape(rows, -1), columns) for plane in planes])
    if format == "f32" or columns == pitch(columns):
        return raw
    padded = np.zeros((rows, 2 * pitch(columns)), np.uint8)
    padded[:, : 2 * columns] = raw.reshape(rows, -1)
    return padded.reshape(-1)


def _interleaved(plane: Bytes, columns: int) -> Bytes:
    """A plane, uint8 [rows, bytes], in the order that ``layout`` tells."""
    width = plane.shape[1] * 32 // columns  # bytes of a block, or 0
    pieces = -(-columns // 128) if width else columns // 256
    filled = np.zeros((-(-len(plane) // 8) * 8, max(pieces * 4 * width, plane.shape[1])), np.uint8)
    filled[: len(plane), : plane.shape[1]] = plane
    return filled.reshape(-1, 8, pieces, filled.shape[1] // pieces).swapaxes(1, 2).reshape(-1)


# Each function below cuts blocks uint8 [n, block_bytes] into planes.


def _q8_0(blocks: Bytes) -> tuple[Bytes, ...]:
    return blocks[:, 2:18], blocks[:, 18:], blocks[:, :2]


def _q4_0(blocks: Bytes) -> tuple[Bytes, ...]:
    return blocks[:, 2:], blocks[:, :2]


def _q4_1(blocks: Bytes) -> tuple[Bytes, ...]:
    return blocks[:, 4:], blocks[:, :4]


def _q5_0(blocks: Bytes) -> tuple[Bytes, ...]:
    return blocks[:, 6:], blocks[:, 2:6], blocks[:, :2]


def _q5_1(blocks: Bytes) -> tuple[Bytes, ...]:
    return blocks[:, 8:], blocks[:, 4:8], blocks[:, :4]


def _q4_k(blocks: Bytes) -> tuple[Bytes, ...]:
    return _nibbles(_low_then_high(blocks[:, 16:].reshape(-1, 4, 32))), _scales(blocks), blocks[:, :4]


def _q5_k(blocks: Bytes) -> tuple[Bytes, ...]:
    codes = _nibbles(_low_then_high(blocks[:, 48:].reshape(-1, 4, 32)))
    bits = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    return codes, np.packbits(bits, axis=-1, bitorder="little"), _scales(blocks), blocks[:, :4]


def _q6_k(blocks: Bytes) -> tuple[Bytes, ...]:
    codes = _nibbles(_low_then_high(blocks[:, :128].reshape(-1, 2, 64)))
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 8, 4, 8)
    pairs: Bytes = np.bitwise_or.reduce(high << shifts, axis=2)
    return codes, pairs, blocks[:, 192:208], blocks[:, 208:]


def _low_then_high(packed: Bytes) -> Bytes:
    """Codes uint8 [n, 256] of ``packed`` [n, groups, bytes]: of each group first the low nibbles, then the high."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(len(packed), 256)


def _nibbles(codes: Bytes) -> Bytes:
    """Codes below 16, [n, 256], as [n, 8, 16]: of each 32 columns, ``j`` in the low and ``j + 16`` in the high half."""
    halves = codes.reshape(-1, 8, 2, 16)
    packed: Bytes = np.bitwise_or(halves[:, :, 0], np.left_shift(halves[:, :, 1], 4, dtype=np.uint8))
    return packed


def _scales(blocks: Bytes) -> Bytes:
    """Scale and minimum of each sub-block side by side, [n, 8, 2]."""
    return np.stack(k_scale_codes(blocks), axis=-1)


_PLANES: dict[str, Callable[[Bytes], tuple[Bytes, ...]]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
