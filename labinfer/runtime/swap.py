"""Swapping rows: their blocks go to host memory, so that others can run, and come back later."""

from __future__ import annotations

from dataclasses import dataclass, field

from labinfer.runtime.block_manager import BlockManager
from labinfer.runtime.block_records import SavedRow
from labinfer.runtime.host_pool import HostPool


@dataclass(frozen=True, slots=True)
class SwappedRow:
    """A row in host memory: what it was, and the places of its blocks by group."""

    saved: SavedRow
    places: list[list[int]]


@dataclass(slots=True)
class Swap:
    """Moves rows of ``blocks`` to ``pool`` and back; ``num_out`` and ``num_in`` count blocks."""

    blocks: BlockManager
    pool: HostPool
    num_out: int = field(default=0, init=False)
    num_in: int = field(default=0, init=False)

    def swap_out(self, row: int) -> SwappedRow | None:
        """Move what ``row`` owns to host memory, and release it; None, and nothing has changed, without room there."""
        saved = self.blocks.save(row)
        places = self.pool.take([saved.count - first for first in saved.first])
        if places is None:
            return None
        for number, (first, own) in enumerate(zip(saved.first, places, strict=True)):
            self.pool.move_out(number, self.blocks.tables[number][row, first : saved.count].tolist(), own)
            self.num_out += len(own)
        self.blocks.release(row)
        return SwappedRow(saved, places)

    def swap_in(self, swapped: SwappedRow, row: int) -> bool:
        """Give ``row``, which owns nothing, the blocks of a swapped row; False if free blocks are too few.

        Blocks of its text that are still cached on the devices are shared, and not copied.
        """
        missing = self.blocks.restore(row, swapped.saved)
        if missing is None:
            return False
        for number, (places, first) in enumerate(zip(missing, swapped.saved.first, strict=True)):
            sources = [swapped.places[number][place - first] for place in places]
            self.pool.move_in(number, sources, self.blocks.tables[number][row, places].tolist())
            self.num_in += len(places)
        self.drop(swapped)
        return True

    def drop(self, swapped: SwappedRow) -> None:
        """Forget a swapped row, which is not wanted any more."""
        self.pool.give_back(swapped.places)

    def seconds(self, row: int) -> float:
        """What swapping ``row`` out and in again would take, at the speed measured so far."""
        owned = [self.blocks.held(row, number) for number in range(len(self.blocks.groups))]
        nbytes = sum(count * size for count, size in zip(owned, self.pool.block_bytes, strict=True))
        return 2 * nbytes * self.pool.seconds_per_byte
