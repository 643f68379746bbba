"""How this backend lays out weights and quantized activations: sizes only, so that compiling a plan imports no numba.

A weight is cut into panels of 16 rows; the last one is padded with zero rows. Panel ``g`` starts at
``g * panel_bytes(format, columns)``. Inside a panel the numbers of the 16 rows stand side by side, in blocks:

- f32 and f16: a block is one column, 16 numbers. bf16: a block is two columns, 16 pairs.
- The quantized formats have blocks of 32 columns. First the quants of all blocks, then the scales of all blocks
  (float16, 16 to a block), then what else the format has, each for all blocks. In eight 64-byte vectors of quants, byte
  ``4 * row + i`` of vector ``j`` belongs to column ``4 * j + i``: one byte dot product with four activations in every
  lane then feeds 16 rows. Nibbles: vector ``j`` in the low ones of stored vector ``j``, vector ``4 + j`` in the high
  ones. Fifth bits: one more vector whose bit ``j`` belongs to vector ``j``. q6_k's bit pairs: two vectors, four each.
- K-quants keep one byte for each scale and minimum of a sub-block, and float16 d (and dmin) for each 256 columns.

An activation row is float32 for the plain formats, padded to an even length. For the quantized ones it is a record for
each 32 columns: its scale, the sums that a zero point or a minimum needs, and one or two signed digits of each number;
without VNNI two are one int16, and of each four columns 0, 2, 1, 3 is the order.
For the matrix unit, activations lie in tiles: for 16 tokens and 32 columns, 16 lines of bf16 with the first digits or
parts of their numbers, then 16 with the second ones, and so on; behind digits, a line each of the 16 tokens' scales and
sums, as in a record; then the tokens' next 32 columns. A line of digits has columns 0, 2, 1, 3 of each four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from labinfer.errors import WeightsError
from labinfer.ops.base import KernelOptions

PANEL_ROWS = 16

TILE_ROWS, TILE_COLUMNS = 16, 32
"""Tokens and columns of a tile of the matrix unit; a product on it has whole tiles of columns."""

TILE = 1024
"""Bytes of a tile: 16 rows of 64."""

VECTOR_CHUNK, MAX_GLU_CHUNK = 64, 512
"""Tokens that meet a panel while it is in the L1 cache; tokens that a gated unit has room for."""

STRETCH_COLUMNS = 2048
"""Columns that the matrix unit multiplies at once: two unpacked panels then take 128 kB of the L2 cache."""

CHUNK_BYTES, CHUNK_TOKENS, SUMS_TOKENS = 1 << 20, 128, 1024
"""Activations that are multiplied at once: as many as take 1 MB, but of enough tokens to be worth the unpacking; and of
digits of no more tokens than there is room for sums."""


@dataclass(frozen=True, slots=True)
class PanelFormat:
    """``columns`` of 16 rows take ``quant_bytes`` of quants (or plain numbers), ``bytes`` with their scales."""

    columns: int
    quant_bytes: int
    bytes: int

    @property
    def quantized(self) -> bool:
        """Whether activations meet this format as digits."""
        return self.columns == 32


PANEL_FORMATS = {
    "f32": PanelFormat(1, 64, 64),
    "f16": PanelFormat(1, 32, 32),
    "bf16": PanelFormat(2, 64, 64),
    "q8_0": PanelFormat(32, 512, 512 + 32),
    "q4_0": PanelFormat(32, 256, 256 + 32),
    "q4_1": PanelFormat(32, 256, 256 + 2 * 32),
    "q5_0": PanelFormat(32, 320, 320 + 32),
    "q5_1": PanelFormat(32, 320, 320 + 2 * 32),
    "q4_k": PanelFormat(32, 256, 256 + 2 * 4 + 2 * 16),  # d and dmin for 8 blocks; a byte of scale and of minimum
    "q5_k": PanelFormat(32, 320, 320 + 2 * 4 + 2 * 16),
    "q6_k": PanelFormat(32, 384, 384 + 4 + 2 * 16),  # a scale for each 16 columns
}
"""Every format this backend multiplies with, by name."""

DIGIT_TILES = -2
"""The form of activations whose two digits lie in tiles."""

HEADER_BYTES = 16
"""An activation record's scale, and scale times the sum of all its digits, of its first 16 and of its last 16."""


