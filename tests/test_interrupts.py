"""Ctrl-C waits for the end of what it must not cut, on the main thread alone, and only once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from labinfer.runtime.interrupts import interrupts_held


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_end() -> None:
    usual, done = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with interrupts_held():
            ctrl_c()
            done.append("all")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all"]
    assert signal.getsignal(signal.SIGINT) is usual


def test_ctrl_c_waits_for_a_check_of_whoever_asks_first() -> None:
    done = []

    def work() -> None:
        with interrupts_held() as check:
            check()
            with interrupts_held() as inner:
                ctrl_c()
                done.append("some")
                inner()
            done.append("all")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["some"]


def test_a_second_ctrl_c_does_not_wait() -> None:
    done = []

    def work() -> None:
        with interrupts_held():
            ctrl_c()
            done.append("some")
            ctrl_c()
            done.append("all")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["some"]


def test_a_handler_of_the_users_is_called_and_may_go_on() -> None:
    seen: list[int] = []
    usual = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        with interrupts_held() as check:
            ctrl_c()
            assert not seen
            check()
            assert seen == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupts_held() as check:
            ctrl_c()
            check()
    finally:
        signal.signal(signal.SIGINT, usual)
    assert seen == [signal.SIGINT]


def test_other_threads_change_nothing() -> None:
    usual, inside = signal.getsignal(signal.SIGINT), []

    def hold() -> None:
        with interrupts_held() as check:
            inside.append(signal.getsignal(signal.SIGINT))
            check()

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert inside == [usual]
