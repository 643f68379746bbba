"""``attention`` over the paged cache: one kernel for decode and chunked prefill, tile by tile with an online softmax.

The work of a step is cut into items: (sequence, run of tokens, key-value head). An item stages its queries, all those
that share the head, and streams the keys and values they see once, 64 positions at a time (FlashAttention, Dao et al.,
arXiv:2205.14135); scores never leave the thread's scratch, whose size does not depend on the context.

A sequence with few tokens in the step has few items, so its context is cut into up to ``MAX_SPLITS`` parts, whose
partial results ``attention_merge`` joins after a barrier (flash-decoding). How a context is cut depends on its length
and its tokens alone: not on the threads, not on the company in the batch. Threads share items by what these cost, since
the contexts of a batch differ.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from labinfer.backends.cpu import workspace as planned
from labinfer.backends.cpu.attention_tiles import (
    NEVER,
    Rows,
    score_tile,
    softmax_tile,
    start_softmax,
    value_tile,
)
from labinfer.backends.cpu.elementwise import add_scaled_row, scale_row, softcap_row, sum_row, zero_row
from labinfer.backends.cpu.isa import njit
from labinfer.backends.cpu.paged_cache import POSITIONS, element_size
from labinfer.backends.cpu.simd import f32p, i32p, i64p
from labinfer.backends.cpu.workspace import MAX_SPLITS, TILE, TILE_ROWS

SPLIT_POSITIONS = 128
"""Positions in such a part at least."""

PANEL_TABLE, VALUE_TABLE = 8 * TILE // POSITIONS, 8 * TILE
"""Bytes of a tile's table of addresses."""

ITEM_POSITIONS, READ_ROWS = 32, 8
"""What an item costs beside its positions, and a position beside its query rows: about as much as so many of them."""


padded_rows, out_stride = njit(planned.padded_rows), njit(planned.out_stride)


class Heads(NamedTuple):
    """The attributes of ``attention``; ``window`` and ``softcap`` 0 for none."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    window: int
    softcap: float


class Pages(NamedTuple):
    """The cache of a layer: addresses of its two parts, the code of its dtype, slots in a block."""

    k: int
    v: int
    dtype: int
    block_size: int


class Batch(NamedTuple):
    """The sequences of a step: addresses of ``Step``'s int32 arrays, and the length of a row of ``block_table``."""

    sequences: int
    query_start: int
    context_len: int
    block_table: int
    table_stride: int


class Item(NamedTuple):
    """Queries of a sequence for one key-value head: ``tokens`` of the step from ``token`` on, at ``position``.

    They look at positions [first, last) of the sequence, as far as causality and window let each.
    """

    sequence: int
    token: int
    tokens: int
    position: int
    head: int
    first: int
    last: int


class Scratch(NamedTuple):
    """Addresses inside a thread's workspace; ``panels`` and ``values`` are tables for two tiles each."""

    panels: int
    values: int
    maxima: int
    factors: int
    sums: int
    scores: int
    q: int
    out: int


