"""Cache blocks on disk: nothing damaged is believed, the cap holds, others' files and other processes are respected."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from labinfer.runtime.disk_store import _PARTIAL, DiskStore

SIZE = 1000
FILE = SIZE * 4 + 30


def content(number: int) -> list[np.ndarray]:
    return [np.full(SIZE // 2, number, np.float32), np.full(SIZE, number, np.uint16)]


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def found(store: DiskStore, number: int, group: int = 0) -> bool:
    """Whether a block is there; it must then be the right one."""
    into = content(0)
    there = store.get(group, digest(number), into)
    assert not there or all(np.array_equal(a, b) for a, b in zip(into, content(number), strict=True))
    return there


def put(store: DiskStore, *numbers: int) -> None:
    for number in numbers:
        store.put(0, digest(number), content(number))


def test_blocks_are_found_by_another_process_and_by_their_own_key(tmp_path: Path) -> None:
    put(DiskStore(tmp_path, "one", 10**6), 1, 2)
    again = DiskStore(tmp_path, "one", 10**6)
    assert again.nbytes == 2 * FILE
    assert [found(again, number) for number in (1, 2, 3)] == [True, True, False]
    assert not found(again, 1, group=1)
    assert not found(DiskStore(tmp_path, "two", 10**6), 1)
    assert (again.hits, again.failures) == (2, 0)


@pytest.mark.parametrize("damage", [
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(file.read_bytes()[:-1]),
    lambda file: file.write_bytes(file.read_bytes() + b"0"),
    lambda file: file.write_bytes(file.read_bytes()[:-1] + b"1"),
    lambda file: file.write_bytes(b"x" + file.read_bytes()[1:]),
    lambda file: file.write_bytes((file.parent / f"{digest(2).hex()}.0").read_bytes()),
], ids=["empty", "short", "long", "changed", "other version", "another block's"])  # fmt: skip
def test_a_damaged_file_is_a_miss_and_is_deleted(tmp_path: Path, damage: object) -> None:
    store = DiskStore(tmp_path, "key", 10**6)
    put(store, 1, 2)
    file = store.path(0, digest(1))
    assert callable(damage)
    damage(file)
    assert not found(store, 1)
    assert (store.failures, file.exists()) == (1, False)
    assert found(store, 2)
    put(store, 1)
    assert found(store, 1)


def test_the_least_recently_used_go_when_it_is_full(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, "key", 10 * FILE)
    put(store, *range(1, 11))
    for number in range(1, 11):  # file systems count time coarsely
        os.utime(store.path(0, digest(number)), (number, number))
    assert found(store, 1)
    put(store, 11)
    assert store.nbytes == sum(file.stat().st_size for file in tmp_path.glob("key/*")) <= 10 * FILE
    assert [found(store, number) for number in (1, 2, 3, 10, 11)] == [True, False, False, True, True]


def test_a_block_beyond_the_cap_is_not_kept(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, "key", FILE - 1)
    put(store, 1)
    assert not list(tmp_path.glob("key/*"))


def test_all_keys_share_the_cap_and_other_files_stay(tmp_path: Path) -> None:
    mine = tmp_path / "key" / "notes.txt"
    old, partial = DiskStore(tmp_path, "old", 10**6), tmp_path / "old" / f"x{_PARTIAL}"
    put(old, *range(8))
    for file in tmp_path.glob("old/*"):
        os.utime(file, (1, 1))
    partial.write_bytes(b"left behind")
    os.utime(partial, (1, 1))
    store = DiskStore(tmp_path, "key", 10 * FILE)
    mine.write_text("x" * 100_000)
    fresh = tmp_path / "key" / f"y{_PARTIAL}"
    fresh.write_bytes(b"being written")
    put(store, *range(10, 16))
    assert [found(store, number) for number in range(10, 16)] == [True] * 6
    assert len(list(tmp_path.glob("old/*"))) < 8
    assert mine.exists()
    assert fresh.exists()
    assert not partial.exists()


def test_a_disk_that_fails_is_only_a_miss(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, "key", 10**6)
    put(store, 1)
    store.path(0, digest(2)).mkdir()  # what is no file
    assert not found(store, 2)
    store.path(0, digest(2)).rmdir()
    for file in (tmp_path / "key").iterdir():
        file.unlink()
    (tmp_path / "key").rmdir()
    put(store, 3)
    assert not found(store, 1)
    assert store.failures == 2
    store.shrink()
    assert store.nbytes == 0


def work(folder: Path, seed: int) -> None:
    store, random = DiskStore(folder, "key", 12 * FILE), np.random.default_rng(seed)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        number = int(random.integers(20))
        if not found(store, number):
            put(store, number)
    assert store.failures == 0


def test_processes_share_a_folder(tmp_path: Path) -> None:
    workers = [multiprocessing.get_context("spawn").Process(target=work, args=(tmp_path, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not list(tmp_path.glob(f"key/*{_PARTIAL}"))
    assert DiskStore(tmp_path, "key", 12 * FILE).nbytes <= 12 * FILE
