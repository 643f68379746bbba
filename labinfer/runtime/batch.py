"""The batch: every sequence that owns cache blocks, as a struct of arrays with one row each.

What happens to all sequences in a step is array arithmetic over their rows; Python looks at a single row only where
something happens to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from labinfer.compiler.plan import Limits
from labinfer.ops.base import NO_ADAPTER
from labinfer.runtime.block_digests import Salt
from labinfer.runtime.block_manager import BlockManager
from labinfer.runtime.step_memory import StepBatch

ZERO, ONE = np.array(0, np.int32), np.array(1, np.int32)
"""For numpy quicker than numbers of Python's."""

CopyBlocks = Callable[[Sequence[tuple[int, int, int]]], None]
"""Copies cache blocks: (group, source, target)."""


COLUMNS = (
    "token_ids", "num_tokens", "num_computed", "total_len", "end", "adapter",
    "watched", "plain", "scored", "interactive",
)  # fmt: skip


class Part(NamedTuple):
    """What a step computes: for each of ``rows`` the next ``counts`` tokens, with logits of the last ``wanted``.

    ``new`` is 1 where a token is made from the last of them, else 0. ``rows`` is intp [S], with which numpy indexes
    fastest, the others int32 [S]; no count is 0. ``decodes``: every number is 1. The last ``proposed`` tokens of a row
    are guesses, which stand behind its known tokens; None where there are none. With several ``steps`` the device makes
    as many tokens of each row in one call: they are its ``counts`` and ``new``.
    """

    rows: np.ndarray
    counts: np.ndarray
    wanted: np.ndarray
    new: np.ndarray
    decodes: bool = False
    proposed: np.ndarray | None = None
    steps: int = 1


@dataclass(slots=True)
class LastDecode:
    """The last decode step: what it was, the tokens of its longest row, and where those that it makes come to stand.

    Once it is over, ``filled`` are those of its rows (by index) that have filled a block: the same ones every time that
    all rows are another block further (``fills``, by how many steps there were, modulo the size of a block). The next
    step is mostly the same, each row a token further.
    """

    part: Part
    step: StepBatch
    longest: int
    at: np.ndarray
    turn: int = 0
    filled: np.ndarray | None = None
    fills: dict[int, np.ndarray] = field(default_factory=dict)


def part_of(row: int, count: int, wanted: int) -> Part:
    """A step of one row, which makes no token."""
    counts, rows_wanted, new = (np.array([number], np.int32) for number in (count, wanted, 0))
    return Part(np.array([row]), counts, rows_wanted, new)


