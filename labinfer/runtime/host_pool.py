"""Host memory for cache blocks that are not on their device: of rows swapped out, and of texts that were evicted."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from labinfer.compiler.plan import Limits
from labinfer.runtime.kv_cache import KVCache


class BlockStore(Protocol):
    """Where blocks go that host memory has no room for: a disk."""

    def has(self, group: int, digest: bytes) -> bool:
        """Whether it has the block of ``digest``."""

    def put(self, group: int, digest: bytes, content: Sequence[np.ndarray]) -> None:
        """Keep a block."""

    def get(self, group: int, digest: bytes, content: Sequence[np.ndarray]) -> bool:
        """Fill ``content`` with a block; False, with anything in it, if it is not there or damaged."""


class HostPool:
    """The plan's ``swap_blocks`` of every group, in memory that each stage's device chooses; a ``Tier``.

    Evicted texts take what swapped rows leave, the least recently used first out, to ``disk`` if there is one. A block
    has the same place in every stage's memory.
    """

    def __init__(self, caches: Sequence[KVCache], limits: Limits, disk: BlockStore | None = None) -> None:
        counts = [group.swap_blocks for group in limits.groups]
        self.caches, self.disk = caches, disk
        self.memory = [cache.host_blocks(counts) for cache in caches]
        self.free = [list(range(count))[::-1] for count in counts]
        self.cold: list[OrderedDict[bytes, int]] = [OrderedDict() for _ in counts]
        self.block_bytes: list[int] = [
            sum(array.itemsize * array.shape[1] for memory in self.memory for array in memory[number])
            for number in range(len(counts))
        ]
        self.moved_bytes, self.moved_seconds = 0, 0.0
        for group, count in enumerate(counts[:1]):
            for _ in range(2 if count else 0):  # the first touches the memory, the second is measured
                self.moved_bytes, self.moved_seconds = 0, 0.0
                self.move_out(group, [0], [0])

    @property
    def seconds_per_byte(self) -> float:
        """What copying a byte has taken on average, either way."""
        return self.moved_seconds / max(1, self.moved_bytes)

    @property
    def nbytes(self) -> int:
        """All of the memory."""
        return sum(array.nbytes for memory in self.memory for arrays in memory for array in arrays)

    def take(self, counts: Sequence[int]) -> list[list[int]] | None:
        """So many places of each group, from evicted texts where none are free; None, if there are too few."""
        rooms = zip(self.free, self.cold, counts, strict=True)
        if any(len(free) + len(cold) < count for free, cold, count in rooms):
            return None
        return [[self._place(number) for _ in range(count)] for number, count in enumerate(counts)]

    def give_back(self, places: Sequence[Sequence[int]]) -> None:
        """Free places of each group."""
        for free, given in zip(self.free, places, strict=True):
            free.extend(given)

    def _place(self, group: int) -> int:
        """A free place; the caller has seen that there is one, or an evicted text that has one."""
        if self.free[group]:
            return self.free[group].pop()
        digest, place = self.cold[group].popitem(last=False)
        if self.disk is not None:
            self.disk.put(group, digest, self.content(group, place))
        return place

    def content(self, group: int, place: int) -> list[np.ndarray]:
        """What lies at ``place``, in all stages."""
        return [array[place] for memory in self.memory for array in memory[group]]

    def move_out(self, group: int, blocks: Sequence[int], places: Sequence[int]) -> None:
        """Copy blocks from the devices."""
        started = time.perf_counter()
        for cache, memory in zip(self.caches, self.memory, strict=True):
            cache.move_out(group, blocks, memory[group], places)
        self._moved(group, len(blocks), started)

    def move_in(self, group: int, places: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy blocks to the devices."""
        started = time.perf_counter()
        for cache, memory in zip(self.caches, self.memory, strict=True):
            cache.move_in(group, memory[group], places, blocks)
        self._moved(group, len(blocks), started)

    def _moved(self, group: int, count: int, started: float) -> None:
        self.moved_bytes += count * self.block_bytes[group]
        self.moved_seconds += time.perf_counter() - started

    # As a tier of the block manager

    def has(self, group: int, digest: bytes) -> bool:
        """Whether the text is here or on the disk; if it is here, it stays a while."""
        try:
            self.cold[group].move_to_end(digest)
        except KeyError:  # not asked for before: whoever asks from another thread than the engine's would be too late
            return self.disk is not None and self.disk.has(group, digest)
        return True

    def keep(self, group: int, digests: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Copy blocks that are evicted, while swapped rows leave room."""
        fresh = [
            (digest, block) for digest, block in zip(digests, blocks, strict=True) if digest not in self.cold[group]
        ]
        room = len(self.free[group]) + len(self.cold[group])
        for digest, block in fresh[-room:] if room else ():
            place = self._place(group)
            self.move_out(group, [block], [place])
            self.cold[group][digest] = place

    def load(self, group: int, digests: Sequence[bytes], blocks: Sequence[int]) -> bool:
        """Copy texts to blocks of the device."""
        for digest, block in zip(digests, blocks, strict=True):
            if digest not in self.cold[group] and not self._read(group, digest):
                return False
            self.move_in(group, [self.cold[group][digest]], [block])
        return True

    def _read(self, group: int, digest: bytes) -> bool:
        """Get a text from the disk into host memory."""
        if self.disk is None or not (self.free[group] or self.cold[group]):
            return False
        place = self._place(group)
        if not self.disk.get(group, digest, self.content(group, place)):
            self.free[group].append(place)
            return False
        self.cold[group][digest] = place
        return True
