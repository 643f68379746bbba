"""Measures a hop of a pipeline: a frame to another thread or process of this machine and back, halved.

``python -m labinfer.profile.hops TRANSPORT BYTES END END`` is the other process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from statistics import median

from labinfer.compiler.costs import LinkProfile
from labinfer.errors import LabinferError
from labinfer.profile.links import link_of
from labinfer.runtime.pipeline.transport import Channel, ChannelClosed, Keys, Sealed, attach, open_channel
from labinfer.runtime.pipeline.transport.tcp import connected_sockets

SMALL, LARGE = 1 << 10, 4 << 20
"""Bytes of a frame: the first show the latency, the others the bandwidth."""

FRAMES = {SMALL: 100, LARGE: 20}
"""How many frames of each size are sent, after a tenth of them that warm up."""

PAUSE_SECONDS = 0.002
"""Between frames, as between steps: whoever waits for the next has gone to sleep."""

KEYS = Keys(bytes(32), bytes(32))
"""Of ``sealed``, which is the way between hosts, here over loopback."""


def measure_hop(transport: str) -> LinkProfile:
    """The way between two stages: with ``local`` between threads, else between processes."""
    small, large = (median(hop_seconds(transport, size, count, PAUSE_SECONDS)) for size, count in FRAMES.items())
    return link_of(SMALL, small, LARGE, large)


def hop_seconds(transport: str, size: int, count: int, pause: float = 0.0) -> list[float]:
    """Seconds of ``count`` hops of a frame of ``size`` bytes, ``pause`` seconds after one another, after a tenth as
    many that warm up."""
    (out, their_in), (their_out, back) = (open_ends(transport, size) for _ in range(2))
    with ExitStack() as stack:
        for end in (out, their_in, their_out, back):
            stack.callback(end.release)
        run = echo if transport == "local" else partial(echo_process, transport)
        other = threading.Thread(target=run, args=(their_in, their_out, size))
        other.start()
        stack.callback(other.join)
        for end in (out, back):
            stack.callback(end.close)
        try:
            return round_trips(out, back, size, count, pause)
        except ChannelClosed:
            raise LabinferError("profile.hop", f"the other end of a hop by {transport} has ended") from None


def round_trips(out: Channel, back: Channel, size: int, count: int, pause: float) -> list[float]:
    """See ``hop_seconds``, once there are channels to who sends all back and from there."""
    memory, seconds, warming = memoryview(bytearray(size)), list[float](), max(1, count // 10)
    for _ in range(warming + count):
        time.sleep(pause)
        started = time.perf_counter()
        out.send(0, 0, [memory])
        receive(back, memory)
        seconds.append((time.perf_counter() - started) / 2)
    return seconds[warming:]


def open_ends(transport: str, size: int) -> tuple[Channel, Channel]:
    """The two ends of a channel that holds two frames, as those of a pipeline do."""
    if transport == "sealed":
        one, other = connected_sockets()
        return Sealed(one, size, KEYS), Sealed(other, size, KEYS)
    return open_channel(transport, 2 * size, size)


def echo(inbound: Channel, outbound: Channel, size: int) -> None:
    """Send back what comes until the channels are closed."""
    memory = memoryview(bytearray(size))
    with suppress(ChannelClosed):
        while True:
            receive(inbound, memory)
            outbound.send(0, 0, [memory])


def echo_process(transport: str, inbound: Channel, outbound: Channel, size: int) -> None:
    """``echo`` in another process; closes the channels if it ends before them."""
    ends = (inbound, outbound)
    command = [sys.executable, "-P", "-m", "labinfer.profile.hops", transport, str(size)]
    command += [json.dumps(end.descriptors) for end in ends]
    subprocess.run(command, pass_fds=[each for end in ends for each in end.descriptors], check=False)
    for end in ends:
        end.close()


def receive(channel: Channel, memory: memoryview) -> None:
    """Receive a frame of one section into ``memory``."""
    channel.receive(lambda _: [memory])


def main() -> None:
    """Echo, in the other process."""
    transport, size, *named = sys.argv[1:]
    keys = KEYS if transport == "sealed" else None
    inbound, outbound = (attach(transport, json.loads(end), int(size), keys) for end in named)
    echo(inbound, outbound, int(size))


if __name__ == "__main__":
    main()
