"""The three steps of attention on one tile of 64 positions, as vector code: scores, softmax weights, sums of values.

Queries come in groups of 6, 3 or 1 rows whose results stay in registers. Where a tile's keys and values lie is a table
of addresses, so that cache blocks need not be neighbours: one address per 16 positions of a key panel, one per position
of the values. A second table says where the next tile's lie (``ahead``): they are asked for meanwhile, since the CPU
cannot guess the way from block to block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from labinfer.backends.cpu.elementwise import pieces, zero_row
from labinfer.backends.cpu.features import LEVEL
from labinfer.backends.cpu.isa import F32, I32, I32X16, I64, Value, njit
from labinfer.backends.cpu.paged_cache import CACHE_DTYPES, widen
from labinfer.backends.cpu.simd import Emit, f32p, i64p, kernel
from labinfer.backends.cpu.workspace import TILE

WIDE = 4 if LEVEL == "avx512vnni" else 1
"""Vectors side by side in registers: 6 rows x 4 with 32 registers of 512 bits, 6 x 1 with 16 of 256."""

WIDE_COLUMNS = 16 * WIDE

NEVER = -1e30
"""The score of what is not seen, and the greatest score before any is known."""

LEAST_LOG = -64.0
"""The least logarithm of a weight: one of e**-64 is nothing beside the greatest, 1, but its products are no subnormal
numbers yet, with which a CPU computes many times as slowly."""


def _scores(rows: int, vectors: int, dtypes: tuple[str, ...]) -> Any:
    """``s[rows, 16 * vectors] = q[rows, head_dim] . keys``; ``panels`` and ``ahead`` have ``vectors`` addresses."""

    def scores(
        e: Emit,
        dtype: Value,
        q: Value,
        q_bytes: Value,
        panels: Value,
        ahead: Value,
        panel_bytes: Value,
        n: Value,
        s: Value,
        s_bytes: Value,
    ) -> None:
        starts = [e.load(e.add(panels, 8 * v), I64) for v in range(vectors)]
        next_starts = [e.load(e.add(ahead, 8 * v), I64) for v in range(vectors)]
        for name in dtypes:
            with e.when(e.b.icmp_signed("==", dtype, e.i(CACHE_DTYPES[name]))):
                totals = [[e.var(e.const(0.0)) for _ in range(vectors)] for _ in range(rows)]
                with e.loop(n) as i:
                    at = e.mul(i, panel_bytes)
                    for start in next_starts:
                        e.prefetch(e.add(start, at))
                    keys = [widen(e, name, e.add(start, at)) for start in starts]
                    for row in range(rows):
                        x = e.bcast(e.add(q, e.mul(q_bytes, row), e.mul(i, 4)))
                        for total, key in zip(totals[row], keys, strict=True):
                            total.set(e.fma(x, key, total.get()))
                for row in range(rows):
                    for v in range(vectors):
                        e.store(totals[row][v].get(), e.add(s, e.mul(s_bytes, row), 64 * v))

    return kernel(scores)


def _values(rows: int, vectors: int, masked: bool) -> Any:
    """``out[rows, 16 * vectors] = out * factors + p[rows, keys] . values``, the last columns masked if ``masked``.

    ``table`` and ``ahead`` hold an address per key, ``offset`` is what to add to each in bytes.
    """

    def values(
        e: Emit,
        dtype: Value,
        p: Value,
        table: Value,
        ahead: Value,
        offset: Value,
        columns: Value,
        keys: Value,
        factors: Value,
        out: Value,
        out_bytes: Value,
    ) -> None:
        mask = e.first_lanes(columns) if masked else None
        for name, code in CACHE_DTYPES.items():
            step = 64 if name == "f32" else 32
            with e.when(e.b.icmp_signed("==", dtype, e.i(code))):
                totals = []
                for row in range(rows):
                    factor = e.bcast(e.add(factors, 4 * row))
                    at = e.add(out, e.mul(out_bytes, row))
                    totals.append([e.var(e.b.fmul(factor, e.load(e.add(at, 64 * v)))) for v in range(vectors)])
                with e.loop(keys) as k:
                    for line in range(0, step * vectors, 64):
                        e.prefetch(e.add(e.load(e.add(ahead, e.mul(k, 8)), I64), offset, line))
                    at = e.add(e.load(e.add(table, e.mul(k, 8)), I64), offset)
                    seen = [widen(e, name, e.add(at, step * v), mask) for v in range(vectors)]
                    for row in range(rows):
                        x = e.bcast(e.add(p, 4 * TILE * row, e.mul(k, 4)))
                        for total, value in zip(totals[row], seen, strict=True):
                            total.set(e.fma(x, value, total.get()))
                for row in range(rows):
                    for v in range(vectors):
                        e.store(totals[row][v].get(), e.add(out, e.mul(out_bytes, row), 64 * v))

    return kernel(values)


def _seen(e: Emit, first: Value, last: Value) -> list[Value]:
    """The masks of a tile's positions in [first, last)."""
    starts = range(0, TILE, 16)
    return [e.b.and_(e.first_lanes(e.add(last, -at)), e.b.not_(e.first_lanes(e.add(first, -at)))) for at in starts]


