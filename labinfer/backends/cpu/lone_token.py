"""One token's product with bf16 weights, in vector instructions and with the bits of the matrix unit.

A lone token is bound by memory, which vector instructions read faster; so that its company changes no bit of it, they
add as the unit does. That multiplies a tile's even and odd columns into a sum each, from zero, and adds the sum of both
to what stands in its result (TDPBF16PS in Intel's Software Developer's Manual), for one part of the activations after
another, a stretch of columns at a time.
"""

from __future__ import annotations

from typing import Any

from numba import types

from labinfer.backends.cpu import isa
from labinfer.backends.cpu.elementwise import add_row
from labinfer.backends.cpu.isa import I32X16, Value, const, njit, specialize
from labinfer.backends.cpu.layout import STRETCH_COLUMNS, TILE, TILE_COLUMNS
from labinfer.backends.cpu.simd import Emit, Var, kernel
from labinfer.backends.cpu.tiles import PREFETCH

# What the body below finds among its globals; ``specialize`` gives each kernel its own.
widen: Any = None
multiply: Any = None
scratch: Any = None
parts = 3


def _widen(parts: int) -> Any:
    """The intrinsic ``(x, tiles, out)``: a token's line of each tile of bf16 parts as float32."""

    def emit(e: Emit, x: Value, tiles: Value, out: Value) -> None:
        with e.loop(e.mul(tiles, parts)) as k:
            for half in (0, 1):
                e.store(e.load_bf16(e.add(x, e.mul(k, TILE), 32 * half)), e.add(out, e.mul(k, 128), 64 * half), 64)

    return kernel(emit)


def _multiply(parts: int) -> Any:
    """The intrinsic ``(x, w, panel, tiles, y, rows, add)``: ``tiles`` of a panel times the widened token ``x``.

    Writes ``rows`` floats at ``y``, or adds to them. The same tiles of the next panel are ``panel`` bytes after ``w``.
    """

    def tile(e: Emit, x: Value, at: Value, ahead: Value, total: Var) -> None:
        sums: list[list[Value]] = [[None, None] for _ in range(parts)]
        for pair in range(TILE_COLUMNS // 2):
            e.prefetch(e.add(ahead, 64 * pair))
            both = e.load(e.add(at, 64 * pair), I32X16, 64)
            for odd, column in enumerate((isa.bf16_low(e.b, both), isa.bf16_high(e.b, both))):
                for part, found in enumerate(sums):
                    number = e.bcast(e.add(x, 128 * part + 8 * pair + 4 * odd))
                    found[odd] = e.fma(column, number, found[odd]) if pair else e.b.fmul(column, number)
        for even, odd_sum in sums:
            total.set(e.b.fadd(total.get(), e.b.fadd(even, odd_sum)))

    def emit(e: Emit, x: Value, w: Value, panel: Value, tiles: Value, y: Value, rows: Value, add: Value) -> None:
        b, total, mask = e.b, e.var(const(0.0)), e.first_lanes(rows)
        with e.loop(tiles) as k:
            ahead = e.add(e.mul(k, TILE), PREFETCH)
            past = b.icmp_signed(">=", ahead, e.mul(tiles, TILE))
            skipped = b.select(past, e.add(panel, e.mul(tiles, -TILE)), e.i(0))
            tile(e, e.add(x, e.mul(k, 128 * parts)), e.add(w, e.mul(k, TILE)), e.add(w, ahead, skipped), total)
        with e.when(b.icmp_signed("!=", add, e.i(0))):
            total.set(b.fadd(total.get(), e.load_masked(y, mask)))
        e.store_masked(total.get(), y, mask)

    return kernel(emit)


def _lone(w, columns, x, y, g0, g1, rows, bias, mode):  # type: ignore[no-untyped-def]
    """Panels ``g0`` .. ``g1`` - 1 times the token whose first line is at ``x``."""
    numbers, tiles = scratch(), columns // TILE_COLUMNS
    stretches = (columns + STRETCH_COLUMNS - 1) // STRETCH_COLUMNS
    for stretch in range(stretches):
        k0, k1 = tiles * stretch // stretches, tiles * (stretch + 1) // stretches
        widen(x + k0 * parts * TILE, k1 - k0, numbers)
        for g in range(g0, g1):
            at = w + (g * tiles + k0) * TILE
            multiply(numbers, at, tiles * TILE, k1 - k0, y + 64 * g, min(16, rows - 16 * g), k0 + mode)
    if bias:
        out = y + 64 * g0
        add_row(bias + 64 * g0, out, out, min(16 * g1, rows) - 16 * g0)


def lone_product(parts: int) -> Any:
    """``(w, columns, x, y, g0, g1, rows, bias, mode)``, for compiled functions; as ``linear`` for a single token.

    The token is the first of tiles of so many bf16 ``parts``.
    """

    def room(e: Emit) -> Value:
        return e.stack(4 * parts * STRETCH_COLUMNS)

    return njit(
        specialize(
            _lone,
            f"lone_{parts}",
            widen=_widen(parts),
            multiply=_multiply(parts),
            scratch=kernel(room, types.int64),
            parts=parts,
        )
    )
