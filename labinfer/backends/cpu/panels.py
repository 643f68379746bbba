"""Packing stored weights into the panels of ``layout``, and reading single rows back. No value changes.

Packing moves words (four bytes of one row); only K-quants and fifth bits need bit work. It writes only its ``out``, so
several threads can pack weights at once. What is stored is described in ``ops/dequantization``.

As in ``linear``, each format has kernels of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from labinfer.backends.cpu.isa import I8, I32, I64, Value, njit, specialize
from labinfer.backends.cpu.layout import PANEL_ROWS, panel_format
from labinfer.backends.cpu.simd import Emit, f32p, kernel, ldf, ldi32, ldu8, sti32, stu8, u16p

_NIBBLES, _BIT, _PAIR = 0x0F0F0F0F, 0x01010101, 0x03030303  # four numbers of 4, 1 and 2 bits in a word

# How blocks of 32 are stored: float16 numbers, words of fifth bits, words of quants.
_BLOCKS = {
    "q8_0": {"scales": 1, "fifth": 0, "words": 8},
    "q4_0": {"scales": 1, "fifth": 0, "words": 4},
    "q4_1": {"scales": 2, "fifth": 0, "words": 4},
    "q5_0": {"scales": 1, "fifth": 1, "words": 4},
    "q5_1": {"scales": 2, "fifth": 1, "words": 4},
}

# What functions below find among their globals; ``specialize`` gives each format's copy its own.
scales, fifth, words, zero, block_columns, block_bytes, quant_bytes = 1, 0, 4, 8, 32, 288, 256
pack_panel: Any = None
word_of: Any = None
scale_of: Any = None


PACK = types.void(*[types.int64] * 6)


def pack_kernel(format: str) -> Any:
    """The kernel ``pack/FORMAT``: raw, row_bytes, rows, columns, out, panel_bytes; with the signature ``PACK``."""
    body = _PACKERS.get(format, _pack_blocks)
    one = njit(specialize(body, f"pack_panel_{format}", **_BLOCKS.get(format, {"fifth": int(format == "q5_k")})))
    return specialize(_pack_panels, f"pack_{format}", pack_panel=one)


def _pack_panels(raw: int, row_bytes: int, rows: int, columns: int, out: int, panel: int) -> None:
    for first in range(0, rows, PANEL_ROWS):
        count, target = min(PANEL_ROWS, rows - first), out + first // PANEL_ROWS * panel
        pack_panel(raw + first * row_bytes, row_bytes, count, columns, target)


def _pack_f32(source: int, row_bytes: int, rows: int, columns: int, target: int) -> None:
    for k in range(columns):
        for r in range(rows):
            sti32(target, k * PANEL_ROWS + r, ldi32(source + r * row_bytes, k))


def _pack_f16(source: int, row_bytes: int, rows: int, columns: int, target: int) -> None:
    halves = u16p(target)
    for k in range(columns):
        for r in range(rows):
            halves[k * PANEL_ROWS + r] = u16p(source + r * row_bytes)[k]


def _pack_bf16(source: int, row_bytes: int, rows: int, columns: int, target: int) -> None:
    for k in range(columns // 2):
        for r in range(rows):
            sti32(target, k * PANEL_ROWS + r, ldi32(source + r * row_bytes, k))
    if columns % 2:  # the last column makes a pair with zero
        for r in range(PANEL_ROWS):
            last = u16p(source + r * row_bytes)[columns - 1] if r < rows else 0
            sti32(target, columns // 2 * PANEL_ROWS + r, last)


def _pack_blocks(source: int, row_bytes: int, rows: int, columns: int, target: int) -> None:
    """Blocks of 32 columns: float16 scales, perhaps a word of fifth bits, then nibbles or bytes."""
    blocks = columns // 32
    flip = -0x7F7F7F80 if words == 8 else 0  # 0x80808080: signed bytes to unsigned ones with zero point 128
    stored, packed = 2 * scales + 4 * fifth + 4 * words, 64 * (words + fifth)
    for block in range(blocks):
        for r in range(rows):
            at = source + r * row_bytes + block * stored
            quants = target + block * packed + 4 * r
            for s in range(scales):
                u16p(target + blocks * (packed + 32 * s))[block * PANEL_ROWS + r] = u16p(at)[s]
            for j in range(words):
                sti32(quants + 64 * j, 0, ldi32(at + 2 * scales + 4 * fifth, j) ^ flip)
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


def _pack_k(source: int, row_bytes: int, rows: int, columns: int, target: int) -> None:
    """q4_k and q5_k: d, dmin, twelve bytes of scales and minima, perhaps 32 bytes of fifth bits, then nibbles."""
    groups, blocks, packed, stored = columns // 256, columns // 32, 256 + 64 * fifth, 144 + 32 * fifth
    at_d, at_dmin = target + blocks * packed, target + blocks * packed + groups * 32
    for group in range(groups):
        for r in range(rows):
            at = source + r * row_bytes + group * stored
            u16p(at_d)[group * PANEL_ROWS + r] = u16p(at)[0]
            u16p(at_dmin)[group * PANEL_ROWS + r] = u16p(at)[1]
            for s in range(8):
                block = group * 8 + s
                _pack_k_scale(at + 4, s, at_dmin + groups * 32, block * PANEL_ROWS + r, blocks * PANEL_ROWS)
                # 32 bytes hold two blocks, one in the low nibbles and one in the high ones.
                body, shift, quants = at + 16 + 32 * fifth + s // 2 * 32, 4 * (s % 2), target + block * packed + 4 * r
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
    """The six-bit scale and minimum of sub-block ``s``, a byte each; the layout is that of ``ops/dequantization``."""
    if s < 4:
        scale, minimum = ldu8(at, s) & 63, ldu8(at, s + 4) & 63
    else:
        nibbles = ldu8(at, s + 4)
        scale = (nibbles & 15) | (ldu8(at, s - 4) >> 6 << 4)
        minimum = (nibbles >> 4) | (ldu8(at, s) >> 6 << 4)
    stu8(out, index, scale)
    stu8(out, index + minima, minimum)


def _pack_q6_k(source: int, row_bytes: int, rows: int, columns: int, target: int) -> None:
    """128 bytes of nibbles, 64 of bit pairs, 16 signed scales, d."""
    blocks = columns // 32
    at_d, at_scales = target + blocks * 384, target + blocks * 388
    for group in range(blocks // 8):
        for r in range(rows):
            at = source + r * row_bytes + group * 210
            u16p(at_d)[group * PANEL_ROWS + r] = u16p(at + 208)[0]
            for s in range(8):
                block, half, quarter = group * 8 + s, s // 4, s % 4
                for part in range(2):
                    stu8(at_scales, block * 32 + part * PANEL_ROWS + r, ldu8(at + 192, 2 * s + part))
                body, shift = at + 64 * half + 32 * (quarter % 2), quarter // 2 * 4
                pairs, quants = at + 128 + 32 * half, target + block * 384 + 4 * r
                low, high = 0, 0
                for j in range(4):
                    nibbles = (ldi32(body, j) >> shift) & _NIBBLES
                    sti32(quants + 64 * j, 0, nibbles | (((ldi32(body, j + 4) >> shift) & _NIBBLES) << 4))
                    low |= ((ldi32(pairs, j) >> (2 * quarter)) & _PAIR) << (2 * j)
                    high |= ((ldi32(pairs, j + 4) >> (2 * quarter)) & _PAIR) << (2 * j)
                sti32(quants + 256, 0, low)
                sti32(quants + 320, 0, high)


_PACKERS = {
    "f32": _pack_f32, "f16": _pack_f16, "bf16": _pack_bf16, "q4_k": _pack_k, "q5_k": _pack_k, "q6_k": _pack_q6_k,
}  # fmt: skip


# ---- single rows, for the embedding


def _emit_unpack_row(e: Emit, code: Value, w: Value, columns: Value, row: Value, out: Value) -> None:
    e.call_at(code, w, columns, row, out)


unpack_row = kernel(_emit_unpack_row)
"""``unpack_row(code, w, columns, row, out)``: a row of the weight packed at ``w`` as float32 [columns] at ``out``.

