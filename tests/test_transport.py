"""Channels: frames arrive whole and in order, whatever their sizes; what is no frame is refused; closing wakes all."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.transport import TRANSPORTS, Channel, ChannelClosed, Header, attach, open_channel
from labinfer.runtime.pipeline.transport.arrivals import Arrivals

LIMIT = 1 << 20


class Inbox:
    """Takes frames into buffers of their own."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.sections = channel, list[bytearray]()

    def receive(self) -> tuple[int, int, list[bytes]]:
        header = self.channel.receive(self.place)
        return header.kind, header.tag, [bytes(each) for each in self.sections]

    def place(self, header: Header) -> list[memoryview]:
        self.sections = [bytearray(size) for size in header.sizes]
        return [memoryview(section) for section in self.sections]


@pytest.fixture(params=TRANSPORTS)
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Channel, Channel]]:
    sender, receiver = open_channel(request.param, 4096, LIMIT)
    yield sender, receiver
    for end in (sender, receiver):
        end.close()
        end.release()


@pytest.mark.parametrize("transport", TRANSPORTS)
@settings(max_examples=20)
@given(frames=st.lists(st.lists(st.sampled_from([0, 1, 7, 4000, 4096, 30_000]), max_size=4), max_size=6))
def test_frames_arrive_whole_and_in_order(transport: str, frames: list[list[int]]) -> None:
    sender, receiver = open_channel(transport, 4096, LIMIT)
    sent = [
        (kind, 1 << 40 | kind, [bytes([kind + index]) * size for index, size in enumerate(sizes)])
        for kind, sizes in enumerate(frames)
    ]

    def send() -> None:
        for kind, tag, sections in sent:
            sender.send(kind, tag, [memoryview(each) for each in sections])

    thread = threading.Thread(target=send)
    thread.start()
    inbox = Inbox(receiver)
    assert [inbox.receive() for _ in sent] == sent
    thread.join()
    assert not receiver.ready()
    sender.release()
    receiver.release()


def test_an_end_can_be_attached_by_its_descriptors() -> None:
    for transport in ("shm", "tcp"):
        sender, receiver = open_channel(transport, 4096, LIMIT)
        other = attach(transport, [os.dup(each) for each in receiver.descriptors], LIMIT)
        sender.send(3, 4, [memoryview(b"text")])
        assert Inbox(other).receive() == (3, 4, [b"text"])
        for end in (sender, receiver, other):
            end.release()


def test_what_is_no_frame_is_refused(ends: tuple[Channel, Channel]) -> None:
    sender, receiver = ends
    sender.write([memoryview(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")])
    with pytest.raises(LabinferError, match="no frame of version 3"):
        Inbox(receiver).receive()


def test_frames_beyond_the_limit_are_refused_at_both_ends(ends: tuple[Channel, Channel]) -> None:
    sender, receiver = ends
    with pytest.raises(LabinferError, match="more than the 1048576 allowed"):
        sender.send(0, 0, [memoryview(bytes(LIMIT + 1))])
    sender.limit *= 2

    def send() -> None:
        with contextlib.suppress(ChannelClosed):
            sender.send(0, 0, [memoryview(bytes(LIMIT + 1))])

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(LabinferError, match="at most 1048576 are allowed"):
        Inbox(receiver).receive()
    sender.close()
    receiver.close()
    thread.join()


def test_what_comes_as_expected_and_what_does_not_is_waited_for(ends: tuple[Channel, Channel]) -> None:
    sender, receiver = ends
    arrivals, inbox = Arrivals(receiver), Inbox(receiver)
    for number, seconds in enumerate((0.02, 0.02, 0.0, 0.1, 0.02)):  # new, as usual, sooner, later, sooner
        timer = threading.Timer(seconds, sender.send, (0, number, [memoryview(b"text")]))
        timer.start()
        arrivals.wait()
        assert not receiver.leaves_process or receiver.ready()
        assert inbox.receive() == (0, number, [b"text"])
        timer.join()
        assert not receiver.ready(0.001)


def test_a_refused_place_leaves_the_channel_usable(ends: tuple[Channel, Channel]) -> None:
    sender, receiver = ends

    def refuse(header: Header) -> list[memoryview]:
        raise LabinferError("test.refused", "no")

    for _ in range(2):
        sender.send(1, 1, [memoryview(b"four"), memoryview(b"more")])
    sender.send(2, 2, [memoryview(b"next")])
    with pytest.raises(LabinferError, match="no"):
        receiver.receive(refuse)
    with pytest.raises(LabinferError, match=r"sections of \(4, 4\) bytes came, not of \(8,\)"):
        receiver.receive(lambda header: [memoryview(bytearray(8))])
    assert Inbox(receiver).receive() == (2, 2, [b"next"])


def test_closing_wakes_who_waits_at_either_end(ends: tuple[Channel, Channel]) -> None:
    sender, receiver = ends
    errors: list[str] = []

    def fill() -> None:
        try:
            while True:
                sender.send(0, 0, [memoryview(bytes(LIMIT))])
        except ChannelClosed:
            errors.append("sender")

    thread = threading.Thread(target=fill)
    thread.start()
    inbox = Inbox(receiver)
    inbox.receive()
    receiver.close()
    thread.join(60)
    assert errors == ["sender"]

    def read() -> None:
        while True:
            inbox.receive()

    with pytest.raises(ChannelClosed):
        read()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_more_than_1024_open_files_are_no_trouble(transport: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], min(2048, limits[1])), limits[1]))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        sender, receiver = open_channel(transport, 2 * LIMIT, LIMIT)
        assert not receiver.ready()
        sender.send(0, 0, [memoryview(b"there")])
        assert receiver.ready()
        for end in (sender, receiver):
            end.close()
            end.release()
    finally:
        for file in taken:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