def _raise_maximum(masked: bool) -> Any:
    """One row of scores, seen in [first, last): raises the row's running maximum, stores the old one less the new."""

    def raise_maximum(e: Emit, s: Value, first: Value, last: Value, maximum: Value, change: Value) -> None:
        b, scores = e.b, [e.load(e.add(s, at)) for at in range(0, 4 * TILE, 64)]
        if masked:
            seen = _seen(e, first, last)
            scores = [b.select(lanes, v, e.const(NEVER)) for lanes, v in zip(seen, scores, strict=True)]
        greatest = scores[0]
        for v in scores[1:]:
            greatest = e.max(v, greatest)
        for distance in (8, 4, 2, 1):
            lanes = ir.Constant(I32X16, [lane ^ distance for lane in range(16)])
            greatest = e.max(b.shuffle_vector(greatest, greatest, lanes), greatest)
        before = e.load(maximum, F32)
        top = b.extract_element(e.max(e.splat(before), greatest), b.trunc(e.i(0), I32))
        e.store(top, maximum)
        e.store(b.fsub(before, top), change)

    return kernel(raise_maximum)


def _weigh(masked: bool) -> Any:
    """One row of scores into weights, zero outside [first, last); adds them, lane by lane, to the row's 16 sums."""

    def weigh(e: Emit, s: Value, first: Value, last: Value, maximum: Value, sums: Value, factor: Value) -> None:
        b, top = e.b, e.bcast(maximum)
        total = b.fmul(e.load(sums), e.bcast(factor))
        seen = _seen(e, first, last) if masked else []
        for index, at in enumerate(range(0, 4 * TILE, 64)):
            weights = e.exp(b.fsub(e.load(e.add(s, at)), top), LEAST_LOG)
            if masked:
                weights = b.select(seen[index], weights, e.const(0.0))
            e.store(weights, e.add(s, at))
            total = b.fadd(total, weights)
        e.store(total, sums)

    return kernel(weigh)


def _exp_row(e: Emit, x: Value, n: Value) -> None:
    for piece in pieces(e, n):
        piece.store(e.exp(piece.load(x), LEAST_LOG), x)


_scores6, _scores3, _scores1 = (_scores(rows, WIDE, tuple(CACHE_DTYPES)) for rows in (6, 3, 1))
_transposed6, _transposed1 = (_scores(rows, 1, ("f32",)) for rows in (6, 1))
_wide6, _wide3, _wide1 = (_values(rows, WIDE, False) for rows in (6, 3, 1))
_tail3, _tail1 = (_values(rows, 1, True) for rows in (3, 1))
_raise_all, _raise_seen = _raise_maximum(False), _raise_maximum(True)
_weigh_all, _weigh_seen = _weigh(False), _weigh(True)
_exp_changes = kernel(_exp_row)


class Rows(NamedTuple):
    """What the rows of an item may see: row ``r`` belongs to its token ``r // group``, the first at ``position``.

    ``padded`` rows in all: those beyond the last token's see what it sees. ``window`` 0 for none; nothing before
    ``first`` or from ``last`` on belongs to the item.
    """

    padded: int
    group: int
    tokens: int
    position: int
    window: int
    first: int
    last: int


