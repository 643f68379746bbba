"""What is counted of the cache's blocks, and what is kept of a row that has none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class CacheCounters:
    """What happened so far: prompt tokens looked up and found; blocks found colder, evicted, copied on write."""

    queries: int = 0
    hits: int = 0
    cold_hits: int = 0
    evictions: int = 0
    copies: int = 0


@dataclass(frozen=True, slots=True)
class SavedRow:
    """A row without its blocks: what ``BlockManager.restore`` needs to go on with it."""

    first: list[int]
    count: int
    chain: list[bytes]
    root: bytes
    reusable: int
