"""Those who run the stages of a pipeline: threads of this process, or processes of this machine.

All are wired alike: a chain of channels from the engine through the stages and back to it, and one on which the tokens
go from the last stage to the first.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.batch import Part
from labinfer.runtime.peers import shared_peer_memory
from labinfer.runtime.pipeline.message import frame_bytes
from labinfer.runtime.pipeline.process import StageDied, StageProcess, Watch, wait_until_ready
from labinfer.runtime.pipeline.stage_loop import Links, StageLoop, caught
from labinfer.runtime.pipeline.transport import Channel, open_channel
from labinfer.runtime.stage import LoadedStage
from labinfer.units import human_bytes

TOKEN_RING_BYTES = 1 << 16


class Workers(ABC):
    """Stages that run. Steps are sent to all ``senders``, what they make is received from ``receiver``."""

    senders: Sequence[Channel]
    receiver: Channel

    @abstractmethod
    def watch(self, died: Callable[[LabinferError], None]) -> None:
        """Call ``died`` from now on, once, with how the first of them died: ``StageDied`` if it can be started anew."""

    def clock_offsets(self) -> np.ndarray:
        """Seconds that the clock of each stage, float64 [stages], is ahead of ours: none on this machine."""
        return np.zeros(1)

    @abstractmethod
    def kill(self) -> None:
        """End them at once, and wake whoever waits for them."""

    @abstractmethod
    def stop(self) -> None:
        """End them, and wake whoever waits for them."""

    @abstractmethod
    def release(self) -> None:
        """Give back what is left; nobody waits any more."""


@dataclass(frozen=True, slots=True)
class HostReport:
    """A host: what it does (``running`` stages, ``idle``, ``lost``, or ``back`` and soon taken in), and how long a
    message takes there and back, if that is known.
    """

    name: str
    address: str
    state: str
    round_trip_seconds: float | None


@dataclass(frozen=True, slots=True)
class Start:
    """Stages were started at ``time`` (of ``time.time``), which took ``seconds``, on ``hosts``, by stage.

    ``loaded`` bytes of weights were read for it, ``kept`` bytes were there from before.
    """

    time: float
    seconds: float
    hosts: Sequence[str]
    loaded: int
    kept: int

    def __str__(self) -> str:
        """For the log."""
        hosts, loaded, kept = ", ".join(dict.fromkeys(self.hosts)), human_bytes(self.loaded), human_bytes(self.kept)
        return f"the stages run on {hosts} now: {loaded} loaded, {kept} kept, in {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class FleetReport:
    """What is to be told of a fleet; ``starts`` are the last ones, oldest first."""

    hosts: Sequence[HostReport] = ()
    starts: Sequence[Start] = ()


class Fleet(Protocol):
    """What can run the stages of a plan, again and again."""

    def start(self, plan: Plan) -> Workers:
        """Start the stages of ``plan``, and return once they are loaded; ``StageDied`` where another try may help."""

    def replan(self, plan: Plan) -> Plan:
        """``plan`` as it is now best run; with the same limits."""

    @property
    def improved(self) -> bool:
        """Whether there is a better plan by now than the one that runs."""

    def observe(self, times: np.ndarray, part: Part) -> None:
        """A step of ``part`` is done, whose stages began and ended at ``times``; see ``StepResult``."""

    def report(self) -> FleetReport:
        """The hosts that it has, and when the stages were started; asked from any thread."""

    def close(self) -> None:
        """Nothing is started any more."""


class LocalWorkers(Workers):
    """Those of this machine, wired by channels of one ``transport``."""

    def __init__(self, plan: Plan, transport: str) -> None:
        self.limit = frame_bytes(plan)
        last, ranks = len(plan.groups) - 1, range(plan.ranks)
        chain = [[open_channel(transport, 2 * self.limit, self.limit) for _ in ranks] for _ in plan.groups]
        made, self.receiver = open_channel(transport, 2 * self.limit, self.limit)
        tokens = [open_channel(transport, TOKEN_RING_BYTES, self.limit) for _ in ranks]
        sending = [[sender for sender, _ in channels] for channels in (*chain, tokens)]
        self.senders, onwards = sending[0], [*sending[1:-1], [made]]
        self.links = [
            Links(
                chain[group][rank][1], [] if rank else onwards[group],
                tokens[rank][1] if group == 0 else None, sending[-1] if group == last and rank == 0 else [],
            )
            for group in range(last + 1)
            for rank in ranks
        ]  # fmt: skip

    @property
    def ends(self) -> list[Channel]:
        """All ends of channels that this process has."""
        return [*self.senders, self.receiver, *(end for links in self.links for end in links.all())]

    def kill(self) -> None:
        """See ``Workers.kill``."""
        for end in (*self.senders, self.receiver):
            end.close()

    def stop(self) -> None:
        """See ``Workers.stop``."""
        for end in self.ends:
            end.close()

    def release(self) -> None:
        """See ``Workers.release``."""
        for end in self.ends:
            end.release()


class StageThreads(LocalWorkers):
    """Loaded stages in threads of this process, each on the cores of its device."""

    def __init__(self, plan: Plan, stages: Sequence[LoadedStage], cores: Mapping[str, Sequence[int]]) -> None:
        super().__init__(plan, "local")
        self.died: Callable[[LabinferError], None] = lambda error: None
        self.threads: list[threading.Thread] = []
        for number, (stage, links) in enumerate(zip(stages, self.links, strict=True)):
            loop = StageLoop(plan, number, stage, links, cores.get(stage.device.name, ()))
            name = f"labinfer-stage-{number}"
            self.threads.append(threading.Thread(target=self.run, args=(loop,), name=name, daemon=True))
            self.threads[-1].start()

    def run(self, loop: StageLoop) -> None:
        """Run a stage, and tell what ends it."""
        if (failure := caught(loop.run)) is not None:
            message = f"stage {loop.number} has failed: {failure.message}"
            self.died(LabinferError(failure.code, message, remedy="load the model again"))

    def watch(self, died: Callable[[LabinferError], None]) -> None:
        """See ``Workers.watch``."""
        self.died = died

    def release(self) -> None:
        """See ``Workers.release``."""
        for thread in self.threads:
            thread.join()
        super().release()


@dataclass(slots=True)
class ProcessFleet:
    """Processes of this machine, each with the cores of its device; layers stay where they are."""

    transport: str
    checkpoint: Path
    cores: Mapping[str, Sequence[int]]
    progress: Callable[[int], None]
    compiling: Callable[[int, int], None]

    def start(self, plan: Plan) -> StageProcesses:
        """See ``Fleet.start``."""
        return StageProcesses(plan, self)

    def replan(self, plan: Plan) -> Plan:
        """It stays as it is."""
        return plan

    @property
    def improved(self) -> bool:
        """Never."""
        return False

    def observe(self, times: np.ndarray, part: Part) -> None:
        """Steps may take as long as they take."""

    def report(self) -> FleetReport:
        """Nothing: all is on this machine."""
        return FleetReport()

    def close(self) -> None:
        """Nothing to do."""


class StageProcesses(LocalWorkers):
    """A process for each stage, which has loaded its own weights by the time this is made."""

    def __init__(self, plan: Plan, fleet: ProcessFleet) -> None:
        check_adapters(plan)
        check_exchange(plan)
        super().__init__(plan, fleet.transport)
        self.stages: list[StageProcess] = []
        self.watcher: Watch | None = None
        written = plan.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        files = [shared_peer_memory(plan, group) for group in range(len(plan.groups))] if plan.ranks > 1 else []
        try:
            for number, (stage, links) in enumerate(zip(plan.stages, self.links, strict=True)):
                start = {
                    "plan": written, "stage": number, "checkpoint": str(fleet.checkpoint), "limit": self.limit,
                    "cores": list(fleet.cores.get(stage.device, ())),
                    "links": {
                        name: [{"transport": fleet.transport, "descriptors": end.descriptors} for end in ends]
                        for name, ends in links.named().items()
                    },
                }  # fmt: skip
                descriptors = [each for end in links.all() for each in end.descriptors]
                if plan.ranks > 1:
                    file = files[number // plan.ranks]
                    start["peers"], descriptors = file, [file, *descriptors]
                self.stages.append(StageProcess(f"stage {number} ({stage.device})", start, descriptors))
            for links in self.links:
                for end in links.all():
                    end.release()
            self.links = []
            wait_until_ready(self.stages, fleet.progress, fleet.compiling)
        except BaseException:
            self.stop()
            self.release()
            raise
        finally:
            for file in files:
                os.close(file)

    def watch(self, died: Callable[[LabinferError], None]) -> None:
        """See ``Workers.watch``."""
        self.watcher = Watch(self.stages, lambda message: died(StageDied("pipeline.stage-died", message)))

    def kill(self) -> None:
        """See ``Workers.kill``."""
        super().kill()
        for stage in self.stages:
            stage.process.kill()

    def stop(self) -> None:
        """See ``Workers.stop``."""
        if self.watcher is not None:
            self.watcher.close()
            self.watcher = None
        for stage in self.stages:
            stage.close()
        super().stop()


def check_adapters(plan: Plan) -> None:
    """Raise ``UsageError`` for a plan with adapters, which are in the memory of the process that asks."""
    if plan.limits.max_loras:
        message = "adapters cannot be given to stages in other processes"
        raise UsageError("pipeline.adapters", message, remedy="run the plan with --transport local")


def check_exchange(plan: Plan) -> None:
    """Raise ``UsageError`` for a plan whose ranks write to each other's device memory: one process has all of that."""
    if any(stage.bytes.exchange for stage in plan.stages):
        message = "ranks that exchange parts in the memory of their devices run in one process"
        raise UsageError("pipeline.ranks", message, remedy="run the plan without --transport")
