"""Local search over the order of devices, for problems that are too large to be solved exactly.

An order is judged by the best chain on it (``best_in_order``), which places the cuts optimally and leaves out devices
that do not help; the search only changes which devices are in the order, and where.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, permutations

import numpy as np

from labinfer.compiler.partition.lengths import Lengths
from labinfer.compiler.partition.ordered import best_in_order
from labinfer.compiler.partition.tables import Chain, Tables

CLOSE = 1e-9  # relative difference that counts as none
FEW = 6  # groups of which all orders are tried

Score = Callable[[Chain], tuple[float, float]]


def improve(
    tables: Tables, seeds: list[Chain], score: Score, *, bottleneck: bool, goal: float, seconds: float
) -> Chain | None:
    """The best chain found within the time, or as soon as its score is within ``CLOSE`` of ``goal``; None if none is.

    ``score`` gives the value to be made small, and another that decides between equals. The random numbers are seeded.
    """
    deadline, rng = time.monotonic() + seconds, random.Random(0)
    best = min(seeds, key=score, default=None)

    def done() -> bool:
        return time.monotonic() > deadline or (best is not None and score(best)[0] <= goal * (1 + CLOSE))

    for order in starting_orders(tables, seeds):
        if done():
            return best
        chain = best_in_order(tables, order, bottleneck=bottleneck)
        if chain is not None and (best is None or score(chain) < score(best)):
            best = chain
    everything = [group for group, size in enumerate(tables.sizes) for _ in range(size)]
    while not done():
        if best is None:
            order = rng.sample(everything, len(everything))
        else:
            order = changed(tables, [run.group for run in best], rng)
        chain = best_in_order(tables, order, bottleneck=bottleneck)
        if chain is not None and (best is None or score(chain) <= score(best)):
            best = chain
    return best


def starting_orders(tables: Tables, seeds: list[Chain]) -> Iterator[list[int]]:
    """Orders to begin with: the seeds' devices by near links, then the quickest and the roomiest, one a layer."""
    for chain in seeds:
        yield shortest_order(tables, [run.group for run in chain])
    lengths = Lengths(tables)
    speed = np.nan_to_num(lengths.anywhere[:, 1], posinf=1e300)
    room = np.isfinite(lengths.anywhere).sum(axis=1)
    for ranking in (np.argsort(speed, kind="stable"), np.argsort(-room, kind="stable")):
        order = [int(group) for group in ranking for _ in range(tables.sizes[group])][: tables.count]
        yield order
        yield shortest_order(tables, order)


def changed(tables: Tables, order: list[int], rng: random.Random) -> list[int]:
    """A neighbour of an order: two exchanged, one moved, a part reversed, one replaced by a spare, or a spare more."""
    order = list(order)
    used = np.bincount(order, minlength=len(tables.groups))
    spare = np.flatnonzero(used < np.array(tables.sizes))
    i, j = sorted((rng.randrange(len(order)), rng.randrange(len(order))))
    move = rng.randrange(5 if len(spare) else 3)
    if move == 0:
        order[i], order[j] = order[j], order[i]
    elif move == 1:
        order.insert(rng.randrange(len(order)), order.pop(j))
    elif move == 2:
        order[i : j + 1] = order[i : j + 1][::-1]
    elif move == 3:
        order[i] = int(rng.choice(spare))
    else:
        order.insert(rng.randrange(len(order) + 1), int(rng.choice(spare)))
    return order


def shortest_order(tables: Tables, groups: list[int]) -> list[int]:
    """Devices in an order of small hops: the best of all orders of a few, else each next to the nearest one left."""
    if len(groups) <= 2:
        return groups
    cut = tables.volume[1:-1].mean()

    def seconds(one: int, other: int) -> float:
        a, b = tables.groups[one][0], tables.groups[other][-1 if one == other else 0]
        return float(tables.fixed[a, b] + tables.per_byte[a, b] * cut)

    def total(order: Iterable[int]) -> float:
        return sum(seconds(a, b) for a, b in pairwise(order))

    if len(groups) <= FEW:
        return list(min(permutations(groups), key=total))
    order, left = [groups[0]], groups[1:]
    while left:
        nearest = min(left, key=lambda group: seconds(order[-1], group))
        left.remove(nearest)
        order.append(nearest)
    return order
