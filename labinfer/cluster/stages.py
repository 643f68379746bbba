"""The stages of a pipeline on many hosts, as their head sees them."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from labinfer.cluster.agent import notice_cuts
from labinfer.cluster.checkpoints import provide
from labinfer.cluster.control import END_SECONDS, Address, Control, open_control
from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.pipeline.message import decode_error, frame_bytes
from labinfer.runtime.pipeline.process import StageDied
from labinfer.runtime.pipeline.transport import Channel, ChannelClosed, Sealed
from labinfer.runtime.pipeline.transport.sealed import connect
from labinfer.runtime.pipeline.workers import Workers, check_adapters

LOADING_SILENCE = 120.0
"""Seconds without any progress after which stages that are loaded are given up."""


class HostedStages(Workers):
    """Stages that agents run: stage ``number`` on the host ``hosts[number]``, whose agent is at ``addresses[host]``.

    They have loaded their weights when this is made. ``owner`` names the model to the agents.
    """

    def __init__(
        self,
        plan: Plan,
        hosts: list[str],
        addresses: Mapping[str, Address],
        token: bytes,
        owner: str,
        checkpoint: Path,
        progress: Callable[[int], None],
        compiling: Callable[[int, int], None],
    ) -> None:
        check_adapters(plan)
        if plan.ranks > 1:
            message = "several ranks of a stage must be on one host, which shares their memory"
            raise UsageError("cluster.ranks", message, remedy="leave --tensor-parallel-size out")
        self.plan, self.hosts, self.addresses, self.token = plan, hosts, addresses, token
        self.progress, self.compiling = progress, compiling
        self.limit = frame_bytes(plan)
        self.changed = threading.Condition()
        self.ready: set[int] = set()
        self.problem: LabinferError | None = None
        self.died: Callable[[str], None] = lambda message: None
        self.stopping = False
        self.controls: dict[str, Control] = {}
        self.listeners: list[threading.Thread] = []
        self.ends: list[Channel] = []
        try:
            self.start(owner, checkpoint)
        except ChannelClosed as error:
            self.stop()
            self.release()
            raise StageDied("pipeline.start", f"a host was lost while its stages were started: {error}") from None
        except BaseException:
            self.stop()
            self.release()
            raise

    def start(self, owner: str, checkpoint: Path) -> None:
        """Start all stages and wait until they are loaded."""
        names = list(dict.fromkeys(self.hosts))
        for name in names:
            self.controls[name] = open_control(self.addresses[name], self.token)
        with ThreadPoolExecutor(len(names)) as pool:
            paths = dict(zip(names, pool.map(lambda name: self.greet(name, owner, checkpoint), names), strict=True))
        for name in names:
            self.listeners.append(threading.Thread(target=self.listen, args=(name,), daemon=True))
            self.listeners[-1].start()
        channels = [secrets.token_hex(8) for _ in range(len(self.hosts) + 2)]
        plan = self.plan.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        for number, stage in enumerate(self.plan.stages):
            start = {"plan": plan, "checkpoint": paths[self.hosts[number]], "limit": self.limit, "cores": []}
            name = f"stage {number} ({stage.device})"
            links = self.links(number, channels)
            self.controls[self.hosts[number]].say(do="start", stage=number, name=name, start=start, links=links)
        self.senders = [self.connect(self.hosts[0], channels[0])]
        self.receiver = self.connect(self.hosts[-1], channels[-2])
        with self.changed:
            while self.problem is None and len(self.ready) < len(self.hosts):
                if not self.changed.wait(LOADING_SILENCE):
                    late = [name for number, name in enumerate(self.hosts) if number not in self.ready]
                    message = f"no progress was told for {LOADING_SILENCE:.0f} seconds by {', '.join(late)}"
                    self.problem = StageDied("pipeline.start", message)
            if self.problem is not None:
                raise self.problem

    def greet(self, name: str, owner: str, checkpoint: Path) -> str:
        """Have a host end what is left of an earlier start; where it has the checkpoint."""
        self.controls[name].ask(do="hello", owner=owner)
        return provide(self.controls[name], checkpoint)

    def links(self, number: int, channels: list[str]) -> dict[str, dict[str, Any]]:
        """How a stage comes to its channels: whoever sends connects, but to the head, which does not listen."""
        last = len(self.hosts) - 1
        outbound: dict[str, Any] = {"channel": channels[number + 1]}
        if number < last:
            outbound["address"] = self.addresses[self.hosts[number + 1]]
        links = {"inbound": {"channel": channels[number]}, "outbound": outbound}
        if number == 0:
            links["tokens_in"] = {"channel": channels[-1]}
        if number == last:
            links["tokens_out"] = {"channel": channels[-1], "address": self.addresses[self.hosts[0]]}
        return links

    def connect(self, host: str, channel: str) -> Channel:
        """The head's end of a channel."""
        connection, keys = connect(self.addresses[host], self.token, channel.encode())
        notice_cuts(connection)
        end = Sealed(connection, self.limit, keys)
        self.ends.append(end)
        return end

    def listen(self, name: str) -> None:
        """Take what a host says until it is gone."""
        try:
            while True:
                message, _ = self.controls[name].hear()
                self.take(message)
        except ChannelClosed as error:
            self.lose(f"host '{name}' is lost: {error}" if str(error) else f"host '{name}' does not answer")

    def take(self, message: dict[str, Any]) -> None:
        """What a stage says, or is said of it."""
        if "died" in message:
            self.lose(str(message["died"]))
        if "error" in message:
            error = message["error"]
            self.lose(decode_error(json.dumps(error).encode()) if isinstance(error, dict) else str(error))
        self.progress(message.get("loaded", 0))
        if "compiling" in message:
            self.compiling(*message["compiling"])
        with self.changed:
            if "ready" in message:
                self.ready.add(message["stage"])
            self.changed.notify_all()

    def lose(self, problem: LabinferError | str) -> None:
        """The stages cannot go on."""
        with self.changed:
            if self.problem is not None or self.stopping:
                return
            error = StageDied("pipeline.start", problem) if isinstance(problem, str) else problem
            self.problem = error
            self.changed.notify_all()
        self.died(error.message)

    def watch(self, died: Callable[[str], None]) -> None:
        """See ``Workers.watch``."""
        with self.changed:
            self.died, problem = died, self.problem
        if problem is not None:
            died(problem.message)

    def clock_offsets(self) -> np.ndarray:
        """See ``Workers.clock_offsets``."""
        return np.array([self.controls[host].clock.offset for host in self.hosts])

    def kill(self) -> None:
        """See ``Workers.kill``: agents end the stages of a head that is gone."""
        for end in self.ends:
            end.close()
        for control in self.controls.values():
            control.close()

    def stop(self) -> None:
        """See ``Workers.stop``."""
        with self.changed:
            self.stopping = True
        self.kill()

    def release(self) -> None:
        """See ``Workers.release``."""
        for listener in self.listeners:
            listener.join(END_SECONDS)
        for control in self.controls.values():
            control.release()
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.release()
