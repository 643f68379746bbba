"""Packing buffers into the smallest arena: greedy orders first, then exact search within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress

from labinfer.compiler.packing import greedy
from labinfer.compiler.packing.problem import Buffer, Instance, Packing, check_buffers
from labinfer.compiler.packing.skyline import OutOfBudget, SkylineSearch, ranking
from labinfer.compiler.packing.verify import verify

SEARCH_LIMIT = 1 << 61  # heights the search can represent
FIRST_ROUNDS = 8  # rounds of restarts at the lower bound before anything above it is tried
RESTART_NODES = 2  # node limit of the shortest restart, per buffer
STRATEGIES = (("WAT", False), ("Z", False), ("TWA", True), ("TAW", False))  # ranking, and whether lowest valley first


def pack(
    buffers: Sequence[Buffer],
    *,
    capacity: int | None = None,
    effort_seconds: float = 1.0,
    node_limit: int | None = None,
) -> Packing:
    """Offsets for ``buffers`` such that no two alive together overlap, in as small an arena as found.

    Stops at the lower bound. Above it, searches for at most ``effort_seconds`` and ``node_limit`` search nodes
    (None: no limit); with ``capacity`` (bytes), the search ends once the packing fits. Not fitting is no error: compare
    ``peak``. Buffers of no size or no lifetime get offset 0. The offsets depend on the clock only through when the
    search gives up.

    Raises ``UsageError`` for repeated ids, negative sizes or lifetimes that end before they start.
    """
    started = time.monotonic()
    check_buffers(buffers)
    kept = [buffer for buffer in buffers if buffer.size and buffer.upper > buffer.lower]
    instance = Instance(kept)
    deadline = started + effort_seconds
    offsets, algorithm = greedy.portfolio(instance, deadline)
    tightening = Tightening(instance, offsets, algorithm, deadline, node_limit)
    if instance.overlaps <= greedy.PAIRS_LIMIT and tightening.peak < SEARCH_LIMIT:
        with suppress(OutOfBudget):
            tightening.run(capacity)
    by_id = dict.fromkeys((buffer.id for buffer in buffers), 0)
    by_id.update((buffer.id, offset) for buffer, offset in zip(kept, tightening.offsets, strict=True))
    verify(kept, by_id, tightening.peak)
    return Packing(
        offsets=by_id,
        peak=tightening.peak,
        lower_bound=instance.load,
        optimal=tightening.peak == tightening.bound,
        algorithm=tightening.algorithm,
        seconds=time.monotonic() - started,
    )


class Tightening:
    """Lowers the peak of a packing by searches at chosen heights.

    ``bound`` is the height below which no packing exists: the load, or more when a search ran dry.
    """

    def __init__(
        self, instance: Instance, offsets: list[int], algorithm: str, deadline: float, node_limit: int | None
    ) -> None:
        self.instance, self.offsets, self.algorithm = instance, offsets, algorithm
        self.deadline, self.nodes_left = deadline, math.inf if node_limit is None else node_limit
        self.peak, self.bound = instance.peak(offsets), instance.load
        self.unit = math.gcd(*instance.size)  # every height in a packing that cannot be pushed down is a multiple
        self.searches: dict[int, tuple[SkylineSearch, int]] = {}  # by height, with the rounds done

    def run(self, capacity: int | None) -> None:
        """Search until the bound is met, the capacity is, or the budget is spent (``OutOfBudget``)."""
        self._rounds(self.bound, FIRST_ROUNDS)
        if capacity is not None and capacity >= self.instance.load:
            while self.bound <= capacity < self.peak:
                if self._rounds(self.instance.load, 1) is None:
                    self._rounds(capacity // self.unit * self.unit, 1)
            if self.peak <= capacity:
                return
        patience = FIRST_ROUNDS
        while self.bound < self.peak:
            self._bisect(patience)
            patience *= 2

    def _bisect(self, patience: int) -> None:
        """One descent, taking a height at which ``patience`` rounds found nothing for too low."""
        low = self.bound
        while low < self.peak:
            target = low + (self.peak - low) // self.unit // 2 * self.unit
            if not self._rounds(target, patience):
                low = max(target + self.unit, self.bound)

    def _rounds(self, target: int, rounds: int) -> bool | None:
        """Up to ``rounds`` rounds of restarts at a height: True found, False none exists, None not found."""
        if not self.bound <= target < self.peak:
            return target >= self.peak
        search, done = self.searches.get(target) or (SkylineSearch(self.instance, target), 0)
        for number in range(done, done + rounds):
            self.searches[target] = search, number + 1
            limit = RESTART_NODES * self.instance.count * luby(number + 1)
            for keys, lowest in STRATEGIES:
                found = self._restart(search, keys, lowest, number, limit)
                if found is not None:
                    return found
        return None

    def _restart(self, search: SkylineSearch, keys: str, lowest: bool, number: int, limit: int) -> bool | None:
        """One search of at most ``limit`` nodes; all but the first of each strategy in a shaken order."""
        if self.nodes_left <= 0 or time.monotonic() > self.deadline:
            raise OutOfBudget
        before, limit = search.nodes, int(min(limit, self.nodes_left))
        try:
            order = ranking(self.instance, keys, number or None)
            learned = number % 2 == 1  # in turns, as some problems want the weights of past failures and some do not
            found = search.run(order, lowest=lowest, learned=learned, node_limit=limit, deadline=self.deadline)
        except OutOfBudget:
            return None
        finally:
            self.nodes_left -= search.nodes - before
        if found:
            self.offsets, self.peak = list(search.offsets), self.instance.peak(search.offsets)
            self.algorithm = f"skyline search by {keys}{' from the lowest valley' if lowest else ''}"
            self.searches.clear()  # of heights that no longer matter
        else:
            self.bound = search.capacity + self.unit
        return found


def luby(number: int) -> int:
    """The restart lengths 1 1 2 1 1 2 4 ... (Luby, Sinclair and Zuckerman, 1993), counted from 1."""
    power = 1 << (number.bit_length() - 1)
    return power if number == 2 * power - 1 else luby(number - power + 1)
