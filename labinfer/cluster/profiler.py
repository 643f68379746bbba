"""Measuring on a host for a head: what a model costs on a device here, and the way to another host.

``python -m labinfer.cluster.profiler`` is the process that measures a device: it reads what to do as a line of JSON,
and writes how that goes on, and the profile, as lines of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from labinfer.cluster.control import notice_cuts
from labinfer.errors import LabinferError
from labinfer.profile.hops import FRAMES, PAUSE_SECONDS, echo, round_trips
from labinfer.runtime.pipeline.transport import Keys, Sealed
from labinfer.runtime.pipeline.transport.sealed import HANDSHAKE_SECONDS

COMMAND = (sys.executable, "-P", "-m", "labinfer.cluster.profiler")


def profiling(order: dict[str, Any], started: list[subprocess.Popen[str]]) -> Iterator[dict[str, Any]]:
    """Messages of the process that does what ``order`` says, which is among ``started`` while it runs."""
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        started.append(process)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.close()
            yield from map(json.loads, process.stdout)
            if process.wait():
                yield {"error": f"the process that measured has ended with exit code {process.returncode}"}
        finally:
            process.kill()
            started.remove(process)


def main() -> None:
    """Measure."""
    from labinfer.profile.quiet import Patience
    from labinfer.profile.session import profile_device

    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is written is no message
    order = json.loads(sys.stdin.readline())

    def progress(phase: str, done: int, total: int | None) -> None:
        print(json.dumps({"progress": [phase, done, total]}), file=lines)

    try:
        found = profile_device(progress=progress, patience=Patience(), **order)
        print(json.dumps({"profile": found.model_dump(mode="json", exclude_defaults=True)}), file=lines)
    except LabinferError as error:
        print(json.dumps({"error": error.message}), file=lines)


def echo_hops(connection: socket.socket, keys: Keys, size: int) -> None:
    """Send back the frames of ``size`` bytes that another host sends, until it hangs up."""
    with closing(connection):
        notice_cuts(connection)
        if size not in FRAMES:
            raise ValueError("no size of frames that are measured")
        end = Sealed(connection, size, keys)
        end.agree(HANDSHAKE_SECONDS)
        echo(end, end, size)


def hops(connection: socket.socket, keys: Keys, size: int) -> list[float]:
    """Seconds of hops of frames of ``size`` bytes, one of ``FRAMES``, to the host that sends them back."""
    with closing(connection):
        notice_cuts(connection)
        end = Sealed(connection, size, keys)
        end.agree(HANDSHAKE_SECONDS)
        return round_trips(end, end, size, FRAMES[size], PAUSE_SECONDS)


if __name__ == "__main__":
    main()
