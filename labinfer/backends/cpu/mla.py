"""``mla_attention``: attention over a cached latent, with ``kv_b`` absorbed into queries and results.

A head's score ``q . (kv_b_k @ latent)`` is ``(q @ kv_b_k) . latent``, and its result ``kv_b_v @ (sum of weights times
latents)``: only latents are read, once for all heads of an item, and no head's keys or values are ever made
(DeepSeek-V2, arXiv:2405.04434, section 2.1.2). The same kernel serves decode and prefill.

An item is (sequence, run of tokens, group of heads). Its queries lie across the lanes of a vector, for they share
keys. ``kv_b`` is read as float32 rows, once per item and head. Contexts are not split: a sequence has as many items as
groups of heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from labinfer.backends.cpu.attention import Batch, Pages, out_stride, padded_rows
from labinfer.backends.cpu.attention_tiles import (
    Rows,
    score_transposed,
    softmax_tile,
    start_softmax,
    value_tile,
)
from labinfer.backends.cpu.elementwise import copy_row, pieces, scale_row, sum_row, zero_row
from labinfer.backends.cpu.isa import Value, njit
from labinfer.backends.cpu.paged_cache import element_size, read_row
from labinfer.backends.cpu.simd import Emit, f32p, i32p, i64p, kernel
from labinfer.backends.cpu.workspace import MLA_GROUP_HEADS, TILE, TILE_ROWS

KEY_ROWS = 8
"""Rows of ``kv_b`` that meet all queries of an item while they are in the L1 cache."""


def _add_products(rows: int) -> Any:
    """``y[rows, n] += x[rows, count] . w[count, n]``, the rows of ``x`` and ``y`` so many bytes apart."""

    def add_products(
        e: Emit, x: Value, x_bytes: Value, w: Value, count: Value, y: Value, y_bytes: Value, n: Value
    ) -> None:
        for piece in pieces(e, n):
            totals = [e.var(piece.load(e.add(y, e.mul(y_bytes, row)))) for row in range(rows)]
            with e.loop(count) as i:
                weight = piece.load(e.add(w, e.mul(e.mul(i, n), 4)))
                for row, total in enumerate(totals):
                    by = e.bcast(e.add(x, e.mul(x_bytes, row), e.mul(i, 4)))
                    total.set(e.fma(by, weight, total.get()))
            for row, total in enumerate(totals):
                piece.store(total.get(), e.add(y, e.mul(y_bytes, row)))

    return kernel(add_products)


def _dots(rows: int) -> Any:
    """``y[row] = x[row] . w`` of ``n`` floats, the rows of ``x`` and the results so many bytes apart."""

    def dots(e: Emit, x: Value, x_bytes: Value, w: Value, n: Value, y: Value, y_bytes: Value) -> None:
        totals = [e.var(e.const(0.0)) for _ in range(rows)]
        for piece in pieces(e, n):
            weight = piece.load(w)
            for row, total in enumerate(totals):
                total.set(e.fma(piece.load(e.add(x, e.mul(x_bytes, row))), weight, total.get()))
        for row, total in enumerate(totals):
            e.store(e.sum(total.get()), e.add(y, e.mul(y_bytes, row)))

    return kernel(dots)


_add_products6, _add_products1 = _add_products(6), _add_products(1)
_dots6, _dots1 = _dots(6), _dots(1)


class Latent(NamedTuple):
    """The attributes of ``mla_attention``, and the address of ``kv_b`` [num_heads * (nope_dim + v_dim), kv_rank]."""

    num_heads: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    kv_rank: int
    scale: float
    kv_b: int


class MlaItem(NamedTuple):
    """``tokens`` tokens of the step from ``token`` on, at ``position`` of their sequence, and ``heads`` heads."""

    sequence: int
    token: int
    tokens: int
    position: int
    head: int
    heads: int


class MlaScratch(NamedTuple):
    """Addresses inside a thread's workspace. Rows are (token, head); ``lanes`` of them fill whole vectors."""

    rows: int
    lanes: int
    table: int
    values: int
    maxima: int
    factors: int
    sums: int
    scores: int
    across: int
    q: int
    row: int
    keys: int
    out: int


