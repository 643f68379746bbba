"""The batch: rows that come and go, what is cached of them, and the decode step that follows from the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labinfer.compiler.plan import CacheGroup, Limits
from labinfer.ops.base import NO_ADAPTER
from labinfer.runtime.batch import Batch, Part, part_of
from labinfer.runtime.block_manager import BlockManager
from labinfer.runtime.step_memory import StepBatch

SIZE = 4
Copies = list[tuple[int, int, int]]


def new_batch(*windows: int | None, num_blocks: int = 40, recompute_after: int | None = None) -> tuple[Batch, Copies]:
    """A batch with a cache group for each of ``windows``, and the copies of blocks that it has asked for."""
    groups = [CacheGroup(window=window, num_blocks=num_blocks) for window in windows or (None,)]
    limits = Limits(
        max_num_batched_tokens=16, max_num_seqs=2, max_logits_rows=2, max_model_len=64, block_size=SIZE, max_loras=2,
        groups=groups,
    )  # fmt: skip
    copies = Copies()
    return Batch(limits, BlockManager(limits, recompute_after=recompute_after), copies.extend), copies


def compute(batch: Batch, part: Part) -> StepBatch:
    """What a step of ``part`` is; its tokens are in the cache afterwards."""
    assert batch.grow(part) is None
    step = batch.step(part)
    batch.computed(part)
    return step


def begin(batch: Batch, text: Sequence[int]) -> int:
    """A row of ``text`` whose last token is not computed, as that of a sequence which decodes."""
    row = batch.add(text)
    cached = batch.attach(row)
    if count := len(text) - 1 - cached:
        compute(batch, part_of(row, count, 0))
    return row


def decode(batch: Batch, rows: np.ndarray) -> StepBatch:
    """A decode step of ``rows``, the one before again where that goes, and their next tokens: each one more."""
    part = batch.again(rows)
    if part is None:
        ones = np.ones(len(rows), np.int32)
        part = Part(rows, ones, ones, ones, decodes=True)
    step = compute(batch, part)
    batch.token_ids[rows, batch.num_tokens[rows]] = batch.token_ids[rows, batch.num_tokens[rows] - 1] + 1
    batch.num_tokens[rows] += 1
    return step


def assert_same(step: StepBatch, other: StepBatch, first: list[np.ndarray]) -> None:
    """Two steps are the same, but for blocks before ``first`` of each group and row, which no token looks at."""
    for name in ("token_ids", "positions", "query_start", "context_len", "total_len", "logits_rows", "adapter"):
        np.testing.assert_array_equal(getattr(step, name), getattr(other, name), name)
    for slots, others in zip(step.slot_mappings, other.slot_mappings, strict=True):
        np.testing.assert_array_equal(slots, others)
    for table, others, before in zip(step.block_tables, other.block_tables, first, strict=True):
        width = min(table.shape[1], others.shape[1])
        seen = np.arange(width) >= before[:, None]
        np.testing.assert_array_equal(table[:, :width][seen], others[:, :width][seen])
        assert (width * SIZE >= step.context_len).all()


@given(
    windows=st.lists(st.sampled_from([None, 3, 8]), min_size=1, max_size=3),
    lengths=st.lists(st.integers(2, 14), min_size=1, max_size=4),
    adapter=st.sampled_from([NO_ADAPTER, 1]),
)
def test_a_decode_step_after_another_is_what_it_would_be_anew(
    windows: list[int | None], lengths: list[int], adapter: int
) -> None:
    found = []
    for follows in (True, False):
        batch, _ = new_batch(*windows)
        rows = np.array([begin(batch, range(100 * number, 100 * number + n)) for number, n in enumerate(lengths)])
        batch.adapter[rows[0]] = adapter
        steps = []
        for turn in range(20):
            assert (batch.again(rows) is not None) == (follows and turn > 0)
            step = decode(batch, rows)
            step = replace(step, block_tables=[table.copy() for table in step.block_tables])  # later ones write there
            steps.append((step, [first[rows].copy() for first in batch.blocks.first]))
            if not follows:
                batch.last = None
            batch.blocks.check_integrity()
        found.append(steps)
    for (step, first), (other, _) in zip(*found, strict=True):
        assert_same(step, other, first)


def test_the_same_step_is_not_made_again_where_anything_else_happened() -> None:
    batch, _ = new_batch()
    rows = np.array([begin(batch, range(6)), begin(batch, range(20, 25))])
    assert batch.again(rows) is None  # the last step was one of a prompt
    decode(batch, rows)
    part = batch.again(rows)
    assert part is not None
    assert batch.again(rows.copy()) is None  # whoever runs has changed
    batch.num_tokens[rows[1]] += 1  # a guess was right
    assert batch.again(rows) is None
    batch.num_tokens[rows[1]] -= 1
    batch.num_computed[rows[0]] -= 1  # a step failed
    assert batch.again(rows) is None
    batch.num_computed[rows[0]] += 1
    assert batch.again(rows) is part
    batch.step(part)
    assert batch.again(rows) is None  # it is on its way
    batch.computed(part)
    batch.num_tokens[rows] += 1
    assert batch.again(rows) is part
    other = batch.add(range(30, 36))
    compute(batch, part_of(other, 6, 0))
    assert batch.again(rows) is None


def test_no_step_follows_from_one_whose_blocks_were_given_back() -> None:
    batch, _ = new_batch()
    rows = np.array([begin(batch, range(7))])
    row = int(rows[0])
    decode(batch, rows)
    decode(batch, rows)
    assert batch.again(rows) is not None
    batch.clear(row)
    assert (batch.num_computed[row], batch.total_len[row], batch.blocks.counts[row]) == (0, 9, 0)
    assert batch.attach(row) == 8  # as many as were computed
    assert batch.again(rows) is None
    step = decode(batch, rows)
    assert (step.positions.tolist(), step.token_ids.tolist()) == ([8], [8])
    batch.blocks.check_integrity()


def test_a_sequence_that_passes_the_length_past_which_keys_do_not_hold_begins_anew() -> None:
    batch, _ = new_batch(recompute_after=9)
    rows = np.array([begin(batch, range(8)), begin(batch, range(20, 25))])
    for _ in range(2):
        decode(batch, rows)
        batch.start_anew(rows)
    assert batch.num_tokens[rows].tolist() == [10, 7]
    assert batch.num_computed[rows].tolist() == [0, 6]
    assert batch.total_len[rows].tolist() == [10, 5]
    assert batch.again(rows) is None
    batch.extend(int(rows[1]), [1, 2])
    assert (batch.num_computed[rows[1]], batch.total_len[rows[1]]) == (6, 9)
    batch.extend(int(rows[1]), [3])
    assert (batch.num_computed[rows[1]], batch.total_len[rows[1]]) == (0, 10)
    batch.blocks.check_integrity()


def test_what_is_cached_of_a_row_is_taken_over() -> None:
    batch, _ = new_batch()
    first = batch.add(range(10))
    assert batch.attach(first) == 0
    compute(batch, part_of(first, 10, 0))
    second, salted = batch.add(range(11)), batch.add(range(11), ("other",))
    assert (batch.attach(second), batch.attach(salted)) == (8, 0)
    assert (batch.num_computed[second], batch.num_computed[salted]) == (8, 0)
    batch.clear(second)
    assert batch.attach(second) == 8
    batch.remove(first)
    third = batch.add(range(11))
    assert batch.attach(third) == 8
    batch.remove(second)
    batch.remove(third)
    batch.forget()
    assert batch.attach(batch.add(range(11))) == 0
    batch.blocks.check_integrity()


def test_a_forgotten_cache_leaves_the_tokens_of_every_row() -> None:
    batch, _ = new_batch()
    rows = np.array([begin(batch, range(9)), begin(batch, range(30, 35))])
    decode(batch, rows)
    batch.forget()
    assert batch.num_computed[rows].tolist() == [0, 0]
    assert batch.tokens(int(rows[0])).tolist() == [*range(10)]
    assert batch.again(rows) is None
    assert batch.blocks.num_free == 40
    batch.blocks.check_integrity()


def test_there_are_always_more_rows_which_keep_what_others_have() -> None:
    batch, _ = new_batch()
    rows = [batch.add([number] * (number + 1), (str(number),)) for number in range(9)]
    batch.end[rows[0]], batch.adapter[rows[0]], batch.watched[rows[0]] = 17, 1, True
    more = [batch.add([9]) for _ in range(20)]
    assert len({*rows, *more}) == 29
    assert [batch.tokens(row).tolist() for row in rows] == [[number] * (number + 1) for number in range(9)]
    assert [batch.salts[row] for row in rows] == [(str(number),) for number in range(9)]
    assert (batch.end[rows[0]], batch.adapter[rows[0]], batch.watched[rows[0]]) == (17, 1, True)
    for row in rows:
        batch.remove(row)
    again = batch.add([5])
    assert again in rows
    assert (batch.adapter[again], batch.watched[again], batch.num_computed[again]) == (NO_ADAPTER, False, 0)
    assert batch.salts[again] == ()


def test_a_fork_shares_blocks_until_one_of_both_writes() -> None:
    batch, copies = new_batch(None, 8)
    row = begin(batch, range(7))
    batch.end[row], batch.plain[row], batch.adapter[row] = 20, True, 1
    other = batch.fork(row)
    assert (batch.end[other], batch.plain[other], batch.adapter[other]) == (20, True, 1)
    assert batch.num_computed[other] == 6
    rows = np.array([row, other])
    shared = [int(table[row, 1]) for table in batch.blocks.tables]
    step = decode(batch, rows)
    assert [(group, source) for group, source, _ in copies] == [*enumerate(shared)]
    assert not set(step.slot_mappings[0][:1] // SIZE) & set(step.slot_mappings[0][1:] // SIZE)
    decode(batch, rows)
    decode(batch, rows)
    assert len(copies) == 2
    batch.blocks.check_integrity()


@pytest.mark.parametrize("follows", [True, False])
def test_where_blocks_run_out_the_rows_before_have_grown(follows: bool) -> None:
    batch, _ = new_batch(num_blocks=7)
    rows = np.array([begin(batch, range(100 * number, 100 * number + n)) for number, n in enumerate((4, 3, 4, 4))])
    decode(batch, rows)  # the first, third and fourth have filled a block
    if not follows:
        batch.last = None
    ones = np.ones(4, np.int32)
    part = batch.again(rows) or Part(rows, ones, ones, ones, decodes=True)
    taken = batch.add(range(3))
    assert batch.grow(part_of(taken, 3, 0)) is None
    assert batch.blocks.num_free == 2
    assert batch.grow(part) == 3
    assert batch.blocks.counts[rows].tolist() == [2, 1, 2, 1]
    batch.remove(taken)
    assert batch.grow(part) is None
    assert batch.blocks.counts[rows].tolist() == [2, 1, 2, 2]
    batch.blocks.check_integrity()


def test_a_step_of_prompts_has_logits_where_they_are_wanted() -> None:
    batch, _ = new_batch()
    rows = np.array([batch.add(range(10)), batch.add(range(20, 23)), batch.add(range(30, 36))])
    counts, wanted = np.array([5, 3, 4], np.int32), np.array([0, 1, 2], np.int32)
    batch.adapter[rows[2]] = 1
    step = compute(batch, Part(rows, counts, wanted, np.array([0, 1, 0], np.int32)))
    assert step.token_ids.tolist() == [0, 1, 2, 3, 4, 20, 21, 22, 30, 31, 32, 33]
    assert step.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert step.query_start.tolist() == [0, 5, 8, 12]
    assert (step.context_len.tolist(), step.total_len.tolist()) == ([5, 3, 4], [10, 3, 6])
    assert step.logits_rows.tolist() == [7, 10, 11]
    assert step.adapter is not None
    assert step.adapter.tolist() == [NO_ADAPTER, NO_ADAPTER, 1]
    assert batch.num_computed[rows].tolist() == [5, 3, 4]
