"""What keeps calls that may wait for a GPU out of the time when some ranks have launched and others have not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest

from labinfer.backends.cuda.launches import LAUNCHES, Launches
from labinfer.backends.cuda.peers import CudaPeers, Meeting
from labinfer.errors import LabinferError

SOON, LATER = 0.02, 20
"""Seconds in which nothing must have happened, and in which something must have."""


def peers_of_two() -> list[CudaPeers]:
    left, meeting = np.zeros(1, np.int32), Meeting(2)
    return [CudaPeers([4096, 8192], left, rank, meeting) for rank in range(2)]


def started(work: Callable[[], Any]) -> threading.Event:
    """An event that is set once ``work``, in a thread of its own, is done."""
    done = threading.Event()

    def run() -> None:
        work()
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done


def test_a_call_waits_until_all_ranks_have_launched() -> None:
    first, second = peers_of_two()
    launched, may_end = threading.Event(), threading.Event()

    def slow() -> None:
        with second.together():
            launched.set()
            assert may_end.wait(LATER)

    second_done = started(slow)
    with first.together():
        pass
    assert launched.wait(LATER)

    def call() -> None:
        with LAUNCHES.paused():
            assert second_done.is_set()

    called = started(call)
    assert not LAUNCHES.try_pause()
    assert not called.wait(SOON)
    may_end.set()
    assert called.wait(LATER)
    assert LAUNCHES.try_pause()
    LAUNCHES.resume()


def test_ranks_wait_for_a_call_and_for_each_other() -> None:
    peers = peers_of_two()

    def step(rank: int) -> None:
        with peers[rank].together():
            pass

    with LAUNCHES.paused():
        first = started(lambda: step(0))
        second = started(lambda: step(1))
        with LAUNCHES.paused():  # one call within another
            assert not second.wait(SOON)
    assert first.wait(LATER)
    assert second.wait(LATER)
    alone = started(lambda: step(0))
    assert not alone.wait(SOON)
    assert started(lambda: step(1)).wait(LATER)
    assert alone.wait(LATER)


def test_who_launches_is_not_kept_by_its_own_calls() -> None:
    """A listener may ask for memory; that nobody else launches meanwhile cannot be had."""
    launches = Launches()
    launches.begin(1)
    with launches.rank(), launches.paused():
        assert not launches.try_pause()
    assert launches.try_pause()


@pytest.mark.parametrize("before", [True, False])
def test_a_rank_that_leaves_is_not_waited_for(before: bool) -> None:
    first, second = peers_of_two()

    def step() -> None:
        with pytest.raises(LabinferError, match="another rank of this stage has failed"), first.together():
            pytest.fail("it launched alone")

    if before:
        second.leave()
    waiting = started(step)
    if not before:
        assert not waiting.wait(SOON)
        second.leave()
    assert waiting.wait(LATER)
    with pytest.raises(LabinferError, match="another rank"), second.together():
        pass
    assert LAUNCHES.try_pause()
    LAUNCHES.resume()


@pytest.mark.parametrize("seed", range(3))
def test_no_call_is_made_between_the_launches_of_a_step(seed: int) -> None:
    """Two groups of two ranks launch, in one order on both devices, and others call; one group loses a rank."""
    order: tuple[list[int], list[int]] = ([], [])
    groups, counts, over = [peers_of_two(), peers_of_two()], np.zeros((2, 2), np.int64), threading.Event()
    steps = 200

    def rank(group: int, number: int) -> int:
        random, peers = np.random.default_rng((seed, group, number)), groups[group][number]
        for step in range(steps):
            if group == 1 and number == 1 and step == steps // 2:
                peers.leave()
                return step
            if random.random() < 0.2:
                with LAUNCHES.paused():
                    assert (counts[:, 0] == counts[:, 1]).all()
            try:
                with peers.together():
                    counts[group, number] += 1
                    order[number].append(group)
            except LabinferError:
                return step
        return steps

    def caller() -> int:
        calls = 0
        while not over.is_set():
            if calls % 2 or not LAUNCHES.try_pause():
                with LAUNCHES.paused():
                    assert (counts[:, 0] == counts[:, 1]).all()
            else:
                assert (counts[:, 0] == counts[:, 1]).all()
                LAUNCHES.resume()
            calls += 1
            time.sleep(1e-4)
        return calls

    with ThreadPoolExecutor(6) as pool:
        callers = [pool.submit(caller) for _ in range(2)]
        ranks = [pool.submit(rank, group, number) for group in range(2) for number in range(2)]
        wait(ranks, LATER)
        over.set()
        assert [each.result() for each in ranks] == [steps, steps, steps // 2, steps // 2]
        assert min(each.result() for each in callers) > 0
    assert order[0] == order[1]
    assert LAUNCHES.ranks == LAUNCHES.pauses == 0
