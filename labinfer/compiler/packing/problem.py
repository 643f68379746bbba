"""The data of offline dynamic storage allocation: buffers in, offsets out, and the interval structure between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from labinfer.errors import UsageError


@dataclass(frozen=True, slots=True)
class Buffer:
    """A block of ``size`` bytes needed in the half-open lifetime [lower, upper) (steps of a schedule)."""

    id: str
    lower: int
    upper: int
    size: int


@dataclass(frozen=True, slots=True)
class Packing:
    """Where every buffer lies in one arena.

    ``offsets`` maps buffer id to byte offset and ``peak`` is the arena's size in bytes. ``lower_bound`` is the
    largest sum of sizes alive at one time. ``optimal`` is True only when no smaller arena exists: the peak meets the
    bound, or an exhausted search proved it. ``algorithm`` names what found the offsets, ``seconds`` the time it took.
    """

    offsets: dict[str, int]
    peak: int
    lower_bound: int
    optimal: bool
    algorithm: str
    seconds: float


def check_buffers(buffers: Sequence[Buffer]) -> None:
    """Raise ``UsageError`` when two buffers share an id, a lifetime ends before it starts or a size is negative."""
    seen: set[str] = set()
    for buffer in buffers:
        if buffer.id in seen:
            raise UsageError("pack.duplicate-id", f"two buffers are called '{buffer.id}'")
        if buffer.upper < buffer.lower:
            raise UsageError("pack.lifetime", f"buffer '{buffer.id}' ends at {buffer.upper}, before {buffer.lower}")
        if buffer.size < 0:
            raise UsageError("pack.size", f"buffer '{buffer.id}' has the negative size {buffer.size}")
        seen.add(buffer.id)


class Instance:
    """Buffers by index, with time cut into sections: the maximal sets of buffers that are alive together.

    Only sections matter to a packing. Buffer ``i`` is alive in sections ``first[i] <= s < last[i]``; ``live[s]`` lists
    the buffers of section ``s`` and ``load`` is the largest total size of a section, which no arena can be below.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.count = len(buffers)
        self.lower = [buffer.lower for buffer in buffers]
        self.upper = [buffer.upper for buffer in buffers]
        self.size = [buffer.size for buffer in buffers]
        self.first = [0] * self.count
        self.last = [0] * self.count
        self.totals: list[int] = []
        self._cut_time()
        self.load = max(self.totals, default=0)

    def _cut_time(self) -> None:
        """Sweep births and deaths; a section is closed by the first death after a birth."""
        births = sorted(range(self.count), key=self.lower.__getitem__)
        deaths = sorted(range(self.count), key=self.upper.__getitem__)
        total, born, open_section = 0, 0, False
        for dying in deaths:
            while born < self.count and self.lower[births[born]] < self.upper[dying]:
                self.first[births[born]] = len(self.totals)
                total += self.size[births[born]]
                born, open_section = born + 1, True
            if open_section:
                self.totals.append(total)
                open_section = False
            self.last[dying] = len(self.totals)
            total -= self.size[dying]

    @cached_property
    def live(self) -> list[list[int]]:
        """The buffers alive in each section."""
        live: list[list[int]] = [[] for _ in self.totals]
        for i in range(self.count):
            for section in range(self.first[i], self.last[i]):
                live[section].append(i)
        return live

    @cached_property
    def neighbours(self) -> list[list[int]]:
        """For each buffer, in increasing order, the others alive at some time together with it."""
        births: list[list[int]] = [[] for _ in self.totals]
        for i in range(self.count):
            births[self.first[i]].append(i)
        neighbours: list[list[int]] = [[] for _ in range(self.count)]
        for i in range(self.count):
            own = neighbours[i]
            for section in range(self.first[i] + 1, self.last[i]):
                own.extend(births[section])
            own.extend(j for j in births[self.first[i]] if j != i)
            for j in own:
                if self.first[j] != self.first[i]:
                    neighbours[j].append(i)
        return [sorted(set(own)) for own in neighbours]

    @cached_property
    def overlaps(self) -> int:
        """The number of pairs of buffers that are alive together, without listing them."""
        born = sorted(self.lower)
        pairs, dead = 0, sorted(self.upper)
        ended = 0
        for count, start in enumerate(born):
            while dead[ended] <= start:
                ended += 1
            pairs += count - ended
        return pairs

    def duration(self, i: int) -> int:
        """The length of buffer ``i``'s lifetime."""
        return self.upper[i] - self.lower[i]

    def peak(self, offsets: Sequence[int]) -> int:
        """The end of the highest buffer."""
        return max((offset + size for offset, size in zip(offsets, self.size, strict=True)), default=0)