@njit
def tile_tokens(heads: Heads) -> int:
    """Tokens of an item."""
    return max(1, TILE_ROWS // (heads.num_heads // heads.num_kv_heads))


@njit
def scratch_at(workspace: int, rows: int, head_dim: int) -> Scratch:
    """The layout of a workspace for ``rows`` query rows; every piece is a whole number of cache lines."""
    values = workspace + 64
    line = (4 * rows + 63) // 64 * 64
    maxima = values + 2 * 8 * TILE
    factors = maxima + line
    sums = factors + line
    scores = sums + 64 * rows
    q = scores + 4 * TILE * rows
    out = q + (4 * rows * head_dim + 63) // 64 * 64
    return Scratch(workspace, values, maxima, factors, sums, scores, q, out)


@njit
def count_splits(tokens: int, context: int, window: int) -> int:
    """Parts that the context of a sequence with ``tokens`` tokens in the step is cut into.

    Parts times tokens are at most ``MAX_SPLITS``; there is room for so many partial results.
    """
    seen = min(context, window) if window else context
    return max(1, min(MAX_SPLITS // max(tokens, 1), seen // SPLIT_POSITIONS))


@njit
def sequence_work(heads: Heads, tokens: int, context: int) -> tuple[int, int]:
    """The number of items of a sequence, and what each of them costs, on average."""
    step, splits = tile_tokens(heads), count_splits(tokens, context, heads.window)
    seen = max(context - tokens // 2, 1)
    if heads.window:
        seen = min(seen, heads.window + step)
    rows = min(tokens, step) * (heads.num_heads // heads.num_kv_heads)
    items = (tokens + step - 1) // step * splits * heads.num_kv_heads
    return items, (seen // splits + ITEM_POSITIONS) * (rows + READ_ROWS)


@njit
def attention_cost(heads: Heads, batch: Batch) -> int:
    """What all items of a step cost."""
    begin, context = i32p(batch.query_start), i32p(batch.context_len)
    total = 0
    for s in range(batch.sequences):
        items, cost = sequence_work(heads, begin[s + 1] - begin[s], context[s] + 0)
        total += items * cost
    return total


@njit
def attention(
    q: int,
    q_stride: int,
    y: int,
    y_stride: int,
    heads: Heads,
    pages: Pages,
    batch: Batch,
    partials: int,
    workspace: int,
    start: int,
    stop: int,
) -> None:
    """The work items whose middle lies in [start, stop) of ``attention_cost``, counted one after another.

    ``partials`` belongs to all threads, ``workspace`` to this one; both lie on 64-byte boundaries (their sizes stand in
    the module ``workspace``). ``attention_merge`` must follow when all items are done.
    """
    begin, context = i32p(batch.query_start), i32p(batch.context_len)
    step, before = tile_tokens(heads), 0  # before: the cost of all earlier sequences
    for s in range(batch.sequences):
        # Adding makes an int64 of an int32: with one type for all, what follows is compiled once.
        token, tokens, length = begin[s] + 0, begin[s + 1] - begin[s], context[s] + 0
        tiles = (tokens + step - 1) // step
        splits = count_splits(tokens, length, heads.window)
        items, cost = sequence_work(heads, tokens, length)
        first, last = max(start - before + cost // 2, 0) // cost, max(stop - before + cost // 2, 0) // cost
        for number in range(first, min(last, items)):
            head, part = number % heads.num_kv_heads, number // heads.num_kv_heads
            if splits > 1:
                item = _split_item(heads, s, token, tokens, length, head, part, splits)
                scratch = _attend(q, q_stride, heads, pages, batch, item, workspace)
                _store_partial(heads, item, scratch, _partial(partials, heads, s, head, part, tokens))
            else:
                # Later runs see more: taken in turn from both ends, equal ranges of items cost about the same.
                run = part // 2 if part % 2 == 0 else tiles - 1 - part // 2
                item = _run_item(heads, s, token, tokens, length, head, run * step)
                scratch = _attend(q, q_stride, heads, pages, batch, item, workspace)
                _store(y, y_stride, heads, item, scratch)
        before += items * cost


@njit
def _run_item(heads: Heads, sequence: int, token: int, tokens: int, length: int, head: int, skip: int) -> Item:
    """The item of a run of tokens that starts ``skip`` tokens into the sequence's."""
    count = min(tile_tokens(heads), tokens - skip)
    position = length - tokens + skip
    first = max(0, position - heads.window + 1) if heads.window else 0
    return Item(sequence, token + skip, count, position, head, first, position + count)


@njit
def _split_item(
    heads: Heads, sequence: int, token: int, tokens: int, length: int, head: int, part: int, splits: int
) -> Item:
    """The item of one part of a sequence's context, whole tiles from the first position that its first token sees."""
    start = max(0, length - tokens + 1 - heads.window) if heads.window else 0
    tiles = (length - start + TILE - 1) // TILE
    first, last = start + tiles * part // splits * TILE, start + tiles * (part + 1) // splits * TILE
    return Item(sequence, token, tokens, length - tokens, head, first, min(last, length))


@njit
def _attend(q: int, q_stride: int, heads: Heads, pages: Pages, batch: Batch, item: Item, workspace: int) -> Scratch:
    """Unnormalised sums of values, maxima and sums of weights of an item's rows, in the scratch that is returned.

    Row ``t * group + j`` is query head ``j`` of token ``t``.
    """
    group = heads.num_heads // heads.num_kv_heads
    rows = item.tokens * group
    padded = padded_rows(rows)
    scratch = scratch_at(workspace, padded, heads.head_dim)
    out_bytes = 4 * out_stride(heads.v_head_dim)
    _stage_queries(q, q_stride, heads, item, scratch, padded)
    zero_row(scratch.out, padded * out_bytes // 4)
    start_softmax(padded, scratch.maxima, scratch.sums)
    seen = Rows(padded, group, item.tokens, item.position, heads.window, item.first, item.last)
    size = element_size(pages.dtype)
    start, here = item.first // POSITIONS * POSITIONS, 0
    _find_tile(heads, pages, batch, item, start, scratch, here)
    for tile in range(start, item.last, TILE):
        keys, there = min(TILE, item.last - tile), 1 - here
        if tile + TILE < item.last:
            _find_tile(heads, pages, batch, item, tile + TILE, scratch, there)
        score_tile(
            pages.dtype,
            scratch.q,
            padded,
            scratch.panels + here * PANEL_TABLE,
            scratch.panels + there * PANEL_TABLE,
            pages.block_size * size,
            heads.head_dim,
            scratch.scores,
        )
        if heads.softcap:
            softcap_row(scratch.scores, scratch.scores, TILE * padded, heads.softcap)
        softmax_tile(seen, tile, scratch.scores, scratch.maxima, scratch.sums, scratch.factors)
        value_tile(
            pages.dtype,
            size,
            scratch.scores,
            padded,
            scratch.values + here * VALUE_TABLE,
            scratch.values + there * VALUE_TABLE,
            heads.v_head_dim,
            keys,
            scratch.factors,
            scratch.out,
            out_bytes,
        )
        here = there
    return scratch


@njit
def _stage_queries(q: int, q_stride: int, heads: Heads, item: Item, scratch: Scratch, padded: int) -> None:
    """Copy the item's queries, multiplied by the scale, to neighbouring rows; rows that only pad are zero."""
    group = heads.num_heads // heads.num_kv_heads
    width = group * heads.head_dim
    for t in range(item.tokens):
        source = q + 4 * ((item.token + t) * q_stride + item.head * width)
        scale_row(source, scratch.q + 4 * t * width, width, heads.scale)
    rows = item.tokens * group
    zero_row(scratch.q + 4 * rows * heads.head_dim, (padded - rows) * heads.head_dim)


@njit
def _find_tile(heads: Heads, pages: Pages, batch: Batch, item: Item, tile: int, scratch: Scratch, turn: int) -> None:
    """Fill the first or second (``turn``) address tables for the tile of positions from ``tile`` on."""
    blocks = i32p(batch.block_table + 4 * item.sequence * batch.table_stride)
    panels, values = i64p(scratch.panels + turn * PANEL_TABLE), i64p(scratch.values + turn * VALUE_TABLE)
    size, block_size = element_size(pages.dtype), pages.block_size
    k_width, v_bytes = heads.num_kv_heads * heads.head_dim, heads.num_kv_heads * heads.v_head_dim * size
    for panel in range(TILE // POSITIONS):
        position = tile + panel * POSITIONS
        if position >= item.last:
            panels[panel] = panels[0]
            continue
        block, within = blocks[position // block_size], position % block_size
        feature = block * k_width + item.head * heads.head_dim
        panels[panel] = pages.k + (feature * block_size + within) * size
        row = pages.v + (block * block_size + within) * v_bytes + item.head * heads.v_head_dim * size
        for i in range(POSITIONS):
            values[panel * POSITIONS + i] = row + i * v_bytes


@njit
def _store(y: int, y_stride: int, heads: Heads, item: Item, scratch: Scratch) -> None:
    """Divide by the sums of weights and write the item's rows of the result."""
    group, width = heads.num_heads // heads.num_kv_heads, heads.v_head_dim
    out_bytes = 4 * out_stride(width)
    for r in range(item.tokens * group):
        feature = (item.head * group + r % group) * width
        target = y + 4 * ((item.token + r // group) * y_stride + feature)
        scale_row(scratch.out + r * out_bytes, target, width, 1.0 / sum_row(scratch.sums + 64 * r, 16))


@njit
def _partial(partials: int, heads: Heads, sequence: int, head: int, part: int, tokens: int) -> int:
    """The partial result of a part: maxima and sums of its rows, then their sums of values."""
    group = heads.num_heads // heads.num_kv_heads
    index = (sequence * heads.num_kv_heads + head) * MAX_SPLITS + part * tokens
    return partials + index * 4 * group * (out_stride(heads.v_head_dim) + 16)


@njit
def _store_partial(heads: Heads, item: Item, scratch: Scratch, partial: int) -> None:
    """Copy an item's running state to its place among the partial results."""
    rows, stride = item.tokens * (heads.num_heads // heads.num_kv_heads), out_stride(heads.v_head_dim)
    maxima, state = f32p(scratch.maxima), f32p(partial)
    for r in range(rows):
        state[r], state[rows + r] = maxima[r], sum_row(scratch.sums + 64 * r, 16)
    scale_row(scratch.out, partial + 64 * rows, rows * stride, 1.0)


@njit
def attention_merge(y: int, y_stride: int, heads: Heads, batch: Batch, partials: int, start: int, stop: int) -> None:
    """Join the parts of split contexts: items [start, stop) of ``sequences * num_kv_heads``."""
    begin, context = i32p(batch.query_start), i32p(batch.context_len)
    group, stride = heads.num_heads // heads.num_kv_heads, out_stride(heads.v_head_dim)
    for number in range(start, stop):
        s, head = number // heads.num_kv_heads, number % heads.num_kv_heads
        tokens = begin[s + 1] - begin[s]
        splits, rows = count_splits(tokens, context[s] + 0, heads.window), tokens * group
        if splits == 1:
            continue
        for r in range(rows):
            top, total = np.float32(NEVER), np.float32(0)
            for part in range(splits):
                top = max(top, f32p(_partial(partials, heads, s, head, part, tokens))[r])
            for part in range(splits):
                state = f32p(_partial(partials, heads, s, head, part, tokens))
                total += np.float32(math.exp(state[r] - top)) * state[rows + r]
            feature = (head * group + r % group) * heads.v_head_dim
            target = y + 4 * ((begin[s] + r // group) * y_stride + feature)
            zero_row(target, heads.v_head_dim)
            for part in range(splits):
                partial = _partial(partials, heads, s, head, part, tokens)
                factor = np.float32(math.exp(f32p(partial)[r] - top)) / total
                add_scaled_row(partial + 64 * rows + 4 * r * stride, target, heads.v_head_dim, factor)
