"""The arena planner: bounds, optimality against brute force, hard instances, determinism, and the verifier."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labinfer.compiler.packing import Buffer, pack, verify
from labinfer.compiler.packing.greedy import orders, place_few, place_many
from labinfer.compiler.packing.planner import luby
from labinfer.compiler.packing.problem import Instance
from labinfer.errors import InvalidFile, UsageError


def cut_rectangle(count: int, seed: int, width: int = 1 << 20, height: int = 1 << 20, grain: int = 512) -> list[Buffer]:
    """A hard instance with a known perfect packing: a rectangle (time x bytes) cut at random, over and over."""
    rng = random.Random(seed)
    pieces = [(0, width, height)]
    while len(pieces) < count:
        lower, upper, size = pieces.pop(rng.randrange(len(pieces)))
        if rng.random() < 0.5 and size >= 2 * grain:
            cut = rng.randrange(1, size // grain) * grain
            pieces += [(lower, upper, cut), (lower, upper, size - cut)]
        elif upper - lower >= 2 * grain:
            middle = lower + rng.randrange(1, (upper - lower) // grain) * grain
            pieces += [(lower, middle, size), (middle, upper, size)]
        else:
            pieces.append((lower, upper, size))
    rng.shuffle(pieces)
    return [Buffer(f"b{i}", *piece) for i, piece in enumerate(pieces)]


def fits(buffers: list[Buffer], offsets: dict[str, int], capacity: int) -> bool:
    """Brute force: some choice of integer offsets for the buffers from ``len(offsets)`` on fits the capacity."""
    if len(offsets) == len(buffers):
        return True
    buffer = buffers[len(offsets)]
    for offset in range(capacity - buffer.size + 1):
        trial = {**offsets, buffer.id: offset}
        if not overlap(buffers[: len(trial)], trial) and fits(buffers, trial, capacity):
            return True
    return False


def overlap(buffers: list[Buffer], offsets: dict[str, int]) -> bool:
    return any(
        a.lower < b.upper
        and b.lower < a.upper
        and offsets[a.id] < offsets[b.id] + b.size
        and offsets[b.id] < offsets[a.id] + a.size
        for i, a in enumerate(buffers)
        for b in buffers[:i]
        if a.size and b.size and a.upper > a.lower and b.upper > b.lower
    )


@st.composite
def problems(draw: st.DrawFn, most: int = 12) -> list[Buffer]:
    rows = draw(st.lists(st.tuples(st.integers(-4, 8), st.integers(0, 6), st.integers(0, 7)), max_size=most))
    return [Buffer(f"b{i}", lower, lower + length, size) for i, (lower, length, size) in enumerate(rows)]


@given(problems())
@settings(max_examples=150, deadline=None)
def test_every_packing_is_free_of_overlaps(buffers: list[Buffer]) -> None:
    packing = pack(buffers, effort_seconds=0.2)
    assert set(packing.offsets) == {buffer.id for buffer in buffers}
    assert not overlap(buffers, packing.offsets)
    assert packing.peak >= packing.lower_bound
    verify(buffers, packing.offsets, packing.peak)


@given(problems(), st.data())
@settings(max_examples=150, deadline=None)
def test_the_verifier_rejects_exactly_the_offsets_that_overlap(buffers: list[Buffer], data: st.DataObject) -> None:
    offsets = {buffer.id: data.draw(st.integers(0, 12)) for buffer in buffers}
    peak = max((offsets[buffer.id] + buffer.size for buffer in buffers), default=0)
    if overlap(buffers, offsets):
        with pytest.raises(InvalidFile) as caught:
            verify(buffers, offsets, peak)
        assert caught.value.code == "plan.arena-overlap"
        named = [buffer for buffer in buffers if f"'{buffer.id}'" in caught.value.message]
        assert len(named) == 2
        assert overlap(named, offsets)
    else:
        verify(buffers, offsets, peak)


def test_optimal_agrees_with_brute_force() -> None:
    rng = random.Random(7)
    for _ in range(150):
        buffers = []
        for i in range(rng.randint(2, 7)):
            lower = rng.randint(0, 5)
            buffers.append(Buffer(str(i), lower, lower + rng.randint(1, 4), rng.randint(1, 4)))
        packing = pack(buffers, effort_seconds=10)
        assert packing.optimal
        load = max(sum(b.size for b in buffers if b.lower <= time < b.upper) for time in range(10))
        assert packing.lower_bound == load
        assert fits(buffers, {}, packing.peak)
        assert packing.peak == load or not fits(buffers, {}, packing.peak - 1)


def test_an_optimum_above_the_bound_is_proved() -> None:
    lives = [(0, 4, 2), (0, 1, 2), (1, 6, 1), (1, 5, 1), (4, 6, 1), (4, 7, 1), (5, 7, 1), (6, 9, 2), (7, 9, 2)]
    buffers = [Buffer(str(i), *life) for i, life in enumerate(lives)]
    packing = pack(buffers, effort_seconds=10)
    assert (packing.lower_bound, packing.peak, packing.optimal) == (4, 5, True)
    assert not fits(buffers, {}, 4)
    given_up = pack(buffers, node_limit=1)
    assert given_up.peak == 5
    assert not given_up.optimal


@pytest.mark.parametrize(("count", "seed"), [(60, 1), (150, 2), (150, 3), (250, 4), (400, 5)])
def test_hard_instances_with_a_perfect_packing_are_solved(count: int, seed: int) -> None:
    buffers = cut_rectangle(count, seed)
    packing = pack(buffers, effort_seconds=10)
    assert packing.lower_bound == 1 << 20
    assert packing.peak == 1 << 20
    assert packing.optimal


def test_the_same_input_gives_the_same_offsets() -> None:
    buffers = cut_rectangle(120, 11)
    first = pack(buffers, effort_seconds=10, node_limit=3000)
    second = pack(buffers, effort_seconds=10, node_limit=3000)
    assert (first.offsets, first.peak, first.algorithm) == (second.offsets, second.peak, second.algorithm)


def test_a_capacity_ends_the_search() -> None:
    buffers = cut_rectangle(200, 3)
    packing = pack(buffers, capacity=(1 << 20) + (1 << 17), effort_seconds=10)
    assert packing.peak <= (1 << 20) + (1 << 17)
    too_small = pack(buffers, capacity=1000, effort_seconds=0.2)
    assert too_small.peak >= 1 << 20


def test_buffers_without_size_or_lifetime_get_offset_zero() -> None:
    buffers = [Buffer("a", 0, 4, 10), Buffer("none", 1, 2, 0), Buffer("never", 3, 3, 50)]
    packing = pack(buffers)
    assert packing.offsets == {"a": 0, "none": 0, "never": 0}
    assert packing.peak == packing.lower_bound == 10
    assert pack([]).peak == 0


def test_huge_sizes_stay_exact() -> None:
    step = (1 << 50) - 1
    buffers = [Buffer(str(i), i, i + 3, step - i) for i in range(40)]
    packing = pack(buffers)
    assert packing.peak >= packing.lower_bound > 1 << 51
    assert not overlap(buffers, packing.offsets)


def test_a_chain_of_thousands_of_buffers_needs_no_deep_recursion() -> None:
    rng = random.Random(5)
    buffers = [Buffer(str(i), i, i + rng.randint(1, 12), rng.randint(1, 9)) for i in range(3000)]
    packing = pack(buffers, effort_seconds=2)
    assert packing.peak <= 1.2 * packing.lower_bound
    verify(buffers, packing.offsets, packing.peak)


def test_many_buffers_are_placed_as_few_are() -> None:
    instance = Instance(cut_rectangle(300, 9))
    for (_, order), (_, other) in pairwise(orders(instance)):
        for best_fit in (True, False):
            for placed in (order, other):
                many = place_many(instance, placed, best_fit)
                assert instance.peak(many) >= instance.load
                assert many == place_few(instance, placed, best_fit)


@pytest.mark.parametrize(
    ("buffers", "code"),
    [
        ([Buffer("a", 0, 1, 1), Buffer("a", 0, 1, 1)], "pack.duplicate-id"),
        ([Buffer("a", 2, 1, 1)], "pack.lifetime"),
        ([Buffer("a", 0, 1, -1)], "pack.size"),
    ],
)
def test_impossible_buffers_are_refused(buffers: list[Buffer], code: str) -> None:
    with pytest.raises(UsageError) as caught:
        pack(buffers)
    assert caught.value.code == code


def test_verify_names_what_is_missing_or_outside() -> None:
    with pytest.raises(InvalidFile, match="'a' has no offset"):
        verify([Buffer("a", 0, 1, 4)], {}, 4)
    with pytest.raises(InvalidFile, match="outside"):
        verify([Buffer("a", 0, 1, 4)], {"a": 1}, 4)
    with pytest.raises(InvalidFile, match="outside"):
        verify([Buffer("a", 0, 1, 4)], {"a": -1}, 4)


def test_luby_sequence() -> None:
    assert [luby(i) for i in range(1, 16)] == [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8]
