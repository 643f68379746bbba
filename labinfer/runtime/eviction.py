"""Which cached block is given up when no free one is left: the policy, and the default, least recently used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict


class EvictionPolicy(ABC):
    """Keeps the cached blocks that nobody owns, one instance for each cache group, and chooses among them.

    ``depth`` is the number of blocks before it in the text it holds: a block is of use only while those are cached
    too. Blocks of a sequence arrive last one first.
    """

    @abstractmethod
    def add(self, block: int, depth: int) -> None:
        """Nobody owns ``block`` any more; it may be evicted from now on."""

    @abstractmethod
    def remove(self, block: int) -> None:
        """``block`` was hit: a sequence owns it again."""

    @abstractmethod
    def evict(self) -> int:
        """Choose a block and forget it; called only while there is one."""

    @abstractmethod
    def __len__(self) -> int:
        """How many blocks it keeps."""


class LeastRecentlyUsed(EvictionPolicy):
    """Gives up the block that was given back the longest time ago."""

    def __init__(self) -> None:
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def add(self, block: int, depth: int) -> None:
        """To the end of the queue."""
        self.blocks[block] = None

    def remove(self, block: int) -> None:
        """Out of the queue, wherever it stands."""
        del self.blocks[block]

    def evict(self) -> int:
        """The first of the queue."""
        return self.blocks.popitem(last=False)[0]

    def __len__(self) -> int:
        return len(self.blocks)
