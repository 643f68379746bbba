"""A problem as arrays: interchangeable devices in groups, seconds of every stage, seconds of every hop."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from labinfer.compiler.partition.problem import Problem
from labinfer.compiler.partition.stages import Floats, StageTable


@dataclass(frozen=True, slots=True)
class Run:
    """Layers ``start`` to ``stop`` - 1 on one device of a group."""

    group: int
    start: int
    stop: int


Chain = tuple[Run, ...]


class Tables:
    """What all algorithms work on.

    ``groups`` lists the devices (by number) that may be exchanged without any change: same kind, memory and pins, and
    the same links. ``stage[g][a, b]`` is the time of layers a to b - 1 on a device of group g, ``hop(g, h)[c]`` the
    time to hand on what layer c - 1 computed, from a device of group g to another of group h.
    """

    def __init__(self, problem: Problem, excluded: frozenset[str] = frozenset()) -> None:
        self.problem, self.count = problem, len(problem.layers)
        self.devices = [device for device in problem.devices if device.name not in excluded]
        self._read_links()
        makers: dict[tuple[object, ...], StageTable] = {}
        pinned = set(problem.pins.values())
        tables, keys = [], []
        for device in self.devices:
            key = (id(device.kind), device.memory - device.reserved, device.name if device.name in pinned else "")
            if key not in makers:
                makers[key] = StageTable(problem, device)
            tables.append(makers[key])
            keys.append(id(makers[key]))
        self.groups = self._group(keys)
        self.sizes = [len(group) for group in self.groups]
        self.tables = [tables[group[0]] for group in self.groups]
        self.stage = [table.seconds for table in self.tables]
        self.exact = all(table.exact for table in self.tables)

    def _read_links(self) -> None:
        problem, size = self.problem, len(self.devices)
        number = {device.name: index for index, device in enumerate(self.devices)}
        latency = np.full((size, size), problem.default_link.latency)
        inverse = np.full((size, size), 1 / problem.default_link.bandwidth)
        for (source, target), link in problem.links.items():
            if source in number and target in number:
                latency[number[source], number[target]] = link.latency
                inverse[number[source], number[target]] = 1 / link.bandwidth
        work = problem.workload
        self.fixed, self.per_byte = work.steps * latency, work.tokens * inverse
        volumes = [0, *(layer.boundary_bytes for layer in problem.layers)]
        self.volume: Floats = np.array(volumes, dtype=float)

    def _group(self, keys: Sequence[int]) -> list[list[int]]:
        if self.problem.ordered:
            return [[index] for index in range(len(keys))]
        groups: list[list[int]] = []
        for index, key in enumerate(keys):
            for group in groups:
                if keys[group[0]] == key and self._alike(group[0], index):
                    group.append(index)
                    break
            else:
                groups.append([index])
        return groups

    def _alike(self, one: int, other: int) -> bool:
        """Exchanging two devices changes no link."""
        for links in (self.fixed, self.per_byte):
            others = np.ones(len(links), dtype=bool)
            others[[one, other]] = False
            same = links[one, other] == links[other, one]
            same &= bool((links[one, others] == links[other, others]).all())
            if not (same and (links[others, one] == links[others, other]).all()):
                return False
        return True

    def hop(self, source: int, target: int) -> Floats:
        """Seconds between devices of two groups (or two devices of one) at each cut 0 to ``count``."""
        one = self.groups[source][0]
        other = self.groups[target][-1 if source == target else 0]
        seconds: Floats = self.fixed[one, other] + self.per_byte[one, other] * self.volume
        return seconds

    def hop_range(self) -> tuple[float, float]:
        """The least and the largest time of a hop between two devices, at any cut."""
        inner = self.volume[1:-1]
        if len(self.devices) < 2 or not len(inner):
            return 0.0, 0.0
        apart = ~np.eye(len(self.devices), dtype=bool)
        low = (self.fixed + self.per_byte * inner.min())[apart].min()
        high = (self.fixed + self.per_byte * inner.max())[apart].max()
        return float(low), float(high)

    def relaxed(self) -> Tables:
        """Tables for bounds: themselves, or without regard to memory where a stage may be quicker than it seems."""
        if self.exact:
            return self
        relaxed = copy(self)
        relaxed.stage = [table.seconds if table.exact else table.floor for table in self.tables]
        return relaxed

    def measure(self, chain: Chain) -> tuple[float, float]:
        """Latency and bottleneck of a chain, in seconds."""
        times = [float(self.stage[run.group][run.start, run.stop]) for run in chain]
        for before, after in pairwise(chain):
            times.append(float(self.hop(before.group, after.group)[after.start]))
        return sum(times), max(times)

    def name_devices(self, chain: Chain) -> list[int]:
        """A device number for each run: the devices of a group in turn."""
        used = [0] * len(self.groups)
        numbers = []
        for run in chain:
            numbers.append(self.groups[run.group][used[run.group]])
            used[run.group] += 1
        return numbers


def reach(seconds: Floats, limit: float) -> NDArray[np.int64]:
    """``reach[a]``: the furthest b such that layers a to b - 1 take at most ``limit`` seconds, or a."""
    size = len(seconds)
    inside = seconds <= limit
    furthest = size - 1 - np.argmax(inside[:, ::-1], axis=1)
    return np.where(inside.any(axis=1), furthest, np.arange(size))
