"""Values that no chain can be below, without solving the problem."""

from __future__ import annotations

import numpy as np

from labinfer.compiler.partition.lengths import Lengths
from labinfer.compiler.partition.stages import Floats
from labinfer.compiler.partition.tables import Tables, reach

HALVINGS = 50


def bottleneck_bound(tables: Tables, lengths: Lengths) -> float:
    """The largest of three bounds on the slowest stage or hop.

    By number of layers (``Lengths``); by the dearest single layer; and by load: whatever we take as the load of each
    layer, what the devices can take within a limit of seconds must add up to all of it.
    """
    value = max(lengths.bottleneck()[0], _dearest_layer(tables))
    for load in _loads(tables):
        value = max(value, _load_bound(tables, load, value))
    least_hop, _ = tables.hop_range()
    return min(float(lengths.whole.min()), max(value, least_hop))  # one device alone has no hop


def latency_bound(tables: Tables, lengths: Lengths) -> float:
    """The larger of the knapsack of ``Lengths`` and every layer on the device that is best for it."""
    least_hop, _ = tables.hop_range()
    return max(lengths.latency(least_hop)[0], float(_cheapest(tables).sum()))


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
