"""The cheapest way for a device to run a run of layers: which are resident, streamed or computed on the host.

A step takes the longer of computing and of copying weights, and that part of the shorter that does not overlap with it.
Its memory holds resident weights, the keys and values of all layers that the device computes, and two buffers as large
as what is copied of the largest streamed layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from labinfer.compiler.partition.problem import Device, Problem, Residency

Floats = NDArray[np.float64]

MEMORY, PREFILL, DECODE, COPIES, BUFFER, CHOICES = range(6)  # columns of a table of options; choices come last
GRID = 64  # more layers of one class than this are tried in coarser numbers
PRUNE_ABOVE = 5000  # options that are looked through for dominated ones
SAMPLE = 100  # options that the others are compared with
MAX_OPTIONS = 20_000  # options kept; when more are useful, the stage counts as not exact


class StageTable:
    """Seconds of every run of layers on one device, as far as memory allows.

    ``seconds[a, b]`` is the time of layers a to b - 1 (``inf`` where b <= a, or it cannot be); ``floor`` is the same
    without regard to memory, no larger. ``exact`` is False when a better choice of residencies may exist.
    """

    def __init__(self, problem: Problem, device: Device) -> None:
        self.problem, self.device = problem, device
        self.count, self.exact = len(problem.layers), True
        self.memory = device.memory - device.reserved
        kind, layers = device.kind, problem.layers
        self.weights = np.array([layer.weight_bytes for layer in layers], dtype=float)
        self.fixed = np.array([layer.fixed_bytes for layer in layers], dtype=float)
        self.kv = np.array([layer.kv_bytes * problem.workload.kv_tokens for layer in layers], dtype=float)
        self.on_device = np.array([kind.prefill, kind.decode], dtype=float)
        self.on_host = np.array([kind.host_prefill, kind.host_decode], dtype=float) if kind.host_prefill else None
        self.classes = self._classes()
        self.best: dict[tuple[int, ...], float] = {}
        self.known: dict[tuple[int, ...], Floats] = {}  # options of runs that begin at ``start``
        self.start = -1
        work = problem.workload
        self.phases = np.array([work.prefill_steps, work.decode_steps])
        self.criteria = np.array([True, work.prefill_steps > 0, work.decode_steps > 0, True, True])
        self.seconds, self.floor = self._fill()

    def _classes(self) -> NDArray[np.int64]:
        """A number for each layer; layers of the same number cost the same here."""
        columns = [self.weights, self.fixed, self.kv, *self.on_device]
        columns += [] if self.on_host is None else [*self.on_host]
        known: dict[tuple[float, ...], int] = {}
        return np.array([known.setdefault(row, len(known)) for row in zip(*columns, strict=True)])

    def _fill(self) -> tuple[Floats, Floats]:
        phases = self.on_device if self.on_host is None else np.minimum(self.on_device, self.on_host)
        resident = _spans(_weighted(self.phases, self.on_device))
        floor = _spans(_weighted(self.phases, phases))
        bytes_needed = _spans(self.weights + self.kv)
        bytes_needed[0, self.count] -= self.problem.tied_bytes
        seconds = np.where(bytes_needed <= self.memory, resident, np.inf)
        allowed = self._allowed()
        self.resident = np.isfinite(seconds) & ((seconds <= floor) | (not self._has_choice()))
        if self._has_choice():
            for start, stop in np.argwhere(allowed & ~self.resident & np.isfinite(floor)):
                seconds[start, stop] = self._solve(int(start), int(stop))
        return np.where(allowed, seconds, np.inf), np.where(allowed, floor, np.inf)

    def _has_choice(self) -> bool:
        return self.device.kind.stream_bandwidth > 0 or self.on_host is not None

    def _allowed(self) -> NDArray[np.bool_]:
        """Runs of layers without one that is pinned to another device."""
        pins = self.problem.pins
        foreign = [pins.get(layer.name, self.device.name) != self.device.name for layer in self.problem.layers]
        return np.asarray(_spans(np.array(foreign, dtype=float)) == 0)

    def _solve(self, start: int, stop: int) -> float:
        if start != self.start:
            self.start, self.known = start, {}
        counts = np.bincount(self.classes[start:stop], minlength=self.classes.max() + 1)
        whole = stop - start == self.count and self.problem.tied_bytes > 0
        key = (whole, *counts.tolist())
        if key not in self.best:
            options = self._tied_whole(counts)[0] if whole else self._options(tuple(counts.tolist()))
            self.best[key] = float(self._times(options).min(initial=np.inf))
        return self.best[key]

    def _options(self, counts: tuple[int, ...]) -> Floats:
        """Choices for so many layers of each class that fit, but not what was chosen; made from a class less."""
        if counts not in self.known:
            largest = max(range(len(counts)), key=lambda number: (counts[number], number))
            if not counts[largest]:
                return np.zeros((1, CHOICES))
            rest = self._options((*counts[:largest], 0, *counts[largest + 1 :]))
            self.known[counts] = self._merge(rest, self._of_class(largest, counts[largest])[:, :CHOICES])
        return self.known[counts]

    def _with_choices(self, counts: NDArray[np.int64], options: Floats) -> tuple[Floats, list[int]]:
        """``options`` with every choice for so many layers of each class, and the order of the classes."""
        order = [int(number) for number in np.argsort(counts, kind="stable") if counts[number]]
        for number in order:
            options = self._merge(options, self._of_class(number, int(counts[number])))
        fits = options[:, MEMORY] + options[:, BUFFER] <= self.memory
        return options[fits], order

    def _tied_whole(self, counts: NDArray[np.int64]) -> tuple[Floats, list[int]]:
        """Choices for all layers, where the bytes that the first and the last share count once if both are resident."""
        ends = _outer(*(self._of_class(int(self.classes[layer]), 1) for layer in (0, -1)))
        ends[(ends[:, CHOICES:] == 0).all(axis=1), MEMORY] -= self.problem.tied_bytes
        inner = counts - np.bincount(self.classes[[0, -1]], minlength=len(counts))
        return self._with_choices(inner, ends)

    def _of_class(self, number: int, count: int) -> Floats:
        """Choices for ``count`` layers of a class: how many are streamed and how many are left to the host."""
        layer = int(np.argmax(self.classes == number))
        grid = np.arange(count + 1) if count <= GRID else np.unique(np.linspace(0, count, GRID + 1).round())
        self.exact &= count <= GRID
        weight, moved, kv = self.weights[layer], self.weights[layer] - self.fixed[layer], self.kv[layer]
        streamed, host = np.meshgrid(
            grid if self.device.kind.stream_bandwidth and moved else grid[:1],
            grid if self.on_host is not None else grid[:1],
        )
        possible = streamed + host <= count
        streamed, host = streamed[possible], host[possible]
        phases = [_times(count - host, each[layer]) for each in self.on_device]
        if self.on_host is not None:
            phases = [mine + _times(host, each[layer]) for mine, each in zip(phases, self.on_host, strict=True)]
        copies = streamed * moved / (self.device.kind.stream_bandwidth or np.inf)
        memory = (count - host) * (weight + kv) - streamed * moved
        return np.column_stack([memory, *phases, copies, np.where(streamed > 0, 2 * moved, 0), streamed, host])

    def _merge(self, some: Floats, more: Floats) -> Floats:
        merged = _outer(some, more)
        merged = merged[merged[:, MEMORY] + merged[:, BUFFER] <= self.memory]
        return self._prune(merged) if len(merged) > PRUNE_ABOVE else merged

    def _prune(self, options: Floats) -> Floats:
        """Drop choices that one of a sample is no worse than in every respect; keep the quickest of too many."""
        options = options[np.argsort(self._times(options), kind="stable")]
        for limit, sample in ((PRUNE_ABOVE, SAMPLE), (MAX_OPTIONS, 10 * SAMPLE)):
            if len(options) > limit:
                criteria, kept = options[:, :CHOICES][:, self.criteria], np.ones(len(options), dtype=bool)
                for row in range(0, len(options), max(1, len(options) // sample)):
                    if kept[row]:
                        kept[row + 1 :] &= (criteria[row + 1 :] < criteria[row]).any(axis=1)
                options = options[kept]
        if len(options) > MAX_OPTIONS:
            smallest = [int(options[:, MEMORY].argmin())]  # the one most likely to leave room for more layers
            self.exact, options = False, np.concatenate([options[:MAX_OPTIONS], options[smallest]])
        return options

    def _times(self, options: Floats) -> Floats:
        computed, copied = options[:, [PREFILL, DECODE]], options[:, [COPIES]]
        return _weighted(self.phases, (computed + copied - self.device.kind.overlap * np.minimum(computed, copied)).T)

    def residencies(self, start: int, stop: int) -> tuple[Residency, ...]:
        """The choice behind ``seconds[start, stop]``, one for each layer; streamed layers are spread evenly."""
        if self.resident[start, stop]:
            return (Residency.RESIDENT,) * (stop - start)
        left = self.classes[start:stop].copy()
        counts, places = np.bincount(left, minlength=self.classes.max() + 1), []
        if stop - start == self.count and self.problem.tied_bytes:
            options, order = self._tied_whole(counts)
            places, left[[0, -1]] = [np.array([0]), np.array([self.count - 1])], -1
        else:
            options, order = self._with_choices(counts, np.zeros((1, CHOICES)))
        places += [np.flatnonzero(left == number) for number in order]
        choices = options[int(self._times(options).argmin()), CHOICES:].reshape(-1, 2).astype(int)
        chosen = [Residency.RESIDENT] * (stop - start)
        for members, (streamed, host) in zip(places, choices, strict=True):
            rest = len(members) - host
            for number in range(host):
                chosen[members[rest + number]] = Residency.HOST
            for number in range(streamed):
                chosen[members[number * rest // streamed]] = Residency.STREAMED
        return tuple(chosen)


def _times(count: NDArray[Any], seconds: float) -> Floats:
    """Their product, where no times forbidden is nothing."""
    product: Floats = np.where(count > 0, np.where(count > 0, count, 1) * seconds, 0.0)
    return product


def _weighted(weights: Floats, phases: Floats) -> Floats:
    """Sum of phases by weight; a phase that never happens costs nothing, even where it is forbidden."""
    total = np.zeros(phases.shape[1])
    for weight, seconds in zip(weights, phases, strict=True):
        if weight:
            total += weight * seconds
    return total


def _spans(amounts: Floats) -> Floats:
    """``spans[a, b]``: the sum of amounts a to b - 1, ``inf`` where b <= a or one of them is."""
    finite = np.isfinite(amounts)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, amounts, 0.0))])
    bad = np.concatenate([[0], np.cumsum(~finite)])
    spans: Floats = np.maximum(sums[None, :] - sums[:, None], 0.0)
    spans[(bad[None, :] > bad[:, None]) | np.tri(len(sums), dtype=bool)] = np.inf
    return spans


def _outer(some: Floats, more: Floats) -> Floats:
    """Every choice of ``some`` with every one of ``more``: sums, the larger buffer, and both choices."""
    left, right = np.repeat(some, len(more), axis=0), np.tile(more, (len(some), 1))
    sums = left[:, :CHOICES] + right[:, :CHOICES]
    sums[:, BUFFER] = np.maximum(left[:, BUFFER], right[:, BUFFER])
    return np.hstack([sums, left[:, CHOICES:], right[:, CHOICES:]])
