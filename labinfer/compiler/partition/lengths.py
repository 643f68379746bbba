"""Layers by their number only: exact where they are alike, a bound where they are not.

A stage of n layers is taken to cost what the cheapest run of n layers costs on that device, and hops nothing (or the
least of all). Every chain is at least as expensive, so the best under these costs bounds it from below. Where inner
layers are alike and hops do not bind, the best is itself a plan: the order of devices no longer matters, which makes
the problem polynomial.
"""

from __future__ import annotations

import math
from copy import copy

import numpy as np
from numpy.typing import NDArray

from labinfer.compiler.partition.tables import Chain, Run, Tables


class Lengths:
    """For each group the least seconds of n layers: at the start, at the end, in between, or anywhere."""

    def __init__(self, tables: Tables) -> None:
        self.sizes, self.count = list(tables.sizes), tables.count
        size = self.count + 1
        self.first = np.array([stage[0] for stage in tables.stage])
        self.last = np.array([stage[::-1, -1] for stage in tables.stage])
        self.inner = np.full((len(tables.stage), size), np.inf)
        for group, stage in enumerate(tables.stage):
            self.inner[group, 1 : size - 2] = [np.diagonal(stage, n)[1:-1].min() for n in range(1, size - 2)]
        self.whole = self.first[:, -1].copy()
        self.anywhere = np.minimum(np.minimum(self.first, self.last), self.inner)
        self.first[:, -1] = self.last[:, -1] = np.inf
        for seconds in (self.first, self.last, self.inner):
            seconds[:, 0] = 0.0

    def among(self, sizes: dict[int, int]) -> Lengths:
        """The same with some groups only, of the given sizes; they get new numbers."""
        some, groups = copy(self), list(sizes)
        some.sizes = list(sizes.values())
        for name in ("first", "last", "inner", "whole", "anywhere"):
            setattr(some, name, getattr(self, name)[groups])
        return some

    def bottleneck(self) -> tuple[float, Chain | None]:
        """No chain has a smaller bottleneck than the number; the chain has it if layers are alike and hops quick."""
        values = [table[np.isfinite(table)] for table in (self.first, self.last, self.inner, self.whole)]
        values.append(np.array([0.0]))
        candidates = np.unique(np.concatenate(values))
        low, high = 0, len(candidates)
        while low < high:  # the first candidate that is enough
            middle = (low + high) // 2
            low, high = (low, middle) if self._enough(candidates[middle]) else (middle + 1, high)
        if low == len(candidates):
            return math.inf, None
        return float(candidates[low]), self._chain(candidates[low])

    def _capacities(self, limit: float) -> list[NDArray[np.int64]]:
        """The most layers of each group within the limit: at the start, at the end, in between."""
        last = self.count
        return [last - np.argmax(table[:, ::-1] <= limit, axis=1) for table in (self.first, self.last, self.inner)]

    def _ends(self, limit: float) -> tuple[int, int, int]:
        """The groups of the first and last stage with which most layers are done, and how many."""
        first, last, inner = self._capacities(limit)
        total = int(inner @ np.array(self.sizes))
        gain_first, gain_last = first - inner, last - inner
        best = (-1, 0, 0)
        for i in np.argsort(-gain_first, kind="stable")[:2]:  # the best pair is among the two best of each
            for j in np.argsort(-gain_last, kind="stable")[:2]:
                if i != j or self.sizes[i] > 1:
                    best = max(best, (total + int(gain_first[i] + gain_last[j]), int(i), int(j)))
        return best

    def _enough(self, limit: float) -> bool:
        return bool((self.whole <= limit).any()) or self._ends(limit)[0] >= self.count

    def _chain(self, limit: float) -> Chain:
        """As few devices as are enough within the limit, each with as many layers as it can take."""
        alone = np.flatnonzero(self.whole <= limit)
        if len(alone):
            return (Run(int(alone[self.whole[alone].argmin()]), 0, self.count),)
        _, start, stop = self._ends(limit)
        first, last, inner = self._capacities(limit)
        left = list(self.sizes)
        left[start] -= 1
        left[stop] -= 1
        done = int(first[start])
        chain = [Run(start, 0, min(done, self.count - 1))] if done else []
        ending = int(last[stop])
        for group in np.argsort(-inner, kind="stable"):
            for _ in range(left[group]):
                if inner[group] and done < self.count - ending:
                    chain.append(Run(int(group), done, min(done + int(inner[group]), self.count - ending)))
                    done = chain[-1].stop
        if done < self.count:
            chain.append(Run(stop, done, self.count))
        return tuple(chain)

    def latency(self, hop: float, limit: float = math.inf) -> tuple[float, Chain | None]:
        """No chain is quicker than the number when each hop takes ``hop`` seconds or more.

        A knapsack: choose for each device how many layers it runs, O(D L²). The chain has that latency if layers are
        alike and all hops equal. Only stages of less than ``limit`` seconds count.
        """
        size = self.count + 1
        best = np.full(size, np.inf)
        best[0] = -hop  # the first stage has no hop before it
        taken: list[tuple[int, NDArray[np.int64]]] = []
        for group, seconds in enumerate(self.anywhere):
            lengths = np.flatnonzero(np.isfinite(seconds) & (seconds < limit) & (np.arange(size) > 0))
            for _ in range(self.sizes[group]):
                more, choice = best.copy(), np.zeros(size, dtype=np.int64)
                for n in lengths:
                    trial = best[: size - n] + (seconds[n] + hop)
                    better = trial < more[n:]
                    more[n:][better], choice[n:][better] = trial[better], n
                taken.append((group, choice))
                if not choice.any():
                    break  # nor would another device of the group help
                best = more
        if not np.isfinite(best[-1]):
            return math.inf, None
        lengths_of, left = [], self.count
        for group, choice in reversed(taken):
            if choice[left]:
                lengths_of.append((group, int(choice[left])))
                left -= int(choice[left])
        return float(best[-1]), _in_a_row(lengths_of)


def _in_a_row(lengths: list[tuple[int, int]]) -> Chain:
    chain, done = [], 0
    for group, n in sorted(lengths):
        chain.append(Run(group, done, done + n))
        done += n
    return tuple(chain)
