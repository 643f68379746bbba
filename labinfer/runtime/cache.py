"""Everything about a model's cache beside its arrays: the books of its blocks, swapping, and colder tiers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from labinfer import __version__
from labinfer.compiler.fold import unfold_ops, unfold_states
from labinfer.compiler.plan import Plan
from labinfer.errors import UsageError
from labinfer.runtime.block_manager import BlockManager
from labinfer.runtime.disk_store import DiskStore
from labinfer.runtime.eviction import EvictionPolicy, LeastRecentlyUsed
from labinfer.runtime.host_pool import HostPool
from labinfer.runtime.kv_cache import Block, KVCache, block_bytes, split_block
from labinfer.runtime.swap import Swap
from labinfer.runtime.write_behind import WriteBehind

Arrived = Callable[[int, np.ndarray | None], None]
"""Called with the place of each block that was asked for, and what it holds; None if that is lost."""


class BlockMemory(Protocol):
    """Where the blocks of a model lie: the caches of this process, or of the stages of a pipeline.

    What a block holds are the bytes of all stages one after another, uint8.
    """

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy blocks (group, source, target) before the next step."""

    def fetch(self, blocks: Sequence[Block], tell: Arrived) -> None:
        """Have ``tell`` called with what ``blocks`` hold after the steps that were asked for."""

    def fill(self, blocks: Sequence[Block], contents: Sequence[np.ndarray]) -> None:
        """Fill blocks before the next step."""


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """How the cache is used, which changes neither tokens nor the device's memory.

    ``enable_prefix_caching`` reuses the blocks of equal beginnings (``LABINFER_PREFIX_CACHE=0`` turns it off too);
    ``eviction_policy`` makes the policy of each cache group. Evicted blocks go to what the plan's ``swap_space`` leaves
    of host memory, and from there to ``cold_folder``, at most ``cold_bytes`` of it, where they outlive the process.
    """

    enable_prefix_caching: bool = True
    eviction_policy: Callable[[], EvictionPolicy] = LeastRecentlyUsed
    cold_folder: str | Path | None = None
    cold_bytes: int = 10 * 10**9


class Cache:
    """The cache of a model: ``blocks`` is what a scheduler talks to; ``swap`` is None without host memory for it.

    In a pipeline nothing is swapped (``swaps``): blocks belong to stages that run meanwhile.
    """

    def __init__(self, plan: Plan, caches: Sequence[KVCache], options: CacheOptions, swaps: bool = True) -> None:
        self.arrays, self.block_bytes = caches, block_bytes(plan)
        self.blocks = block_manager(plan, options)
        self.swap: Swap | None = None
        self.disk: WriteBehind | None = None
        has_room = swaps and any(stage.bytes.swap for stage in plan.stages)
        if options.cold_folder is not None:
            if not has_room:
                message = "blocks reach a folder through host memory, and the plan has none for them"
                remedy = "compile with --swap-space 1" if swaps else "run the plan without --transport"
                raise UsageError("run.cache-folder", message, remedy=remedy)
            key = content_key(plan, [cache.device.describe() for cache in caches])
            self.disk = WriteBehind(DiskStore(Path(options.cold_folder), key, options.cold_bytes))
        if has_room:
            pool = HostPool(caches, plan.limits, self.disk)
            self.swap = Swap(self.blocks, pool)
            self.blocks.evict_into(pool)

    def close(self) -> None:
        """Give host memory back; what was evicted to a folder is there afterwards."""
        self.swap = None
        self.blocks.evict_into(None)
        if self.disk is not None:
            self.disk.close()

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy blocks in every stage, as ``BlockManager.writable`` asks for it."""
        for arrays in self.arrays:
            arrays.copy_blocks(copies)

    def fetch(self, blocks: Sequence[Block], tell: Arrived) -> None:
        """See ``BlockMemory.fetch``."""
        for place, block in enumerate(blocks):
            content = np.empty(sum(sizes[block[0]] for sizes in self.block_bytes), np.uint8)
            for arrays, part in zip(self.arrays, split_block(self.block_bytes, block, content), strict=True):
                arrays.read(block, part)
            tell(place, content)

    def fill(self, blocks: Sequence[Block], contents: Sequence[np.ndarray]) -> None:
        """See ``BlockMemory.fill``."""
        for block, content in zip(blocks, contents, strict=True):
            for arrays, part in zip(self.arrays, split_block(self.block_bytes, block, content), strict=True):
                arrays.write(block, part)


def block_manager(plan: Plan, options: CacheOptions) -> BlockManager:
    """The books of ``plan``'s cache, empty."""
    attrs = [part.attrs for stage in plan.stages for op, _ in unfold_ops(stage) for part in op.primitives()]
    lengths = [length for each in attrs if (length := getattr(each, "reuse_until", None)) is not None]
    return BlockManager(
        plan.limits,
        caching=options.enable_prefix_caching and os.environ.get("LABINFER_PREFIX_CACHE") != "0",
        policy=options.eviction_policy,
        recompute_after=plan.recompute_after,
        reuse_until=min(lengths, default=None),
    )


def content_key(plan: Plan, devices: Sequence[str]) -> str:
    """What the content of blocks depends on beside their text: two plans with equal keys can share files."""
    states = [[state.name, *state.widths.items(), state.group] for state in unfold_states(plan).values()]
    windows = [group.window for group in plan.limits.groups]
    model = [__version__, plan.source.sha256, states, windows, plan.limits.kv_dtype, plan.limits.block_size]
    return blake2b(json.dumps([model, list(devices)], sort_keys=True).encode(), digest_size=16).hexdigest()
