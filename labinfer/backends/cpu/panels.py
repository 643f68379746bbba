"""Packing stored weights into the panels of ``layout``, and reading single rows back. No value changes.

Packing moves words (four bytes of one row); only K-quants and fifth bits need bit work. It holds no GIL and writes only
its ``out``, so several threads can pack weights at once. Stored layouts are ggml's (see ops/dequantization).
"""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from labinfer.backends.cpu.isa import I8, I32, I64, Value, njit
from labinfer.backends.cpu.layout import PANEL_FORMATS, PANEL_ROWS, packed_bytes, panel_bytes
from labinfer.backends.cpu.simd import Emit, f32p, kernel, ldi32, ldu8, sti32, stu8, u16p
from labinfer.errors import WeightsError
from labinfer.ops.formats import stored_bytes

FORMAT_CODES = {name: code for code, name in enumerate(PANEL_FORMATS)}
"""The numbers by which ``unpack_row`` knows the formats."""

_F32, _F16, _BF16, _Q8_0, _Q4_0, _Q4_1, _Q5_0, _Q5_1, _Q4_K, _Q5_K, _Q6_K = range(11)
_COLUMNS = np.array([layout.columns for layout in PANEL_FORMATS.values()])
_BYTES = np.array([layout.bytes for layout in PANEL_FORMATS.values()])
_QUANT_BYTES = np.array([layout.quant_bytes for layout in PANEL_FORMATS.values()])
_NIBBLES, _BIT, _PAIR = 0x0F0F0F0F, 0x01010101, 0x03030303  # four numbers of 4, 1 and 2 bits in a word


