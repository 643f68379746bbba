"""Blocks of the cache: growth, windows, reuse of prefixes, eviction, forks, and the books kept right throughout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labinfer.compiler.plan import CacheGroup, Limits
from labinfer.errors import LabinferError
from labinfer.runtime.block_manager import BlockManager
from labinfer.runtime.block_texts import BlockTexts, equal_tokens
from labinfer.runtime.eviction import LeastRecentlyUsed

TEXT = list(range(100, 200))


def manager(*groups: tuple[int | None, int], block_size: int = 4, **options: Any) -> BlockManager:
    """A manager of groups given as (window, number of blocks)."""
    limits = Limits(
        max_num_batched_tokens=16, max_num_seqs=2, max_logits_rows=2, max_model_len=128, block_size=block_size,
        groups=[CacheGroup(window=window, num_blocks=count) for window, count in groups],
    )  # fmt: skip
    return BlockManager(limits, **options)


def write(blocks: BlockManager, row: int, text: list[int], upto: int | None = None) -> bool:
    """Grow ``row`` for ``text``, and count all of it, or what is before ``upto``, as computed."""
    rows, length = np.array([row]), len(text) if upto is None else upto
    if blocks.grow(rows, np.array([length])) is not None:
        return False
    blocks.commit(rows, np.array([length]), tokens_of(row, text))
    return True


def tokens_of(row: int, text: list[int]) -> np.ndarray:
    """The tokens of all rows, as far as that of ``row`` is known."""
    tokens = np.zeros((row + 1, 128), np.int32)
    tokens[row, : len(text)] = text
    return tokens


def begin(blocks: BlockManager, text: list[int], salt: tuple[str, ...] = ()) -> tuple[int, int]:
    """A new row with all of ``text`` computed, and how much of it was cached."""
    row = blocks.open_row()
    cached = blocks.attach(row, text, salt)
    assert write(blocks, row, text)
    return row, cached


def owned(blocks: BlockManager, row: int, group: int = 0) -> list[int]:
    return blocks.tables[group][row, blocks.first[group][row] : blocks.counts[row]].tolist()


def test_rows_grow_by_whole_blocks_until_they_run_out() -> None:
    blocks = manager((None, 5))
    rows = np.array([blocks.open_row(), blocks.open_row(), blocks.open_row()])
    assert blocks.grow(rows, np.array([4, 5, 1])) is None
    assert [len(owned(blocks, row)) for row in rows.tolist()] == [1, 2, 1]
    assert blocks.grow(rows, np.array([4, 8, 4])) is None
    assert blocks.num_free == 1
    assert blocks.grow(rows, np.array([5, 9, 5])) == 1  # the first takes the last block
    assert [len(owned(blocks, row)) for row in rows.tolist()] == [2, 2, 1]
    assert blocks.grow(rows, np.array([8, 8, 4])) is None
    blocks.check_integrity()
    assert len({block for row in rows.tolist() for block in owned(blocks, row)}) == 5
    assert blocks.usage == 1
    blocks.close_row(int(rows[1]))
    assert (blocks.num_free, blocks.usage) == (2, pytest.approx(0.6))


def test_a_cached_beginning_is_shared_and_never_the_whole_prompt() -> None:
    blocks = manager((None, 40))
    first, cached = begin(blocks, TEXT[:22])
    assert cached == 0
    assert blocks.match(TEXT[:22]) == 20
    assert blocks.match(TEXT[:20]) == 16  # the last token must be computed, for its logits
    assert blocks.match([*TEXT[:9], 7, *TEXT[10:22]]) == 8
    assert blocks.match([7, *TEXT[1:22]]) == 0
    second, cached = begin(blocks, TEXT[:30])
    assert cached == 20
    assert owned(blocks, second)[:5] == owned(blocks, first)[:5]
    assert (blocks.counters.queries, blocks.counters.hits) == (52, 20)
    blocks.check_integrity()


def test_the_same_block_of_text_after_another_text_is_another() -> None:
    blocks = manager((None, 40))
    begin(blocks, [1, 2, 3, 4, 9, 9, 9, 9, 0])
    assert blocks.match([9, 9, 9, 9, 0]) == 0
    assert blocks.match([1, 2, 3, 4, 9, 9, 9, 9, 5]) == 8


def test_salts_keep_texts_apart() -> None:
    blocks = manager((None, 40))
    begin(blocks, TEXT[:20], ("alice",))
    for salt, expected in ((("alice",), 16), ((), 0), (("bob",), 0), (("alice", ""), 0), (("", "alice"), 0)):
        assert blocks.match(TEXT[:20], salt) == expected


def test_released_blocks_stay_until_the_last_of_a_text_is_evicted_first() -> None:
    blocks = manager((None, 6))
    row, _ = begin(blocks, TEXT[:16])
    blocks.release(row)
    assert (blocks.num_free, blocks.usage, blocks.match(TEXT[:17])) == (6, 0, 16)
    other = blocks.open_row()
    assert blocks.grow(np.array([other]), np.array([8])) is None  # the two that hold nothing
    assert (blocks.match(TEXT[:17]), blocks.counters.evictions) == (16, 0)
    assert blocks.grow(np.array([other]), np.array([12])) is None
    assert (blocks.match(TEXT[:17]), blocks.counters.evictions) == (12, 1)
    assert blocks.attach(row, TEXT[:17]) == 12
    assert blocks.grow(np.array([other]), np.array([16])) == 0 or blocks.num_free == 0
    blocks.check_integrity()


def test_least_recently_used_goes_first() -> None:
    blocks = manager((None, 4))
    for text in ([1] * 4, [2] * 4, [3] * 4, [4] * 4):
        blocks.close_row(begin(blocks, text)[0])
    row = blocks.open_row()
    assert blocks.attach(row, [1] * 5) == 4
    blocks.close_row(row)
    row, _ = begin(blocks, [9] * 8)
    assert [blocks.match([n] * 5) for n in (1, 2, 3, 4)] == [4, 0, 0, 4]


def test_two_rows_that_compute_the_same_text_keep_their_own_blocks() -> None:
    blocks = manager((None, 20))
    one, two = blocks.open_row(), blocks.open_row()
    for row in (one, two):
        blocks.attach(row, TEXT[:12])
    for row in (one, two):
        assert write(blocks, row, TEXT[:12])
    assert not set(owned(blocks, one)) & set(owned(blocks, two))
    blocks.check_integrity()
    blocks.release(one)
    blocks.release(two)
    blocks.check_integrity()
    assert blocks.match(TEXT[:13]) == 12


@pytest.mark.parametrize("window", [1, 3, 4, 5, 16, 17])
def test_a_window_keeps_what_the_next_token_sees_and_no_more(window: int) -> None:
    blocks = manager((window, 40))
    row = blocks.open_row()
    for length in range(1, 100):
        assert write(blocks, row, TEXT[:length])
        table, first = blocks.tables[0][row], int(blocks.first[0][row])
        seen = range(max(0, length - window + 1), length)  # what the token at position `length` looks at, but itself
        assert first <= min(seen, default=length) // 4
        assert len(owned(blocks, row)) <= 2 + window // 4
        assert not table[:first].any()
    blocks.check_integrity()


def test_groups_go_on_until_their_own_windows_pass() -> None:
    blocks = manager((None, 30), (16, 30), (4, 30))
    row = blocks.open_row()
    assert write(blocks, row, TEXT)
    assert [len(owned(blocks, row, group)) for group in range(3)] == [25, 4, 1]
    blocks.check_integrity()


def cached_beside_a_narrow_group() -> tuple[BlockManager, int]:
    """Forty tokens, cached whole in one group, and what a window of eight leaves of them in the other."""
    blocks = manager((None, 60), (8, 6))
    row = blocks.open_row()
    blocks.attach(row, TEXT[:40])
    for upto in (16, 32, 40):
        assert write(blocks, row, TEXT[:40], upto)
    blocks.release(row)
    return blocks, row


def test_a_window_group_needs_only_the_window_for_a_hit() -> None:
    blocks, row = cached_beside_a_narrow_group()
    assert blocks.match([*TEXT[:40], 1]) == 40  # places 8 and 9 are there, the text before is in the other group
    assert blocks.match([*TEXT[:28], 1]) == 16  # place 5 was given to what came later, and so was 4; 2 and 3 are there
    assert blocks.match([*TEXT[:12], 1]) == 0
    assert blocks.attach(row, [*TEXT[:40], 1]) == 40
    assert (len(owned(blocks, row, 0)), len(owned(blocks, row, 1))) == (10, 2)
    blocks.check_integrity()


def test_without_a_group_that_sees_all_the_window_alone_is_a_hit() -> None:
    blocks = manager((8, 12))
    row, _ = begin(blocks, TEXT[:40])
    blocks.release(row)
    assert blocks.match([*TEXT[:40], 1]) == 40
    other, cached = begin(blocks, TEXT[:60])
    assert cached == 40
    assert len(owned(blocks, other)) == 2
    blocks.check_integrity()


def test_a_window_bounds_what_a_sequence_needs() -> None:
    blocks = manager((8, 8))
    row = blocks.open_row()
    assert blocks.fits(row, 128)  # a window and one step's tokens: 1 + (8 + 16 + 2) // 4 = 7 blocks
    for upto in range(16, 97, 16):
        assert blocks.fits(row, 128)
        assert write(blocks, row, TEXT, upto)
    assert not manager((8, 6)).fits(0, 128)


def test_writing_to_a_forked_row_copies_what_is_shared_once() -> None:
    blocks = manager((None, 8))
    row, _ = begin(blocks, TEXT[:10])
    child = blocks.open_row()
    blocks.fork(row, child)
    blocks.check_integrity()
    assert owned(blocks, child) == owned(blocks, row)
    assert blocks.num_free == 5
    source = owned(blocks, row)[2]
    [(group, copied, target)] = blocks.writable(child, 10, 11) or []
    assert (group, copied) == (0, source)
    assert owned(blocks, child) == [*owned(blocks, row)[:2], target]
    assert blocks.writable(child, 10, 11) == []
    assert blocks.writable(row, 10, 11) == []  # nobody else has it any more
    assert blocks.counters.copies == 1
    assert not blocks.forked.any()
    blocks.check_integrity()
    blocks.release(row)
    assert blocks.match(TEXT[:10]) == 8
    blocks.check_integrity()


def test_a_fork_that_finds_no_block_changes_nothing() -> None:
    blocks = manager((None, 3))
    row, _ = begin(blocks, TEXT[:10])
    child = blocks.open_row()
    blocks.fork(row, child)
    assert blocks.writable(child, 10, 11) is None
    blocks.check_integrity()
    blocks.release(row)
    assert blocks.writable(child, 10, 11) == []


def test_a_block_that_begins_alike_is_shared_until_it_is_written_to() -> None:
    blocks = manager((None, 8))
    first, _ = begin(blocks, TEXT[:12])
    text = [*TEXT[:7], 7, 7, 7]
    row = blocks.open_row()
    assert blocks.match(text) == 4
    assert blocks.attach(row, text) == 7
    assert owned(blocks, row) == owned(blocks, first)[:2]
    assert (blocks.counters.hits, blocks.borrowed[row]) == (7, 3)
    blocks.check_integrity()
    blocks.release(first)  # what is cached must stay as it is, owned or not
    source = owned(blocks, row)[1]
    assert blocks.grow(np.array([row]), np.array([10])) is None
    [(group, copied, target)] = blocks.writable(row, 7, 10) or []
    assert (group, copied, blocks.borrowed[row]) == (0, source, 0)
    assert owned(blocks, row)[1] == target != source
    blocks.commit(np.array([row]), np.array([10]), tokens_of(row, text))
    blocks.check_integrity()
    assert (blocks.match([*TEXT[:12], 1]), blocks.match([*text[:8], 1])) == (12, 8)


def test_of_a_prompt_that_is_all_cached_one_token_is_computed() -> None:
    blocks = manager((None, 8))
    begin(blocks, TEXT[:12])
    row = blocks.open_row()
    assert blocks.attach(row, TEXT[:12]) == 11


def test_less_than_a_quarter_of_a_block_is_not_worth_a_copy() -> None:
    blocks = manager((None, 8), block_size=16)
    begin(blocks, TEXT[:32])
    row = blocks.open_row()
    for equal, found in ((3, 16), (4, 20), (15, 31)):
        assert blocks.attach(row, [*TEXT[: 16 + equal], *[7] * 20]) == found
        blocks.release(row)
    blocks.check_integrity()


def test_without_room_for_a_copy_what_is_cached_is_written_to() -> None:
    blocks = manager((None, 3))
    row, _ = begin(blocks, TEXT[:12])
    blocks.release(row)
    text = [*TEXT[:10], 7, 7]
    assert blocks.attach(row, text) == 10
    other = blocks.open_row()
    blocks.fork(row, other)
    assert blocks.writable(row, 10, 12) is None  # the other one has it too
    blocks.check_integrity()
    blocks.release(other)
    assert blocks.writable(row, 10, 12) == []
    assert (blocks.counters.evictions, blocks.match([*TEXT[:12], 1])) == (1, 8)
    blocks.commit(np.array([row]), np.array([12]), tokens_of(row, text))
    blocks.check_integrity()
    assert blocks.match([*text, 1]) == 12


def test_a_block_that_begins_alike_must_be_in_every_group() -> None:
    blocks, row = cached_beside_a_narrow_group()
    assert blocks.attach(row, [*TEXT[:18], 7, 7]) == 16  # the narrow group has not kept the block after the fourth
    blocks.release(row)
    assert blocks.attach(row, [*TEXT[:38], 7, 7]) == 38
    assert write(blocks, row, [*TEXT[:38], 7, 7], 38)
    blocks.check_integrity()


def test_what_keys_of_other_lengths_hold_is_not_shared_either() -> None:
    blocks = manager((None, 60), reuse_until=20)
    row, _ = begin(blocks, TEXT[:20])
    other = blocks.open_row()
    assert blocks.attach(other, [*TEXT[:18], 7, 7]) == 18
    blocks.release(other)
    assert blocks.attach(other, [*TEXT[:18], *[7] * 7]) == 0
    long = manager((None, 60), recompute_after=20)
    row, _ = begin(long, TEXT[:20])
    assert long.attach(row + 1, [*TEXT[:18], *[7] * 7]) == 0


BYTES_OF_TOKENS = st.lists(st.sampled_from([0, 1, 255, 256, 1 << 24]), min_size=4, max_size=4).map(
    lambda tokens: np.array(tokens, np.int32).tobytes()
)


@given(
    kept=st.lists(BYTES_OF_TOKENS, max_size=20, unique=True), gone=st.sets(st.integers(0, 19)), wanted=BYTES_OF_TOKENS
)
def test_the_nearest_text_has_the_longest_common_beginning(kept: list[bytes], gone: set[int], wanted: bytes) -> None:
    texts = BlockTexts()
    for number, raw in enumerate(kept):
        texts.add([(raw, bytes([number]), b"before"), (raw, bytes([100 + number]), b"elsewhere")])
    for number, raw in enumerate(kept):
        if number in gone:
            texts.remove((raw, bytes([number]), b"before"))
    left = {bytes([number]): raw for number, raw in enumerate(kept) if number not in gone}
    for length in (4, 3, 1, 0):
        digest, common = texts.nearest(b"before", wanted[: 4 * length])
        assert common == max((equal_tokens(wanted[: 4 * length], raw) for raw in left.values()), default=0)
        assert common == 0 or equal_tokens(wanted[: 4 * length], left[digest]) == common
    assert len(texts.after) == bool(left) + bool(kept)


def test_blocks_grown_before_a_fork_are_copied_when_they_are_reached() -> None:
    blocks = manager((None, 20))
    row, _ = begin(blocks, TEXT[:6])
    assert blocks.grow(np.array([row]), np.array([16])) is None
    child = blocks.open_row()
    blocks.fork(row, child)
    assert len(blocks.writable(child, 6, 8) or ()) == 1
    assert len(blocks.writable(child, 8, 16) or ()) == 2
    blocks.check_integrity()


def test_keys_of_long_and_short_sequences_are_not_mixed() -> None:
    blocks = manager((None, 60), recompute_after=20)
    row, _ = begin(blocks, TEXT[:20])
    assert (blocks.match(TEXT[:20]), blocks.match(TEXT[:21])) == (16, 0)
    blocks.release(row)  # it grew past the length, and is computed anew
    assert blocks.attach(row, TEXT[:21]) == 0
    assert write(blocks, row, TEXT[:21])
    assert (blocks.match(TEXT[:19]), blocks.match(TEXT[:30])) == (16, 20)


def test_nothing_is_reused_where_keys_depend_on_the_length() -> None:
    blocks = manager((None, 60), reuse_until=20)
    row, _ = begin(blocks, TEXT[:18])
    assert write(blocks, row, TEXT[:40])
    assert (blocks.match(TEXT[:20]), blocks.match(TEXT[:30])) == (16, 0)
    assert len(blocks.groups[0].cached) == 5
    blocks.release(row)
    begin(blocks, TEXT[40:80])
    assert len(blocks.groups[0].cached) == 5


def test_caching_can_be_turned_off() -> None:
    blocks = manager((None, 20), caching=False)
    row, _ = begin(blocks, TEXT[:16])
    assert blocks.match(TEXT[:17]) == 0
    blocks.release(row)
    assert (blocks.attach(row, TEXT[:17]), len(blocks.groups[0].cached)) == (0, 0)


def test_rows_are_never_few() -> None:
    blocks = manager((None, 40), (8, 40))
    rows = [begin(blocks, [n] * 5)[0] for n in range(9)]
    assert len(set(rows)) == 9
    blocks.check_integrity()
    for row in rows:
        blocks.close_row(row)
    assert blocks.usage == 0
    blocks.check_integrity()


@pytest.mark.parametrize("damage", [
    lambda blocks: blocks.groups[0].owners.__setitem__(0, 2),
    lambda blocks: blocks.tables[0].__setitem__((0, 9), 3),
    lambda blocks: blocks.groups[0].texts.reverse(),
    lambda blocks: blocks.groups[0].cached.popitem(),
    lambda blocks: blocks.groups[0].texts.__setitem__(9, (b"", b"", b"")),
    lambda blocks: blocks.groups[0].give_back(np.array([9], np.int32), 0),
    lambda blocks: blocks.groups[0].policy.blocks.popitem(),
    lambda blocks: blocks.chains[0].reverse(),
    lambda blocks: blocks.closed.append(0),
    lambda blocks: blocks.groups[0].by_beginning.add([(b"", b"another", b"")]),
    lambda blocks: setattr(blocks.groups[0], "fresh", 3),
], ids=range(11))  # fmt: skip
def test_broken_books_are_found(damage: Any) -> None:
    blocks = manager((None, 20))
    row, _ = begin(blocks, TEXT[:12])
    other, _ = begin(blocks, TEXT[50:58])
    assert row == 0
    blocks.close_row(other)
    blocks.check_integrity()
    damage(blocks)
    with pytest.raises(LabinferError) as caught:
        blocks.check_integrity()
    assert caught.value.code == "run.cache-integrity"


def test_a_policy_of_ones_own() -> None:
    class Newest(LeastRecentlyUsed):
        def evict(self) -> int:
            return self.blocks.popitem()[0]

    blocks = manager((None, 3), policy=Newest)
    for text in ([1] * 4, [2] * 4, [3] * 4):
        blocks.close_row(begin(blocks, text)[0])
    begin(blocks, [9] * 4)
    assert [blocks.match([n] * 5) for n in (1, 2, 3)] == [4, 4, 0]
