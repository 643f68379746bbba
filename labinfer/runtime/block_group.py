"""The blocks of one cache group: who counts on which, which hold text that can be reused, which are free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from labinfer.compiler.plan import CacheGroup
from labinfer.errors import LabinferError
from labinfer.runtime.block_texts import BlockTexts, Text, text_of
from labinfer.runtime.eviction import EvictionPolicy


class Tier(Protocol):
    """A colder place that keeps evicted blocks: host memory, a disk."""

    def has(self, group: int, digest: bytes) -> bool:
        """Whether it has the block of ``digest``, which then counts as used."""

    def keep(self, group: int, digests: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Copy ``blocks``, which are about to be overwritten, as far as there is room."""

    def load(self, group: int, digests: Sequence[bytes], blocks: Sequence[int]) -> bool:
        """Fill ``blocks`` with the texts of ``digests``; False if one of them is not there after all."""


class BlockGroup:
    """Every block is owned (``owners`` counts by how many rows), or cached and free, or simply free.

    A cached block holds the keys and values of the text that its digest stands for. Free blocks that hold nothing are
    given out first, those given back last before all; then ``policy`` chooses among the cached ones, which ``tier``,
    where there is one, may keep.
    """

    def __init__(self, group: CacheGroup, block_size: int, policy: EvictionPolicy, number: int) -> None:
        self.num_blocks, self.window, self.block_size = group.num_blocks, group.window, block_size
        self.policy, self.number = policy, number
        self.tier: Tier | None = None
        self.owners = np.zeros(group.num_blocks, np.int32)
        self.returned = np.empty(group.num_blocks, np.int32)  # a stack of free blocks that hold nothing
        self.num_returned = 0
        self.fresh = 0  # blocks from here on were never taken
        self.cached: dict[bytes, int] = {}
        self.texts: list[Text | None] = [None] * group.num_blocks  # what each cached block holds
        self.by_beginning = BlockTexts()  # those of them that were computed here, in the first group
        self.evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return self.num_blocks - self.fresh + self.num_returned + len(self.policy)

    def first_seen(self, position: int) -> int:
        """The first block that the token at ``position`` looks at."""
        return 0 if self.window is None else max(0, (position + 1 - self.window) // self.block_size)

    def has(self, digest: bytes, cold: bool) -> bool:
        """Whether the text of ``digest`` is cached here or, if ``cold`` counts, in the tier."""
        return digest in self.cached or (cold and self.tier is not None and self.tier.has(self.number, digest))

    def kept(self, chain: Sequence[bytes], cold: bool) -> int:
        """``len(chain)``, if all is here that the token after it looks at; else the last place where that fails."""
        first = self.first_seen(len(chain) * self.block_size)
        places = range(len(chain) - 1, first - 1, -1)
        return next((place for place in places if not self.has(chain[place], cold)), len(chain))

    def load(self, digests: Sequence[bytes], blocks: Sequence[int]) -> bool:
        """Fill ``blocks``, which rows own, from the tier; False if it cannot."""
        loaded = self.tier is not None and self.tier.load(self.number, digests, blocks)
        if loaded:
            self.register(list(map(text_of, digests)), blocks)
        return loaded

    def take(self, count: int) -> np.ndarray:
        """``count`` blocks for one owner each, int32; the caller has seen that so many are free."""
        missing = count - self.num_returned - (self.num_blocks - self.fresh)
        if missing > 0:
            self._evict(missing)
        reused = min(count, self.num_returned)
        self.num_returned -= reused
        returned = self.returned[self.num_returned : self.num_returned + reused]
        fresh = np.arange(self.fresh, self.fresh + count - reused, dtype=np.int32)
        self.fresh += count - reused
        blocks = np.concatenate([returned, fresh])
        self.owners[blocks] = 1
        return blocks

    def share(self, block: int) -> None:
        """One more row owns a cached ``block``."""
        if self.owners[block] == 0:
            self.policy.remove(block)
        self.owners[block] += 1

    def give_back(self, blocks: np.ndarray, depth: int) -> None:
        """A row gives up ``blocks``, which stand one after another in its text, the first after ``depth`` others."""
        self.owners[blocks] -= 1
        unowned, cached = self.owners[blocks] == 0, self.are_cached(blocks)
        empty = blocks[unowned & ~cached]
        self.returned[self.num_returned : self.num_returned + len(empty)] = empty
        self.num_returned += len(empty)
        for index in np.flatnonzero(unowned & cached)[::-1].tolist():  # the end of a text goes first
            self.policy.add(int(blocks[index]), depth + index)

    def register(self, texts: Sequence[Text], blocks: Sequence[int]) -> list[Text]:
        """``blocks``, which rows own, hold ``texts`` from now on: those that are new, as each is cached only once."""
        cached, held = self.cached, self.texts
        new: list[Text] = []
        for text, block in zip(texts, blocks, strict=True):
            if text[1] not in cached and held[block] is None:
                cached[text[1]], held[block] = block, text
                new.append(text)
        return new

    def are_cached(self, blocks: np.ndarray) -> np.ndarray:
        """Which of ``blocks`` hold text that can be reused, bool."""
        held = self.texts
        return np.array([held[block] is not None for block in blocks.tolist()], np.bool_)

    def not_writable(self, blocks: np.ndarray) -> np.ndarray:
        """Which of ``blocks``, by their place there, a row that owns them has to copy before it writes to them.

        Others own them too, or they are cached: those that it owns alone are so no more where free blocks are too few.
        """
        others, cached = self.owners[blocks] > 1, self.are_cached(blocks)
        if np.count_nonzero(others | cached) > self.num_free:
            self.give_up(blocks[cached & ~others].tolist())
            cached = others
        return np.flatnonzero(others | cached)

    def forget(self) -> None:
        """What is cached is lost; nobody owns any of it."""
        self._evict(len(self.policy), keep=False)

    def _evict(self, count: int, keep: bool = True) -> None:
        blocks = [self.policy.evict() for _ in range(count)]
        self.give_up(blocks, keep)
        self.returned[self.num_returned : self.num_returned + count] = blocks
        self.num_returned += count

    def give_up(self, blocks: Sequence[int], keep: bool = True) -> None:
        """What ``blocks`` hold is not cached here any more: they are about to be overwritten."""
        texts = [text for block in blocks if (text := self.texts[block]) is not None]
        for block, text in zip(blocks, texts, strict=True):
            self.texts[block] = None
            del self.cached[text[1]]
            self.by_beginning.remove(text)
        if self.tier is not None and keep:
            self.tier.keep(self.number, [digest for _, digest, _ in texts], blocks)
        self.evictions += len(blocks)

    def check(self, owners: np.ndarray) -> None:
        """Raise ``LabinferError`` unless everything agrees with ``owners``, counted from the rows' tables."""
        for wrong in np.flatnonzero(owners != self.owners)[:1].tolist():
            fault(f"block {wrong} has {owners[wrong]} owners, {self.owners[wrong]} are counted")
        empty = [*self.returned[: self.num_returned].tolist(), *range(self.fresh, self.num_blocks)]
        idle = int(np.count_nonzero(self.owners == 0))
        if len(set(empty)) != len(empty) or self.owners[empty].any() or self.are_cached(np.array(empty)).any():
            fault("a block is free twice, or owned or cached and free")
        if idle != len(empty) + len(self.policy):
            fault(f"{idle} blocks have no owner, {len(empty)} are free and {len(self.policy)} cached and free")
        held = {text[1]: block for block, text in enumerate(self.texts) if text is not None}
        if held != self.cached:
            fault("texts and cached blocks do not agree")
        if not {text[1] for texts in self.by_beginning.after.values() for text in texts} <= held.keys():
            fault("a text can be found by its beginning that is not cached")


def fault(message: str) -> None:
    """Raise what broken bookkeeping is: a ``LabinferError``."""
    raise LabinferError("run.cache-integrity", f"the cache's books are wrong: {message}")
