"""The tape and its workers: every row by every worker, in order, whatever the number of threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

pytest.importorskip("numba")

from labinfer.backends.cpu.driver import share, share_bytes
from labinfer.backends.cpu.tape import ROW, Row, table
from labinfer.backends.cpu.workers import Workers


def test_shares_cover_everything_once() -> None:
    for count in (0, 1, 2, 7, 100):
        for workers in (1, 2, 3, 8):
            parts = [share(count, worker, workers) for worker in range(workers)]
            assert [parts[0][0], *(stop for _, stop in parts)] == [0, *(start for start, _ in parts[1:]), count]


def test_shares_of_products_cover_every_panel_once() -> None:
    products = [(36, 11520), (12, 11520), (12, 16800)]  # panels and the bytes of each: the last in another format
    total = sum(count * size for count, size in products)
    for workers in (1, 2, 3, 7, 100):
        before, taken = 0, np.zeros(workers, np.int64)
        for count, size in products:
            parts = [share_bytes(count, size, before, total, worker, workers) for worker in range(workers)]
            owners = [worker for worker, (start, stop) in enumerate(parts) for _ in range(start, stop)]
            assert len(owners) == count
            assert owners == [next(w for w, (a, b) in enumerate(parts) if a <= i < b) for i in range(count)]
            taken += [size * (stop - start) for start, stop in parts]
            before += count * size
        assert taken.sum() == total
        assert abs(taken - total / workers).max() <= 2 * 16800  # even but for a panel at either end


def test_a_row_keeps_its_arguments() -> None:
    made = table([Row("scale_step", (3, -1, 0.5), then_wait=False), Row("scale_step", (True,))])
    assert made.shape == (2, ROW)
    assert made[0, 1:4].tolist() == [0, 3, -1]
    assert made[0, 4:5].view(np.float64)[0] == 0.5
    assert made[1, 1:3].tolist() == [1, 1]
    assert table([Row("scale_step", (), then_wait=False)])[-1, 1] == 1  # a step ends for all at once
    assert table([]).shape == (0, ROW)
    with pytest.raises(ValueError, match="do not fit"):
        Row("scale_step", tuple(range(ROW - 1)))


def chain(x: np.ndarray, ones: np.ndarray, length: int) -> np.ndarray:
    """A tape that adds ``ones`` to ``x``, ``length`` times over."""
    rows, n = x.shape
    at, one = x.ctypes.data, ones.ctypes.data
    return table([Row("add_step", (rows, at, n, one, n, at, n, n)) for _ in range(length)])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_workers_do_every_row(threads: int) -> None:
    workers, x, ones = Workers(threads), np.zeros((7, 20), np.float32), np.ones((7, 20), np.float32)
    tape = chain(x, ones, 30)
    try:
        for turn in range(1, 40):
            workers.run(tape.ctypes.data, len(tape), 0)
            assert (x == 30 * turn).all()
            if turn % 13 == 0:
                time.sleep(0.02)  # long enough for all to fall asleep
        workers.run(tape.ctypes.data, 0, 0)
        assert (x == 30 * 39).all()
    finally:
        workers.close()
    assert not any(thread.is_alive() for thread in workers.threads)


def test_barriers_order_what_depends_on_other_workers() -> None:
    """Each row of the tape reads what another worker wrote in the one before: a rotation by one row, many times."""
    workers, rows, n = Workers(3), 8, 16
    x, y = (np.zeros((rows, n), np.float32) for _ in range(2))
    x[:] = np.arange(rows)[:, np.newaxis]
    order = np.roll(np.arange(rows), 1).astype(np.int32)
    made, source, target = [], x, y
    for _ in range(40):
        addresses = source.ctypes.data, n, order.ctypes.data, target.ctypes.data, n, n
        made.append(Row("select_rows_step", (rows, *addresses)))
        source, target = target, source
    tape = table(made)
    try:
        for _ in range(20):
            workers.run(tape.ctypes.data, len(tape), 0)
            np.testing.assert_array_equal(x[:, 0], np.arange(rows))  # 40 = 5 whole turns
    finally:
        workers.close()


def test_two_callers_take_turns() -> None:
    workers, arrays = Workers(2), [np.zeros((4, 16), np.float32) for _ in range(2)]
    ones = np.ones((4, 16), np.float32)
    tapes = [chain(x, ones, 10) for x in arrays]

    def repeat(tape: np.ndarray) -> None:
        for _ in range(200):
            workers.run(tape.ctypes.data, len(tape), 0)

    callers = [threading.Thread(target=repeat, args=(tape,)) for tape in tapes]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    workers.close()
    assert all((x == 2000).all() for x in arrays)
