"""Which cache blocks each row owns: growth, sharing and reuse of the blocks of a paged cache.

After Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(arXiv:2309.06180). A full block is known by a digest of its text and all text before it, so that a later sequence with
the same beginning finds it; of one that parts from it within the block it is the one to copy. A group with a window
owns only the blocks that its next token looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from labinfer.compiler.plan import Limits
from labinfer.runtime.block_digests import Salt, Tokens, block_digest, block_digests, root_digest
from labinfer.runtime.block_group import BlockGroup, Tier, fault
from labinfer.runtime.block_records import CacheCounters, SavedRow
from labinfer.runtime.block_texts import LEAST_BORROWED, Text, text_of
from labinfer.runtime.eviction import EvictionPolicy, LeastRecentlyUsed


class BlockManager:
    """The blocks of all rows, in every cache group. A row is a number from ``open_row``.

    ``tables[group][row]`` lists the blocks of a row by place in its text, int32; those before ``first[group][row]`` are
    0, given back since the window has passed them; ``counts[row]`` is the place after the last.

    ``caching`` off reuses no blocks. A ``salt`` keeps texts apart that would share blocks: a tenant's secret, the name
    of an adapter. Keys of sequences longer than ``recompute_after`` differ from those of shorter ones (longrope), and
    past ``reuse_until`` tokens every length has its own (dynamic NTK).
    """

    def __init__(
        self,
        limits: Limits,
        *,
        caching: bool = True,
        policy: Callable[[], EvictionPolicy] = LeastRecentlyUsed,
        recompute_after: int | None = None,
        reuse_until: int | None = None,
    ) -> None:
        self.limits, self.block_size, self.caching = limits, limits.block_size, caching
        self.size = np.array(self.block_size, np.int32)  # with arrays numpy is quicker so
        self.raw = np.dtype((np.void, 4 * self.block_size))  # the tokens of a block, as bytes
        self.recompute_after, self.reuse_until = recompute_after, reuse_until
        self.groups = [
            BlockGroup(each, limits.block_size, policy(), number) for number, each in enumerate(limits.groups)
        ]
        width = -(-limits.max_model_len // limits.block_size)
        capacity = limits.max_num_seqs
        self.tables = [np.zeros((capacity, width), np.int32) for _ in self.groups]
        self.first = [np.zeros(capacity, np.int32) for _ in self.groups]
        self.counts = np.zeros(capacity, np.int32)
        self.hashed = np.zeros(capacity, np.int32)  # blocks whose digests are in `chains`
        self.reusable = np.zeros(capacity, np.int32)  # blocks that may be hashed at all
        self.forked = np.zeros(capacity, bool)  # rows that `writable` has to look at
        self.borrowed = np.zeros(capacity, np.int32)  # tokens of a cached block that begins like the row's next one
        self.roots = [b""] * capacity
        self.chains: list[list[bytes]] = [[] for _ in range(capacity)]
        self.closed = list(range(capacity))[::-1]
        self.counted = CacheCounters()
        self.windowed = any(group.window is not None for group in self.groups)

    def evict_into(self, tier: Tier | None) -> None:
        """Keep evicted blocks in ``tier``, and find them there; None loses them."""
        for group in self.groups:
            group.tier = tier

    def open_row(self) -> int:
        """A row that owns nothing; there are always more."""
        if not self.closed:
            capacity = len(self.counts)
            self.tables = [np.concatenate([table, np.zeros_like(table)]) for table in self.tables]
            self.first = [np.concatenate([first, np.zeros_like(first)]) for first in self.first]
            self.counts, self.hashed, self.reusable, self.forked, self.borrowed = (
                np.concatenate([each, np.zeros_like(each)])
                for each in (self.counts, self.hashed, self.reusable, self.forked, self.borrowed)
            )
            self.roots += [b""] * capacity
            self.chains += [[] for _ in range(capacity)]
            self.closed = list(range(capacity, 2 * capacity))[::-1]
        return self.closed.pop()

    def close_row(self, row: int) -> None:
        """Give back what ``row`` owns, and the row."""
        self.release(row)
        self.closed.append(row)

    @property
    def open_rows(self) -> list[int]:
        """The rows that were opened and not closed."""
        return sorted(set(range(len(self.counts))) - set(self.closed))

    def forget(self) -> None:
        """No block holds text that can be reused any more; the rows own none."""
        for group in self.groups:
            group.forget()

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns, in the group that has the fewest."""
        return min(group.num_free for group in self.groups)

    @property
    def usage(self) -> float:
        """The part of the blocks that rows own, in the group where it is largest."""
        return max(1 - group.num_free / group.num_blocks for group in self.groups)

    @property
    def counters(self) -> CacheCounters:
        """What happened so far."""
        return replace(self.counted, evictions=sum(group.evictions for group in self.groups))

    # Reuse of what is cached

    def match(self, token_ids: Tokens, salt: Salt = ()) -> int:
        """How many tokens at the beginning of ``token_ids`` whole cached blocks hold; never all of the tokens."""
        return len(self._cached_chain(token_ids, self._root(len(token_ids), salt))) * self.block_size

    def lacking(self, token_ids: Tokens, salt: Salt = ()) -> list[tuple[int, bytes]]:
        """The blocks (group, digest) that ``token_ids`` could begin with and that are neither here nor colder."""
        chain = list(self._digests(token_ids, self._root(len(token_ids), salt)))
        seen = [(group, chain[group.first_seen(len(chain) * self.block_size) :]) for group in self.groups]
        return [(group.number, each) for group, some in seen for each in some if not group.has(each, cold=True)]

    def attach(self, row: int, token_ids: Tokens, salt: Salt = ()) -> int:
        """Begin ``row``, which owns nothing, with what is cached of ``token_ids``, never all; how many tokens it is."""
        root = self._root(len(token_ids), salt)
        chain = self._cached_chain(token_ids, root)
        if not self._begin(row, chain):  # a colder tier could not give back what it has, or there is no room for it
            chain = self._cached_chain(token_ids, root, cold=False)
            self._begin(row, chain)
        self.reusable[row], self.roots[row], self.chains[row] = self._reusable(len(token_ids)), root, chain
        cached = len(chain) * self.block_size + self._borrow(row, token_ids)
        self.counted.queries += len(token_ids)
        self.counted.hits += cached
        return cached

    def _borrow(self, row: int, token_ids: Tokens) -> int:
        """Share a cached block that begins like the next one of ``row``, until that writes; how many are equal."""
        place, size, chain = int(self.hashed[row]), self.block_size, self.chains[row]
        if place >= self.reusable[row]:
            return 0
        rest = np.asarray(token_ids[place * size : min((place + 1) * size, len(token_ids) - 1)], np.int32)
        digest, common = self.groups[0].by_beginning.nearest(chain[-1] if chain else self.roots[row], rest.tobytes())
        if common < LEAST_BORROWED * size or not all(group.has(digest, cold=False) for group in self.groups):
            return 0
        for group, table in zip(self.groups, self.tables, strict=True):
            table[row, place] = group.cached[digest]
            group.share(group.cached[digest])
        self.counts[row] += 1
        self.forked[row], self.borrowed[row] = True, common
        return common

    def _begin(self, row: int, chain: list[bytes]) -> bool:
        """Make the blocks of ``chain`` the row's own, those that only a colder tier has too; False if none are."""
        first = [group.first_seen(len(chain) * self.block_size) for group in self.groups]
        missing = self._own(row, first, chain)
        for number, places in enumerate(missing or ()):
            if places:
                digests, blocks = [chain[place] for place in places], self.tables[number][row, places].tolist()
                if not self.groups[number].load(digests, blocks):
                    self.release(row)
                    return False
                self.counted.cold_hits += len(blocks)
        self.hashed[row] = len(chain) if missing is not None else 0
        return missing is not None

    def _own(self, row: int, first: Sequence[int], digests: Sequence[bytes | None]) -> list[list[int]] | None:
        """Give ``row`` a block for each of ``digests`` from ``first`` on: the cached one, or one that is to be filled.

        Returns the places of the latter by group; None, and nothing has changed, where free blocks are too few.
        """
        cached = [
            [group.cached.get(digest) if digest else None for digest in digests[start:]]
            for group, start in zip(self.groups, first, strict=True)
        ]
        for group, blocks in zip(self.groups, cached, strict=True):
            if sum(block is None or group.owners[block] == 0 for block in blocks) > group.num_free:
                return None
        missing = []
        for number, (group, table, blocks) in enumerate(zip(self.groups, self.tables, cached, strict=True)):
            self.first[number][row] = first[number]
            for place, block in enumerate(blocks, first[number]):
                if block is not None:
                    group.share(block)
                    table[row, place] = block
            missing.append([place for place, block in enumerate(blocks, first[number]) if block is None])
        for group, table, places in zip(self.groups, self.tables, missing, strict=True):
            table[row, places] = group.take(len(places))
        self.counts[row] = len(digests)
        return missing

    def _root(self, length: int, salt: Salt) -> bytes:
        long = self.recompute_after is not None and length > self.recompute_after
        return root_digest(("long" if long else "", *salt))

    def _reusable(self, length: int) -> int:
        """How many blocks of a sequence that has ``length`` tokens by now others may reuse."""
        if not self.caching or (self.reuse_until is not None and length > self.reuse_until):
            return 0
        return self.tables[0].shape[1] if self.reuse_until is None else self.reuse_until // self.block_size

    def _digests(self, token_ids: Tokens, root: bytes) -> Iterator[bytes]:
        """Those of all blocks that ``token_ids`` may begin with; never all of the tokens."""
        most = max(0, min(self._reusable(len(token_ids)), (len(token_ids) - 1) // self.block_size))
        return block_digests(root, token_ids[: most * self.block_size], self.block_size)

    def _cached_chain(self, token_ids: Tokens, root: bytes, cold: bool = True) -> list[bytes]:
        """Digests of the longest beginning of ``token_ids`` of which every group has what the next token looks at.

        ``cold``: what only a colder tier has counts too.
        """
        chain: list[bytes] = []
        for digest in self._digests(token_ids, root):
            if self.groups[0].window is None and not self.groups[0].has(digest, cold):
                break
            chain.append(digest)
        while True:
            kept = min(group.kept(chain, cold) for group in self.groups)
            if kept == len(chain):
                return chain
            del chain[kept:]

    # Growth

    def held(self, row: int, group: int) -> int:
        """Blocks that ``row`` owns in ``group``."""
        return int(self.counts[row] - self.first[group][row])

    def fits(self, row: int, length: int) -> bool:
        """Whether ``row`` can grow to ``length`` tokens, step by step."""
        for number, group in enumerate(self.groups):
            more = self.limits.blocks_needed(self.limits.groups[number], length) - self.held(row, number)
            if more > group.num_free:
                return False
        return True

    def grow(self, rows: np.ndarray, lengths: np.ndarray) -> int | None:
        """Give ``rows`` the blocks that ``lengths`` tokens need; where they run out, the index of the first row left.

        The rows before it have grown then, those from it on have not.
        """
        counts = self.counts[rows]
        room = counts * self.size
        growing = (lengths > room).nonzero()[0]
        if not len(growing):
            return None
        if len(growing) <= self.num_free and not np.count_nonzero(lengths > room + self.size):  # one block each
            if len(growing) < len(rows):
                rows, counts = rows[growing], counts[growing]
            for group, table in zip(self.groups, self.tables, strict=True):
                table[rows, counts] = group.take(len(rows))
            self.counts[rows] = counts + 1
            return None
        missing = -(-lengths // self.size) - counts
        for index in growing.tolist():
            if missing[index] > self.num_free:
                return int(index)
            row, start, count = rows[index], self.counts[rows[index]], missing[index]
            for group, table in zip(self.groups, self.tables, strict=True):
                table[row, start : start + count] = group.take(int(count))
            self.counts[row] += count
        return None

    def shrink(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Take back the blocks that ``rows`` have past ``lengths`` tokens, which hold nothing that is computed."""
        places = -(-lengths // self.block_size)
        for index in np.flatnonzero(self.counts[rows] > places).tolist():
            row, place = int(rows[index]), int(places[index])
            for group, table in zip(self.groups, self.tables, strict=True):
                group.give_back(table[row, place : self.counts[row]].copy(), place)
                table[row, place : self.counts[row]] = 0
            self.counts[row] = place

    def block_tables(self, rows: np.ndarray, length: int) -> list[np.ndarray]:
        """The tables of ``rows`` in each group, int32, wide enough for ``length`` tokens: copies."""
        width = -(-length // self.block_size)
        return [table[rows, :width] for table in self.tables]

    def commit(self, rows: np.ndarray, num_computed: np.ndarray, token_ids: np.ndarray) -> None:
        """The first ``num_computed`` tokens of ``rows`` are in the cache: full blocks can be reused from now on.

        ``token_ids``, int32 [all rows, a whole number of blocks], are the tokens of every row. Gives back the blocks
        that no later token of the row looks at.
        """
        new = np.minimum(num_computed // self.size, self.reusable[rows]) - self.hashed[rows]
        complete = (new > 0).nonzero()[0]
        if len(complete):
            self._register(rows[complete], new[complete], token_ids)
        if self.windowed:
            for number, group in enumerate(self.groups):
                if group.window is not None:
                    passed = (num_computed + 1 - group.window) // self.block_size
                    for index in np.flatnonzero(passed > self.first[number][rows]).tolist():
                        self._pass(number, int(rows[index]), int(passed[index]))

    def _register(self, rows: np.ndarray, new: np.ndarray, token_ids: np.ndarray) -> None:
        """Make the next ``new`` blocks of ``rows`` known by their digests."""
        owners, places = rows, self.hashed[rows]
        self.hashed[rows] = counts = places + new
        if np.count_nonzero(new > 1):  # not one block each, as in decoding
            owners, ends = np.repeat(rows, new), np.cumsum(new)
            places = np.arange(ends[-1]) + np.repeat(counts - ends, new)
        raws = token_ids.view(self.raw)[owners, places].tolist()
        chains, roots = self.chains, self.roots
        texts: list[Text] = []
        for row, raw in zip(owners.tolist(), raws, strict=True):
            chain = chains[row]
            before = chain[-1] if chain else roots[row]
            digest = block_digest(before, raw)
            chain.append(digest)
            texts.append((raw, digest, before))
        added = []
        for group, table, first in zip(self.groups, self.tables, self.first, strict=True):
            blocks, kept = table[owners, places].tolist(), texts
            if group.window is not None:
                inside = (places >= first[owners]).nonzero()[0].tolist()
                blocks, kept = [blocks[index] for index in inside], [texts[index] for index in inside]
            added.append(group.register(kept, blocks))
        self.groups[0].by_beginning.add(added[0])

    def _pass(self, number: int, row: int, place: int) -> None:
        """Give back the blocks of ``row`` before ``place`` in one group."""
        first, table = int(self.first[number][row]), self.tables[number]
        self.groups[number].give_back(table[row, first:place].copy(), first)
        table[row, first:place] = 0
        self.first[number][row] = place

    # Sharing

    def fork(self, row: int, into: int) -> None:
        """Give ``into``, which owns nothing, the text of ``row``: both own all its blocks."""
        for group, table, first in zip(self.groups, self.tables, self.first, strict=True):
            table[into], first[into] = table[row], first[row]
            group.owners[table[row, first[row] : self.counts[row]]] += 1
        for each in (self.counts, self.hashed, self.reusable, self.borrowed):
            each[into] = each[row]
        self.forked[[row, into]] = True
        self.roots[into], self.chains[into] = self.roots[row], self.chains[row].copy()

    def writable(self, row: int, start: int, stop: int) -> list[tuple[int, int, int]] | None:
        """Make the blocks of tokens ``start`` to ``stop`` of ``row`` its own, so that they can be written.

        Returns the blocks to copy first, as ``KVCache.copy_blocks`` takes them: (group, source, target). None, and
        no row's blocks have changed, where free blocks are too few. Only rows that are ``forked`` can need it.
        """
        if not self.forked[row]:
            return []
        shared = []
        for group, table, first in zip(self.groups, self.tables, self.first, strict=True):
            begin, end = max(start // self.block_size, int(first[row])), -(-stop // self.block_size)
            places = group.not_writable(table[row, begin : min(end, self.counts[row])])
            if len(places) > group.num_free:
                return None
            shared.append(begin + places)
        copies = []
        for number, places in enumerate(shared):
            group, table = self.groups[number], self.tables[number]
            sources, targets = table[row, places], group.take(len(places))
            table[row, places] = targets
            group.give_back(sources, int(places.min(initial=0)))
            copies += [(number, int(source), int(target)) for source, target in zip(sources, targets, strict=True)]
        self.counted.copies += len(copies)
        self.forked[row] = -(-stop // self.block_size) < self.counts[row]  # what is grown later is its own
        self.borrowed[row] = 0
        return copies

    def release(self, row: int) -> None:
        """Give back what ``row`` owns; cached blocks can be reused until they are evicted, the text's end first."""
        for group, table, first in zip(self.groups, self.tables, self.first, strict=True):
            held = slice(int(first[row]), int(self.counts[row]))
            group.give_back(table[row, held].copy(), held.start)
            table[row, held] = 0
            first[row] = 0
        for each in (self.counts, self.hashed, self.reusable, self.forked, self.borrowed):
            each[row] = 0
        self.chains[row] = []

    def save(self, row: int) -> SavedRow:
        """All that is known of ``row`` but for its blocks."""
        first = [int(first[row]) for first in self.first]
        return SavedRow(first, int(self.counts[row]), self.chains[row], self.roots[row], int(self.reusable[row]))

    def restore(self, row: int, saved: SavedRow) -> list[list[int]] | None:
        """Give ``row``, which owns nothing, the blocks of a saved one; the places by group that the caller must fill.

        What is cached of the text is shared. None, and nothing has changed, where free blocks are too few.
        """
        missing = self._own(row, saved.first, [*saved.chain, *[None] * (saved.count - len(saved.chain))])
        if missing is not None:
            self.roots[row], self.chains[row], self.reusable[row] = saved.root, saved.chain, saved.reusable
            self.hashed[row] = len(saved.chain)
            for group, table, places in zip(self.groups, self.tables, missing, strict=True):
                known = [place for place in places if place < len(saved.chain)]
                group.register([text_of(saved.chain[place]) for place in known], table[row, known].tolist())
        return missing

    def check_integrity(self) -> None:
        """Raise ``LabinferError`` unless each block is owned as often as rows list it, or cached and free, or free."""
        for number, (group, table, first) in enumerate(zip(self.groups, self.tables, self.first, strict=True)):
            places = np.arange(table.shape[1])
            held = (places >= first[:, None]) & (places < self.counts[:, None])
            if table[~held].any():
                fault(f"a row lists a block of group {number} that it does not own")
            group.check(np.bincount(table[held], minlength=group.num_blocks))
            for row in range(len(self.counts)):
                for place in range(first[row], self.hashed[row]):
                    text = group.texts[int(table[row, place])]
                    if text is not None and text[1] != self.chains[row][place]:
                        fault(f"row {row} has a block at {place} that is cached as another text")
        if self.counts[self.closed].any() or len(set(self.closed)) != len(self.closed):
            fault("a closed row owns blocks, or is closed twice")
