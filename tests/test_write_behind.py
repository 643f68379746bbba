"""Blocks that wait to be written: found at once, written all, few enough, and a store that fails harms nobody."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from labinfer.runtime.disk_store import DiskStore
from labinfer.runtime.write_behind import WriteBehind


def block(number: int) -> list[np.ndarray]:
    return [np.full(100, number, np.float32), np.full(50, number, np.uint16)]


class SlowStore(DiskStore):
    """Writes when it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "key", 10**6)
        self.go = threading.Event()

    def put(self, group: int, digest: bytes, content: Sequence[np.ndarray]) -> None:
        self.go.wait()
        super().put(group, digest, content)


def found(store: WriteBehind | DiskStore, number: int) -> bool:
    into = block(0)
    there = store.get(0, bytes([number] * 16), into)
    assert not there or all((array == number).all() for array in into)
    return there


def test_blocks_are_found_before_they_are_written_and_all_are_in_the_end(tmp_path: Path) -> None:
    slow = SlowStore(tmp_path)
    store = WriteBehind(slow)
    content = block(1)
    for number in (1, 2, 3, 2):
        content = block(number)
        store.put(0, bytes([number] * 16), content)
        for array in content:  # the caller's memory is used again at once
            array[...] = 77
    assert [found(store, number) for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert [store.has(0, bytes([number] * 16)) for number in (3, 4)] == [True, False]
    assert not found(slow, 1)
    slow.go.set()
    store.close()
    assert (store.pending, store.nbytes, store.lost) == ({}, 0, 0)
    assert [found(slow, number) for number in (1, 2, 3)] == [True] * 3
    assert [found(store, number) for number in (1, 2, 3)] == [True] * 3


def test_what_is_too_much_to_wait_is_lost(tmp_path: Path) -> None:
    slow = SlowStore(tmp_path)
    store = WriteBehind(slow, max_bytes=1000)
    for number in (1, 2, 3):
        store.put(0, bytes([number] * 16), block(number))
    assert [found(store, number) for number in (1, 2, 3)] == [True, True, False]
    slow.go.set()
    store.close()
    assert store.lost == 1
    assert [found(slow, number) for number in (1, 2, 3)] == [True, True, False]


def test_a_store_that_raises_keeps_nothing_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskStore(tmp_path, "key", 10**6)
    put = disk.put

    def sometimes(group: int, digest: bytes, content: Sequence[np.ndarray]) -> None:
        if digest[0] == 1:
            raise MemoryError
        put(group, digest, content)

    monkeypatch.setattr(disk, "put", sometimes)
    store = WriteBehind(disk)
    for number in (1, 2):
        store.put(0, bytes([number] * 16), block(number))
    store.close()
    assert [found(store, number) for number in (1, 2)] == [False, True]
    assert store.nbytes == 0
