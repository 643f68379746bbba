"""The cache under random events, against a model that knows what every token's place must hold.

Arrays, host memory and files are the real ones; what a kernel would write for a token is a number that stands for the
text up to it, so that every read shows whether sharing, copies, swaps and colder tiers kept the right content.
"""

from __future__ import annotations

import random
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from labinfer.backends.reference.device import ReferenceDevice
from labinfer.compiler.graph import State
from labinfer.compiler.plan import CacheGroup, Limits
from labinfer.runtime.block_manager import BlockManager
from labinfer.runtime.disk_store import DiskStore
from labinfer.runtime.host_pool import HostPool
from labinfer.runtime.kv_cache import KVCache
from labinfer.runtime.swap import Swap, SwappedRow

LONGEST, CHUNK = 48, 8
GROUPS: dict[str, list[int | None]] = {"all": [None], "window": [6], "both": [None, 5], "three": [None, 9, 1]}


class Text:
    """A sequence of the model: tokens, how many are computed, and its salt."""

    def __init__(self, tokens: list[int], salt: tuple[str, ...], num_computed: int = 0) -> None:
        self.tokens, self.salt, self.num_computed = tokens, salt, num_computed
        self.sums = [zlib.crc32(repr(salt).encode())]

    def values(self, positions: range) -> list[float]:
        """What the tokens at ``positions`` leave in the cache: a checksum of the text up to each."""
        while len(self.sums) <= positions.stop:
            self.sums.append(zlib.crc32(bytes([self.tokens[len(self.sums) - 1]]), self.sums[-1]))
        return [float(self.sums[position + 1] % (1 << 24)) for position in positions]


