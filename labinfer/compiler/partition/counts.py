"""Exact search over how many devices of each group are used: dynamic programming over counts.

Where all devices differ, a count is 0 or 1 and this is the dynamic programme over subsets. A state is (devices used of
each group, group of the last, layers done); equal devices are never told apart, so 8 + 12 + 4 devices have 585 counts,
not 2 ** 24.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
from numpy.typing import NDArray

from labinfer.compiler.partition.stages import Floats
from labinfer.compiler.partition.tables import Chain, Run, Tables

STEP_CELLS = 2_000_000  # numbers in one array of a transition


def work(tables: Tables) -> float:
    """About how many numbers ``best_chain`` computes."""
    states = math.prod(size + 1 for size in tables.sizes)
    return states * len(tables.groups) * (tables.count + 1) * (len(tables.groups) + (tables.count + 1) / 2)


class CountSearch:
    """Shortest chains in the sense of the sum of its times, or of the largest of them.

    ``best_chain(limit)`` considers stages and hops of less than ``limit`` seconds only.
    """

    def __init__(self, tables: Tables, *, bottleneck: bool) -> None:
        self.tables, self.bottleneck = tables, bottleneck
        self.counts = np.array(list(product(*(range(size + 1) for size in tables.sizes))))
        sizes = np.array(tables.sizes) + 1
        self.strides = np.concatenate([np.cumprod(sizes[::-1])[-2::-1], [1]]).astype(int)
        self.levels = self.counts.sum(axis=1)

    def best_chain(self, limit: float = math.inf) -> Chain | None:
        """A chain of least value, or None where no chain is possible."""
        tables, groups = self.tables, range(len(self.tables.groups))
        stages = [np.where(stage < limit, stage, np.inf) for stage in tables.stage]
        hops = np.array([[tables.hop(i, j) for j in groups] for i in groups])
        hops[hops >= limit] = np.inf
        value = np.full((len(self.counts), len(groups), tables.count + 1), np.inf)
        for level in range(sum(tables.sizes)):
            here = np.flatnonzero(self.levels == level)
            for group in groups:
                states = here[self.counts[here, group] < tables.sizes[group]]
                if len(states):
                    begin = self._begin(value[states], hops[:, group], first=level == 0)
                    value[states + self.strides[group], group] = self._extend(begin, stages[group])
        state, group = divmod(int(value[:, :, -1].argmin()), len(groups))
        if not np.isfinite(value[state, group, -1]):
            return None
        return self._trace(value, stages, hops, state, group)

    def _begin(self, value: Floats, hops: Floats, *, first: bool) -> Floats:
        """The least value at which a stage after cut a can begin, for each state and a."""
        if first:
            begin = np.full((1, value.shape[2]), np.inf)
            begin[0, 0] = 0.0
            return begin
        together = np.maximum(value, hops) if self.bottleneck else value + hops
        least: Floats = together.min(axis=1)
        return least

    def _extend(self, begin: Floats, stage: Floats) -> Floats:
        """The least value at which a stage can end at each cut b."""
        combine = np.maximum if self.bottleneck else np.add
        size = begin.shape[1]
        ends = np.full_like(begin, np.inf)
        width = max(1, min(size, STEP_CELLS // (len(begin) * size)))
        for start in range(0, size, width):
            part = slice(start, start + width)
            np.minimum(ends, combine(begin[:, part, None], stage[None, part]).min(axis=1), out=ends)
        return ends

    def _trace(self, value: Floats, stages: list[Floats], hops: Floats, state: int, group: int) -> Chain:
        """The chain behind a value, from its end: the predecessor is the one that gives the value again."""
        chain: list[Run] = []
        stop = self.tables.count
        while stop:
            before = state - int(self.strides[group])
            begin = self._begin(value[[before]], hops[:, group], first=before == 0)[0]
            start = self._argmin(begin, stages[group][:, stop])
            chain.append(Run(group, start, stop))
            state, stop = before, start
            if stop:
                group = self._argmin(value[state, :, stop], hops[:, group, stop])
        return tuple(reversed(chain))

    def _argmin(self, some: NDArray[np.float64], more: NDArray[np.float64]) -> int:
        return int((np.maximum(some, more) if self.bottleneck else some + more).argmin())
