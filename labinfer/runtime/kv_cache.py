"""The paged KV cache: memory for every layer's keys and values, and the blocks that sequences own of it.

A block holds ``block_size`` tokens in every layer; block ``b`` of a state's part is rows ``[b * block_size, ...)`` of
it. After Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from labinfer.backends.base import Device
from labinfer.compiler.graph import State
from labinfer.compiler.plan import Limits


class KVCache:
    """The cache arrays of one stage, in one allocation of exactly the plan's bytes."""

    def __init__(self, device: Device, states: Mapping[str, State], names: Iterable[str], limits: Limits) -> None:
        slots = limits.num_blocks * limits.block_size
        chosen = [states[name] for name in names]
        self.device, size = device, limits.cache_bytes_per_number
        self.buffer = device.allocate(sum(size * slots * sum(s.widths.values()) for s in chosen), "kv cache")
        self.parts: dict[str, dict[str, Any]] = {}
        offset = 0
        for state in chosen:
            self.parts[state.name] = {}
            for part, width in state.widths.items():
                self.parts[state.name][part] = device.view(self.buffer, offset, (slots, width), limits.kv_dtype)
                offset += size * slots * width

    def close(self) -> None:
        """Give the memory back."""
        self.parts.clear()
        self.device.deallocate(self.buffer)


class BlockPool:
    """Which blocks of the cache are free; the same numbers hold in every stage."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.fresh = 0  # blocks from here on were never taken
        self.returned: list[int] = []

    @property
    def num_free(self) -> int:
        """How many blocks nobody owns."""
        return self.num_blocks - self.fresh + len(self.returned)

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks; None, and none is taken, when fewer are free."""
        if count > self.num_free:
            return None
        taken = [self.returned.pop() for _ in range(min(count, len(self.returned)))]
        taken += range(self.fresh, self.fresh + count - len(taken))
        self.fresh = max([self.fresh, *(block + 1 for block in taken)])
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back."""
        self.returned.extend(blocks)
