"""The process of one stage: ``python -m labinfer.runtime.pipeline.worker DESCRIPTOR``, started by ``process.py``."""

from __future__ import annotations

import gc
import json
import os
import queue
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from labinfer.backends.base import local_name
from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError
from labinfer.runtime.cores import stay_on
from labinfer.runtime.manager import Manager
from labinfer.runtime.peers import map_shared, peers_of
from labinfer.runtime.pipeline.message import encode_error
from labinfer.runtime.pipeline.process import BEAT, LISTENS_WITHIN, MAX_DESCRIPTORS
from labinfer.runtime.pipeline.stage_loop import Links, StageLoop
from labinfer.runtime.pipeline.transport import Channel, ChannelClosed, Distrusted, Keys, Tls, attach
from labinfer.runtime.stage import Kept, LoadedStage
from labinfer.runtime.weights import Checkpoint, open_checkpoint


class Parent:
    """The other end of the control socket, from which ``starts`` come: what to run, one after another."""

    def __init__(self, descriptor: int) -> None:
        self.control = socket.socket(fileno=descriptor)
        self.sending = threading.Lock()
        self.starts: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()

    def say(self, **message: Any) -> None:
        """Send a line."""
        with self.sending:
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def listen(self) -> None:
        """Say that this process lives, and take starts, until the parent closes the socket; then end it at once.

        Saying has no timeout: a parent that does not listen for a while, since it was stopped, goes on later.
        """
        try:
            text, descriptors = b"", list[int]()
            with selectors.DefaultSelector() as selector:
                selector.register(self.control, selectors.EVENT_READ)
                while True:
                    if selector.select(BEAT):
                        received, given, *_ = socket.recv_fds(self.control, 1 << 16, MAX_DESCRIPTORS)
                        if not received:
                            break
                        *lines, text = (text + received).split(b"\n")
                        descriptors += given
                        for line in lines:
                            start = json.loads(line)
                            start["descriptors"] = dict(zip(start["descriptors"], descriptors, strict=True))
                            descriptors.clear()
                            self.starts.put(start)
                    self.say(beat=True)
        finally:
            os._exit(0)


def main() -> None:
    """Run the stage that the parent names, and the next one once that rests, until the parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent, manager, kept = Parent(int(sys.argv[1])), Manager(), Kept()
    while True:
        start = parent.starts.get()
        try:
            links = open_links(start)
            if agreed(links):
                checkpoint = open_checkpoint(start["checkpoint"])  # stays open: layers may be streamed from it
                loop = prepare(parent, start, links, manager, checkpoint, kept if start.get("stays") else None)
                parent.say(ready=True, kept=loop.stage.kept_bytes)
                loop.run()
                kept = loop.stage.rest()
                del loop
                checkpoint.close()
        except LabinferError as error:
            parent.say(error=json.loads(encode_error(error)))
            return
        if not start.get("stays"):
            return
        for end in links.all():
            end.release()
        gc.collect()  # nothing but the weights is left
        parent.say(rests=True)


def open_links(start: dict[str, Any]) -> Links:
    """The stage's ends of its channels."""
    links = {
        name: [open_link(link, start["limit"], start["descriptors"]) for link in start["links"].get(name, ())]
        for name in ("inbound", "outbound", "tokens_in", "tokens_out")
    }
    [inbound], tokens_in = links["inbound"], links["tokens_in"]
    return Links(inbound, links["outbound"], tokens_in[0] if tokens_in else None, links["tokens_out"])


def agreed(links: Links) -> bool:
    """Whether all channels are ready for frames: False if one was closed meanwhile, as when another stage has died.

    All at once, since tokens may come back to the stage that has sent them.
    """
    ends = links.all()
    with ThreadPoolExecutor(len(ends)) as pool:
        try:
            for _ in pool.map(lambda end: end.agree(LISTENS_WITHIN), ends):
                pass
        except Distrusted as error:
            raise LabinferError(error.code, str(error), remedy=error.remedy) from None
        except ChannelClosed:
            return False
    return True


def prepare(
    parent: Parent, start: dict[str, Any], links: Links, manager: Manager, checkpoint: Checkpoint, kept: Kept | None
) -> StageLoop:
    """The loop of the stage, ready to run."""
    plan, number, descriptors = Plan.model_validate(start["plan"]), start["stage"], start["descriptors"]
    stay_on(start["cores"])
    name = plan.stages[number].device
    device = manager.device(local_name(name), plan.devices[name].threads)
    memory = map_shared(descriptors[start["peers"]]) if "peers" in start else None
    peers = None if memory is None else peers_of(memory, plan, number)
    stage = LoadedStage(plan, number, device, peers, kept)
    stage.load(
        checkpoint,
        lambda nbytes: parent.say(loaded=nbytes),
        lambda done, total: parent.say(compiling=[done, total]),
    )
    return StageLoop(plan, number, stage, links)


def open_link(link: dict[str, Any], limit: int, descriptors: Mapping[int, int]) -> Channel:
    """The end of a channel that the parent describes, whose descriptors have other numbers there; one to another host
    has keys, as hexadecimal text.
    """
    keys = None
    if "keys" in link:
        mine, theirs = map(bytes.fromhex, link["keys"])
        keys = Keys(mine, theirs, Tls(*link["tls"]) if link["tls"] else None)
    return attach(link["transport"], [descriptors[each] for each in link["descriptors"]], limit, keys)


if __name__ == "__main__":
    main()
