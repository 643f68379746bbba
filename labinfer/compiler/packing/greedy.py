"""Greedy packings: place buffers one by one, in several orders, each in a gap between those already placed.

Orders after Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020), and others in use in
the field; trying several and keeping the best costs little, and for one transformer step one of them meets the bound.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

from labinfer.compiler.packing.problem import Instance

PAIRS_LIMIT = 1_000_000  # beyond this many overlapping pairs the placed buffers are scanned with numpy instead


def portfolio(instance: Instance, deadline: float) -> tuple[list[int], str]:
    """The best offsets over all orders, and the name of what found them.

    Stops at the lower bound, and after ``deadline`` (``time.monotonic``) once there is any packing.
    """
    place = place_few if instance.overlaps <= PAIRS_LIMIT or sum(instance.size) >= 1 << 62 else place_many
    best, best_peak, best_name = [0] * instance.count, -1, "greedy"
    for order_name, order in orders(instance):
        for best_fit in (True, False):
            if best_peak >= 0 and time.monotonic() > deadline:
                return best, best_name
            offsets = place(instance, order, best_fit)
            peak = instance.peak(offsets)
            if best_peak < 0 or peak < best_peak:
                best, best_peak = offsets, peak
                best_name = f"greedy by {order_name}, {'best' if best_fit else 'first'} fit"
            if best_peak == instance.load:
                return best, best_name
    return best, best_name


def orders(instance: Instance) -> Iterator[tuple[str, list[int]]]:
    """Orders of placement, the most often successful first."""
    size, duration = instance.size, instance.duration
    key: dict[str, Callable[[int], Any]] = {
        "size": lambda i: (-size[i], instance.lower[i]),
        "size and lifetime": lambda i: (-size[i], -duration(i)),
        "area": lambda i: -size[i] * duration(i),
        "lifetime": lambda i: (-duration(i), -size[i]),
    }
    for name in key:
        yield name, sorted(range(instance.count), key=key[name])
    load = [max(instance.totals[instance.first[i] : instance.last[i]]) for i in range(instance.count)]
    yield "load and size", sorted(range(instance.count), key=lambda i: (-load[i], -size[i]))
    yield "load and area", sorted(range(instance.count), key=lambda i: (-load[i], -size[i] * duration(i)))
    yield "load and lifetime", sorted(range(instance.count), key=lambda i: (-load[i], -duration(i), -size[i]))
    yield "birth", sorted(range(instance.count), key=lambda i: (instance.lower[i], -size[i]))
    if instance.overlaps <= PAIRS_LIMIT:
        degree = [len(neighbours) for neighbours in instance.neighbours]
        yield "conflicts", sorted(range(instance.count), key=lambda i: (-degree[i], -size[i]))
        yield "breadth", _by_breadth(instance)


def _by_breadth(instance: Instance) -> list[int]:
    """The most loaded section first, big buffers first in each."""
    order: dict[int, None] = {}
    for section in sorted(range(len(instance.totals)), key=lambda s: -instance.totals[s]):
        order.update(dict.fromkeys(sorted(instance.live[section], key=lambda i: -instance.size[i])))
    return list(order)


def place_few(instance: Instance, order: list[int], best_fit: bool) -> list[int]:
    """Offsets from placing buffers in ``order``, each in the tightest (or the lowest) gap, else on top."""
    offsets = [-1] * instance.count
    size = instance.size
    for i in order:
        below, at, tightest = 0, -1, 0
        for offset, j in sorted((offsets[j], j) for j in instance.neighbours[i] if offsets[j] >= 0):
            gap = offset - below
            if gap >= size[i] and (at < 0 or gap < tightest):
                at, tightest = below, gap
                if not best_fit or gap == size[i]:
                    break
            below = max(below, offset + size[j])
        offsets[i] = at if at >= 0 else below
    return offsets


def place_many(instance: Instance, order: list[int], best_fit: bool) -> list[int]:
    """As ``place_few``, for tens of thousands of buffers: numpy finds the live ones among all that are placed."""
    import numpy as np

    rows = np.zeros((4, instance.count), dtype=np.int64)  # lower, upper, offset, end; sorted by offset
    lower, upper, start, end = rows
    sorted_offsets: list[int] = []
    offsets = [0] * instance.count
    for count, i in enumerate(order):
        size = instance.size[i]
        alive = (lower[:count] < instance.upper[i]) & (upper[:count] > instance.lower[i])
        tops = np.maximum.accumulate(end[:count][alive])
        below = np.concatenate(([0], tops))
        gaps = start[:count][alive] - below[:-1]
        fits = np.flatnonzero(gaps >= size)
        gap = -1 if not len(fits) else fits[np.argmin(gaps[fits])] if best_fit else fits[0]  # -1: on top of all
        at = int(below[gap])
        offsets[i] = at
        position = bisect_left(sorted_offsets, at)
        sorted_offsets.insert(position, at)
        rows[:, position + 1 : count + 1] = rows[:, position:count].copy()
        rows[:, position] = instance.lower[i], instance.upper[i], at, at + size
    return offsets