def pack(format: str, raw: NDArray[np.uint8], rows: int, columns: int, out: NDArray[np.uint8]) -> None:
    """Pack a weight [rows, columns] stored in ``raw`` (uint8, as in the file) into ``out`` (uint8 [packed_bytes]).

    ``out`` should begin at a multiple of 64 bytes. Raises WeightsError when ``raw`` has not the size it should.
    """
    expected, size = stored_bytes(format, (rows, columns)), packed_bytes(format, rows, columns)
    if raw.dtype != np.uint8 or raw.size != expected or not raw.flags.c_contiguous:
        message = f"{format} of shape [{rows}, {columns}] takes {expected} contiguous bytes, {raw.nbytes} were given"
        raise WeightsError("weights.corrupt", message)
    if out.dtype != np.uint8 or out.size != size or not out.flags.c_contiguous:
        raise ValueError(f"{format} [{rows}, {columns}] packs into {size} bytes, not {out.nbytes}")
    panel = panel_bytes(format, columns)
    if rows % PANEL_ROWS:
        out[-panel:] = 0
    _pack(FORMAT_CODES[format], raw.ctypes.data, expected // max(rows, 1), rows, columns, out.ctypes.data, panel)


@njit
def _pack(code: int, raw: int, row_bytes: int, rows: int, columns: int, out: int, panel: int) -> None:
    for first in range(0, rows, PANEL_ROWS):
        count = min(PANEL_ROWS, rows - first)
        source, target = raw + first * row_bytes, out + first // PANEL_ROWS * panel
        if code == _F32:
            _pack_words(source, row_bytes, count, columns, target)
        elif code == _F16:
            _pack_f16(source, row_bytes, count, columns, target)
        elif code == _BF16:
            _pack_words(source, row_bytes, count, columns // 2, target)
            if columns % 2:
                _pack_last_bf16(source, row_bytes, count, columns, target)
        elif code == _Q6_K:
            _pack_q6_k(source, row_bytes, count, columns // 32, target)
        elif code == _Q4_K or code == _Q5_K:
            _pack_k(source, row_bytes, count, columns // 32, target, code == _Q5_K)
        else:
            scales = 2 if code == _Q4_1 or code == _Q5_1 else 1
            fifth = 1 if code == _Q5_0 or code == _Q5_1 else 0
            _pack_blocks(source, row_bytes, count, columns // 32, target, scales, fifth, code == _Q8_0)


@njit
def _pack_words(source: int, row_bytes: int, rows: int, words: int, target: int) -> None:
    """Word ``k`` of each row to word ``16 * k + row``."""
    for k in range(words):
        for r in range(rows):
            sti32(target, k * PANEL_ROWS + r, ldi32(source + r * row_bytes, k))


@njit
def _pack_f16(source: int, row_bytes: int, rows: int, columns: int, target: int) -> None:
    halves = u16p(target)
    for k in range(columns):
        for r in range(rows):
            halves[k * PANEL_ROWS + r] = u16p(source + r * row_bytes)[k]


@njit
def _pack_last_bf16(source: int, row_bytes: int, rows: int, columns: int, target: int) -> None:
    """The last of an odd number of columns: a pair with zero."""
    for r in range(rows):
        sti32(target, columns // 2 * PANEL_ROWS + r, u16p(source + r * row_bytes)[columns - 1])


@njit
def _pack_blocks(
    source: int, row_bytes: int, rows: int, blocks: int, target: int, scales: int, fifth: int, whole_bytes: bool
) -> None:
    """Blocks of 32 columns: float16 scales, perhaps a word of fifth bits, then nibbles or bytes."""
    words = 8 if whole_bytes else 4
    flip = -0x7F7F7F80 if whole_bytes else 0  # 0x80808080: signed bytes to unsigned ones with zero point 128
    block_bytes, quant_bytes = 2 * scales + 4 * fifth + 4 * words, 64 * (words + fifth)
    for block in range(blocks):
        for r in range(rows):
            at = source + r * row_bytes + block * block_bytes
            quants = target + block * quant_bytes + 4 * r
            for s in range(scales):
                u16p(target + blocks * (quant_bytes + 32 * s))[block * PANEL_ROWS + r] = u16p(at)[s]
            body = at + 2 * scales + 4 * fifth
            for j in range(words):
                sti32(quants + 64 * j, 0, ldi32(body, j) ^ flip)
            if fifth:
                sti32(quants + 256, 0, _every_fourth_bit(ldi32(at + 2 * scales, 0)))


@njit
def _every_fourth_bit(bits: int) -> int:
    """Bit ``4 * j + i`` to bit ``j`` of byte ``i``."""
    word = 0
    for i in range(4):
        t = (bits >> i) & 0x11111111
        t = (t | (t >> 3)) & 0x03030303
        t = (t | (t >> 6)) & 0x000F000F
        word |= ((t | (t >> 12)) & 0xFF) << (8 * i)
    return word


@njit
def _copy_half(source: int, target: int, index: int) -> None:
    u16p(target)[index] = u16p(source)[0]


@njit
def _pack_k(source: int, row_bytes: int, rows: int, blocks: int, target: int, fifth: bool) -> None:
    """q4_k and q5_k: d, dmin, twelve bytes of scales and minima, perhaps 32 bytes of fifth bits, then nibbles."""
    quant_bytes = 320 if fifth else 256
    scales = target + blocks * quant_bytes
    groups = blocks // 8
    for group in range(groups):
        for r in range(rows):
            at = source + r * row_bytes + group * (176 if fifth else 144)
            _copy_half(at, scales, group * PANEL_ROWS + r)
            _copy_half(at + 2, scales + groups * 32, group * PANEL_ROWS + r)
            for s in range(8):
                block = group * 8 + s
                _pack_k_scale(at + 4, s, scales + groups * 64, block * PANEL_ROWS + r, blocks * PANEL_ROWS)
                # 32 bytes hold two blocks, one in the low nibbles and one in the high ones.
                body, shift = at + (48 if fifth else 16) + s // 2 * 32, 4 * (s % 2)
                quants = target + block * quant_bytes + 4 * r
                for j in range(4):
                    low = (ldi32(body, j) >> shift) & _NIBBLES
                    sti32(quants + 64 * j, 0, low | (((ldi32(body, j + 4) >> shift) & _NIBBLES) << 4))
                if fifth:
                    word = 0
                    for j in range(8):
                        word |= ((ldi32(at + 16, j) >> s) & _BIT) << j
                    sti32(quants + 256, 0, word)


@njit
def _pack_k_scale(at: int, s: int, out: int, index: int, minima: int) -> None:
    """The six-bit scale and minimum of sub-block ``s`` (see ``ops/dequantization``), a byte each."""
    if s < 4:
        scale, minimum = ldu8(at, s) & 63, ldu8(at, s + 4) & 63
    else:
        nibbles = ldu8(at, s + 4)
        scale = (nibbles & 15) | (ldu8(at, s - 4) >> 6 << 4)
        minimum = (nibbles >> 4) | (ldu8(at, s) >> 6 << 4)
    stu8(out, index, scale)
    stu8(out, index + minima, minimum)


@njit
def _pack_q6_k(source: int, row_bytes: int, rows: int, blocks: int, target: int) -> None:
    """128 bytes of nibbles, 64 of bit pairs, 16 signed scales, d."""
    scales = target + blocks * 384
    for group in range(blocks // 8):
        for r in range(rows):
            at = source + r * row_bytes + group * 210
            _copy_half(at + 208, scales, group * PANEL_ROWS + r)
            for s in range(8):
                block, half, quarter = group * 8 + s, s // 4, s % 4
                for part in range(2):
                    index = block * 32 + part * PANEL_ROWS + r
                    stu8(scales + blocks * 4, index, ldu8(at + 192, 2 * s + part))
                body, shift = at + 64 * half + 32 * (quarter % 2), quarter // 2 * 4
                pairs = at + 128 + 32 * half
                quants = target + block * 384 + 4 * r
                low, high = 0, 0
                for j in range(4):
                    nibbles = (ldi32(body, j) >> shift) & _NIBBLES
                    sti32(quants + 64 * j, 0, nibbles | (((ldi32(body, j + 4) >> shift) & _NIBBLES) << 4))
                    low |= ((ldi32(pairs, j) >> (2 * quarter)) & _PAIR) << (2 * j)
                    high |= ((ldi32(pairs, j + 4) >> (2 * quarter)) & _PAIR) << (2 * j)
                sti32(quants + 256, 0, low)
                sti32(quants + 320, 0, high)


# ---- single rows, for the embedding


def _read_f16(e: Emit, p: Value, i: Value) -> Value:
    return e.b.extract_element(e.load_f16(e.add(p, e.mul(i, 2)), 1), I32(0))


def _read_bf16(e: Emit, p: Value, i: Value) -> Value:
    return e.b.extract_element(e.load_bf16(e.add(p, e.mul(i, 2)), 1), I32(0))


def _read_i8(e: Emit, p: Value, i: Value) -> Value:
    return e.b.sext(e.load(e.add(p, i), I8), I64)


_ldh, _ldbf = kernel(_read_f16, types.float32), kernel(_read_bf16, types.float32)
_ldi8 = kernel(_read_i8, types.int64)


@njit
def unpack_row(code: int, w: int, columns: int, row: int, out: int) -> None:
    """Row ``row`` of the weight packed at ``w`` as float32 [columns] at ``out``; exactly what ``dequantize`` gives."""
    blocks = (columns + _COLUMNS[code] - 1) // _COLUMNS[code]
    panel = w + row // PANEL_ROWS * ((blocks * _BYTES[code] + 63) // 64 * 64)
    lane, target = row % PANEL_ROWS, f32p(out)
    if code == _F32:
        for c in range(columns):
            target[c] = f32p(panel)[c * PANEL_ROWS + lane]
    elif code == _F16:
        for c in range(columns):
            target[c] = _ldh(panel, c * PANEL_ROWS + lane)
    elif code == _BF16:
        for c in range(columns):
            target[c] = _ldbf(panel, c // 2 * 2 * PANEL_ROWS + 2 * lane + c % 2)
    else:
        for block in range(blocks):
            quants = panel + block * _QUANT_BYTES[code] + 4 * lane
            for j in range(8):
                scale, minimum = _scale(code, panel + blocks * _QUANT_BYTES[code], blocks, block, lane, j // 4)
                word = _quants(code, quants, j)
                for i in range(4):
                    target[block * 32 + 4 * j + i] = np.float32((word >> (8 * i)) & 255) * scale + minimum


@njit
def _quants(code: int, at: int, j: int) -> int:
    """The unsigned quants of columns ``4 * j`` to ``4 * j + 3``, a byte each."""
    if code == _Q8_0:
        return ldi32(at + 64 * j, 0)
    word = (ldi32(at + 64 * (j % 4), 0) >> (j // 4 * 4)) & _NIBBLES
    if code == _Q6_K:
        word |= ((ldi32(at + 256 + 64 * (j // 4), 0) >> (2 * (j % 4))) & _PAIR) << 4
    elif code == _Q5_0 or code == _Q5_1 or code == _Q5_K:
        word |= ((ldi32(at + 256, 0) >> j) & _BIT) << 4
    return word


@njit
def _scale(code: int, at: int, blocks: int, block: int, lane: int, half: int) -> tuple[float, float]:
    """Scale and minimum of half a block: weight = scale * quant + minimum."""
    index, group = block * PANEL_ROWS + lane, block // 8 * PANEL_ROWS + lane
    if code == _Q6_K:
        scale = _ldh(at, group) * np.float32(_ldi8(at + blocks * 4, block * 32 + half * PANEL_ROWS + lane))
        return scale, scale * np.float32(-32.0)
    if code == _Q4_K or code == _Q5_K:
        scale = _ldh(at, group) * np.float32(ldu8(at + blocks * 8, index))
        minimum = _ldh(at + blocks * 4, group) * np.float32(ldu8(at + blocks * 24, index))
        return scale, -minimum
    scale = _ldh(at, index)
    if code == _Q4_1 or code == _Q5_1:
        return scale, _ldh(at + blocks * 32, index)
    zero = 8 if code == _Q4_0 else 16 if code == _Q5_0 else 128
    return scale, scale * np.float32(-zero)
