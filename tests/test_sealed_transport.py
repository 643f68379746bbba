"""Connections between hosts: only who knows the token speaks, and nothing is changed, repeated or said by others."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials, Header, Keys, Sealed
from labinfer.runtime.pipeline.transport import sealed as module
from labinfer.runtime.pipeline.transport.sealed import accept, connect

from .test_transport import Inbox

TOKEN = Credentials(bytes(range(32)))
LIMIT = 1 << 20
KEYS = Keys(b"a" * 32, b"b" * 32)
THEIRS = Keys(KEYS.theirs, KEYS.mine)


def pair() -> tuple[Sealed, Sealed]:
    """Two ends with the keys of each other, over a connection that a test can listen to."""
    one, other = connected()
    return Sealed(one, LIMIT, KEYS), Sealed(other, LIMIT, THEIRS)


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


@pytest.fixture
def ends() -> Iterator[tuple[Sealed, Sealed]]:
    sender, receiver = pair()
    yield sender, receiver
    sender.release()
    receiver.release()


class Listener:
    """Accepts callers with ``TOKEN``; what they wanted and their keys, or why they were refused."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = self.socket.getsockname()
        self.heard: list[Any] = []
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        with self.socket, self.socket.accept()[0] as connection:
            try:
                self.heard += accept(connection, TOKEN)
            except ChannelClosed as error:
                self.heard.append(str(error))

    def close(self) -> None:
        self.thread.join()


def test_both_ends_have_the_same_keys_crosswise() -> None:
    with closing(Listener()) as listener:
        connection, keys = connect(listener.address, TOKEN, b"stage 3")
        connection.close()
    assert listener.heard == [b"stage 3", Keys(keys.theirs, keys.mine)]
    assert keys.mine != keys.theirs


def test_a_caller_with_another_token_is_told_so_and_refused() -> None:
    with closing(Listener()) as listener, pytest.raises(ChannelClosed, match="another token"):
        connect(listener.address, Credentials(bytes(32)), b"")
    assert listener.heard == ["the other end hung up"]


def test_a_listener_does_not_believe_a_wrong_proof() -> None:
    with closing(Listener()) as listener, socket.create_connection(listener.address) as caller:
        caller.sendall(struct.pack("<4sH16s16s", b"LABS", module.VERSION, bytes(16), b"") + bytes(32))
        assert len(caller.recv(100, socket.MSG_WAITALL)) < 100
    assert listener.heard == ["the caller has another token"]


def test_versions_must_be_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Listener()) as listener, socket.create_connection(listener.address) as caller:
        caller.sendall(struct.pack("<4sH16s16s", b"LABS", module.VERSION + 1, bytes(16), b""))
        assert caller.recv(1) == b""
    assert "does not speak version" in listener.heard[0]


def test_who_says_nothing_is_not_listened_to_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_SECONDS", 0.05)
    with closing(Listener()) as listener, socket.create_connection(listener.address):
        listener.thread.join(60)
        assert listener.heard == ["timed out"]


def test_a_handshake_has_one_deadline_however_slowly_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_SECONDS", 0.3)
    with closing(Listener()) as listener, socket.create_connection(listener.address) as caller:
        with suppress(OSError):
            for _ in range(1000):
                if listener.heard:
                    break
                caller.sendall(b"L")
                time.sleep(0.02)
        assert listener.heard in (["the other end took too long"], ["timed out"])


@settings(max_examples=50, deadline=None)
@given(garbage=st.binary(max_size=200))
def test_garbage_instead_of_a_handshake_is_refused(garbage: bytes) -> None:
    with closing(Listener()) as listener, socket.create_connection(listener.address) as caller:
        caller.sendall(garbage)
        caller.shutdown(socket.SHUT_WR)
    assert len(listener.heard) == 1
    assert isinstance(listener.heard[0], str)


def record(sections: list[bytes], tag: int = 7) -> bytes:
    """A frame as it travels."""
    sender, receiver = pair()
    with closing(receiver.connection):
        sender.send(1, tag, [memoryview(each) for each in sections])
        sender.release()
        heard = b""
        while received := receiver.connection.recv(1 << 16):
            heard += received
    return heard


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_frame_that_was_changed_is_never_taken_for_one(data: st.DataObject) -> None:
    heard = bytearray(record([b"first section", b"", b"second"]))
    at = data.draw(st.integers(0, len(heard) - 1))
    heard[at] ^= data.draw(st.integers(1, 255))
    one, other = connected()
    receiver = Sealed(other, LIMIT, THEIRS)
    with closing(one), closing(other):
        one.sendall(heard)
        one.shutdown(socket.SHUT_WR)
        with pytest.raises((ChannelClosed, LabinferError)):
            Inbox(receiver).receive()


