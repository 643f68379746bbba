"""Mixture of experts around the matrix products: choose experts, group tokens by expert, combine the results.

The expert products themselves are the ``linear`` kernels on rows that lie together: the weights of each chosen expert
are read once, those of the others not at all. On a tape, with T tokens, k experts each and barriers between:

1. ``linear``: x [T, d] -> logits [T, experts];
2. ``route``, tokens shared out: logits -> ids, weights [T, k];
3. ``group_by_expert``, one thread: ids -> bounds [experts + 1], tokens [T * k], places [T * k];
4. ``elementwise.select_rows`` with ``tokens``: x -> gathered [T * k, d], quantized as the next products want;
5. for each expert ``e`` with rows, ``linear`` of gate and of up over rows [bounds[e], bounds[e + 1]), panels shared
   out; all experts in one tape row, without barriers between;
6. ``elementwise.glu`` over [T * k, expert_size], then as 5 for down -> results [T * k, d];
7. ``combine``, tokens shared out: y[t] = sum over r of weights[t, r] * results[places[t * k + r]].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from labinfer.backends.cpu.elementwise import add_scaled_row, zero_row
from labinfer.backends.cpu.isa import njit
from labinfer.backends.cpu.simd import f32p, i32p


class Routing(NamedTuple):
    """The attributes of ``router``: ``sigmoid`` and ``normalize`` 0 or 1, one group of which one is kept for none.

    ``best_two`` 1: a group's score is the sum of its best two, 0: its best. ``bias`` [num_experts], 0 for none.
    """

    num_experts: int
    top_k: int
    sigmoid: int
    normalize: int
    scale: float
    num_groups: int
    top_groups: int
    best_two: int
    bias: int


@njit
def route(
    logits: int, stride: int, routing: Routing, ids: int, weights: int, workspace: int, start: int, stop: int
) -> None:
    """Tokens [start, stop): the ``top_k`` best experts into ``ids`` int32 and ``weights`` float32, both [T, top_k]."""
    experts, k = routing.num_experts, routing.top_k
    scores, choice = f32p(workspace), f32p(workspace + 4 * experts)
    for t in range(start, stop):
        _score(logits + 4 * t * stride, routing, workspace)
        for e in range(experts):
            choice[e] = scores[e] + (f32p(routing.bias)[e] if routing.bias else np.float32(0))
        if routing.top_groups < routing.num_groups:
            _keep_best_groups(routing, workspace + 4 * experts)
        chosen, weight = i32p(ids + 4 * t * k), f32p(weights + 4 * t * k)
        total = np.float32(0)
        for r in range(k):
            best = _take_best(workspace + 4 * experts, experts)
            chosen[r], weight[r] = best, scores[best]
            total += scores[best]
        factor = routing.scale / (total + 1e-20) if routing.normalize else routing.scale
        for r in range(k):
            weight[r] *= np.float32(factor)


@njit
def _score(logits: int, routing: Routing, scores: int) -> None:
    """Softmax or sigmoid of one token's logits."""
    x, y, total, top = f32p(logits), f32p(scores), np.float32(0), f32p(logits)[0]
    for e in range(routing.num_experts):
        top = max(top, x[e])
    for e in range(routing.num_experts):
        if routing.sigmoid:
            y[e] = np.float32(1 / (1 + math.exp(-x[e])))
        else:
            y[e] = np.float32(math.exp(x[e] - top))
        total += y[e]
    if not routing.sigmoid:
        for e in range(routing.num_experts):
            y[e] /= total


@njit
def _take_best(choice: int, count: int) -> int:
    """The index of the greatest of ``count`` numbers, the first of equals, and minus infinity in its place."""
    x, best = f32p(choice), -1
    for i in range(count):
        if x[i] > -math.inf and (best < 0 or x[i] > x[best]):
            best = i
    best = max(best, 0)
    x[best] = -math.inf
    return best


@njit
def _keep_best_groups(routing: Routing, choice: int) -> None:
    """Minus infinity in ``choice`` outside the best groups; the groups' scores lie behind it."""
    x, size = f32p(choice), routing.num_experts // routing.num_groups
    groups = choice + 4 * routing.num_experts
    for g in range(routing.num_groups):
        first, second = np.float32(-math.inf), np.float32(-math.inf)
        for e in range(g * size, (g + 1) * size):
            if x[e] > first:
                first, second = x[e], first
            elif x[e] > second:
                second = x[e]
        f32p(groups)[g] = first + second if routing.best_two else first
    for _ in range(routing.top_groups):
        _take_best(groups, routing.num_groups)
    for g in range(routing.num_groups):
        if f32p(groups)[g] > -math.inf:
            for e in range(g * size, (g + 1) * size):
                x[e] = -math.inf


@njit
def group_by_expert(
    ids: int, pairs: int, top_k: int, first: int, num_experts: int, bounds: int, tokens: int, places: int
) -> None:
    """Sort the ``pairs`` (token, expert) of ``ids`` by expert, tokens in order (a counting sort). All int32.

    Rows [bounds[e], bounds[e + 1]) belong to expert ``first + e``; ``tokens[row]`` is the row's token,
    ``places[t * top_k + r]`` the row of a token's r-th expert, -1 where another rank has that expert. Rows that nobody
    needs then come last; they are of token 0.
    """
    expert, bound, token, place = i32p(ids), i32p(bounds), i32p(tokens), i32p(places)
    for e in range(num_experts + 1):
        bound[e] = 0
    for i in range(pairs):
        token[i] = 0
        if 0 <= expert[i] - first < num_experts:
            bound[expert[i] - first + 1] += 1
    for e in range(num_experts):
        bound[e + 1] += bound[e]
    for i in range(pairs):
        e = expert[i] - first
        if 0 <= e < num_experts:
            token[bound[e]], place[i] = i // top_k, bound[e]
            bound[e] += 1
        else:
            place[i] = -1
    for e in range(num_experts, 0, -1):  # every bound has moved to the next one's place
        bound[e] = bound[e - 1]
    bound[0] = 0


@njit
def combine(
    x: int, x_stride: int, weights: int, places: int, top_k: int, y: int, y_stride: int, n: int, start: int, stop: int
) -> None:
    """Tokens [start, stop): ``y[t]`` [n] is the sum of its experts' rows of ``x``, each times its weight."""
    weight, place = f32p(weights), i32p(places)
    for t in range(start, stop):
        target = y + 4 * t * y_stride
        zero_row(target, n)
        for i in range(t * top_k, (t + 1) * top_k):
            if place[i] >= 0:  # else another rank has the expert
                add_scaled_row(x + 4 * place[i] * x_stride, target, n, weight[i])