def panel_format(format: str) -> PanelFormat:
    """The layout of ``format``; raises WeightsError for one that this backend has no kernel for."""
    if format not in PANEL_FORMATS:
        message = f"the CPU backend has no kernel for weights in format '{format}'"
        raise WeightsError("weights.unsupported-format", message, remedy="it has: " + ", ".join(PANEL_FORMATS))
    return PANEL_FORMATS[format]


def panel_bytes(format: str, columns: int) -> int:
    """Bytes of one panel, a multiple of 64: 16 rows of ``columns``."""
    layout = panel_format(format)
    return -(-columns // layout.columns * layout.bytes // 64) * 64


def packed_bytes(format: str, rows: int, columns: int) -> int:
    """Bytes of a packed weight [rows, columns].

    What is stored with rows padded to 16, but for panels padded to 64 bytes (at most 32 more, where blocks or columns
    are odd) and for the unpacked scales of q4_k (+2.8 %) and q5_k (+2.3 %).
    """
    return -(-rows // PANEL_ROWS) * panel_bytes(format, columns)


def weight_bytes(format: str, shape: Sequence[int]) -> int:
    """Bytes that a stored tensor of ``shape`` takes here: each matrix of it its panels, a vector float32 in lines."""
    if len(shape) < 2:
        return -(-4 * prod(shape) // 64) * 64
    return prod(shape[:-2]) * packed_bytes(format, shape[-2], shape[-1])


def scattered_form(format: str, options: KernelOptions) -> int:
    """``activation_form`` of rows that do not lie together, of which nobody knows yet how many meet a weight."""
    return (1 if options.activations == "int8" else 2) if panel_format(format).quantized else 0


def activation_form(format: str, columns: int, tokens: int, options: KernelOptions) -> int:
    """How ``tokens`` rows of activations lie when they meet a weight in ``format``.

    0: as float32. 1 or 2: as so many signed digits with a scale for each 32 columns. For the matrix unit, in tiles: -1
    or -3: as so many bf16 parts; -2 (``DIGIT_TILES``): as two digits.
    """
    fewest, lossy = options.matrix_unit.get(format), options.activations == "int8"
    if fewest is None or tokens < fewest or columns % TILE_COLUMNS or (format == "f16" and not lossy):
        return scattered_form(format, options)
    return -1 if lossy else DIGIT_TILES if panel_format(format).quantized else -3


def product_kernel(format: str, form: int) -> str:
    """The name of the kernel for a weight in ``format`` and activations in a form."""
    if form >= 0:
        return f"linear/{format}/{form}"
    return f"digits/{format}" if form == DIGIT_TILES else f"matrix/{format}/{-form}"


def activation_bytes(form: int, columns: int) -> int:
    """Bytes of one token's activation row in a form."""
    if form == DIGIT_TILES:
        return columns // 32 * (HEADER_BYTES + 2 * 64)
    if form < 0:
        return columns * 2 * -form
    if form == 0:
        return (columns + columns % 2) * 4
    return columns // 32 * (HEADER_BYTES + 32 * form)


def activations_bytes(form: int, tokens: int, columns: int) -> int:
    """Bytes of the activation rows of so many tokens: tiles hold 16 tokens."""
    return (tokens if form >= 0 else -(-tokens // TILE_ROWS) * TILE_ROWS) * activation_bytes(form, columns)


def matrix_chunk(columns: int, token_bytes: int) -> int:
    """Tokens that two panels meet, one pair after another, on the matrix unit: what a part of the L2 cache holds.

    ``token_bytes`` are those of one token's activation row.
    """
    stretches = (columns + STRETCH_COLUMNS - 1) // STRETCH_COLUMNS
    return max(CHUNK_BYTES * stretches // token_bytes // 32 * 32, CHUNK_TOKENS)


def glu_chunk(form: int, columns: int) -> int:
    """Tokens that go through gate and up together."""
    return min(matrix_chunk(columns, activation_bytes(form, columns)), MAX_GLU_CHUNK) if form < 0 else VECTOR_CHUNK
