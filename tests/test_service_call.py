"""Streams of clients that read nothing, or wait for long."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from labinfer.service.call import Call
from labinfer.service.services import Services

from .service import Served, served, wait_for


def silent_stream(api: Served, sent: list[dict[str, Any]], reads: bool) -> Call:
    """A call whose stream has begun and says nothing more, of a client that ``reads`` or does not."""

    async def send(message: Any) -> None:
        sent.append(message)
        if not reads:
            await asyncio.Event().wait()

    async def receive() -> Any:
        raise AssertionError

    call = Call(Services(api.service), {"headers": [], "labinfer.request_id": "req-1"}, receive, send)
    api.service.open_streams.add(call)
    return call


def test_a_silent_stream_gets_comments_whoever_else_reads_nothing(tiny_model: Path) -> None:
    unread: list[dict[str, Any]] = []
    read: list[dict[str, Any]] = []
    with served(tiny_model, keep_alive_seconds=0.1) as api:
        silent_stream(api, unread, reads=False)
        wait_for(lambda: unread)
        silent_stream(api, read, reads=True)
        wait_for(lambda: len(read) >= 2)
        api.service.stalled = True
        wait_for(lambda: not api.service.stalled)  # the watchdog looks on
        api.service.open_streams.clear()
    assert len(unread) == 1  # no comment behind one that was not read
    assert {message["body"] for message in read} == {b": keep-alive\n\n"}
