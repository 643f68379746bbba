"""``linear`` for many tokens on the CPU's matrix unit (AMX): products of 16 x 32 and 32 x 16 bf16 numbers at once.

An activation is the sum of bf16 parts, of 8 bits each, and the products of the parts are summed in float32.
Activations come in tiles of 16 tokens x 32 columns (``quantize``), with three parts, and bf16 weights lie in memory as
the unit wants them; the error against float64 is that of a float32 sum. The lossy option has one part. Other weights
come here only with that: they are rounded to bf16, a pair of panels by a stretch of columns at a time, into a buffer
that stays in the cache while it meets the tokens. ``digit_tiles`` is for all bits of quantized ones; float16 ones keep
to vectors, whose bits would cost 2.7 times the time of a lone token here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from labinfer.backends.cpu import isa
from labinfer.backends.cpu.elementwise import add_row
from labinfer.backends.cpu.isa import F32X16, I16X32, I32, I32X16, Value, const, njit, specialize, vector
from labinfer.backends.cpu.layout import PANEL_FORMATS, STRETCH_COLUMNS, TILE, TILE_COLUMNS, matrix_chunk, panel_format
from labinfer.backends.cpu.lone_token import lone_product
from labinfer.backends.cpu.simd import Emit, i64p, kernel, stu8
from labinfer.backends.cpu.tiles import QUANTIZED

STRETCH = STRETCH_COLUMNS // TILE_COLUMNS

IDLE = 64
SUMS = IDLE + TILE
WEIGHTS = SUMS + 4 * TILE
SCRATCH = WEIGHTS + 2 * STRETCH * TILE
"""Bytes on the stack: what the tiles are, then a tile that is written for nothing, sums that are to be added to ``y``,
and two unpacked panels."""

# What the body below finds among its globals; ``specialize`` gives each kernel its own.
multiply: Any = None
unpack_panel: Any = None
block: Any = None
block_11: Any = None
block_12: Any = None
block_21: Any = None
block_22: Any = None
lone: Any = None
many: Any = None
unpacked, panel_tile_bytes, parts = False, 1, 2


# ---- two panels times 32 tokens


def _block(tokens: int, panels: int, parts: int) -> Any:
    """The intrinsic ``(a, a_size, w, w_size, steps, c, c_stride, idle)``.

    ``c = a @ w`` for up to 2 x 16 ``tokens`` whose tiles are ``a_size`` bytes apart and ``panels`` that are
    ``w_size`` apart, ``steps`` tiles deep. Rows of ``c`` are ``c_stride`` bytes apart. ``idle`` is memory for a tile.
    """

    def emit(e: Emit, a: Value, a_size: Value, w: Value, w_size: Value, steps: Value, c: Value, c_stride: Value,
             idle: Value) -> None:  # fmt: skip
        b, line = e.b, e.i(64)
        sums = [(i, j, e.add(c, e.mul(c_stride, 16 * i), 64 * j)) for i in range(tokens) for j in range(panels)]
        for i, j, _ in sums:
            isa.tile_zero(b, 2 * i + j)
        with e.loop(steps) as k:
            for part in range(parts):
                for i in range(tokens):
                    isa.tile_load(b, 4 + i, e.add(a, e.mul(a_size, i), e.mul(k, parts * TILE), part * TILE), line)
                for j in range(panels if part == 0 else 0):
                    isa.tile_load(b, 6 + j, e.add(w, e.mul(w_size, j), e.mul(k, TILE)), line)
                for i, j, _ in sums:
                    isa.tile_dpbf16(b, 2 * i + j, 4 + i, 6 + j)
            # The way from the tiles to memory falls asleep after half a microsecond and takes a third to wake up.
            with e.when(b.icmp_signed("==", b.and_(k, e.i(7)), e.i(7))):
                isa.tile_store(b, 4, idle, line)
        for i, j, at in sums:
            isa.tile_store(b, 2 * i + j, at, c_stride)

    return kernel(emit)


def _configure(e: Emit, at: Value) -> None:
    isa.tile_config(e.b, at)


def _release(e: Emit) -> None:
    isa.tile_release(e.b)


_load_config, release_tiles = kernel(_configure), kernel(_release)


@njit
def configure(at: int, tokens: int, rows: int, depth: int) -> None:
    """Cut the tiles to ``tokens`` and ``rows``, each up to 32, and ``depth`` pairs of columns, up to 16.

    ``at`` are 64 bytes for their description. Tile ``2 * i + j`` sums up token tile ``i`` (number ``4 + i``) times
    panel ``j`` (number ``6 + j``).
    """
    for i in range(8):
        i64p(at)[i] = 0
    stu8(at, 0, 1)
    for i in range(2):
        height, width = min(max(tokens - 16 * i, 0), 16), min(max(rows - 16 * i, 0), 16)
        if height:
            _set_tile(at, 4 + i, height, depth)
        if width:
            _set_tile(at, 6 + i, depth, width)
        for j in range(2):
            other = min(max(rows - 16 * j, 0), 16)
            if height and other:
                _set_tile(at, 2 * i + j, height, other)
    _load_config(at)


@njit
def _set_tile(at: int, tile: int, rows: int, columns: int) -> None:
    stu8(at, 48 + tile, rows)
    stu8(at, 16 + 2 * tile, 4 * columns)


# ---- unpacking a panel into tiles


def _upper_halves(b: Value, first: Value, second: Value) -> Value:
    """The upper 16 bits of the lanes of two vectors, alternating."""
    halves = [b.bitcast(v, I16X32) for v in (first, second)]
    lanes = [32 * which + 2 * lane + 1 for lane in range(16) for which in (0, 1)]
    return b.shuffle_vector(*halves, ir.Constant(vector(I32, 32), lanes))


def _store_pair(e: Emit, first: Value, second: Value, at: Value) -> None:
    """Two columns of 16 rows, float32, as pairs of bf16, rounded."""
    b = e.b
    columns = [b.add(b.bitcast(v, I32X16), const(0x8000, I32X16)) for v in (first, second)]
    e.store(_upper_halves(b, *columns), at, 64)


def _unpack_quants(format: str) -> Callable[..., None]:
    """Quantized weights."""
    (unpack, scales_of), layout = QUANTIZED[format], PANEL_FORMATS[format]

    def emit(e: Emit, panel: Value, blocks: Value, first: Value, count: Value, out: Value) -> None:
        b = e.b
        with e.loop(count) as turn:
            k = e.add(first, turn)
            source = e.add(panel, e.mul(k, layout.quant_bytes))
            quants = [unpack(e, source, j) for j in range(8)]
            scales = scales_of(e, e.add(panel, e.mul(blocks, layout.quant_bytes)), blocks, k)
            for j, four in enumerate(quants):
                scale, minimum = scales[j * len(scales) // 8]
                numbers = [b.and_(b.lshr(four, const(8 * i, I32X16)), const(255, I32X16)) for i in range(4)]
                columns = [e.fma(b.uitofp(v, F32X16), scale, minimum) for v in numbers]
                for pair in (0, 1):
                    at = e.add(out, e.mul(turn, TILE), 64 * (2 * j + pair))
                    _store_pair(e, columns[2 * pair], columns[2 * pair + 1], at)

    return emit


def _unpack_halves(e: Emit, panel: Value, blocks: Value, first: Value, count: Value, out: Value) -> None:
    """float16 weights."""
    with e.loop(count) as turn:
        at = e.add(panel, e.mul(e.add(first, turn), TILE))
        for pair in range(16):
            first_column, second = (e.load_f16(e.add(at, 64 * pair + 32 * i)) for i in (0, 1))
            _store_pair(e, first_column, second, e.add(out, e.mul(turn, TILE), 64 * pair))


# ---- the whole product


def _emit_scratch(e: Emit) -> Value:
    return e.stack(SCRATCH)


_scratch, _chunk = kernel(_emit_scratch, types.int64), njit(matrix_chunk)


def _linear(w, columns, x, x_stride, y, y_stride, tokens, g0, g1, rows, bias, mode):  # type: ignore[no-untyped-def]
    """Panels ``g0`` .. ``g1`` - 1: a chunk of tokens and a stretch of columns at a time, by pairs of panels."""
    at, tiles, row = _scratch(), columns // TILE_COLUMNS, 4 * y_stride
    panel = (tiles * panel_tile_bytes + 63) // 64 * 64
    stretches = (tiles + STRETCH - 1) // STRETCH
    chunk_tokens, blocks = _chunk(columns, x_stride), (tokens + 31) // 32
    chunks = (tokens + chunk_tokens - 1) // chunk_tokens
    cut_tokens, cut_rows = 0, 0
    for chunk in range(chunks):
        t0, t1 = blocks * chunk // chunks * 32, min(blocks * (chunk + 1) // chunks * 32, tokens)
        for stretch in range(stretches):
            k0, k1 = tiles * stretch // stretches, tiles * (stretch + 1) // stretches
            for g in range(g0, g1, 2):
                count = min(32, 16 * (g1 - g), rows - 16 * g)
                b, b_size = w + g * panel + k0 * TILE, panel
                if unpacked:
                    b, b_size = at + WEIGHTS, STRETCH * TILE
                    for p in range(min(2, g1 - g)):
                        unpack_panel(w + (g + p) * panel, tiles, k0, k1 - k0, b + p * b_size)
                for t in range(t0, t1, 32):
                    if min(t1 - t, 32) != cut_tokens or count != cut_rows:
                        cut_tokens, cut_rows = min(t1 - t, 32), count
                        configure(at, cut_tokens, cut_rows, TILE_COLUMNS // 2)
                    multiply(
                        x + t * x_stride + k0 * parts * TILE, 16 * x_stride, b, b_size, k1 - k0,
                        y + t * row + 64 * g, row, k0 > 0 or mode != 0, cut_tokens, cut_rows, at,
                    )  # fmt: skip
    release_tiles()
    if bias:
        for t in range(tokens):
            out = y + t * row + 64 * g0
            add_row(bias + 64 * g0, out, out, min(16 * g1, rows) - 16 * g0)


def _bf16(w, columns, x, x_stride, y, y_stride, tokens, g0, g1, rows, bias, mode):  # type: ignore[no-untyped-def]
    """``_linear``; a lone token, for which the matrix unit is no help, gets the same bits without it."""
    if tokens == 1:
        lone(w, columns, x, y, g0, g1, rows, bias, mode)
    else:
        many(w, columns, x, x_stride, y, y_stride, tokens, g0, g1, rows, bias, mode)


def _of_shape(tokens, rows, *arguments):  # type: ignore[no-untyped-def]
    """The block for so many tokens and rows, up to 32 of each."""
    if tokens > 16 and rows > 16:
        block_22(*arguments)
    elif tokens > 16:
        block_21(*arguments)
    elif rows > 16:
        block_12(*arguments)
    else:
        block_11(*arguments)


def block_of_shape(name: str, make: Callable[[int, int], Any]) -> Any:
    """Code that calls, by its first two arguments, tokens and rows, that of the ``make(1 or 2, 1 or 2)`` they need."""
    shapes = {f"block_{m}{n}": make(m, n) for m in (1, 2) for n in (1, 2)}
    return njit(specialize(_of_shape, name, **shapes))


def _multiply(a, a_size, w, w_size, steps, y, y_stride, add, tokens, rows, at):  # type: ignore[no-untyped-def]
    """A pair of panels for up to 32 tokens. What is added is summed apart, as ``y`` may be much larger."""
    c, c_stride = (at + SUMS, 128) if add else (y, y_stride)
    block(tokens, rows, a, a_size, w, w_size, steps, c, c_stride, at + IDLE)
    if add:
        for t in range(tokens):
            add_row(c + 128 * t, y + t * y_stride, y + t * y_stride, rows)


def matrix_kernel(format: str, parts: int) -> Any:
    """The kernel ``matrix/FORMAT/PARTS``, to be compiled with the signature ``linear.LINEAR`` and called as ``linear``.

    Activation rows are in tiles, ``x_stride`` the bytes of one token.
    """
    layout = panel_format(format)
    unpack = _unpack_quants(format) if layout.quantized else _unpack_halves
    block = block_of_shape(f"block_{format}_{parts}", lambda m, n: _block(m, n, parts))
    many = specialize(
        _linear,
        f"many_{format}_{parts}",
        multiply=njit(specialize(_multiply, f"multiply_{format}_{parts}", block=block)),
        unpack_panel=kernel(unpack),
        unpacked=format != "bf16",
        panel_tile_bytes=layout.bytes * (TILE_COLUMNS // layout.columns),
        parts=parts,
    )
    if format != "bf16":
        return many
    return specialize(_bf16, f"matrix_bf16_{parts}", lone=lone_product(parts), many=njit(many))