@njit
def group_heads(latent: Latent) -> int:
    """Heads of an item; the last group may have fewer."""
    return min(MLA_GROUP_HEADS, latent.num_heads)


@njit
def _scratch_at(workspace: int, latent: Latent, tokens: int, heads: int) -> MlaScratch:
    """The layout of a workspace for ``tokens * heads`` rows; every piece is a whole number of cache lines."""
    rows = padded_rows(tokens * heads)
    lanes = (rows + 15) // 16 * 16
    width = out_stride(latent.kv_rank + latent.rope_dim)
    values = workspace + 64
    maxima = values + 8 * TILE
    factors = maxima + 4 * lanes
    sums = factors + 4 * lanes
    scores = sums + 64 * lanes
    across = scores + 4 * TILE * lanes
    q = across + 4 * TILE * lanes
    row = q + 4 * width * lanes
    keys = row + 4 * width * tokens
    out = keys + 4 * width * TILE
    return MlaScratch(rows, lanes, workspace, values, maxima, factors, sums, scores, across, q, row, keys, out)


@njit
def mla_items(latent: Latent, batch: Batch) -> int:
    """The number of work items of a step."""
    begin, heads = i32p(batch.query_start), group_heads(latent)
    step, runs = TILE_ROWS // heads, 0
    for s in range(batch.sequences):
        runs += (begin[s + 1] - begin[s] + step - 1) // step
    return runs * ((latent.num_heads + heads - 1) // heads)


@njit
def mla_attention(
    q: int,
    q_stride: int,
    y: int,
    y_stride: int,
    latent: Latent,
    pages: Pages,
    batch: Batch,
    workspace: int,
    start: int,
    stop: int,
) -> None:
    """Work items [start, stop) of ``mla_items``; ``workspace`` (``workspace.mla_scratch`` bytes) is this thread's."""
    begin, context = i32p(batch.query_start), i32p(batch.context_len)
    heads = group_heads(latent)
    step, groups, before = TILE_ROWS // heads, (latent.num_heads + heads - 1) // heads, 0
    for s in range(batch.sequences):
        tokens = begin[s + 1] - begin[s]
        runs = (tokens + step - 1) // step
        for number in range(max(start - before, 0), min(stop - before, runs * groups)):
            part, head = number // groups, number % groups * heads
            # Later runs see more: taken in turn from both ends, equal ranges of items cost about the same.
            skip = (part // 2 if part % 2 == 0 else runs - 1 - part // 2) * step
            count, position = min(step, tokens - skip), context[s] - tokens + skip
            item = MlaItem(s, begin[s] + skip, count, position, head, min(heads, latent.num_heads - head))
            scratch = _scratch_at(workspace, latent, count, item.heads)
            _absorb_queries(q, q_stride, latent, item, scratch)
            _attend_latents(latent, pages, batch, item, scratch)
            _expand_values(y, y_stride, latent, item, scratch)
        before += runs * groups


@njit
def _absorb_queries(q: int, q_stride: int, latent: Latent, item: MlaItem, scratch: MlaScratch) -> None:
    """``q`` [features, lanes]: each query times ``kv_b``'s key rows, beside its turned part, times the scale."""
    rank, width = latent.kv_rank, latent.kv_rank + latent.rope_dim
    across = f32p(scratch.q)
    zero_row(scratch.q, width * scratch.lanes)
    for h in range(item.heads):
        head = item.head + h
        weight = latent.kv_b + 4 * head * (latent.nope_dim + latent.v_dim) * rank
        source = q + 4 * (item.token * q_stride + head * (latent.nope_dim + latent.rope_dim))
        zero_row(scratch.row, item.tokens * width)
        for n in range(0, latent.nope_dim, KEY_ROWS):
            count, w = min(KEY_ROWS, latent.nope_dim - n), weight + 4 * n * rank
            t = 0
            while t < item.tokens:
                x, y = source + 4 * (t * q_stride + n), scratch.row + 4 * t * width
                if item.tokens - t >= 6:
                    _add_products6(x, 4 * q_stride, w, count, y, 4 * width, rank)
                    t += 6
                else:
                    _add_products1(x, 4 * q_stride, w, count, y, 4 * width, rank)
                    t += 1
        for t in range(item.tokens):
            turned = source + 4 * (t * q_stride + latent.nope_dim)
            copy_row(turned, scratch.row + 4 * (t * width + rank), latent.rope_dim)
            row, lane = f32p(scratch.row + 4 * t * width), t * item.heads + h
            for i in range(width):
                across[i * scratch.lanes + lane] = row[i] * np.float32(latent.scale)


@njit
def _attend_latents(latent: Latent, pages: Pages, batch: Batch, item: MlaItem, scratch: MlaScratch) -> None:
    """Unnormalised sums of latents, maxima and sums of weights of every row, tile by tile of positions."""
    width, out_bytes = latent.kv_rank + latent.rope_dim, 4 * out_stride(latent.kv_rank)
    scores, across, values = f32p(scratch.scores), f32p(scratch.across), i64p(scratch.values)
    zero_row(scratch.out, scratch.rows * out_bytes // 4)
    start_softmax(scratch.rows, scratch.maxima, scratch.sums)
    for i in range(TILE):
        values[i] = scratch.keys + 4 * width * i
    last = item.position + item.tokens
    seen = Rows(scratch.rows, item.heads, item.tokens, item.position, 0, 0, last)
    for tile in range(0, last, TILE):
        count = min(TILE, last - tile)
        _read_tile(latent, pages, batch, item.sequence, tile, count, scratch)
        score_transposed(scratch.keys, count, scratch.q, scratch.lanes, width, scratch.table, scratch.across)
        for r in range(scratch.rows):
            for i in range(count):
                scores[r * TILE + i] = across[i * scratch.lanes + r]
        softmax_tile(seen, tile, scratch.scores, scratch.maxima, scratch.sums, scratch.factors)
        value_tile(
            0, 4, scratch.scores, scratch.rows, scratch.values, scratch.values, latent.kv_rank, count, scratch.factors,
            scratch.out, out_bytes,
        )  # fmt: skip


@njit
def _read_tile(
    latent: Latent, pages: Pages, batch: Batch, sequence: int, tile: int, count: int, scratch: MlaScratch
) -> None:
    """``keys`` [count, kv_rank + rope_dim] in float32: latents and turned parts of the positions from ``tile`` on."""
    blocks = i32p(batch.block_table + 4 * sequence * batch.table_stride)
    size, rank = element_size(pages.dtype), latent.kv_rank
    for i in range(count):
        position = tile + i
        slot = blocks[position // pages.block_size] * pages.block_size + position % pages.block_size
        row = scratch.keys + 4 * (rank + latent.rope_dim) * i
        read_row(pages.dtype, pages.k + slot * rank * size, row, rank)
        read_row(pages.dtype, pages.v + slot * latent.rope_dim * size, row + 4 * rank, latent.rope_dim)


@njit
def _expand_values(y: int, y_stride: int, latent: Latent, item: MlaItem, scratch: MlaScratch) -> None:
    """Every row's average latent times ``kv_b``'s value rows, into the result."""
    rank, stride = latent.kv_rank, 4 * out_stride(latent.kv_rank)
    for r in range(item.tokens * item.heads):
        average = scratch.out + r * stride
        scale_row(average, average, rank, 1.0 / sum_row(scratch.sums + 64 * r, 16))
    for h in range(item.heads):
        head = item.head + h
        weight = latent.kv_b + 4 * (head * (latent.nope_dim + latent.v_dim) + latent.nope_dim) * rank
        for v in range(latent.v_dim):
            w, t = weight + 4 * v * rank, 0
            while t < item.tokens:
                x = scratch.out + (t * item.heads + h) * stride
                target = y + 4 * ((item.token + t) * y_stride + head * latent.v_dim + v)
                if item.tokens - t >= 6:
                    _dots6(x, item.heads * stride, w, rank, target, 4 * y_stride)
                    t += 6
                else:
                    _dots1(x, item.heads * stride, w, rank, target, 4 * y_stride)
                    t += 1