class Batch:
    """``token_ids`` [rows, whole blocks] and columns [rows]; ``add`` takes a row, ``remove`` gives it back.

    int32: ``num_tokens`` counts the tokens known, ``num_computed`` those whose keys and values are in the cache,
    ``total_len`` those known when the first of them were computed, and ``end`` those of a sequence when it ends;
    ``adapter`` is a slot or ``NO_ADAPTER``. bool: ``watched`` rows have
    something done to each token, ``plain`` ones take the likeliest, of ``scored`` ones all logits of the prompt are
    wanted, for ``interactive`` ones somebody waits. Rows are those of ``blocks``; ``copy_blocks`` copies in the cache
    itself.
    """

    def __init__(self, limits: Limits, blocks: BlockManager, copy_blocks: CopyBlocks) -> None:
        self.blocks, self.copy_blocks = blocks, copy_blocks
        self.block_size = np.array(limits.block_size, np.int32)
        self.last: LastDecode | None = None
        rows = limits.max_num_seqs
        width = -(-limits.max_model_len // limits.block_size) * limits.block_size
        self.token_ids = np.zeros((rows, width), np.int32)
        self.num_tokens, self.num_computed, self.total_len = (np.zeros(rows, np.int32) for _ in range(3))
        self.end, self.adapter = (np.zeros(rows, np.int32) for _ in range(2))
        self.watched, self.plain, self.scored, self.interactive = (np.zeros(rows, np.bool_) for _ in range(4))
        self.salts: list[Salt] = [()] * rows
        self.has_adapters = limits.max_loras > 0
        self.numbers = np.arange(limits.max_num_batched_tokens + 1, dtype=np.int32)

    def add(self, token_ids: Sequence[int] | np.ndarray, salt: Salt = ()) -> int:
        """A row for a sequence of these tokens that owns no blocks; there are always more."""
        row = self.blocks.open_row()
        if row >= len(self.num_tokens):
            for name in COLUMNS:
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
            self.salts += [()] * len(self.salts)
        self.token_ids[row, : len(token_ids)] = token_ids
        self.num_tokens[row] = self.total_len[row] = len(token_ids)
        self.num_computed[row], self.salts[row] = 0, salt
        self.watched[row], self.adapter[row] = False, NO_ADAPTER
        return row

    def attach(self, row: int) -> int:
        """Take over what the cache has of the beginning of ``row``, which owns nothing; how many tokens that is."""
        cached = self.blocks.attach(row, self.tokens(row), self.salts[row])
        self.num_computed[row] = cached
        return cached

    def clear(self, row: int) -> None:
        """Give the blocks of ``row`` back: nothing of it is computed any more."""
        self.blocks.release(row)
        self.num_computed[row], self.total_len[row] = 0, self.num_tokens[row]
        self.last = None  # no step follows from one that wrote into other blocks

    def forget(self) -> None:
        """The cache has lost what it held: nothing is computed, and nothing can be reused."""
        for row in self.blocks.open_rows:
            self.clear(row)
        self.blocks.forget()

    def start_anew(self, rows: np.ndarray) -> None:
        """Begin those of ``rows`` again that have just passed the length past which cached keys do not hold."""
        limit = self.blocks.recompute_after
        if limit is not None:
            for row in rows[self.num_tokens[rows] == limit + 1].tolist():
                self.clear(row)
                self.attach(row)

    def fork(self, row: int) -> int:
        """A row that goes on from where ``row`` is and shares its blocks."""
        into = self.add(self.tokens(row), self.salts[row])
        for name in COLUMNS[1:]:
            column = getattr(self, name)
            column[into] = column[row]
        self.blocks.fork(row, into)
        return into

    def remove(self, row: int) -> None:
        """Give the row and its blocks back."""
        self.blocks.close_row(row)

    def tokens(self, row: int) -> np.ndarray:
        """The tokens of ``row``: its memory, not a copy."""
        return self.token_ids[row, : self.num_tokens[row]]

    def extend(self, row: int, token_ids: Sequence[int]) -> None:
        """Add tokens to one row; where they pass the length past which cached keys do not hold, it begins anew."""
        before, limit = int(self.num_tokens[row]), self.blocks.recompute_after
        after = before + len(token_ids)
        self.token_ids[row, before:after] = token_ids
        self.num_tokens[row] = self.total_len[row] = after
        if limit is not None and before <= limit < after:
            self.clear(row)

    def put(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """``tokens`` are the last ones of ``rows``, which count them already; how many tokens these have, int32."""
        last, lengths = self.last, np.asarray(self.num_tokens[rows])
        if last is not None and rows is last.part.rows and lengths[0] == last.step.context_len[0] + ONE:
            self.token_ids.reshape(-1)[last.at] = tokens.astype(np.int32)  # quicker than by rows and lengths
        else:
            self.token_ids[rows, lengths - ONE] = tokens
        return lengths

    def grow(self, part: Part) -> int | None:
        """Give rows blocks of their own for what ``part`` writes; where they run out, the index of the first row left.

        Rows before it have grown then.
        """
        last = self.last
        if last is not None and part is last.part and last.filled is not None:
            return self.grow_filled(part, last.filled, last.step.context_len)
        start = self.num_computed[part.rows]
        stop = start + part.counts
        failed = self.blocks.grow(part.rows, stop)
        if failed is None:
            for index in self.blocks.forked[part.rows].nonzero()[0].tolist():
                copies = self.blocks.writable(int(part.rows[index]), int(start[index]), int(stop[index]))
                if copies is None:
                    return int(index)
                self.copy_blocks(copies)
        return failed

    def grow_filled(self, part: Part, filled: np.ndarray, lengths: np.ndarray) -> int | None:
        """``grow`` by one token past ``lengths``, where only rows ``filled`` need another block."""
        failed = self.blocks.grow(part.rows[filled], lengths[filled] + ONE) if len(filled) else None
        return None if failed is None else int(filled[failed])

    def again(self, rows: np.ndarray) -> Part | None:
        """The part of the last decode step, if the next one has the same ``rows``, each of them one token further.

        ``grow`` and ``step`` know it again, and do what has changed.
        """
        last = self.last
        if last is None or last.filled is None or last.part.rows is not rows:
            return None
        computed = last.step.context_len
        if np.count_nonzero(self.num_computed[rows] != computed):
            return None
        return None if np.count_nonzero(self.num_tokens[rows] != computed + ONE) else last.part

    def computed(self, part: Part) -> None:
        """The tokens of ``part`` are in the cache now."""
        self.num_computed[part.rows] += part.counts
        self.commit(part)

    def commit(self, part: Part) -> None:
        """Full blocks of ``part``'s rows hold what their tokens say, and can be reused."""
        rows, lengths = part.rows, self.num_computed[part.rows]
        if part.decodes and part.steps == 1:
            filled = self.filled(part, lengths)
            if not self.blocks.windowed:
                if not len(filled):
                    return
                rows, lengths = rows[filled], lengths[filled]
        self.blocks.commit(rows, lengths, self.token_ids)

    def filled(self, part: Part, lengths: np.ndarray) -> np.ndarray:
        """Which rows of a decode step, by index, have filled a block now that they have ``lengths`` tokens computed."""
        last = self.last
        if last is None or part is not last.part:
            filled: np.ndarray = (lengths % self.block_size == ZERO).nonzero()[0]
            return filled
        turn = last.turn % self.blocks.block_size
        if turn not in last.fills:
            last.fills[turn] = (lengths % self.block_size == ZERO).nonzero()[0]
        last.filled = last.fills[turn]
        return last.filled

    def step(self, part: Part) -> StepBatch:
        """The step batch of ``part``, flat over its rows, which own the blocks it needs."""
        last = self.last
        if last is not None and part is last.part and last.filled is not None:
            return self.next_step(last, last.filled)
        rows, start, size, sequences = part.rows, self.num_computed[part.rows], self.block_size, len(part.rows)
        context = start + part.counts
        longest = int(context.max())
        if part.decodes:
            row, owner, positions = rows, self.numbers[:sequences], start
            query_start, logits = self.numbers[: sequences + 1], owner
            seen = total = start + ONE  # all known tokens
        else:
            query_start = np.zeros(sequences + 1, np.int32)
            np.cumsum(part.counts, out=query_start[1:])
            logits = logits_rows(query_start, part.wanted)
            owner = np.repeat(self.numbers[:sequences], part.counts)
            positions = self.numbers[: len(owner)] + (start - query_start[:-1])[owner]
            row, seen, total = rows[owner], context, np.maximum(self.total_len[rows], context)
        tables = self.blocks.block_tables(rows, longest)
        block, offset = np.divmod(positions, size)
        step = StepBatch(
            token_ids=self.token_ids[row, positions],
            positions=positions,
            query_start=query_start,
            context_len=seen,
            total_len=total,
            logits_rows=logits,
            block_tables=tables,
            slot_mappings=[table[owner, block] * size + offset for table in tables],
            adapter=self.adapters(rows) if self.has_adapters else None,
        )
        single = part.decodes and part.steps == 1 and not np.count_nonzero(self.blocks.forked[rows])
        self.last = LastDecode(part, step, longest, rows * self.token_ids.shape[1] + context) if single else None
        return step

    def next_step(self, last: LastDecode, filled: np.ndarray) -> StepBatch:
        """The step after a decode step that is over; rows ``filled`` have another block now."""
        part, before, size = last.part, last.step, self.blocks.block_size
        positions, tables = before.context_len, before.block_tables
        context, slots = positions + ONE, [each + ONE for each in before.slot_mappings]
        token_ids, last.at = self.token_ids.reshape(-1)[last.at], last.at + 1
        last.longest, last.turn, last.filled = last.longest + 1, last.turn + 1, None
        if last.longest > tables[0].shape[1] * size:
            tables = self.blocks.block_tables(part.rows, last.longest)
        if len(filled):
            rows, places = part.rows[filled], positions[filled] // self.block_size
            for each, table, all_blocks in zip(slots, tables, self.blocks.tables, strict=True):
                table[filled, places] = blocks = all_blocks[rows, places]
                each[filled] = blocks * self.block_size
        last.step = StepBatch(
            token_ids=token_ids,
            positions=positions,
            query_start=before.query_start,
            context_len=context,
            total_len=context,
            logits_rows=before.logits_rows,
            block_tables=tables,
            slot_mappings=slots,
            adapter=before.adapter,
        )
        return last.step

    def adapters(self, rows: np.ndarray) -> np.ndarray | None:
        """The adapter slots of ``rows``, int32; None where none of them has one."""
        slots: np.ndarray = self.adapter[rows]
        return slots if (slots != NO_ADAPTER).any() else None


def logits_rows(query_start: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Indices of the last ``wanted`` tokens of each sequence, int32."""
    last = query_start[1:]
    if int(wanted.max()) <= 1:
        rows: np.ndarray = last[wanted == 1] - np.int32(1)
        return rows
    spans = [np.arange(end - count, end, dtype=np.int32) for end, count in zip(last, wanted, strict=True)]
    return np.concatenate(spans)
