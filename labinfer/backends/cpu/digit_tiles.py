"""``linear`` for quantized weights and many tokens on the CPU's matrix unit (AMX), to the bit what ``tiles`` gives.

The sum of the products of a block's quants and a token's digits is a whole number below 2**24, which float32 holds
exactly in whatever order it is added up. So quants and digits are written as bf16 numbers, the upper digit times 128,
and the unit multiplies tiles of them, a block of 32 columns deep. What follows, block by block, are the scalings and
additions of ``tiles`` in the same order: how many tokens a step has changes no bit of any of them.

Where the sum may be greater (q8_0), each digit has a sum of its own; where half a block has a scale (q6_k), each half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import types

from labinfer.backends.cpu import isa
from labinfer.backends.cpu.elementwise import add_row, copy_row, zero_row
from labinfer.backends.cpu.isa import F32X16, I8X64, I16X32, I32X16, Value, const, njit, specialize, vector
from labinfer.backends.cpu.layout import PANEL_FORMATS, STRETCH_COLUMNS, SUMS_TOKENS, TILE, matrix_chunk
from labinfer.backends.cpu.matrix_unit import block_of_shape, configure, release_tiles
from labinfer.backends.cpu.simd import Emit, kernel
from labinfer.backends.cpu.tape import ACCUMULATE
from labinfer.backends.cpu.tiles import QUANTIZED, SCALES

STRETCH = STRETCH_COLUMNS // 32

DIGITS, HEADER = 2, 4 * 64
"""Digits of a number, and bytes behind those of a block of 16 tokens: their scales, their sums of all, of the first 16
and of the last 16 columns."""

DOTS = 64
SUMS = DOTS + 8 * TILE
WEIGHTS = SUMS + 128 * SUMS_TOKENS
SCRATCH = WEIGHTS + 2 * STRETCH * (TILE + 4 * 64)
"""Bytes on the stack: what the tiles are, then the products of a block, 32 tokens x 32 rows, twice; sums of a chunk of
tokens for as many pairs of panels as have room; two unpacked panels: for each block a tile, then its scales and
minima."""

Round = list[tuple[int, int]]
"""Tiles whose products are summed up before they are scaled: bytes to the activations', to the weight's."""

# What the body below finds among its globals; ``specialize`` gives each kernel its own.
multiply: Any = None
unpack_panel: Any = None
block_size, panel_block_bytes, record_bytes, depth = 1, 1, 1, 16


def rounds(format: str) -> list[Round]:
    """One round for both digits where the sum of their products stays below 2**24; halves of a block are apart."""
    halves = [(32 * half, 512 * half) for half in range(SCALES[format])]
    if len(halves) == 1 and PANEL_FORMATS[format].quant_bytes == 512:
        return [[(TILE * digit, 0)] for digit in range(DIGITS)]
    return [[(TILE * digit + x, w) for digit in range(DIGITS)] for x, w in halves]


# ---- two panels times 32 tokens


class _Block:
    """What ``_block`` emits; names are those of its arguments."""

    def __init__(self, e: Emit, tokens: int, panels: int, format: str, *places: Value) -> None:
        self.e, self.tokens, self.panels = e, tokens, panels
        self.a, self.a_size, self.w, self.w_size, count, self.dots, self.total = places
        self.scales, self.rounds = SCALES[format], rounds(format)
        first = e.b.select(e.b.icmp_signed("<", count, e.i(16)), count, e.i(16))
        self.counts = [first, e.add(count, -16)][:tokens]
        self.sums = [(i, j) for i in range(tokens) for j in range(panels)]

    def tile(self, i: int, k: Value) -> Value:
        """The address of block ``k`` of 16 tokens."""
        return self.e.add(self.a, self.e.mul(self.a_size, i), self.e.mul(k, DIGITS * TILE + HEADER))

    def weight(self, j: int, k: Value) -> Value:
        """The address of block ``k`` of a panel."""
        return self.e.add(self.w, self.e.mul(self.w_size, j), self.e.mul(k, TILE + 128 * self.scales))

    def multiply(self, n: int, k: Value) -> None:
        """Make the products of round ``n`` of block ``k``, in tiles."""
        e, line, half = self.e, self.e.i(64), -1
        for i, j in self.sums:
            isa.tile_zero(e.b, 2 * i + j)
        for x_at, w_at in self.rounds[n]:
            for i in range(self.tokens):
                isa.tile_load(e.b, 4 + i, e.add(self.tile(i, k), x_at), line)
            for j in range(self.panels if w_at != half else 0):
                isa.tile_load(e.b, 6 + j, e.add(self.weight(j, k), w_at), line)
            for i, j in self.sums:
                isa.tile_dpbf16(e.b, 2 * i + j, 4 + i, 6 + j)
            half = w_at

    def store(self, n: int) -> None:
        """Write the products of round ``n`` to memory, where vector instructions find them."""
        for i, j in self.sums:
            at = self.e.add(self.dots, 4 * TILE * n, 16 * 128 * i + 64 * j)
            isa.tile_store(self.e.b, 2 * i + j, at, self.e.i(128))

    def scale(self, k: Value) -> None:
        """Add the products of block ``k`` to the sums."""
        e = self.e
        factors = [
            [[e.load(e.add(self.weight(j, k), TILE + 128 * s + 64 * m)) for m in (0, 1)] for s in range(self.scales)]
            for j in range(self.panels)
        ]
        for i, count in enumerate(self.counts):
            header = e.add(self.tile(i, k), DIGITS * TILE)
            with e.loop(count) as t:
                token, row = e.add(header, e.mul(t, 4)), e.mul(e.add(t, 16 * i), 128)
                by = e.bcast(token)
                digit_sums = [e.bcast(e.add(token, 64 * n)) for n in ((1,) if self.scales == 1 else (2, 3))]
                for j in range(self.panels):
                    at = e.add(self.total, row, 64 * j)
                    found = [e.load(e.add(self.dots, row, 4 * TILE * n + 64 * j)) for n in range(len(self.rounds))]
                    if len(found) > self.scales:
                        found = [e.b.fadd(*found)]
                    e.store(_scaled(e, found, factors[j], digit_sums, by, e.load(at)), at)


def _block(tokens: int, panels: int, format: str) -> Any:
    """The intrinsic ``(a, a_size, w, w_size, steps, count, dots, total)``: adds ``steps`` blocks to ``total`` [32, 32].

    Up to 2 x 16 tokens, ``count`` in all, whose tiles begin at ``a``, ``a_size`` bytes from those of the first 16 to
    the others', with ``panels`` that are ``w_size`` apart. Products go through ``dots`` and are scaled while the next
    ones are made.
    """

    def emit(e: Emit, a: Value, a_size: Value, w: Value, w_size: Value, steps: Value, count: Value, dots: Value,
             total: Value) -> None:  # fmt: skip
        block = _Block(e, tokens, panels, format, a, a_size, w, w_size, count, dots, total)
        others, last = range(1, len(block.rounds)), e.add(steps, -1)
        for n in range(len(block.rounds)):
            block.multiply(n, e.i(0))
            block.store(n)
        with e.loop(last) as k:
            block.multiply(0, e.add(k, 1))
            block.scale(k)
            block.store(0)
            for n in others:
                block.multiply(n, e.add(k, 1))
                block.store(n)
        block.scale(last)

    return kernel(emit)


def _scaled(e: Emit, dots: list[Value], factors: list[list[Value]], digit_sums: list[Value], by: Value,
            total: Value) -> Value:  # fmt: skip
    """``total`` and a block's products, scaled, exactly as ``tiles`` does it."""
    product = const(0.0)
    for part, (dot, (scale, minimum), digit_sum) in enumerate(zip(dots, factors, digit_sums, strict=True)):
        product = e.fma(dot, scale, product) if part else e.b.fmul(dot, scale)
        total = e.fma(minimum, digit_sum, total)
    return e.fma(product, by, total)


