"""Packing weights into panels and reading rows back: sizes, exactness, edges, refusals, threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.testing import assert_array_equal

pytest.importorskip("numba")

from labinfer.backends.cpu import isa
from labinfer.backends.cpu.layout import (
    PANEL_FORMATS,
    activation_bytes,
    activations_bytes,
    packed_bytes,
    panel_bytes,
    weight_bytes,
)
from labinfer.backends.cpu.machine_code import address
from labinfer.backends.cpu.packed_weight import pack
from labinfer.backends.cpu.panels import unpack_row
from labinfer.errors import WeightsError
from labinfer.ops.dequantization import dequantize
from labinfer.ops.formats import FORMATS, stored_bytes
from tests.cpu.weights import aligned, stored_weight

GROWTH = {"q4_k": 148 / 144, "q5_k": 180 / 176}


@isa.njit
def unpack_all(code: int, w: int, columns: int, rows: int, out: int) -> None:
    for row in range(rows):
        unpack_row(code, w, columns, row, out + row * columns * 4)


def columns_of(format: str) -> list[int]:
    """Column counts to try: one block, an odd number of blocks; odd and tiny ones for plain numbers."""
    size = FORMATS[format].block_size
    return [size, 3 * size, 4 * size] if size > 1 else [1, 2, 31, 77]


def packed(format: str, raw: np.ndarray, rows: int, columns: int) -> np.ndarray:
    out = aligned(packed_bytes(format, rows, columns), fill=0xFF)
    pack(format, raw, rows, columns, out)
    return out


@pytest.mark.parametrize("format", PANEL_FORMATS)
def test_every_row_comes_back_as_dequantized(format):
    for rows in (1, 15, 16, 50):
        for columns in columns_of(format):
            raw = stored_weight(format, rows, columns)
            w = packed(format, raw, rows, columns)
            out = np.full((rows, columns), np.nan, np.float32)
            unpack_all(address(f"unpack/{format}"), w.ctypes.data, columns, rows, out.ctypes.data)
            assert_array_equal(out, dequantize(raw, format, (rows, columns)))


@pytest.mark.parametrize("format", PANEL_FORMATS)
def test_rows_that_pad_the_last_panel_are_zero(format):
    columns = columns_of(format)[-1]
    w = packed(format, stored_weight(format, 17, columns), 17, columns)
    out = np.full((32, columns), np.nan, np.float32)
    unpack_all(address(f"unpack/{format}"), w.ctypes.data, columns, 32, out.ctypes.data)
    assert out[:17].any()
    assert not out[17:].any()


@pytest.mark.parametrize("format", PANEL_FORMATS)
def test_packed_weights_take_what_is_stored(format):
    for rows in (1, 16, 100):
        for columns in (512, 1536, 2048):
            stored = stored_bytes(format, (-(-rows // 16) * 16, columns))
            assert packed_bytes(format, rows, columns) == pytest.approx(stored * GROWTH.get(format, 1.0))
            assert panel_bytes(format, columns) % 64 == 0
    odd = FORMATS[format].block_size * 3
    assert 0 <= packed_bytes(format, 16, odd) - stored_bytes(format, (16, odd)) * GROWTH.get(format, 1.0) < 64


def test_bytes_of_tensors_and_activations():
    assert weight_bytes("q4_0", (576,)) == 4 * 576
    assert weight_bytes("q4_0", (3, 20, 64)) == 3 * packed_bytes("q4_0", 20, 64)
    assert activation_bytes(2, 64) == 2 * (16 + 64)
    assert activation_bytes(1, 256) == 8 * (16 + 32)
    assert activation_bytes(0, 77) == 78 * 4
    assert activations_bytes(-2, 17, 64) == 32 * 2 * (16 + 2 * 64)
    with pytest.raises(WeightsError, match="no kernel for weights in format 'i32'"):
        panel_bytes("i32", 64)


def test_wrong_sizes_are_refused():
    raw, out = stored_weight("q8_0", 16, 64), aligned(packed_bytes("q8_0", 16, 64))
    with pytest.raises(WeightsError, match="takes 1088 contiguous bytes, 1087 were given"):
        pack("q8_0", raw[:-1], 16, 64, out)
    with pytest.raises(WeightsError, match="multiple of the 32 elements"):
        pack("q8_0", raw, 16, 63, out)
    with pytest.raises(ValueError, match="packs into 1088 bytes"):
        pack("q8_0", raw, 16, 64, out[:-64])


def test_threads_pack_at_once():
    formats = list(PANEL_FORMATS) * 4
    weights = {format: stored_weight(format, 100, 512) for format in PANEL_FORMATS}
    alone = {format: packed(format, raw, 100, 512) for format, raw in weights.items()}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda format: packed(format, weights[format], 100, 512), formats))
    for format, w in zip(formats, together, strict=True):
        assert_array_equal(w, alone[format])
