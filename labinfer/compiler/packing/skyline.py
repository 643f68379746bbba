"""Exact search for a packing of a given height: depth-first over the skyline of what is already placed.

In a packing where nothing can be pushed down, every buffer lies at offset 0 or on top of another. So the search
builds from the bottom: the state is the skyline (the lowest offset still open in each section of time) and the set of
unplaced buffers. It picks one section at the bottom of a valley and branches on what lies exactly there: one of the
unplaced buffers that fit, or nothing, in which case the section rises to the next height at which something can start.
The branches exclude each other, so a branch that ran dry is a proof, and equal states are remembered across restarts.

Sources: canonical placement, section floors and decomposition in time from Moffitt, "MiniMalloc: A Lightweight Memory
Allocator for Hardware-Accelerated Machine Learning" (ASPLOS 2023); branching on the section with the fewest choices
weighted by past failures from Boussemart et al., "Boosting Systematic Search by Weighting Constraints" (ECAI 2004).
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable
from hashlib import blake2b
from operator import itemgetter
from typing import Any

from labinfer.compiler.packing.problem import Instance

PLACED = 1 << 62  # the height of a buffer that is already placed; above every capacity the search takes
NOTHING = -1  # the branch that leaves the bottom of a section empty
MEMO_LIMIT = 200_000  # states remembered as hopeless, about 100 bytes each


class OutOfBudget(Exception):
    """The node limit or the deadline was reached before an answer."""


class Frame:
    """One open decision: what lies at the bottom of ``section``, for the buffers of sections [start, end)."""

    __slots__ = ("agenda", "choices", "end", "key", "mark", "nodes", "parent", "section", "start")

    def __init__(self, start: int, end: int, parent: int, agenda: Agenda, key: bytes) -> None:
        self.start, self.end, self.parent, self.agenda, self.key = start, end, parent, agenda, key
        self.choices: list[int] = []
        self.section = self.mark = self.nodes = 0


Agenda = tuple[int, int, int, Any] | None  # open parts as a linked list: start, end, parent frame, rest


class SkylineSearch:
    """Looks for offsets below ``capacity``; what failed is remembered from one ``run`` to the next."""

    def __init__(self, instance: Instance, capacity: int) -> None:
        self.instance, self.capacity = instance, capacity
        self.hopeless: set[bytes] = set()
        self.learned = [1.0] * len(instance.totals)  # 1 + the times a section failed in learned runs
        self.nodes = 0
        # The heights of a section's buffers in one call; index `count` is a sentinel that is always PLACED.
        self.heights_of = [itemgetter(*live, instance.count, instance.count) for live in instance.live]
        shape = [(instance.first[i], instance.last[i], instance.size[i]) for i in range(instance.count)]
        last_of = {lifetime_and_size: i for i, lifetime_and_size in enumerate(shape)}
        self.twin = [last_of[lifetime_and_size] for lifetime_and_size in shape]  # one index for all equal buffers
        self.alive_mask = [sum(1 << i for i in live) for live in instance.live]
        self.part_masks: dict[tuple[int, int], int] = {}

    def _reset(self) -> None:
        instance = self.instance
        self.height = [0] * instance.count + [PLACED]  # lowest offset still open to each unplaced buffer
        self.offsets = [0] * instance.count
        self.unplaced = [(1 << instance.count) - 1]  # one bit mask, in a list so that the trail can restore it
        self.sky = [0] * len(instance.totals)
        self.slack = [self.capacity - total for total in instance.totals]
        self.choices = [len(live) for live in instance.live]  # unplaced buffers whose height is the section's sky
        self.crossing = [0] * (len(instance.totals) + 1)  # unplaced buffers alive on both sides of a boundary
        for i in range(instance.count):
            for boundary in range(instance.first[i] + 1, instance.last[i]):
                self.crossing[boundary] += 1
        self.trail: list[tuple[Any, Any, Any]] = []  # (list, index or slice, old value)

    def run(self, order: list[int], *, lowest: bool, learned: bool, node_limit: int, deadline: float) -> bool:
        """Search until solved (True, see ``offsets``), exhausted (False: no packing exists) or ``OutOfBudget``.

        ``order`` ranks the buffers, preferred first. ``lowest`` branches on the preferred buffer of the lowest valley;
        otherwise on the section with the fewest choices, for the times it failed in this run (or, if
        ``learned``, in all learned runs).
        ``deadline`` is a ``time.monotonic`` time.
        """
        if self.instance.load > self.capacity:
            return False
        self._reset()
        self.weight = self.learned if learned else [1.0] * len(self.sky)
        rank = [0] * len(order)
        for position, i in enumerate(order):
            rank[i] = position
        stack: list[Frame] = []
        agenda = self._parts(0, len(self.sky), -1, None)
        limit = self.nodes + node_limit
        while agenda is not None:
            start, end, parent, rest = agenda
            key = self._key(start, end)
            retry = parent
            if key not in self.hopeless:
                frame = Frame(start, end, parent, rest, key)
                self._branch(frame, rank, lowest)
                stack.append(frame)
                retry = len(stack) - 1
            while True:  # take the next choice that holds, backing up to the decision that caused a dead end
                if retry < 0:
                    return False
                del stack[retry + 1 :]
                frame = stack[retry]
                self._undo(frame.mark)
                if not frame.choices:
                    self._remember(frame)
                    retry = frame.parent
                    continue
                if self.nodes >= limit or (self.nodes & 127 == 0 and time.monotonic() > deadline):
                    raise OutOfBudget
                self.nodes += 1
                choice = frame.choices.pop()
                if self._leave_empty(frame.section) if choice == NOTHING else self._place(choice):
                    agenda = self._parts(frame.start, frame.end, retry, frame.agenda)
                    break
        return True

    def _parts(self, start: int, end: int, parent: int, agenda: Agenda) -> Agenda:
        """Put the stretches of [start, end) that no unplaced buffer connects on the agenda, the tightest on top."""
        crossing, sky, slack, capacity = self.crossing, self.sky, self.slack, self.capacity
        parts = []
        begin = start
        while begin < end:
            try:
                stop = crossing.index(0, begin + 1, end)
            except ValueError:
                stop = end
            if stop - begin > 1 or sky[begin] + slack[begin] < capacity:  # something is left to place here
                parts.append((min(slack[begin:stop]), stop - begin, begin, stop))
            begin = stop
        if len(parts) > 1:
            parts.sort(reverse=True)
        for _, _, begin, stop in parts:
            agenda = (begin, stop, parent, agenda)
        return agenda

    def _key(self, start: int, end: int) -> bytes:
        """A digest of the state of one part: its skyline and its unplaced buffers."""
        mask = self.part_masks.get((start, end))
        if mask is None:
            mask = 0
            for alive in self.alive_mask[start:end]:
                mask |= alive
            self.part_masks[start, end] = mask
        left = self.unplaced[0] & mask
        state = array("q", self.sky[start:end])
        state.append(start)
        return blake2b(state.tobytes() + left.to_bytes((left.bit_length() + 7) // 8, "little"), digest_size=16).digest()

    def _remember(self, frame: Frame) -> None:
        """Keep a part that cannot be packed, unless finding out was quick."""
        if self.nodes - frame.nodes > 2 and len(self.hopeless) < MEMO_LIMIT:
            self.hopeless.add(frame.key)

    def _branch(self, frame: Frame, rank: list[int], lowest: bool) -> None:
        """Choose the section to decide next and list what may lie at its bottom, the preferred last."""
        section = self._preferred(frame, rank) if lowest else self._narrowest(frame)
        height, bottom, twin = self.height, self.sky[section], self.twin
        choices = [i for i in self.instance.live[section] if height[i] == bottom]
        choices.sort(key=rank.__getitem__, reverse=True)
        if len(choices) > 1:  # of buffers with equal lifetime and size only one need be tried
            choices = list({twin[i]: i for i in choices}.values())
        if self.slack[section] > 0:
            choices.insert(0, NOTHING)
        frame.choices, frame.section = choices, section
        frame.mark, frame.nodes = len(self.trail), self.nodes

    def _valleys(self, start: int, end: int) -> list[tuple[int, int]]:
        """The stretches of equal height between higher walls. What fits one lies flat, so nothing can go below it."""
        sky, valleys = self.sky, []
        begin, wall = start, PLACED
        while begin < end:
            bottom = sky[begin]
            stop = begin + 1
            while stop < end and sky[stop] == bottom:
                stop += 1
            if wall > bottom and (stop == end or sky[stop] > bottom):
                valleys.append((begin, stop))
            begin, wall = stop, bottom
        return valleys

    def _narrowest(self, frame: Frame) -> int:
        """The valley section with the fewest choices for the times it has failed."""
        choices, slack, weight = self.choices, self.slack, self.weight
        best, least = -1, 1e300
        for begin, stop in self._valleys(frame.start, frame.end):
            for section in range(begin, stop):
                ways = (choices[section] + (slack[section] > 0) - 0.9) / weight[section]
                if ways < least or (ways == least and slack[section] < slack[best]):
                    best, least = section, ways
        return best

    def _preferred(self, frame: Frame, rank: list[int]) -> int:
        """In the lowest valley, the section with the fewest choices among those of the best ranked buffer."""
        sky, height, choices, slack = self.sky, self.height, self.choices, self.slack
        bottom, begin, stop = min((sky[begin], begin, stop) for begin, stop in self._valleys(frame.start, frame.end))
        fitting = {i for section in range(begin, stop) for i in self.instance.live[section] if height[i] == bottom}
        best = min(fitting, key=rank.__getitem__)
        sections = range(self.instance.first[best], self.instance.last[best])
        return min(sections, key=lambda section: (choices[section] + (slack[section] > 0), slack[section]))

    def _place(self, i: int) -> bool:
        """Put buffer ``i`` at its height; False when a section then runs over the capacity."""
        first, last, trail = self.instance.first[i], self.instance.last[i], self.trail
        at = self.height[i]
        top = at + self.instance.size[i]
        self.offsets[i] = at
        trail.append((self.height, i, at))
        self.height[i] = PLACED
        trail.append((self.unplaced, 0, self.unplaced[0]))
        self.unplaced[0] ^= 1 << i
        inside, boundaries = slice(first, last), slice(first + 1, last)
        trail.append((self.sky, inside, self.sky[inside]))
        self.sky[inside] = [top] * (last - first)
        crossing = self.crossing[boundaries]
        trail.append((self.crossing, boundaries, crossing))
        self.crossing[boundaries] = [count - 1 for count in crossing]
        return self._lift(self.instance.neighbours[i], top, first, last)

    def _leave_empty(self, section: int) -> bool:
        """Raise a section to the lowest height above its sky at which one of its buffers can start."""
        height, size, bottom = self.height, self.instance.size, self.sky[section]
        first, last = self.instance.first, self.instance.last
        lowest = PLACED
        for i in self.instance.live[section]:
            if height[i] > bottom:
                lowest = min(lowest, height[i])
                continue
            for j in self.instance.neighbours[i]:  # a buffer beside the section may carry i
                if height[j] + size[j] < lowest and not first[j] <= section < last[j]:
                    lowest = height[j] + size[j]
        if lowest - bottom > self.slack[section]:
            return False
        self.trail.append((self.sky, section, bottom))
        self.trail.append((self.slack, section, self.slack[section]))
        self.sky[section] = lowest
        self.slack[section] -= lowest - bottom
        return self._lift(self.instance.live[section], lowest, section, section + 1)

    def _lift(self, buffers: list[int], top: int, first: int, last: int) -> bool:
        """Raise ``buffers`` to at least ``top``, then every section whose lowest buffers rose, [first, last) too."""
        height, sky, trail = self.height, self.sky, self.trail
        begins, ends = self.instance.first, self.instance.last
        changed = set(range(first, last))
        for i in buffers:
            was = height[i]
            if was < top:
                trail.append((height, i, was))
                height[i] = top
                for begin, stop in ((begins[i], first), (last, ends[i])):
                    if begin < stop and was in (stretch := sky[begin:stop]):
                        changed.update(s for s, level in enumerate(stretch, begin) if level == was)
        return self._settle(changed)

    def _settle(self, sections: set[int]) -> bool:
        """Raise each section's sky to its lowest unplaced buffer; False when a slack does not allow that."""
        height, choices, sky, slack, trail = self.height, self.choices, self.sky, self.slack, self.trail
        heights_of = self.heights_of
        for section in sections:
            heights = heights_of[section](height)
            floor = min(heights)
            if floor == PLACED:
                continue
            trail.append((choices, section, choices[section]))
            choices[section] = heights.count(floor)
            if rise := floor - sky[section]:
                trail.append((sky, section, sky[section]))
                trail.append((slack, section, slack[section]))
                sky[section] = floor
                slack[section] -= rise
                if slack[section] < 0:
                    self.weight[section] += 1
                    return False
        return True

    def _undo(self, mark: int) -> None:
        for values, index, old in reversed(self.trail[mark:]):
            values[index] = old
        del self.trail[mark:]


def ranking(instance: Instance, keys: str, seed: int | None = None) -> list[int]:
    """Buffers by decreasing keys: T most loaded section, W lifetime, A area, Z size; with a seed, shaken by 30%."""
    indices = range(instance.count)
    totals, first, last = instance.totals, instance.first, instance.last
    value: dict[str, Callable[[int], int]] = {
        "T": lambda i: max(totals[first[i] : last[i]]),
        "W": instance.duration,
        "A": lambda i: instance.duration(i) * instance.size[i],
        "Z": instance.size.__getitem__,
    }
    columns: list[list[float]] = [[value[key](i) for i in indices] for key in keys]
    if seed is not None:
        rng = random.Random(seed)
        columns = [[entry * rng.uniform(0.7, 1.3) for entry in column] for column in columns]
    return sorted(indices, key=lambda i: [-column[i] for column in columns])
