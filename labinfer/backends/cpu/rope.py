"""``rope`` from tables of cosines and sines, alone or fused with the write of keys and values.

A table row holds the cosines, then the sines, of one position: float32 ``[2, turned / 2]``. Each token names its row by
number. That is its position where angles depend on nothing else. ``longrope`` has two tables one after the other and
``longrope_rows`` picks; ``dynamic`` has no fixed table, so ``dynamic_table`` fills one row per token of a step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from labinfer.backends.cpu.elementwise import copy_row
from labinfer.backends.cpu.isa import njit
from labinfer.backends.cpu.paged_cache import write_token
from labinfer.backends.cpu.simd import f32p, i32p


class Turn(NamedTuple):
    """What a rope does to a row of heads: addresses of ``table`` and ``rows`` (int32 [T]), and the heads' geometry.

    ``half`` pairs of features turn from ``rotary_start`` on, neighbours when ``interleaved``, else ``half`` apart.
    """

    table: int
    rows: int
    head_dim: int
    rotary_start: int
    half: int
    interleaved: int


@njit
def longrope_rows(
    query_start: int, total_len: int, sequences: int, positions: int, trained: int, max_len: int, rows: int
) -> None:
    """Each token's row of longrope's two tables: the second in sequences longer than ``trained``."""
    begin, length, position, row = i32p(query_start), i32p(total_len), i32p(positions), i32p(rows)
    for s in range(sequences):
        shift = max_len if length[s] > trained else 0
        for t in range(begin[s], begin[s + 1]):
            row[t] = position[t] + shift


@njit
def dynamic_table(
    query_start: int,
    total_len: int,
    sequences: int,
    positions: int,
    freq_factors: int,
    rotary_dim: int,
    half: int,
    theta: float,
    factor: float,
    max_position: int,
    table: int,
    rows: int,
) -> None:
    """Fill one table row per token with ``dynamic`` scaling, whose base grows with the sequence (arXiv:2309.00071).

    ``freq_factors`` [half] divides the frequencies, 0 for none; ``rows[t]`` becomes t.
    """
    begin, length, position, row = i32p(query_start), i32p(total_len), i32p(positions), i32p(rows)
    out, divisor = f32p(table), f32p(freq_factors)
    for s in range(sequences):
        base = theta
        if length[s] > max_position:
            growth = np.float32(factor) * np.float32(length[s]) / np.float32(max_position) - np.float32(factor - 1)
            power = np.float32(np.float64(growth) ** (rotary_dim / (rotary_dim - 2)))
            base = np.float64(np.float32(theta) * power)
        for i in range(half):
            exponent = np.float64(np.float32(2 * i) / np.float32(rotary_dim))
            frequency = np.float32(1) / np.float32(base**exponent)
            if freq_factors:
                frequency = frequency / divisor[i]
            for t in range(begin[s], begin[s + 1]):
                angle = np.float64(np.float32(position[t]) * frequency)
                out[(2 * t) * half + i] = np.float32(math.cos(angle))
                out[(2 * t + 1) * half + i] = np.float32(math.sin(angle))
        for t in range(begin[s], begin[s + 1]):
            row[t] = t


@njit
def rotate_row(x: int, heads: int, token: int, turn: Turn) -> None:
    """Turn the heads of one token in place."""
    half = turn.half
    row = i32p(turn.rows)[token]
    cos = f32p(turn.table + 8 * row * half)
    sin = f32p(turn.table + 8 * row * half + 4 * half)
    for head in range(heads):
        v = f32p(x + 4 * (head * turn.head_dim + turn.rotary_start))
        if turn.interleaved:
            for i in range(half):
                a, b = v[2 * i], v[2 * i + 1]
                v[2 * i] = a * cos[i] - b * sin[i]
                v[2 * i + 1] = b * cos[i] + a * sin[i]
        else:
            for i in range(half):
                a, b = v[i], v[half + i]
                v[i] = a * cos[i] - b * sin[i]
                v[half + i] = b * cos[i] + a * sin[i]


@njit
def rope(x: int, x_stride: int, y: int, y_stride: int, heads: int, turn: Turn, start: int, stop: int) -> None:
    """Rows [start, stop) of ``heads`` heads turned into ``y``, which may be ``x``."""
    for t in range(start, stop):
        result = y + 4 * t * y_stride
        if result != x + 4 * t * x_stride:
            copy_row(x + 4 * t * x_stride, result, heads * turn.head_dim)
        rotate_row(result, heads, t, turn)


class KeyValues(NamedTuple):
    """Where a layer's keys and values go: rows of the step, and the two parts of the cache (``slots`` int32 [T])."""

    k: int
    k_stride: int
    v: int
    v_stride: int
    k_cache: int
    v_cache: int
    k_width: int
    v_width: int
    dtype: int
    block_size: int
    slots: int


@njit
def rope_kv_write(
    q: int,
    q_stride: int,
    y: int,
    y_stride: int,
    heads: int,
    q_turn: Turn,
    k_turn: Turn,
    new: KeyValues,
    scratch: int,
    start: int,
    stop: int,
) -> None:
    """Tokens [start, stop): turn queries into ``y`` (which may be ``q``), turn keys and write them and the values.

    ``scratch`` holds ``k_width`` float32 for this thread; the keys of the step are left as they are.
    """
    rope(q, q_stride, y, y_stride, heads, q_turn, start, stop)
    slots = i32p(new.slots)
    for t in range(start, stop):
        copy_row(new.k + 4 * t * new.k_stride, scratch, new.k_width)
        rotate_row(scratch, new.k_width // k_turn.head_dim, t, k_turn)
        write_token(scratch, new.k_cache, new.k_width, 1, new.dtype, new.block_size, slots[t])
        write_token(new.v + 4 * t * new.v_stride, new.v_cache, new.v_width, 0, new.dtype, new.block_size, slots[t])
