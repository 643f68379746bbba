"""The stages of a pipeline on many hosts, as their head sees them."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from labinfer.cluster.control import notice_cuts
from labinfer.cluster.host import Host
from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.pipeline.message import decode_error, frame_bytes
from labinfer.runtime.pipeline.process import LISTENS_WITHIN, StageDied
from labinfer.runtime.pipeline.transport import Channel, ChannelClosed, Credentials, Sealed
from labinfer.runtime.pipeline.transport.sealed import connect
from labinfer.runtime.pipeline.workers import Workers, check_adapters

_log = logging.getLogger(__name__)

LOADING_SILENCE = 120.0
"""Seconds without any progress after which stages that are loaded are given up."""


class HostedStages(Workers):
    """Stages that agents run: stage ``number`` on ``hosts[number]``; ``run`` tells these from the head's others.

    They have loaded their weights when this is made, ``loaded`` bytes in all, beside those that processes had ``kept``.
    When they end they rest, with their weights, until their hosts are told what else to run, or are closed.
    """

    def __init__(
        self,
        plan: Plan,
        hosts: Sequence[Host],
        credentials: Credentials,
        run: int,
        checkpoint: Path,
        progress: Callable[[int], None],
        compiling: Callable[[int, int], None],
    ) -> None:
        check_adapters(plan)
        if plan.ranks > 1:
            message = "several ranks of a stage must be on one host, which shares their memory"
            raise UsageError("cluster.ranks", message, remedy="leave --tensor-parallel-size out")
        self.plan, self.hosts, self.credentials, self.run = plan, hosts, credentials, run
        self.progress, self.compiling = progress, compiling
        self.limit = frame_bytes(plan)
        self.changed = threading.Condition()
        self.ready: set[int] = set()
        self.loaded = self.kept = 0
        self.problem: LabinferError | None = None
        self.died: Callable[[LabinferError], None] = lambda error: None
        self.stopping = False
        self.ends: list[Channel] = []
        try:
            self.start(checkpoint)
        except ChannelClosed as error:
            self.stop()
            self.release()
            lost = f"a host was lost while its stages were started: {error}"
            raise self.problem or StageDied("pipeline.start", lost) from None
        except BaseException:
            self.stop()
            self.release()
            raise

    def start(self, checkpoint: Path) -> None:
        """Start all stages and wait until they are loaded."""
        devices: dict[Host, list[str]] = {}
        for host, stage in zip(self.hosts, self.plan.stages, strict=True):
            devices.setdefault(host, []).append(stage.device)
        for host in devices:
            host.tell = self.take
        with ThreadPoolExecutor(len(devices)) as pool:
            for _ in pool.map(lambda host: host.prepare(self.run, devices[host], checkpoint), devices):
                pass
        channels = [secrets.token_hex(8) for _ in range(len(self.hosts) + 2)]
        plan = self.plan.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        for number, (host, stage) in enumerate(zip(self.hosts, self.plan.stages, strict=True)):
            start = {"plan": plan, "checkpoint": host.checkpoint, "limit": self.limit, "cores": []}
            host.control.say(
                do="start", run=self.run, stage=number, name=f"stage {number} ({stage.device})", device=stage.device,
                start=start, links=self.links(number, channels),
            )  # fmt: skip
        self.senders = [self.connect(self.hosts[0], channels[0])]
        self.receiver = self.connect(self.hosts[-1], channels[-2])
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(lambda end: end.agree(LISTENS_WITHIN), self.ends):
                pass
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Return once all are loaded; raises what went wrong."""
        with self.changed:
            while self.problem is None and len(self.ready) < len(self.hosts):
                if not self.changed.wait(LOADING_SILENCE):
                    late = [host.name for number, host in enumerate(self.hosts) if number not in self.ready]
                    message = f"no progress was told for {LOADING_SILENCE:.0f} seconds by {', '.join(late)}"
                    self.problem = StageDied("pipeline.start", message)
            if self.problem is not None:
                raise self.problem

    def links(self, number: int, channels: list[str]) -> dict[str, dict[str, Any]]:
        """How a stage comes to its channels: whoever sends connects, but to the head, which does not listen."""
        last = len(self.hosts) - 1
        outbound: dict[str, Any] = {"channel": channels[number + 1]}
        if number < last:
            outbound |= way_to(self.hosts[number + 1])
        links = {"inbound": {"channel": channels[number]}, "outbound": outbound}
        if number == 0:
            links["tokens_in"] = {"channel": channels[-1]}
        if number == last:
            links["tokens_out"] = {"channel": channels[-1], **way_to(self.hosts[0])}
        return links

    def connect(self, host: Host, channel: str) -> Channel:
        """The head's end of a channel."""
        connection, keys = connect(host.address, self.credentials, channel.encode())
        notice_cuts(connection)
        end = Sealed(connection, self.limit, keys)
        with self.changed:
            self.ends.append(end)
            if self.problem is not None:
                end.close()
        return end

    def take(self, message: dict[str, Any]) -> None:
        """What a stage says, or is said of it or of its host."""
        if message.get("run", self.run) != self.run:
            return
        if "died" in message:
            self.lose(str(message["died"]))
        if "error" in message:
            error = message["error"]
            self.lose(decode_error(json.dumps(error).encode()) if isinstance(error, dict) else str(error))
        self.progress(message.get("loaded", 0))
        if "compiling" in message:
            self.compiling(*message["compiling"])
        with self.changed:
            self.loaded += message.get("loaded", 0)
            if "ready" in message:
                self.kept += message["kept"]
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
            self.kill()
        _log.warning("%s", error.message)
        self.died(StageDied("pipeline.stage-died", error.message))

    def watch(self, died: Callable[[LabinferError], None]) -> None:
        """See ``Workers.watch``."""
        with self.changed:
            self.died, problem = died, self.problem
        if problem is not None:
            died(StageDied("pipeline.stage-died", problem.message))

    def clock_offsets(self) -> np.ndarray:
        """See ``Workers.clock_offsets``."""
        return np.array([host.control.clock.offset for host in self.hosts])

    def kill(self) -> None:
        """See ``Workers.kill``: who has lost the head's end of a channel rests, as do those behind it."""
        for end in self.ends:
            end.close()

    def stop(self) -> None:
        """See ``Workers.stop``."""
        with self.changed:
            self.stopping = True
        self.kill()

    def release(self) -> None:
        """See ``Workers.release``."""
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.release()


def way_to(host: Host) -> dict[str, Any]:
    """How another host comes to ``host``."""
    return {"host": host.name, "address": host.address}
