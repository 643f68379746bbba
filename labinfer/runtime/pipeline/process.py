"""Stages in processes of their own: starting them, and noticing within two seconds that one is dead.

Parent and child talk over a Unix socket, a line of JSON each: what to run, progress, readiness, and a beat four times a
second. A child whose socket closes has ended; one that does not beat is stopped, or stuck. A child whose parent ends
sees its socket close and ends too, so nothing is left behind however the parent dies.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.message import decode_error

STDERR = 2
"""Where children write: the descriptor itself, since ``sys.stderr`` need not have one (in a notebook)."""

BEAT = 0.25
"""Seconds between the beats of a child."""

STOPPED_AFTER, STUCK_AFTER = 1.0, 10.0
"""Seconds without a beat after which a process that is stopped, and any process, counts as dead.

They are counted in looks at it, one each ``BEAT``: a machine that was asleep, or too busy for both, does not count.
"""

LISTENS_WITHIN = 60
"""Seconds that a new process may take to read what it is to run."""

MAX_DESCRIPTORS = 250
"""How many a process gets with what it is to run: Linux sends up to 253 at a time."""


class StageDied(LabinferError):
    """A stage's process is dead; whatever it held is lost."""


class StageProcess:
    """The process of one stage; ``name`` says which in errors."""

    def __init__(self, name: str, start: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        self.control, theirs = socket.socketpair()
        self.control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", LISTENS_WITHIN, 0))
        with theirs:
            command = [sys.executable, "-P", "-m", "labinfer.runtime.pipeline.worker", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=STDERR
            )
        self.missed, self.text = 0, b""
        self.give(name, start, descriptors)

    def give(self, name: str, start: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Have it run what ``start`` says, with copies of ``descriptors``: it is new, or rests."""
        self.name, self.ready = name, False
        line = json.dumps({**start, "descriptors": list(descriptors)}).encode() + b"\n"
        try:
            sent = socket.send_fds(self.control, [line], descriptors)
            self.control.sendall(line[sent:])
        except OSError:  # `load` tells that it has ended
            self.process.kill()

    def load(self, progress: Callable[[int], None], compiling: Callable[[int, int], None]) -> None:
        """Take the messages that have come, of which the last is that it is ready; raises what went wrong there."""
        lines = self.read()
        if lines is None:
            raise StageDied("pipeline.start", f"{self.name} ended while it was loaded: {self.cause()}")
        for line in lines:
            if "error" in line:
                raise decode_error(json.dumps(line["error"]).encode())
            self.ready |= "ready" in line
            progress(line.get("loaded", 0))
            if "compiling" in line:
                compiling(*line["compiling"])

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come, waiting for some; None when the process has ended."""
        try:
            received = self.control.recv(1 << 16)
        except OSError:
            received = b""
        if not received:
            return None
        self.missed = 0
        *lines, self.text = (self.text + received).split(b"\n")
        return [json.loads(line) for line in lines if line]

    def silent(self) -> str | None:
        """Why it counts as dead although it has not ended, or None; asked once each ``BEAT``."""
        self.missed += 1
        seconds = self.missed * BEAT
        if seconds > STOPPED_AFTER and stopped(self.process.pid):
            return "it was stopped by a signal"
        return f"it has not answered for {seconds:.0f} seconds" if seconds > STUCK_AFTER else None

    def cause(self) -> str:
        """How it ended."""
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return f"it was killed by signal {-code}" if code < 0 else f"it ended with exit code {code}"

    def close(self) -> None:
        """End it: it is asked to, and killed if it does not."""
        self.control.close()
        try:
            self.process.wait(timeout=0 if stopped(self.process.pid) else 2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def wait_until_ready(
    stages: Sequence[StageProcess], progress: Callable[[int], None], compiling: Callable[[int, int], None]
) -> None:
    """Return once all weights are loaded; raises what went wrong with the first stage where something does."""
    with selectors.DefaultSelector() as selector:
        for stage in stages:
            selector.register(stage.control, selectors.EVENT_READ, stage)
        while not all(stage.ready for stage in stages):
            for key, _ in selector.select():
                key.data.load(progress, compiling)


def stopped(pid: int) -> bool:
    """Whether a process does not run because of a signal; False where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


class Watch:
    """A thread that listens to stages; ``died(message)`` is called once, for the first that is dead."""

    def __init__(self, stages: Sequence[StageProcess], died: Callable[[str], None]) -> None:
        self.stages, self.died = stages, died
        self.wake, self.woken = os.pipe()
        self.thread = threading.Thread(target=self.run, name="labinfer-watch", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Until closed, or until one is dead."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.wake, selectors.EVENT_READ)
            for stage in self.stages:
                selector.register(stage.control, selectors.EVENT_READ, stage)
            looked = time.monotonic()
            while True:
                for key, _ in selector.select(BEAT):
                    if key.data is None:
                        return
                    lines = key.data.read()
                    if lines is None or (told := [line["error"]["message"] for line in lines if "error" in line]):
                        self.died(f"{key.data.name} died: {key.data.cause() if lines is None else told[0]}")
                        return
                if time.monotonic() - looked < BEAT:
                    continue
                looked = time.monotonic()
                for stage in self.stages:
                    if (reason := stage.silent()) is not None:
                        self.died(f"{stage.name} died: {reason}")
                        return

    def close(self) -> None:
        """End the thread."""
        os.write(self.woken, b"\0")
        self.thread.join()
        os.close(self.wake)
        os.close(self.woken)
