"""Exact bottleneck for any layers where hops do not bind: how far do so many devices of each kind get?

For a limit of seconds, state (devices used of each group) keeps only the furthest layer done; further is never worse,
as a part of a run takes no longer than the whole. Binary search over the limit.
"""

from __future__ import annotations

import math

import numpy as np

from labinfer.compiler.partition.tables import Chain, Run, Tables, reach


def states(tables: Tables) -> int:
    """The number of counts that are kept at once."""
    return math.prod(size + 1 for size in tables.sizes)


def best_bottleneck(tables: Tables, low: float, high: float) -> tuple[float, Chain | None]:
    """The least bottleneck in [low, high] if hops took no time, and a chain with it (None: there is none)."""
    times = [stage[np.isfinite(stage) & (stage >= low) & (stage <= high)] for stage in tables.stage]
    candidates = np.unique(np.concatenate([*times, [low]]))
    first, end = 0, len(candidates)
    while first < end:
        middle = (first + end) // 2
        if _furthest(tables, candidates[middle]).flat[-1] >= tables.count:
            end = middle
        else:
            first = middle + 1
    if first == len(candidates):
        return math.inf, None
    return float(candidates[first]), _chain(tables, candidates[first])


def _furthest(tables: Tables, limit: float) -> np.ndarray:
    """For each count of devices, the furthest cut reached within the limit; counts are the array's axes.

    Computed row by row along the largest group's axis, all rows of the other groups at once being done before.
    """
    reaches = [reach(stage, limit) for stage in tables.stage]
    furthest = np.zeros([size + 1 for size in tables.sizes], dtype=np.int64)
    levels = np.indices(furthest.shape).sum(axis=0).ravel()
    flat = furthest.ravel()
    order = np.argsort(levels, kind="stable")
    strides = np.array(furthest.strides) // furthest.itemsize
    sizes = np.array(furthest.shape)
    for part in np.split(order, np.flatnonzero(np.diff(levels[order])) + 1)[1:]:
        best = np.zeros(len(part), dtype=np.int64)
        for group, after in enumerate(reaches):
            has = part // strides[group] % sizes[group] > 0
            best[has] = np.maximum(best[has], after[flat[part[has] - strides[group]]])
        flat[part] = best
    return furthest


def _chain(tables: Tables, limit: float) -> Chain:
    furthest = _furthest(tables, limit)
    reaches = [reach(stage, limit) for stage in tables.stage]
    enough = np.argwhere(furthest >= tables.count)
    counts = enough[enough.sum(axis=1).argmin()]
    groups: list[int] = []
    while furthest[tuple(counts)] > 0:
        for group, after in enumerate(reaches):
            if counts[group]:
                counts[group] -= 1
                before = int(furthest[tuple(counts)])
                counts[group] += 1
                if after[before] == furthest[tuple(counts)]:
                    counts[group] -= 1
                    groups.append(group)
                    break
    chain, done = [], 0
    for group in reversed(groups):
        chain.append(Run(group, done, int(reaches[group][done])))
        done = chain[-1].stop
    return tuple(run for run in chain if run.stop > run.start)
