"""What a hop between two stages costs: a frame of 16 KB to another thread or process and back, halved.

    python benchmarks/transport.py [--json FILE]

Bars: 60 microseconds over tcp and over sealed tcp (loopback), 25 over shm. The ceiling beside them is a pipe of the
operating system with one byte in it: two system calls and a wake-up, with no frame and nothing copied.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import median

from labinfer.runtime.pipeline.transport import TRANSPORTS, Channel, Header, Keys, Sealed, attach, open_channel
from labinfer.runtime.pipeline.transport.tcp import connected_sockets

BARS = {"tcp": 60.0, "shm": 25.0, "sealed": 60.0}
KEYS = Keys(bytes(32), bytes(32))
SIZE, LIMIT = 16 << 10, 1 << 20


def receive(channel: Channel, memory: memoryview) -> None:
    """Receive a frame of one section into ``memory``."""

    def place(_: Header) -> Iterator[memoryview]:
        yield memory

    channel.receive(place)


def echo(inbound: Channel, outbound: Channel, rounds: int) -> None:
    """Send back what comes."""
    memory = memoryview(bytearray(SIZE))
    for _ in range(rounds):
        receive(inbound, memory)
        outbound.send(0, 0, [memory])


def ends(transport: str) -> tuple[Channel, Channel]:
    """The two ends of a channel."""
    if transport == "sealed":
        one, other = connected_sockets()
        return Sealed(one, LIMIT, KEYS), Sealed(other, LIMIT, KEYS)
    return open_channel(transport, 4 * SIZE, LIMIT)


def half_rounds(there_and_back: Callable[[], None], rounds: int) -> list[float]:
    """Microseconds of half of each round."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        there_and_back()
        times.append((time.perf_counter() - started) * 5e5)
    return times


def hop(transport: str, rounds: int) -> list[float]:
    """Microseconds of one hop, for each of ``rounds``."""
    (out, their_in), (their_out, back) = (ends(transport) for _ in range(2))
    memory = memoryview(bytearray(SIZE))

    def there_and_back() -> None:
        out.send(0, 0, [memory])
        receive(back, memory)

    with ExitStack() as stack:
        if transport == "local":
            thread = threading.Thread(target=echo, args=(their_in, their_out, rounds))
            thread.start()
            stack.callback(thread.join)
        else:
            named = [json.dumps(end.descriptors) for end in (their_in, their_out)]
            command = [sys.executable, __file__, "--echo", transport, *named, str(rounds)]
            stack.enter_context(subprocess.Popen(command, pass_fds=their_in.descriptors + their_out.descriptors))
        times = half_rounds(there_and_back, rounds)
    for end in (out, their_in, their_out, back):
        end.release()
    return times


def pipe(rounds: int) -> list[float]:
    """Microseconds of a byte through a pipe to another process."""
    (their_in, out), (back, their_out) = os.pipe(), os.pipe()
    code = f"import os\nfor _ in range({rounds}): os.write({their_out}, os.read({their_in}, 1))"

    def there_and_back() -> None:
        os.write(out, b"\0")
        os.read(back, 1)

    with subprocess.Popen([sys.executable, "-c", code], pass_fds=[their_in, their_out]):
        times = half_rounds(there_and_back, rounds)
    for descriptor in (their_in, out, back, their_out):
        os.close(descriptor)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4000)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--echo", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.echo:
        transport, inbound, outbound, rounds = options.echo
        keys = KEYS if transport == "sealed" else None
        echo(*(attach(transport, json.loads(end), LIMIT, keys) for end in (inbound, outbound)), rounds=int(rounds))
        return
    found = {"pipe": median(pipe(options.rounds))}
    print(f"ceiling  {found['pipe']:6.1f} µs  a byte through a pipe")
    for transport in (*TRANSPORTS, "sealed"):
        times = sorted(hop(transport, options.rounds))
        found[transport] = median(times)
        bar = f"  bar {BARS[transport]:.0f} µs" if transport in BARS else ""
        print(f"{transport:8} {found[transport]:6.1f} µs  (90 %: {times[len(times) * 9 // 10]:.1f}){bar}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"bytes": SIZE, "microseconds": found, "bars": BARS}, file, indent=1)
    sys.exit(any(found[transport] > bar for transport, bar in BARS.items()))


if __name__ == "__main__":
    main()