Exactly what ``dequantize`` gives; ``code`` is the address of ``unpack_kernel``. For compiled functions.
"""


UNPACK = types.void(*[types.int64] * 4)


def unpack_kernel(format: str) -> Any:
    """The kernel ``unpack/FORMAT``, whose address is a ``code`` of ``unpack_row``, with the signature ``UNPACK``."""
    layout = panel_format(format)
    sizes = {"block_columns": layout.columns, "block_bytes": layout.bytes, "quant_bytes": layout.quant_bytes}
    if layout.quantized:
        word, scale, zero_point = _QUANTS[format]
        names = {"word_of": word, "scale_of": njit(specialize(scale, f"scale_{format}", zero=zero_point))}
        return specialize(_unpack_quants, f"unpack_{format}", **sizes, **names)
    return specialize(_unpack_plain, f"unpack_{format}", **sizes, word_of=_PLAIN[format])


def _unpack_plain(w: int, columns: int, row: int, out: int) -> None:
    blocks = (columns + block_columns - 1) // block_columns
    panel = w + row // PANEL_ROWS * ((blocks * block_bytes + 63) // 64 * 64)
    for c in range(columns):
        index = (c // block_columns * PANEL_ROWS + row % PANEL_ROWS) * block_columns + c % block_columns
        f32p(out)[c] = word_of(panel, index)


def _unpack_quants(w: int, columns: int, row: int, out: int) -> None:
    blocks, lane = columns // 32, row % PANEL_ROWS
    panel = w + row // PANEL_ROWS * ((blocks * block_bytes + 63) // 64 * 64)
    for block in range(blocks):
        for j in range(8):
            scale, minimum = scale_of(panel + blocks * quant_bytes, blocks, block, lane, j // 4)
            word = word_of(panel + block * quant_bytes + 4 * lane, j)
            for i in range(4):
                f32p(out)[block * 32 + 4 * j + i] = np.float32((word >> (8 * i)) & 255) * scale + minimum


def _read_f16(e: Emit, p: Value, i: Value) -> Value:
    return e.b.extract_element(e.load_f16(e.add(p, e.mul(i, 2)), 1), I32(0))


def _read_bf16(e: Emit, p: Value, i: Value) -> Value:
    return e.b.extract_element(e.load_bf16(e.add(p, e.mul(i, 2)), 1), I32(0))


def _read_i8(e: Emit, p: Value, i: Value) -> Value:
    return e.b.sext(e.load(e.add(p, i), I8), I64)


_ldh, _ldbf = kernel(_read_f16, types.float32), kernel(_read_bf16, types.float32)
_ldi8 = kernel(_read_i8, types.int64)
_PLAIN = {"f32": ldf, "f16": _ldh, "bf16": _ldbf}


# The quants of columns ``4 * j`` to ``4 * j + 3`` of a block, unsigned, a byte each.


@njit
def _bytes(at: int, j: int) -> int:
    word: int = ldi32(at + 64 * j, 0)
    return word


@njit
def _nibbles(at: int, j: int) -> int:
    word: int = (ldi32(at + 64 * (j % 4), 0) >> (j // 4 * 4)) & _NIBBLES
    return word


@njit
def _nibbles_and_bit(at: int, j: int) -> int:
    word: int = _nibbles(at, j) | (((ldi32(at + 256, 0) >> j) & _BIT) << 4)
    return word


@njit
def _nibbles_and_pair(at: int, j: int) -> int:
    word: int = _nibbles(at, j) | (((ldi32(at + 256 + 64 * (j // 4), 0) >> (2 * (j % 4))) & _PAIR) << 4)
    return word


# Scale and minimum of half a block, weight = scale * quant + minimum; ``at`` is behind the panel's quants.


def _scale_and_zero(at: int, blocks: int, block: int, lane: int, half: int) -> tuple[float, float]:
    scale = _ldh(at, block * PANEL_ROWS + lane)
    return scale, scale * np.float32(-zero)


def _scale_and_minimum(at: int, blocks: int, block: int, lane: int, half: int) -> tuple[float, float]:
    index = block * PANEL_ROWS + lane
    return _ldh(at, index), _ldh(at + blocks * 32, index)


def _k_scale_and_minimum(at: int, blocks: int, block: int, lane: int, half: int) -> tuple[float, float]:
    index, group = block * PANEL_ROWS + lane, block // 8 * PANEL_ROWS + lane
    scale = _ldh(at, group) * np.float32(ldu8(at + blocks * 8, index))
    return scale, -_ldh(at + blocks * 4, group) * np.float32(ldu8(at + blocks * 24, index))


def _k_scale_of_16(at: int, blocks: int, block: int, lane: int, half: int) -> tuple[float, float]:
    index = block * 32 + half * PANEL_ROWS + lane
    scale = _ldh(at, block // 8 * PANEL_ROWS + lane) * np.float32(_ldi8(at + blocks * 4, index))
    return scale, scale * np.float32(-zero)


_QUANTS = {
    "q8_0": (_bytes, _scale_and_zero, 128),
    "q4_0": (_nibbles, _scale_and_zero, 8),
    "q4_1": (_nibbles, _scale_and_minimum, 0),
    "q5_0": (_nibbles_and_bit, _scale_and_zero, 16),
    "q5_1": (_nibbles_and_bit, _scale_and_minimum, 0),
    "q4_k": (_nibbles, _k_scale_and_minimum, 0),
    "q5_k": (_nibbles_and_bit, _k_scale_and_minimum, 0),
    "q6_k": (_nibbles_and_pair, _k_scale_of_16, 32),
}
