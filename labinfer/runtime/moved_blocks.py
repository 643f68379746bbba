"""Cache blocks that another engine has computed, in host memory until a sequence takes them over."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from labinfer.compiler.plan import Plan
from labinfer.runtime.block_group import Tier
from labinfer.runtime.kv_cache import block_bytes
from labinfer.runtime.model import Model
from labinfer.runtime.streaming import Mailbox, mailbox

LONGEST = 2
"""There is room for the blocks of so many of the longest sequences."""

Key = tuple[int, bytes]
"""A cache group, and the digest of a block's text."""


class Arrived(NamedTuple):
    """A block that has come, and from what kind of device: others lay out blocks in other ways."""

    kind: str | None
    content: np.ndarray


def kind_of(plan: Plan) -> str | None:
    """The kind of device that all stages of ``plan`` are on; None where there are several."""
    kinds = {plan.devices[stage.device].kind for stage in plan.stages}
    return kinds.pop() if len(kinds) == 1 else None


class MovedBlocks:
    """A ``Tier`` of ``model`` above the one that it had: blocks that come from elsewhere, each taken over once.

    Room is reserved before a block is sent; who finds none waits, in turn. ``num_blocks`` of ``num_bytes`` have come,
    in ``seconds``.
    """

    def __init__(self, model: Model) -> None:
        tier, limits = model.blocks.groups[0].tier, model.plan.limits
        self.model = model
        self.below: Tier | None = tier.below if isinstance(tier, MovedBlocks) else tier
        self.sizes = [sum(sizes) for sizes in zip(*block_bytes(model.plan), strict=True)]
        longest = [limits.blocks_needed(group, limits.max_sequence_len) for group in limits.groups]
        self.room = LONGEST * sum(count * size for count, size in zip(longest, self.sizes, strict=True))
        self.contents: dict[Key, Arrived | None] = {}  # None: it is on its way
        self.waiting: deque[tuple[Mailbox, asyncio.Event]] = deque()
        self.lock = threading.Lock()
        self.num_blocks, self.num_bytes, self.seconds = 0, 0, 0.0
        model.blocks.evict_into(self)

    async def reserve(self, keys: Iterable[Key]) -> list[Key]:
        """Reserve room for those of ``keys`` that nobody else expects, once there is some; which these are."""
        turn = mailbox(), asyncio.Event()
        self.waiting.append(turn)
        try:
            while True:
                with self.lock:
                    fresh = [key for key in keys if key not in self.contents]
                    if self.waiting[0] is turn and self._size(fresh) <= self.room:
                        self.contents |= dict.fromkeys(fresh)
                        self.room -= self._size(fresh)
                        return fresh
                await turn[1].wait()
                turn[1].clear()
        finally:
            self.waiting.remove(turn)
            self._wake()

    def put(self, key: Key, content: np.ndarray, kind: str | None) -> None:
        """A block has come from a device of this kind; it is dropped if nobody expects it any more."""
        with self.lock:
            if key in self.contents:
                self.contents[key] = Arrived(kind, content)
                self.num_blocks += 1
                self.num_bytes += len(content)

    def drop(self, keys: Iterable[Key]) -> None:
        """Nobody expects these blocks any more."""
        with self.lock:
            dropped = [key for key in keys if key in self.contents]
            for key in dropped:
                del self.contents[key]
            self.room += self._size(dropped)
        self._wake()

    def _size(self, keys: Iterable[Key]) -> int:
        return sum(self.sizes[group] for group, _ in keys)

    def _wake(self) -> None:
        """Let the one whose turn it is look again."""
        with self.lock:
            turn = self.waiting[0] if self.waiting else None
        if turn is not None:
            turn[0].post(turn[1])

    # As a tier of the block manager

    def has(self, group: int, digest: bytes) -> bool:
        """Whether the block has come, or is colder."""
        return self._come(group, digest) is not None or (self.below is not None and self.below.has(group, digest))

    def _come(self, group: int, digest: bytes) -> np.ndarray | None:
        """What has come of a block that the devices of the model, which may be others by now, understand."""
        found = self.contents.get((group, digest))
        return found.content if found is not None and found.kind == kind_of(self.model.plan) else None

    def keep(self, group: int, digests: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Blocks that are evicted go on to the tier below."""
        if self.below is not None:
            self.below.keep(group, digests, blocks)

    def load(self, group: int, digests: Sequence[bytes], blocks: Sequence[int]) -> bool:
        """Fill ``blocks``; those that came from elsewhere are in the cache then, and not here any more."""
        places = dict(zip(digests, blocks, strict=True))
        came = {digest: found for digest in places if (found := self._come(group, digest)) is not None}
        colder = [digest for digest in places if digest not in came]
        if colder and (self.below is None or not self.below.load(group, colder, [places[each] for each in colder])):
            return False
        self.model.block_memory.fill([(group, places[digest]) for digest in came], list(came.values()))
        self.drop((group, digest) for digest in came)
        return True
