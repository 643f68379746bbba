"""The pipeline as its user sees it: submit steps, and wait for what they make, in order.

Steps go down a chain of stages, tokens from the last stage back to the first and to here. How many are in flight is for
the caller to decide.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.peers import shared_peer_memory
from labinfer.runtime.pipeline.message import (
    FAILED,
    LOGITS,
    STEP,
    StepMessage,
    decode_error,
    frame_bytes,
    view,
    views,
)
from labinfer.runtime.pipeline.process import StageProcess, Watch, wait_until_ready
from labinfer.runtime.pipeline.stage_loop import Links, StageLoop
from labinfer.runtime.pipeline.transport import ChannelClosed, Header, open_channel
from labinfer.runtime.stage import LoadedStage

TOKEN_RING_BYTES = 1 << 16
MAX_SPANS = 4096


class StageDied(LabinferError):
    """A stage's process is dead; whatever it held is lost."""


@dataclass(slots=True)
class StepResult:
    """What a step made: the likeliest token of each row of logits (int32, -1 where there is none), and float32 logits
    [rows, vocab_size] if they were wanted. ``times`` [stages, 2] is when each stage (its first rank) began and ended,
    ``time.monotonic``.
    """

    tokens: np.ndarray
    times: np.ndarray
    logits: np.ndarray | None = None


class Pipeline:
    """Stages that run, each in a thread or a process. ``close`` it."""

    def __init__(self, plan: Plan, transport: str) -> None:
        self.plan, self.transport = plan, transport
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
        self.threads: list[threading.Thread] = []
        self.stages: list[StageProcess] = []
        self.watch: Watch | None = None
        self.copies: list[tuple[int, int, int]] = []
        self.numbers = itertools.count(1)
        self.results: dict[int, StepResult | LabinferError] = {}
        self.arrived = threading.Condition()
        self.broken: LabinferError | None = None
        self.spans: deque[np.ndarray] = deque(maxlen=MAX_SPANS)
        self.collector = threading.Thread(target=self.collect, name="labinfer-results", daemon=True)

    def start_threads(self, stages: Sequence[LoadedStage], cores: Mapping[str, Sequence[int]]) -> None:
        """Run loaded stages in threads of this process, each on the cores of its device."""
        for number, (stage, links) in enumerate(zip(stages, self.links, strict=True)):
            loop = StageLoop(self.plan, number, stage, links, cores.get(stage.device.name, ()))
            self.threads.append(threading.Thread(target=loop.run, name=f"labinfer-stage-{number}", daemon=True))
        for thread in [*self.threads, self.collector]:
            thread.start()

    def start_processes(
        self,
        checkpoint: Path,
        cores: Mapping[str, Sequence[int]],
        progress: Callable[[int], None],
        compiling: Callable[[int, int], None],
    ) -> None:
        """Start a process for each stage, which loads its own weights, and wait until all are ready."""
        if self.plan.limits.max_loras:
            message = "adapters cannot be given to stages in other processes"
            raise UsageError("pipeline.adapters", message, remedy="run the plan with --transport local")
        plan = self.plan.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        files = [shared_peer_memory(self.plan, group) for group in range(len(self.plan.groups))]
        for number, (stage, links) in enumerate(zip(self.plan.stages, self.links, strict=True)):
            named = {"inbound": [links.inbound], "outbound": links.outbound, "tokens_out": links.tokens_out}
            named["tokens_in"] = [] if links.tokens_in is None else [links.tokens_in]
            file = files[number // self.plan.ranks]
            start = {
                "plan": plan, "stage": number, "checkpoint": str(checkpoint), "transport": self.transport,
                "limit": self.limit, "cores": list(cores.get(stage.device, ())), "peers": file,
                "links": {name: [end.descriptors for end in ends] for name, ends in named.items()},
            }  # fmt: skip
            descriptors = [file, *(each for end in links.all() for each in end.descriptors)]
            self.stages.append(StageProcess(f"stage {number} ({stage.device})", start, descriptors))
        for file in files:
            os.close(file)
        for links in self.links:
            for end in links.all():
                end.release()
        wait_until_ready(self.stages, progress, compiling)
        self.watch = Watch(self.stages, lambda message: self.fail(StageDied("pipeline.stage-died", message)))
        self.collector.start()

    def submit(self, message: StepMessage) -> int:
        """Send a step down the pipeline; the number to ``wait`` for."""
        if self.copies:
            message.copies, self.copies = np.array(self.copies, np.int32), []
        number = next(self.numbers)
        sections = views([message.encode(), np.zeros((len(self.plan.groups), 2))])
        with contextlib.suppress(ChannelClosed):  # `wait` raises why
            for sender in self.senders:
                sender.send(STEP, number, sections)
        return number

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Have cache blocks copied in every stage before the next step, after those in flight."""
        self.copies += copies

    def wait(self, number: int) -> StepResult:
        """The result of step ``number``, once; raises what went wrong with it, and ``StageDied``."""
        with self.arrived:
            while number not in self.results and self.broken is None:
                self.arrived.wait()
            result = self.results.pop(number, self.broken)
        if isinstance(result, LabinferError):
            raise result
        assert result is not None
        return result

    def collect(self) -> None:
        """Receive results until the pipeline is closed."""
        try:
            while True:
                number, result = self.receive()
                if isinstance(result, StepResult):
                    self.spans.append(result.times)
                with self.arrived:
                    self.results[number] = result
                    self.arrived.notify_all()
        except ChannelClosed:
            return
        except LabinferError as error:
            self.fail(error)

    def receive(self) -> tuple[int, StepResult | LabinferError]:
        """The next result and its number."""
        arrays: list[np.ndarray] = []

        def place(header: Header) -> Iterator[memoryview]:
            kinds = [np.uint8] if header.kind == FAILED else [np.int32, np.float64, np.float32]
            for size, kind in zip(header.sizes, kinds, strict=False):
                arrays.append(np.empty(size // np.dtype(kind).itemsize, kind))
                yield view(arrays[-1])

        header = self.receiver.receive(place)
        if header.kind == FAILED:
            return header.tag, decode_error(arrays[0].tobytes())
        times = arrays[1].reshape(-1, 2)
        logits = arrays[2].reshape(-1, self.plan.vocab_size) if header.kind == LOGITS else None
        return header.tag, StepResult(arrays[0], times, logits)

    def fail(self, error: LabinferError) -> None:
        """The pipeline is broken: whoever waits gets ``error``, and the processes are ended."""
        with self.arrived:
            self.broken = self.broken or error
            self.arrived.notify_all()
        for end in (*self.senders, self.receiver):
            end.close()
        for stage in self.stages:
            stage.process.kill()

    def close(self) -> None:
        """End threads and processes and give everything back."""
        ends = [*self.senders, self.receiver, *(end for links in self.links for end in links.all())]
        if self.watch is not None:
            self.watch.close()
        for stage in self.stages:
            stage.close()
        for end in ends:
            end.close()
        for thread in [*self.threads, self.collector]:
            if thread.ident is not None:
                thread.join()
        for end in ends:
            end.release()
        with self.arrived:
            self.broken = self.broken or LabinferError("run.closed", "the model is closed")
            self.arrived.notify_all()
