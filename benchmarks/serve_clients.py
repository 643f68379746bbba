"""Clients for ``serve.py`` and ``serve_faults.py``: some read nothing, leave at any time, or ask for anything; others
know what they should be told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from labinfer.bench.load import Sample, Target, ask

Body = dict[str, Any]

KINDS: tuple[Body, ...] = (
    {"temperature": 0},
    {"temperature": 1, "seed": 5},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "n": 2},
    {"temperature": 1.3, "min_p": 0.05, "logprobs": 3},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "stop": [" the", "."]},
    {"echo": True, "logprobs": 1},
    {"temperature": -1},
)
"""Kinds of requests; the last is refused."""


async def slow_readers(to: Target, bodies: list[Body], reads: bool) -> list[Sample]:
    """The answers to ``bodies`` beside 8 long streams with much to read, which are read or not."""
    heavy = {"max_tokens": 400, "ignore_eos": True, "temperature": 0, "logprobs": 20, "n": 2, "stream": True}
    others = [asyncio.ensure_future(hold(to, heavy | {"prompt": [100 + number] * 32}, reads)) for number in range(8)]
    samples = await asyncio.gather(*(ask(to, body) for body in bodies))
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return list(samples)


async def hold(to: Target, body: Body, reads: bool) -> None:
    """Ask for a stream through a small window, and read all of it or nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    with connection:
        await loop.sock_connect(connection, (to.host, to.port))
        await loop.sock_sendall(connection, to.request(body))
        while not reads or await loop.sock_recv(connection, 1 << 16):
            if not reads:
                await asyncio.sleep(3600)


async def drip(to: Target) -> tuple[float, bytes]:
    """Send a byte of a request a second until the server closes; after how many seconds, and what it said."""
    reader, writer = await asyncio.open_connection(to.host, to.port)
    began, said = time.monotonic(), asyncio.ensure_future(reader.read())
    try:
        for byte in to.request({}):
            writer.write(bytes([byte]))
            if (await asyncio.wait([said], timeout=1))[0]:
                break
        return time.monotonic() - began, await said
    finally:
        writer.close()


async def beside_drips(to: Target, bodies: list[Body], count: int) -> tuple[list[Sample], list[tuple[float, bytes]]]:
    """The answers to ``bodies`` beside ``count`` connections that drip, and how these ended."""
    drips = [asyncio.ensure_future(drip(to)) for _ in range(count)]
    await asyncio.sleep(1)
    samples = await asyncio.gather(*(ask(to, body) for body in bodies))
    return list(samples), await asyncio.gather(*drips)


async def leave_at_random(to: Target, bodies: list[Body], seconds: float) -> int:
    """As many clients as ``bodies`` ask again and again and leave at any time; how often somebody left."""
    end, source, left = time.monotonic() + seconds, random.Random(0), 0

    async def client(body: Body) -> None:
        nonlocal left
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(source.expovariate(0.5)):
                    await ask(to, body | {"stream": source.random() < 0.7})
                    await asyncio.sleep(source.random())
            left += 1

    await asyncio.gather(*map(client, bodies))
    return left


async def random_load(
    to: Target, source: np.random.Generator, seconds: float, each_second: Callable[[], None]
) -> tuple[dict[str, int], list[str]]:
    """24 clients with requests of every kind, a fifth of which are left early; how they ended, and for each that
    failed why, when and what it had asked for.
    """
    began, reasons = time.monotonic(), list[str]()
    end, counts = began + seconds, {"good": 0, "refused": 0, "left": 0, "failed": 0}

    async def client() -> None:
        while time.monotonic() < end:
            prompt = source.integers(100, 40_000, size=int(source.integers(4, 200))).tolist()
            body = {"prompt": prompt, "max_tokens": int(source.integers(4, 200)), "stream": True}
            body |= {"stream_options": {"include_usage": True}, **KINDS[source.integers(len(KINDS))]}
            try:
                async with asyncio.timeout(float(source.exponential(2)) if source.random() < 0.2 else None):
                    error = (await ask(to, body)).error
            except TimeoutError:
                counts["left"] += 1
            else:
                refused = error is not None and error.startswith(("status 400", "status 503"))
                counts["good" if error is None else "refused" if refused else "failed"] += 1
                if error is not None and not refused:
                    reasons.append(f"{error} (after {time.monotonic() - began:.0f} s: {json.dumps(body)})")
                    print(reasons[-1], file=sys.stderr, flush=True)

    async def watch() -> None:
        while time.monotonic() < end:
            each_second()
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client() for _ in range(24)))
    return counts, reasons


@dataclass(slots=True)
class Watch:
    """How answers ended, and the longest time in which no client read anything."""

    outcomes: Counter[str] = field(default_factory=Counter)
    last: float = field(default_factory=time.monotonic)
    silence: float = 0.0

    def heard(self) -> None:
        """A client has read something."""
        now = time.monotonic()
        self.silence, self.last = max(self.silence, now - self.last), now


async def ask_again(
    to: Target, bodies: Sequence[Body], expected: Sequence[str], end: float, watch: Watch, model: str | None
) -> None:
    """Ask one of ``bodies`` after the other, of ``model`` if it is given, until ``end``; each has an expected text."""
    places = list(range(len(bodies)))
    random.shuffle(places)
    while time.monotonic() < end:
        place = places[0]
        places = [*places[1:], place]
        body = bodies[place] | {"stream": True} | ({"model": model} if model else {})
        ended = await outcome(to, body, expected[place], watch)
        watch.outcomes[ended] += 1
        if ended != "right":
            await asyncio.sleep(0.2)


async def outcome(to: Target, body: Body, expected: str, watch: Watch) -> str:
    """How an answer ended: ``right``, ``wrong``, ``told`` that it failed, ``lost``, or ``nobody`` was there."""
    said = b""
    try:
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(to.host, to.port)
            try:
                writer.write(to.request(body))
                while data := await reader.read(1 << 16):
                    said += data
                    watch.heard()
            finally:
                writer.close()
    except ConnectionRefusedError:
        return "nobody"
    except (OSError, TimeoutError):
        return "lost"
    lines = [line for line in said.split(b"\n") if line.startswith(b"data: ")]
    if b'"error":' in said:
        return "told"
    if not lines or lines[-1] != b"data: [DONE]":
        return "lost"
    texts = [choice["text"] for line in lines[:-1] for choice in json.loads(line[6:])["choices"]]
    return "right" if "".join(texts) == expected else "wrong"