# ---- unpacking a panel


def _unpack(format: str) -> Callable[..., None]:
    """For each block a tile of its quants as bf16, in rows of two columns for 16 rows, then its scales and minima."""
    (unpack, scales_of), layout = QUANTIZED[format], PANEL_FORMATS[format]
    pairs = _pairs_by_table if layout.quant_bytes < 512 else _pairs_by_conversion

    def emit(e: Emit, panel: Value, blocks: Value, first: Value, count: Value, out: Value) -> None:
        with e.loop(count) as turn:
            k = e.add(first, turn)
            source = e.add(panel, e.mul(k, layout.quant_bytes))
            quants = [unpack(e, source, j) for j in range(8)]
            scales = scales_of(e, e.add(panel, e.mul(blocks, layout.quant_bytes)), blocks, k)
            target = e.add(out, e.mul(turn, TILE + len(scales) * 128))
            for j, four in enumerate(quants):
                for n, pair in enumerate(pairs(e, four)):
                    e.store(pair, e.add(target, 64 * (2 * j + n)), 64)
            for s, vectors in enumerate(scales):
                for m, v in enumerate(vectors):
                    e.store(v, e.add(target, TILE + 128 * s + 64 * m), 64)

    return emit


def _pairs_by_conversion(e: Emit, four: Value) -> Iterable[Value]:
    """Columns 0 and 2 of four, then 1 and 3, as pairs of bf16: unsigned bytes fit into its 8 bits."""
    b = e.b
    columns = [
        b.bitcast(b.uitofp(b.and_(b.lshr(four, const(8 * i, I32X16)), const(255, I32X16)), F32X16), I32X16)
        for i in range(4)
    ]
    for low, high in ((columns[0], columns[2]), (columns[1], columns[3])):
        yield b.or_(b.lshr(low, const(16, I32X16)), high)


_BF16 = [0 if n == 0 else (127 + n.bit_length() - 1) << 7 | (n << (8 - n.bit_length())) & 127 for n in range(64)]
"""The bits of the numbers below 64 as bf16."""