@njit
def seen_by(rows: Rows, row: int) -> tuple[int, int]:
    """The positions [first, last) that a row sees."""
    end = rows.position + min(row // rows.group, rows.tokens - 1) + 1
    first = max(rows.first, end - rows.window) if rows.window else rows.first
    return first, min(end, rows.last)


@njit
def score_tile(dtype: int, q: int, rows: int, panels: int, ahead: int, panel_bytes: int, head_dim: int, s: int) -> None:
    """``s[rows, TILE]`` from ``q`` [rows, head_dim]; ``rows`` is padded, ``panels`` and ``ahead`` have 4 addresses."""
    for at in range(0, TILE // 16, WIDE):
        table, after, out, width = panels + 8 * at, ahead + 8 * at, s + 64 * at, 4 * head_dim
        r = 0
        while rows - r >= 6:
            _scores6(dtype, q + r * width, width, table, after, panel_bytes, head_dim, out + 4 * TILE * r, 4 * TILE)
            r += 6
        if rows - r >= 3:
            _scores3(dtype, q + r * width, width, table, after, panel_bytes, head_dim, out + 4 * TILE * r, 4 * TILE)
            r += 3
        if rows - r >= 1:
            _scores1(dtype, q + r * width, width, table, after, panel_bytes, head_dim, out + 4 * TILE * r, 4 * TILE)


@njit
def score_transposed(keys: int, count: int, q: int, lanes: int, n: int, table: int, s: int) -> None:
    """``s[count, lanes] = keys[count, n] . q[n, lanes]`` in float32; ``lanes`` is a multiple of 16.

    ``table`` is room for one address.
    """
    for at in range(0, 4 * lanes, 64):
        i64p(table)[0] = q + at
        r = 0
        while count - r >= 6:
            _transposed6(0, keys + 4 * r * n, 4 * n, table, table, 4 * lanes, n, s + at + 4 * lanes * r, 4 * lanes)
            r += 6
        while count - r >= 1:
            _transposed1(0, keys + 4 * r * n, 4 * n, table, table, 4 * lanes, n, s + at + 4 * lanes * r, 4 * lanes)
            r += 1


@njit
def value_tile(
    dtype: int, size: int, p: int, rows: int, table: int, ahead: int, width: int, keys: int, factors: int, out: int,
    out_bytes: int,
) -> None:  # fmt: skip
    """``out[rows, width] = out * factors + p . values`` over ``keys`` positions; ``size`` bytes an element."""
    column = 0
    while column < width:
        whole = width - column >= WIDE_COLUMNS
        offset, columns, to = column * size, width - column, out + 4 * column
        r = 0
        while r < rows:
            weights, factor, y = p + 4 * TILE * r, factors + 4 * r, to + out_bytes * r
            if whole and rows - r >= 6:
                _wide6(dtype, weights, table, ahead, offset, columns, keys, factor, y, out_bytes)
                r += 6
            elif rows - r >= 3:
                if whole:
                    _wide3(dtype, weights, table, ahead, offset, columns, keys, factor, y, out_bytes)
                else:
                    _tail3(dtype, weights, table, ahead, offset, columns, keys, factor, y, out_bytes)
                r += 3
            else:
                if whole:
                    _wide1(dtype, weights, table, ahead, offset, columns, keys, factor, y, out_bytes)
                else:
                    _tail1(dtype, weights, table, ahead, offset, columns, keys, factor, y, out_bytes)
                r += 1
        column += WIDE_COLUMNS if whole else 16


@njit
def start_softmax(rows: int, maxima: int, sums: int) -> None:
    """Running maxima [rows] and sums [rows, 16] before the first tile."""
    for r in range(rows):
        f32p(maxima)[r] = NEVER
    zero_row(sums, 16 * rows)


@njit
def softmax_tile(rows: Rows, tile: int, scores: int, maxima: int, sums: int, factors: int) -> None:
    """Scores of the tile at position ``tile`` into weights, row by row, by what each row may see.

    Keeps each row's running maximum and its weights' sums in 16 lanes; ``factors`` [rows] receives what the sums of
    values so far must be multiplied by (online softmax, Milakov & Gimelshein, arXiv:1805.02867).
    """
    for r in range(rows.padded):
        first, last = seen_by(rows, r)
        at, s = 4 * r, scores + 4 * TILE * r
        if first <= tile and last >= tile + TILE:
            _raise_all(s, 0, 0, maxima + at, factors + at)
        else:
            _raise_seen(s, first - tile, last - tile, maxima + at, factors + at)
    _exp_changes(factors, rows.padded)
    for r in range(rows.padded):
        first, last = seen_by(rows, r)
        at, s = 4 * r, scores + 4 * TILE * r
        if first <= tile and last >= tile + TILE:
            _weigh_all(s, 0, 0, maxima + at, sums + 16 * at, factors + at)
        else:
            _weigh_seen(s, first - tile, last - tile, maxima + at, sums + 16 * at, factors + at)
