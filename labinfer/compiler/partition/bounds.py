"""Values that no chain can be below, without solving the problem."""

from __future__ import annotations

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from labinfer.compiler.partition.lengths import Lengths
from labinfer.compiler.partition.stages import Floats
from labinfer.compiler.partition.tables import Tables, reach

HALVINGS = 50


def bottleneck_bound(tables: Tables, lengths: Lengths) -> float:
    """The largest of four bounds on the slowest stage or hop.

    By number of layers (``Lengths``); by the dearest single layer; and by load: whatever we take as the load of each
    layer, what the devices can take within a limit of seconds must add up to all of it. And by region: a chain whose
    hops are all quick stays among devices that quick links join.
    """
    value = max(lengths.bottleneck()[0], _dearest_layer(tables))
    for load in _loads(tables):
        value = max(value, _load_bound(tables, load, value))
    return max(value, _region_bound(tables, lengths))


def latency_bound(tables: Tables, lengths: Lengths) -> float:
    """The larger of the knapsack of ``Lengths`` and every layer on the device that is best for it."""
    least_hop, _ = tables.hop_range()
    return max(lengths.latency(least_hop)[0], float(_cheapest(tables).sum()))


def _region_bound(tables: Tables, lengths: Lengths) -> float:
    """The least of max(slowest hop allowed, best bottleneck inside a region that such hops join), over all hops."""
    groups = range(len(tables.sizes))
    hops = np.array([[tables.hop(i, j)[1:-1].min(initial=np.inf) for j in groups] for i in groups])
    hops = np.minimum(hops, hops.T)
    alone = np.array(tables.sizes) == 1
    hops[alone, alone] = np.inf
    allowed = np.concatenate([[-1.0], np.unique(hops[np.isfinite(hops)])])  # -1: no hop at all
    low, high = 0, len(allowed) - 1
    while low < high:  # more hops allowed make regions larger and their bound less: find where the two meet
        middle = (low + high) // 2
        if _best_region(tables, lengths, hops <= allowed[middle]) <= allowed[middle]:
            high = middle
        else:
            low = middle + 1
    value = max(float(allowed[low]), _best_region(tables, lengths, hops <= allowed[low]))
    return min(value, _best_region(tables, lengths, hops <= allowed[low - 1])) if low else value


def _best_region(tables: Tables, lengths: Lengths, joined: NDArray[np.bool_]) -> float:
    """The least bound by number of layers of any region, groups being joined as the matrix says."""
    graph = nx.from_numpy_array(joined & ~np.eye(len(joined), dtype=bool))
    best = float(lengths.whole.min())
    for members in nx.connected_components(graph):
        groups = sorted(members)
        if len(groups) > 1 or joined[groups[0], groups[0]]:
            best = min(best, lengths.among({group: tables.sizes[group] for group in groups}).bottleneck()[0])
    return best


def _single(tables: Tables) -> Floats:
    """Seconds of each layer alone, one row a group, without regard to memory."""
    return np.array([np.diagonal(table.floor, 1) for table in tables.tables])


def _cheapest(tables: Tables) -> Floats:
    cheapest: Floats = _single(tables).min(axis=0)
    return cheapest


def _dearest_layer(tables: Tables) -> float:
    return float(np.min([np.diagonal(stage, 1) for stage in tables.stage], axis=0).max())


def _loads(tables: Tables) -> list[Floats]:
    """Layers weighed by their seconds: on the best device, and on average."""
    single = _single(tables)
    finite = np.where(np.isfinite(single), single, 0.0)
    return [load for load in (finite.min(axis=0), finite.mean(axis=0)) if load.sum() > 0]


def _load_bound(tables: Tables, load: Floats, low: float) -> float:
    """The least limit, of ``low`` or more, within which devices can take the whole load."""
    sums = np.concatenate([[0.0], np.cumsum(load)])
    total = sums[-1] * (1 - 1e-12)

    def enough(limit: float) -> bool:
        taken = [(sums[reach(stage, limit)] - sums).max() for stage in tables.stage]
        return float(np.dot(taken, tables.sizes)) >= float(total)

    high = max(float(stage[np.isfinite(stage)].max(initial=0.0)) for stage in tables.stage)
    if not np.isfinite(low) or enough(low) or not enough(high):
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return low