def _pairs_by_table(e: Emit, four: Value) -> Iterable[Value]:
    """The same for numbers below 64: both bytes of each bf16 are looked up."""
    b = e.b
    tables = [ir.Constant(I8X64, [bits >> shift & 255 for bits in _BF16]) for shift in (0, 8)]
    even = ir.Constant(vector(ir.IntType(1), 64), [1, 0] * 32)
    words = b.bitcast(four, I16X32)
    raised = b.bitcast(b.shl(words, const(8, I16X32)), I8X64)
    lowered = b.bitcast(b.lshr(words, const(8, I16X32)), I8X64)
    bytes_ = b.bitcast(four, I8X64)
    for low, high in ((bytes_, raised), (lowered, bytes_)):
        halves = [isa.permute_bytes(b, table, index) for table, index in zip(tables, (low, high), strict=True)]
        yield b.bitcast(b.select(even, *halves), I32X16)


# ---- the whole product


def _emit_scratch(e: Emit) -> Value:
    return e.stack(SCRATCH)


_scratch, _chunk = kernel(_emit_scratch, types.int64), njit(matrix_chunk)


def _linear(w, columns, x, x_stride, y, y_stride, tokens, g0, g1, rows, bias, mode):  # type: ignore[no-untyped-def]
    """Panels ``g0`` .. ``g1`` - 1: a chunk of tokens, panels that have room for their sums, a stretch of columns at a
    time, by pairs of panels. So a stretch of activations, which the L2 cache holds, meets many panels in turn."""
    at, blocks = _scratch(), columns // 32
    panel = (blocks * panel_block_bytes + 63) // 64 * 64
    stretches, groups = (blocks + STRETCH - 1) // STRETCH, (tokens + 31) // 32
    chunk_tokens = min(_chunk(columns, x_stride), SUMS_TOKENS)
    chunks = (tokens + chunk_tokens - 1) // chunk_tokens
    cut_tokens, cut_rows = 0, 0
    for chunk in range(chunks):
        t0, t1 = groups * chunk // chunks * 32, min(groups * (chunk + 1) // chunks * 32, tokens)
        width = SUMS_TOKENS // (t1 - t0) * 2
        for start in range(g0, g1, width):
            stop = min(start + width, g1)
            zero_row(at + SUMS, 32 * ((stop - start + 1) // 2) * (t1 - t0))
            for stretch in range(stretches):
                k0, k1 = blocks * stretch // stretches, blocks * (stretch + 1) // stretches
                for g in range(start, stop, 2):
                    count = min(32, 16 * (g1 - g), rows - 16 * g)
                    for p in range(min(2, g1 - g)):
                        unpack_panel(w + (g + p) * panel, blocks, k0, k1 - k0, at + WEIGHTS + p * STRETCH * block_size)
                    for t in range(t0, t1, 32):
                        if min(t1 - t, 32) != cut_tokens or count != cut_rows:
                            cut_tokens, cut_rows = min(t1 - t, 32), count
                            configure(at, cut_tokens, cut_rows, depth)
                        multiply(
                            cut_tokens, cut_rows, x + t * x_stride + k0 * record_bytes * 16, 16 * x_stride,
                            at + WEIGHTS, STRETCH * block_size, k1 - k0, cut_tokens, at + DOTS,
                            at + SUMS + 64 * (g - start) * (t1 - t0) + 128 * (t - t0),
                        )  # fmt: skip
            for g in range(start, stop, 2):
                b = bias + 64 * g if bias else 0
                _write(
                    at + SUMS + 64 * (g - start) * (t1 - t0), y + 4 * t0 * y_stride + 64 * g, 4 * y_stride, t1 - t0,
                    min(32, 16 * (g1 - g), rows - 16 * g), b, mode,
                )  # fmt: skip
    release_tiles()


@njit
def _write(total: int, y: int, y_stride: int, tokens: int, rows: int, bias: int, mode: int) -> None:
    """The sums of ``tokens`` tokens and a pair of panels to their places in ``y``, ``y_stride`` bytes apart."""
    for t in range(tokens):
        found, out = total + 128 * t, y + t * y_stride
        if bias:
            add_row(found, bias, found, rows)
        if mode & ACCUMULATE:
            add_row(found, out, out, rows)
        else:
            copy_row(found, out, rows)


def digit_tiles_kernel(format: str) -> Any:
    """The kernel ``digits/FORMAT``, to be compiled with the signature ``linear.LINEAR``; called as ``linear``.

    Activation rows are in tiles of digits, ``x_stride`` the bytes of one token.
    """
    return specialize(
        _linear,
        f"digits_{format}",
        multiply=block_of_shape(f"multiply_digits_{format}", lambda m, n: _block(m, n, format)),
        unpack_panel=kernel(_unpack(format)),
        block_size=TILE + SCALES[format] * 128,
        panel_block_bytes=PANEL_FORMATS[format].bytes,
        record_bytes=(DIGITS * TILE + HEADER) // 16,
        depth=16 // SCALES[format],
    )