class CacheEvents(RuleBasedStateMachine):
    rows: dict[int, Text]
    swapped: list[tuple[SwappedRow, Text]]

    @initialize(
        groups=st.sampled_from(sorted(GROUPS)), size=st.sampled_from([1, 2, 4, 16]), blocks=st.integers(3, 12),
        host=st.integers(0, 8), disk=st.booleans(), caching=st.sampled_from([True, True, True, False]),
    )  # fmt: skip
    def begin(self, groups: str, size: int, blocks: int, host: int, disk: bool, caching: bool) -> None:
        windows = GROUPS[groups]
        scale = max(1, 4 // size)  # blocks of one token are many
        made = [CacheGroup(window=window, num_blocks=blocks * scale, swap_blocks=host * scale) for window in windows]
        limits = Limits(
            max_num_batched_tokens=CHUNK, max_num_seqs=2, max_logits_rows=2, max_model_len=LONGEST, block_size=size,
            groups=made,
        )  # fmt: skip
        states = {str(n): State(str(n), {"k": 1, "v": 2}, n) for n in range(len(windows))}
        self.limits, self.size = limits, size
        self.device = ReferenceDevice("reference")
        self.cache = KVCache(self.device, states, states, limits)
        self.blocks = BlockManager(limits, caching=caching)
        self.folder = tempfile.TemporaryDirectory()
        store = DiskStore(Path(self.folder.name), "key", 20 * (30 + 12 * size)) if disk else None
        self.pool = HostPool([self.cache], limits, store)
        self.swap = Swap(self.blocks, self.pool)
        if host:
            self.blocks.evict_into(self.pool)
        self.rows, self.swapped, self.num_borrowed = {}, [], 0

    def pick(self, index: int) -> int:
        return sorted(self.rows)[index % len(self.rows)]

    def slots(self, group: int, row: int, positions: np.ndarray) -> np.ndarray:
        return self.blocks.tables[group][row][positions // self.size] * self.size + positions % self.size

    @precondition(lambda self: len(self.rows) < 6)
    @rule(
        start=st.integers(0, 2), length=st.integers(1, 30), tail=st.lists(st.integers(0, 1), max_size=3),
        salt=st.sampled_from([(), (), ("x",)]),
    )  # fmt: skip
    def arrive(self, start: int, length: int, tail: list[int], salt: tuple[str, ...]) -> None:
        text = Text([*[start] * length, *tail], salt)
        row = self.blocks.open_row()
        found = self.blocks.match(text.tokens, salt)
        text.num_computed = self.blocks.attach(row, text.tokens, salt)
        assert text.num_computed - self.blocks.borrowed[row] <= found < len(text.tokens)
        assert (text.num_computed - self.blocks.borrowed[row]) % self.size == 0
        assert 0 <= self.blocks.borrowed[row] < self.size
        assert text.num_computed < len(text.tokens)
        self.num_borrowed += int(self.blocks.borrowed[row])
        self.rows[row] = text

    @precondition(lambda self: self.rows)
    @rule(index=st.integers(0, 9), token=st.integers(0, 2))
    def say(self, index: int, token: int) -> None:
        text = self.rows[self.pick(index)]
        if len(text.tokens) < LONGEST:
            text.tokens.append(token)

    @precondition(lambda self: self.rows)
    @rule(chosen=st.lists(st.tuples(st.integers(0, 9), st.integers(1, CHUNK)), min_size=1, max_size=4))
    def compute(self, chosen: list[tuple[int, int]]) -> None:
        wanted = {self.pick(index): count for index, count in chosen}
        wanted = {row: n for row, n in wanted.items() if self.rows[row].num_computed < len(self.rows[row].tokens)}
        starts = [self.rows[row].num_computed for row in wanted]
        stops = [min(s + n, len(self.rows[row].tokens)) for s, (row, n) in zip(starts, wanted.items(), strict=True)]
        if not wanted:
            return
        failed = self.blocks.grow(np.array(list(wanted)), np.array(stops))
        ready = []
        for row, start, stop in list(zip(wanted, starts, stops, strict=True))[:failed]:
            copies = self.blocks.writable(row, start, stop)
            if copies is None:
                continue
            self.cache.copy_blocks(copies)
            ready.append((row, stop))
            positions, values = np.arange(start, stop), self.rows[row].values(range(start, stop))
            for group in range(len(self.limits.groups)):
                slots = self.slots(group, row, positions)
                self.cache.parts[str(group)]["k"][slots, 0] = values
                self.cache.parts[str(group)]["v"][slots] = np.array(values)[:, None] + [1, 2]
        self.finish_step(ready)

    def finish_step(self, ready: list[tuple[int, int]]) -> None:
        for row, stop in ready:
            self.rows[row].num_computed = stop
        if ready:
            rows, stops = (np.array(each) for each in zip(*ready, strict=True))
            tokens = np.full((len(self.blocks.counts), LONGEST), -1, np.int32)
            for row, text in self.rows.items():
                tokens[row, : len(text.tokens)] = text.tokens
            self.blocks.commit(rows, stops, tokens)

    @precondition(lambda self: self.rows and len(self.rows) < 6)
    @rule(index=st.integers(0, 9))
    def fork(self, index: int) -> None:
        row, into = self.pick(index), self.blocks.open_row()
        self.blocks.fork(row, into)
        text = self.rows[row]
        self.rows[into] = Text(text.tokens.copy(), text.salt, text.num_computed)

    @precondition(lambda self: self.rows)
    @rule(index=st.integers(0, 9))
    def finish(self, index: int) -> None:
        row = self.pick(index)
        del self.rows[row]
        self.blocks.close_row(row)

    @precondition(lambda self: self.rows)
    @rule(index=st.integers(0, 9))
    def start_anew(self, index: int) -> None:
        row = self.pick(index)
        self.blocks.release(row)
        self.rows[row].num_computed = self.blocks.attach(row, self.rows[row].tokens, self.rows[row].salt)

    @precondition(lambda self: self.rows)
    @rule(index=st.integers(0, 9))
    def swap_out(self, index: int) -> None:
        row = self.pick(index)
        assert self.swap.seconds(row) >= 0
        if (handle := self.swap.swap_out(row)) is not None:
            self.swapped.append((handle, self.rows.pop(row)))
            self.blocks.close_row(row)

    @precondition(lambda self: self.swapped)
    @rule(index=st.integers(0, 9), drop=st.sampled_from([False, False, True]))
    def swap_in(self, index: int, drop: bool) -> None:
        handle, text = self.swapped[index % len(self.swapped)]
        if drop:
            self.swap.drop(handle)
        else:
            row = self.blocks.open_row()
            if not self.swap.swap_in(handle, row):
                self.blocks.close_row(row)
                return
            self.rows[row] = text
        self.swapped.remove((handle, text))

    @rule(seed=st.integers(0, 1 << 16))
    def damage_a_file(self, seed: int) -> None:
        files = sorted(Path(self.folder.name).glob("key/*"))
        if files:
            chance = random.Random(seed)
            file, data = chance.choice(files), None
            data = bytearray(file.read_bytes())
            kind = chance.randrange(4) if data else 0
            if kind == 0:
                file.unlink()
            elif kind == 1:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
                file.write_bytes(data)
            elif kind == 2:
                file.write_bytes(data[: chance.randrange(len(data) or 1)])
            else:
                file.write_bytes(files[0].read_bytes())  # another block's

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "rows"):
            return
        self.blocks.check_integrity()
        for number, group in enumerate(self.limits.groups):
            held = [place for handle, _ in self.swapped for place in handle.places[number]]
            places = [*self.pool.free[number], *self.pool.cold[number].values(), *held]
            assert sorted(places) == list(range(group.swap_blocks))
        if self.pool.disk is not None:
            size = sum(file.stat().st_size for file in Path(self.folder.name).glob("key/*"))
            assert size <= 1.25 * self.pool.disk.max_bytes  # exactly, but for what damage has added

    @invariant()
    def every_row_reads_its_own_text(self) -> None:
        for row, text in getattr(self, "rows", {}).items():
            for number, group in enumerate(self.limits.groups):
                first = max(0, text.num_computed - (group.window or LONGEST) + 1)
                slots = self.slots(number, row, np.arange(first, text.num_computed))
                values, parts = text.values(range(first, text.num_computed)), self.cache.parts[str(number)]
                assert parts["k"][slots, 0].tolist() == values
                assert parts["v"][slots, 1].tolist() == [value + 2 for value in values]

    def teardown(self) -> None:
        if hasattr(self, "rows"):
            for row in list(self.rows):
                self.blocks.close_row(row)
            self.blocks.check_integrity()
            assert self.blocks.usage == 0
            self.folder.cleanup()


CacheEvents.TestCase.settings = settings(max_examples=120, stateful_step_count=60)
test_cache_events = CacheEvents.TestCase


WEIGHTS = {
    "arrive": 20, "say": 15, "compute": 45, "fork": 6, "finish": 14, "start_anew": 3, "swap_out": 4, "swap_in": 6,
    "damage_a_file": 12,
}  # fmt: skip


def arguments(chance: random.Random, event: str) -> dict[str, Any]:
    """What an event of ``CacheEvents`` is called with, so that few texts come again and again."""
    index = {"index": chance.randrange(10)}
    match event:
        case "arrive":
            tail = [chance.randrange(2) for _ in range(chance.randrange(3))]
            return {"start": chance.randrange(3), "length": chance.randrange(1, 30), "tail": tail, "salt": ()}
        case "say":
            return index | {"token": chance.randrange(2)}
        case "compute":
            return {"chosen": [(chance.randrange(10), CHUNK) for _ in range(3)]}
        case "swap_in":
            return index | {"drop": chance.random() < 0.2}
        case "damage_a_file":
            return {"seed": chance.randrange(1 << 16)}
        case _:
            return index


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("groups", GROUPS)
def test_thousands_of_events(groups: str, size: int) -> None:
    chance, events = random.Random(size), CacheEvents()
    events.begin(groups, size, blocks=16, host=6, disk=True, caching=True)
    for event in chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=2000):
        needs_row = event not in ("arrive", "swap_in", "damage_a_file")
        full = event in ("arrive", "fork") and len(events.rows) >= 6
        if full or (needs_row and not events.rows) or (event == "swap_in" and not events.swapped):
            continue
        getattr(events, event)(**arguments(chance, event))
        events.books_are_right()
        events.every_row_reads_its_own_text()
    counters, disk = events.blocks.counters, events.pool.disk
    assert disk is not None
    happened = [counters.hits, counters.cold_hits, counters.evictions, disk.hits, disk.failures]
    happened += [counters.copies, events.num_borrowed] if size > 1 else []
    assert min(*happened, events.swap.num_out, events.swap.num_in) > 0, happened
    events.teardown()
