"""The planes of block formats, read as the kernels read them, are the numbers of the checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from labinfer.backends.cuda.layout import EIGHT_BLOCKS, FORMATS, matrix_bytes, pitch
from labinfer.backends.cuda.weights import pack
from labinfer.ops.dequantization import dequantize
from labinfer.ops.formats import FORMATS as FORMATS_BY_NAME
from tests.cpu.weights import stored_weight

BITS = {"q8_0": 32, "q5_0": 20, "q5_1": 20, "q5_k": 20, "q6_k": 24}
ZEROS = {"q4_0": 8, "q5_0": 16, "q6_k": 32}


def places(rows: int, columns: int) -> np.ndarray:
    """``place_of`` of kernels/formats.cuh for every block of 32 columns: [rows * columns / 32]."""
    fours = -(-columns // 128)
    row, block = np.divmod(np.arange(rows * columns // 32), columns // 32)
    return ((row // 8 * fours + block // 4) * 8 + row % 8) * 4 + block % 4


def codes_of(format: str, planes: np.ndarray, blocks: int, place: np.ndarray) -> np.ndarray:
    """``code_at`` of kernels/formats.cuh for every column of the blocks at these places: [places, 32]."""
    if format == "q8_0":
        halves = planes[: 32 * blocks].view(np.int8).reshape(2, blocks, 16)[:, place]
        return np.concatenate([halves[0], halves[1]], axis=1).astype(np.int32)
    nibbles, j = planes[: 16 * blocks].reshape(blocks, 16)[place], np.arange(32)
    codes = nibbles[:, j % 16].astype(np.int32) >> (j // 16 * 4) & 15
    more = planes[16 * blocks : BITS.get(format, 16) * blocks]
    if BITS.get(format) == 20:
        codes |= (more.view(np.uint32)[place][:, None] >> j.astype(np.uint32) & 1).astype(np.int32) << 4
    if BITS.get(format) == 24:
        codes |= (more.reshape(blocks, 8)[place][:, j % 8].astype(np.int32) >> (j // 8 * 2) & 3) << 4
    return codes - ZEROS.get(format, 0)


def scales_of(format: str, planes: np.ndarray, blocks: int, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``scales_of`` of kernels/formats.cuh: d and m, [places, 32]."""
    at, shared = BITS.get(format, 16) * blocks, place // 64 * 8 + place // 4 % 8
    if format in ("q8_0", "q4_0", "q5_0"):
        d = planes[at : at + 2 * blocks].view(np.float16).astype(np.float32)[place, None]
        return d, np.zeros_like(d)
    if format in ("q4_1", "q5_1"):
        pairs = planes[at : at + 4 * blocks].view(np.float16).astype(np.float32).reshape(blocks, 2)[place]
        return pairs[:, :1], pairs[:, 1:]
    rest = planes[at + 2 * blocks :]
    if format == "q6_k":
        d = rest[: blocks // 4].view(np.float16).astype(np.float32)[shared, None]
        scales = d * planes[at : at + 2 * blocks].view(np.int8).reshape(blocks, 2)[place]
        return np.repeat(scales, 16, axis=1), np.float32(0)
    both = rest[: blocks // 2].view(np.float16).astype(np.float32).reshape(-1, 2)[shared]
    scales = planes[at : at + 2 * blocks].reshape(blocks, 2)[place]
    return (both[:, 0] * scales[:, 0])[:, None], -(both[:, 1] * scales[:, 1])[:, None]


@pytest.mark.parametrize("format", EIGHT_BLOCKS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 768), (16, 256), (19, 1280)])
def test_planes_hold_the_same_numbers(format: str, rows: int, columns: int) -> None:
    columns -= 96 * (FORMATS_BY_NAME[format].block_size == 32)  # a row of so many blocks is filled up
    raw = stored_weight(format, rows, columns)
    planes = pack(format, raw, rows, columns)
    blocks = -(-rows // 8) * 8 * -(-columns // 128) * 4
    assert len(planes) * 8 == blocks * EIGHT_BLOCKS[format]
    place = places(rows, columns)
    d, m = scales_of(format, planes, blocks, place)
    expected = dequantize(raw, format, (rows, columns)).reshape(-1, 32)
    assert_allclose(codes_of(format, planes, blocks, place) * d + m, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("format", ["f16", "bf16"])
@pytest.mark.parametrize("columns", [1, 33, 64])
def test_plain_rows_are_padded_with_zeros(format: str, columns: int) -> None:
    raw = stored_weight(format, 3, columns)
    packed = pack(format, raw, 3, columns).view(np.uint16).reshape(3, pitch(columns))
    assert_array_equal(packed[:, :columns], raw.view(np.uint16).reshape(3, columns))
    assert not packed[:, columns:].any()


@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_fits_its_bytes(format: str) -> None:
    columns = 256 if format in EIGHT_BLOCKS else 77
    packed = pack(format, stored_weight(format, 7, columns), 7, columns)
    assert 0 <= matrix_bytes(format, 7, columns) - packed.nbytes < 256
