"""The process of one stage: ``python -m labinfer.runtime.pipeline.worker DESCRIPTOR``, started by ``process.py``."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
from typing import Any

from labinfer.backends.base import local_name
from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError
from labinfer.runtime.cores import stay_on
from labinfer.runtime.manager import Manager
from labinfer.runtime.peers import map_shared, peers_of
from labinfer.runtime.pipeline.message import encode_error
from labinfer.runtime.pipeline.process import BEAT
from labinfer.runtime.pipeline.stage_loop import Links, StageLoop
from labinfer.runtime.pipeline.transport import Channel, Keys, attach
from labinfer.runtime.stage import LoadedStage
from labinfer.runtime.weights import open_checkpoint


class Parent:
    """The other end of the control socket."""

    def __init__(self, descriptor: int) -> None:
        self.control = socket.socket(fileno=descriptor)
        self.sending = threading.Lock()
        with self.control.makefile("r", encoding="utf-8") as lines:
            self.start: dict[str, Any] = json.loads(lines.readline() or "null") or sys.exit(1)

    def say(self, **message: Any) -> None:
        """Send a line."""
        with self.sending:
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def beat(self) -> None:
        """Say that this process lives until the parent closes the socket; then end it, whatever it does.

        Saying has no timeout: a parent that does not listen for a while, since it was stopped, goes on later.
        """
        with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            while not selector.select(BEAT) or self.control.recv(1):
                self.say(beat=True)
        os._exit(0)


def main() -> None:
    """Load the stage that the parent names and run it until the parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = Parent(int(sys.argv[1]))
    threading.Thread(target=parent.beat, daemon=True).start()
    try:
        loop = prepare(parent)
    except LabinferError as error:
        parent.say(error=json.loads(encode_error(error)))
        return
    parent.say(ready=True)
    loop.run()


def prepare(parent: Parent) -> StageLoop:
    """The loop of the stage, ready to run."""
    start = parent.start
    plan, number = Plan.model_validate(start["plan"]), start["stage"]
    stay_on(start["cores"])
    links = {
        name: [open_link(link, start["limit"]) for link in start["links"].get(name, ())]
        for name in ("inbound", "outbound", "tokens_in", "tokens_out")
    }
    name = plan.stages[number].device
    device = Manager().device(local_name(name), plan.devices[name].threads)
    memory = map_shared(start["peers"]) if "peers" in start else None
    stage = LoadedStage(plan, number, device, None if memory is None else peers_of(memory, plan, number))
    stage.load(
        open_checkpoint(start["checkpoint"]),  # stays open: layers may be streamed from it
        lambda nbytes: parent.say(loaded=nbytes),
        lambda done, total: parent.say(compiling=[done, total]),
    )
    [inbound], tokens_in = links["inbound"], links["tokens_in"]
    ends = Links(inbound, links["outbound"], tokens_in[0] if tokens_in else None, links["tokens_out"])
    return StageLoop(plan, number, stage, ends)


def open_link(link: dict[str, Any], limit: int) -> Channel:
    """The end of a channel that the parent describes; one to another host has keys, as hexadecimal text."""
    keys = Keys(*map(bytes.fromhex, link["keys"])) if "keys" in link else None
    return attach(link["transport"], link["descriptors"], limit, keys)


if __name__ == "__main__":
    main()
