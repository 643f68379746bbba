"""The next token from a row of logits, as ``runtime.sampler`` chooses it, but without sorting the vocabulary.

Sampling walks the tokens from the most to the least likely until their probability passes a number. So tokens are put
into buckets by their logit, whole buckets are passed by their sums, and only the bucket in which the walk ends is
put in order, by a heap. Everything is float64, so that the same random number gives the same token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from labinfer.backends.cpu.elementwise import pieces
from labinfer.backends.cpu.isa import F32, I32X16, I64, Value, const, njit, vector
from labinfer.backends.cpu.simd import Emit, f32p, f64p, i32p, i64p, kernel
from labinfer.backends.cpu.workspace import BUCKETS

SPAN = 64.0
"""The buckets cover this much of ``logit / temperature`` below the greatest; e**-64 of its weight never matters."""


def _greatest(e: Emit, x: Value, n: Value) -> Value:
    greatest, strange = e.var(e.const(-math.inf)), e.var(e.const(0, I32X16))
    for piece in pieces(e, n):
        v = piece.load(x)
        if piece.mask is not None:
            v = e.b.select(piece.mask, v, e.const(-math.inf))
        greatest.set(e.max(v, greatest.get()))
        strange.set(e.b.or_(strange.get(), e.b.sext(e.b.fcmp_unordered("uno", v, v), I32X16)))
    none = e.b.icmp_signed("==", e.sum(strange.get()), e.b.trunc(e.i(0), strange.get().type.element))
    return e.b.select(none, e.hmax(greatest.get()), ir.Constant(F32, math.nan))


greatest_of = kernel(_greatest, types.float32)
"""The greatest of ``n`` floats, NaN if any is."""


def _exp(b: Value, x: Value) -> Value:
    """e**x of float64 lanes within 1e-15 relative, for x cut to [-700, 0] (a Taylor series after Cody and Waite)."""
    kind, whole = x.type, vector(I64, x.type.count)
    x = b.select(b.fcmp_ordered(">", x, const(-700.0, kind)), x, const(-700.0, kind))
    rounder = const(1.5 * 2.0**52, kind)  # leaves the whole number in the lowest bits
    shifted = b.fadd(b.fmul(x, const(1.4426950408889634, kind)), rounder)
    n = b.fsub(shifted, rounder)
    r = b.fsub(x, b.fmul(n, const(6.93147180369123816490e-01, kind)))
    r = b.fsub(r, b.fmul(n, const(1.90821492927058770002e-10, kind)))
    p = const(1 / math.factorial(13), kind)
    for k in range(12, -1, -1):
        p = b.fadd(b.fmul(p, r), const(1 / math.factorial(k), kind))
    exponent = b.shl(b.bitcast(shifted, whole), const(52, whole))
    return b.bitcast(b.add(b.bitcast(p, whole), exponent), kind)


def _weigh(e: Emit, x: Value, n: Value, given: Value, weights: Value) -> None:
    top, temperature = (e.load(e.add(given, 8 * i), ir.DoubleType()) for i in (0, 1))

    def some(at: Value, lanes: int) -> None:
        kind = vector(ir.DoubleType(), lanes)
        v = e.b.fpext(e.load(e.add(x, e.mul(at, 4)), vector(F32, lanes)), kind)
        v = e.b.fdiv(e.b.fsub(v, e.splat(top, lanes)), e.splat(temperature, lanes))
        e.store(_exp(e.b, v), e.add(weights, e.mul(at, 8)))

    whole = e.b.ashr(n, e.i(3))
    with e.loop(whole) as k:
        some(e.mul(k, 8), 8)
    with e.loop(e.b.and_(n, e.i(7))) as k:
        some(e.add(e.mul(whole, 8), k), 1)


weigh_row = kernel(_weigh)
"""``exp((x - given[0]) / given[1])`` in float64 of ``n`` floats."""


class Ranking(NamedTuple):
    """The tokens of a row in buckets, most likely first: addresses, and what makes a logit a bucket.

    ``weights`` float64 [n], ``mass`` float64 and ``counts`` int64 [BUCKETS], ``heap`` int32 [n].
    """

    logits: int
    n: int
    top: float
    per_bucket: float
    weights: int
    mass: int
    counts: int
    heap: int


class Place(NamedTuple):
    """A token, and how many tokens and what weight the walk has passed with it."""

    token: int
    rank: int
    total: float


@njit
def argmax(logits: int, n: int) -> int:
    """The first of the greatest of ``n`` floats, or of those that are no numbers."""
    x, top = f32p(logits), greatest_of(logits, n)
    for i in range(n):
        if x[i] == top or x[i] != x[i]:
            return i
    return 0


def sample(logits: int, n: int, temperature: float, top_k: int, top_p: float, random: float, workspace: int) -> int:
    """A token id from ``n`` logits by a ``random`` number in [0, 1); greedy with temperature 0 or top_k 1.

    Temperature first, then top-k (0: off; of equal logits at its end the lower ids stay), then top-p. Logits that are
    not numbers give ``-1 - id`` of the offender.
    """
    best = argmax(logits, n)
    top = f32p(logits)[best]
    if not math.isfinite(top):
        return -1 - best
    if temperature == 0 or top_k == 1:
        return best
    ranking = _rank(logits, n, top, temperature, workspace)
    kept = min(top_k, n) if top_k > 0 else n
    total = 0.0
    if kept < n:
        total = _walk(ranking, math.inf, False, kept).total
    else:
        for bucket in range(BUCKETS):
            total += f64p(ranking.mass)[bucket]
    if top_p < 1:
        last = _walk(ranking, top_p * total, False, kept)
        kept, total = last.rank, last.total
    return _walk(ranking, random * total, True, kept).token


@njit
def _rank(logits: int, n: int, top: float, temperature: float, workspace: int) -> Ranking:
    """Weigh every token and sum up the buckets."""
    mass, counts = workspace + 16, workspace + 16 + 8 * BUCKETS
    weights = counts + 8 * BUCKETS
    per_bucket = (BUCKETS - 1) / (SPAN * temperature)
    ranking = Ranking(logits, n, np.float64(top), per_bucket, weights, mass, counts, weights + 8 * n)
    given, sums, numbers, weight = f64p(workspace), f64p(mass), i64p(counts), f64p(weights)
    given[0], given[1] = top, temperature
    weigh_row(logits, n, workspace, weights)
    for bucket in range(BUCKETS):
        sums[bucket], numbers[bucket] = 0.0, 0
    for i in range(n):
        bucket = _bucket(ranking, i)
        sums[bucket] += weight[i]
        numbers[bucket] += 1
    return ranking


@njit
def _bucket(ranking: Ranking, token: int) -> int:
    """The bucket of a token; the last one takes all that is too unlikely, and minus infinity."""
    at = (ranking.top - f32p(ranking.logits)[token]) * ranking.per_bucket
    return int(at) if at < BUCKETS - 1 else BUCKETS - 1


@njit
def _walk(ranking: Ranking, target: float, beyond: bool, kept: int) -> Place:
    """The first token, from the likeliest on, with which the weight reaches ``target``, or is ``beyond`` it.

    At the latest the ``kept``-th token. Equal logits come in the order of their ids.
    """
    mass, counts, weight = f64p(ranking.mass), i64p(ranking.counts), f64p(ranking.weights)
    heap = i32p(ranking.heap)
    rank, total, token = 0, 0.0, 0
    for bucket in range(BUCKETS):
        count, after = counts[bucket], total + mass[bucket]
        if rank + count < kept and (after <= target if beyond else after < target):
            rank, total = rank + count, after
            continue
        _fill_heap(ranking, bucket)
        for left in range(count, 0, -1):
            token = heap[0] + 0  # int64 like every other number of a Place
            rank, total = rank + 1, total + weight[token]
            if rank == kept or (total > target if beyond else total >= target):
                return Place(token, rank, total)
            heap[0] = heap[left - 1]
            _sift(ranking, 0, left - 1)
    return Place(token, rank, total)


@njit
def _fill_heap(ranking: Ranking, bucket: int) -> None:
    """Make the tokens of a bucket a heap, the likeliest first."""
    heap, count = i32p(ranking.heap), 0
    for i in range(ranking.n):
        if _bucket(ranking, i) == bucket:
            heap[count] = i
            count += 1
    for i in range(count // 2 - 1, -1, -1):
        _sift(ranking, i, count)


@njit
def _sift(ranking: Ranking, parent: int, count: int) -> None:
    """Move the token at ``parent`` down until none below it is likelier."""
    heap = i32p(ranking.heap)
    while 2 * parent + 1 < count:
        child = 2 * parent + 1
        if child + 1 < count and _likelier(ranking, heap[child + 1], heap[child]):
            child += 1
        if not _likelier(ranking, heap[child], heap[parent]):
            return
        heap[child], heap[parent] = heap[parent], heap[child]
        parent = child


@njit
def _likelier(ranking: Ranking, a: int, b: int) -> bool:
    """Whether token ``a`` comes before token ``b``."""
    x = f32p(ranking.logits)
    return x[a] > x[b] or (x[a] == x[b] and a < b)