@pytest.mark.parametrize("order", [[0, 0], [1], [0, 2]])
def test_a_frame_cannot_be_repeated_left_out_or_put_before_another(order: list[int]) -> None:
    sender, receiver = pair()
    with ExitStack() as stack:
        stack.callback(receiver.release)
        for tag in range(3):
            sender.send(1, tag, [memoryview(b"text")])
        sender.release()
        size = len(record([b"text"]))
        stream = receiver.connection.recv(3 * size, socket.MSG_WAITALL)
        frames = [stream[start : start + size] for start in range(0, len(stream), size)]
        one, other = connected()
        stack.callback(one.close)
        late = Sealed(other, LIMIT, THEIRS)
        stack.callback(late.release)
        one.sendall(b"".join(frames[number] for number in order))
        inbox = Inbox(late)
        if order[0] == 0:
            assert inbox.receive() == (1, 0, [b"text"])
        with pytest.raises(ChannelClosed, match="forged or repeated"):
            inbox.receive()


def test_frames_go_both_ways_whole_and_in_order(ends: tuple[Sealed, Sealed]) -> None:
    sent = [(kind, 9, [bytes([kind]) * size for size in (0, 70_000, 3)]) for kind in range(3)]
    for here, there in (ends, reversed(ends)):
        inbox = Inbox(there)
        for kind, tag, sections in sent:
            here.send(kind, tag, [memoryview(each) for each in sections])
            assert inbox.receive() == (kind, tag, sections)


@pytest.mark.parametrize("fetches", [True, False], ids=["fetched before", "not fetched"])
@pytest.mark.parametrize("sizes", [(0, 3), (48, 2304, 0), (70_000,)])
def test_an_expected_frame_is_received_into_its_sections(
    sizes: tuple[int, ...], fetches: bool, ends: tuple[Sealed, Sealed]
) -> None:
    sender, receiver = ends
    for tag in range(3):
        sent = [bytes([tag + 1]) * size for size in sizes]
        taken = [bytearray(size) for size in sizes]
        receiver.expect(1, tag, [memoryview(each) for each in taken])
        sender.send(1, tag, [memoryview(each) for each in sent])
        while fetches and not receiver.fetch():
            pass
        header = receiver.receive(lambda header, taken=taken: [memoryview(each) for each in taken])
        assert (header, taken) == (Header(1, tag, sizes), sent)


def test_another_frame_may_come_than_was_expected(ends: tuple[Sealed, Sealed]) -> None:
    sender, receiver = ends
    inbox = Inbox(receiver)
    untouched = bytearray(4)
    for kind, tag, text in [(2, 0, b"four"), (1, 1, b"four"), (1, 0, b"three"), (1, 0, b"four")]:
        receiver.expect(1, 0, [memoryview(untouched)])
        sender.send(kind, tag, [memoryview(text)])
        while not receiver.fetch():
            pass
        if (kind, tag, text) != (1, 0, b"four"):
            assert inbox.receive() == (kind, tag, [text])
            assert untouched == bytes(4)
    receiver.receive(inbox.place)
    assert untouched == b"four"


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_an_expected_frame_that_was_changed_is_never_taken_for_one(data: st.DataObject) -> None:
    heard = bytearray(record([b"first section"]))
    heard[data.draw(st.integers(0, len(heard) - 1))] ^= data.draw(st.integers(1, 255))
    one, other = connected()
    receiver, taken = Sealed(other, LIMIT, THEIRS), bytearray(13)
    with closing(one), closing(other):
        receiver.expect(1, 7, [memoryview(taken)])
        one.sendall(heard)
        one.shutdown(socket.SHUT_WR)
        while not receiver.fetch():
            pass
        with pytest.raises((ChannelClosed, LabinferError)):
            Inbox(receiver).receive()
        assert taken == bytes(13)


def test_a_frame_beyond_the_limit_is_refused_before_its_memory_is_taken(ends: tuple[Sealed, Sealed]) -> None:
    sender, receiver = ends
    sender.limit *= 1 << 30
    sender.write([memoryview(struct.pack("<4sHHQIIQ", b"LABI", module.VERSION, 1, 0, 1, 0, 1 << 40))])
    with pytest.raises(LabinferError, match="at most 1048576 are allowed"):
        Inbox(receiver).receive()


def test_a_refused_place_leaves_the_connection_usable(ends: tuple[Sealed, Sealed]) -> None:
    def refuse(header: Header) -> list[memoryview]:
        raise LabinferError("test.refused", "no")

    sender, receiver = ends
    sender.send(1, 1, [memoryview(bytes(100_000)), memoryview(b"more")])
    sender.send(2, 2, [memoryview(b"next")])
    with pytest.raises(LabinferError, match="no"):
        receiver.receive(refuse)
    assert Inbox(receiver).receive() == (2, 2, [b"next"])
