"""Exact search where the order of the devices is given: dynamic programming over (last device, layers done)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from labinfer.compiler.partition.stages import Floats
from labinfer.compiler.partition.tables import Chain, Run, Tables


def best_in_order(tables: Tables, order: Sequence[int], *, bottleneck: bool, limit: float = math.inf) -> Chain | None:
    """A chain of least latency (or bottleneck) whose stages are on groups in this order; any may be left out.

    Only stages and hops of less than ``limit`` seconds are used. O(D² L + D L²) for D entries of ``order``.
    """
    combine = np.maximum if bottleneck else np.add
    size = tables.count + 1
    ends = np.full((len(order), size), np.inf)
    parents: list[tuple[np.ndarray, np.ndarray]] = []  # for each cut: start of the stage; and position before a start
    for position, group in enumerate(order):
        begin, before = np.full(size, np.inf), np.full(size, -1)
        begin[0] = 0.0
        if position:
            hops = _hops(tables, order[:position], group, limit)
            together: Floats = combine(ends[:position], hops)
            before[1:] = together[:, 1:].argmin(axis=0)
            begin[1:] = together[:, 1:].min(axis=0)
        stage = np.where(tables.stage[group] < limit, tables.stage[group], np.inf)
        through: Floats = combine(begin[:, None], stage)
        ends[position] = through.min(axis=0)
        parents.append((through.argmin(axis=0), before))
    position, stop = int(ends[:, -1].argmin()), tables.count
    if not np.isfinite(ends[position, -1]):
        return None
    chain: list[Run] = []
    while stop:
        starts, before = parents[position]
        chain.append(Run(order[position], int(starts[stop]), stop))
        stop = int(starts[stop])
        position = int(before[stop])
    return tuple(reversed(chain))


def _hops(tables: Tables, sources: Sequence[int], target: int, limit: float) -> Floats:
    """Seconds of a hop from each source group at each cut, one row a source."""
    ones = [tables.groups[group][0] for group in sources]
    others = [tables.groups[target][-1 if group == target else 0] for group in sources]
    hops: Floats = tables.fixed[ones, others][:, None] + tables.per_byte[ones, others][:, None] * tables.volume
    return np.where(hops < limit, hops, np.inf)
