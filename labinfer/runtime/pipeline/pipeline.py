"""The pipeline as its user sees it: submit steps, and wait for what they make, in order.

Steps go down a chain of stages, tokens from the last stage back to the first and to here. How many are in flight is for
the caller to decide.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError
from labinfer.runtime.cache import Arrived
from labinfer.runtime.kv_cache import Block, block_bytes, split_block
from labinfer.runtime.pipeline.message import (
    FAILED,
    FETCH,
    FILL,
    LOGITS,
    STEP,
    BlockFrame,
    StepMessage,
    decode_error,
    view,
    views,
)
from labinfer.runtime.pipeline.stage_loop import caught
from labinfer.runtime.pipeline.transport import ChannelClosed, Header
from labinfer.runtime.pipeline.workers import Workers

MAX_SPANS = 4096


@dataclass(slots=True)
class StepResult:
    """What a step made: the likeliest token of each row of logits (int32, -1 where there is none), and float32 logits
    [rows, vocab_size] if they were wanted. ``times`` [stages, 2] is when each stage (its first rank) began and ended,
    ``time.monotonic`` of this machine.
    """

    tokens: np.ndarray
    times: np.ndarray
    logits: np.ndarray | None = None


class Fetched(NamedTuple):
    """A block that is on its way here, and whom to tell what it holds; see ``BlockMemory.fetch``."""

    block: Block
    place: int
    tell: Arrived


class Steps(Protocol):
    """Where steps are sent, and what they make comes from, in order."""

    def submit(self, message: Any) -> int:
        """Send a step; the number to ``wait`` for."""

    def wait(self, number: int) -> StepResult:
        """The result of step ``number``, once; raises what went wrong with it."""


class Pipeline:
    """Steps to stages that run, and what they make of them. ``close`` it."""

    def __init__(self, plan: Plan, workers: Workers) -> None:
        self.plan, self.workers = plan, workers
        self.senders, self.receiver = workers.senders, workers.receiver
        self.copies: list[tuple[int, int, int]] = []
        self.block_bytes = block_bytes(plan)
        self.fetched: dict[int, Fetched] = {}  # that are on their way, by the number of their frame
        self.numbers = itertools.count(1)
        self.results: dict[int, StepResult | LabinferError] = {}
        self.arrived = threading.Condition()
        self.broken: LabinferError | None = None
        self.spans: deque[np.ndarray] = deque(maxlen=MAX_SPANS)
        self.collector = threading.Thread(target=self.collect, name="labinfer-results", daemon=True)
        workers.watch(self.fail)
        self.collector.start()

    def submit(self, message: StepMessage) -> int:
        """Send a step down the pipeline; the number to ``wait`` for."""
        message.copies = self.take_copies()
        number = next(self.numbers)
        self.send(STEP, number, [message.encode()])
        return number

    def send(self, kind: int, number: int, arrays: Sequence[np.ndarray]) -> None:
        """Send a frame to the first stage, unless the pipeline is broken, which `wait` raises."""
        if self.broken is None:
            with contextlib.suppress(ChannelClosed):
                for sender in self.senders:
                    sender.send(kind, number, views(arrays))

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Have cache blocks copied in every stage before the next step, after those in flight."""
        self.copies += copies

    def take_copies(self) -> np.ndarray:
        """Those that go with the next frame, int32 [copies, 3]."""
        copies, self.copies = np.array(self.copies, np.int32).reshape(-1, 3), []
        return copies

    def fetch(self, blocks: Sequence[Block], tell: Arrived) -> None:
        """See ``BlockMemory.fetch``; ``tell`` is called in another thread."""
        asked = {next(self.numbers): Fetched(block, place, tell) for place, block in enumerate(blocks)}
        with self.arrived:
            broken = self.broken is not None
            if not broken:
                self.fetched |= asked
        for number, each in asked.items():
            if broken:
                tell(each.place, None)
            else:
                self.send(FETCH, number, [BlockFrame(*each.block).encode()])

    def fill(self, blocks: Sequence[Block], contents: Sequence[np.ndarray]) -> None:
        """See ``BlockMemory.fill``; copies that were asked for before are made first."""
        for block, content in zip(blocks, contents, strict=True):
            frame = BlockFrame(*block, self.take_copies())
            self.send(FILL, next(self.numbers), [frame.encode(), *split_block(self.block_bytes, block, content)])

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
        """Receive results until the pipeline is closed, or broken by what is none."""
        with contextlib.suppress(ChannelClosed):
            if (failure := caught(self.take_results)) is not None:
                self.fail(failure)

    def take_results(self) -> None:
        """Receive results, and tell whoever waits for them."""
        while True:
            number, result = self.receive()
            if isinstance(result, np.ndarray):
                self.tell(number, result)
                continue
            if isinstance(result, StepResult):
                result.times -= self.workers.clock_offsets()[:, None]
                self.spans.append(result.times)
            with self.arrived:
                self.results[number] = result
                self.arrived.notify_all()

    def receive(self) -> tuple[int, StepResult | LabinferError | np.ndarray]:
        """The next result, or what a block that is fetched holds, and its number."""
        arrays: list[np.ndarray] = []

        def place(header: Header) -> list[memoryview]:
            kinds = [np.int32, np.float64, np.float32]
            if header.kind in (FAILED, FETCH):
                kinds = [np.uint8] * len(header.sizes)
            for size, kind in zip(header.sizes, kinds, strict=False):
                arrays.append(np.empty(size // np.dtype(kind).itemsize, kind))
            return [view(array) for array in arrays]

        header = self.receiver.receive(place)
        if header.kind == FAILED:
            return header.tag, decode_error(arrays[0].tobytes())
        if header.kind == FETCH:
            return header.tag, np.concatenate(arrays[1:])
        times = arrays[1].reshape(-1, 2)
        logits = arrays[2].reshape(-1, self.plan.vocab_size) if header.kind == LOGITS else None
        return header.tag, StepResult(arrays[0], times, logits)

    def tell(self, number: int, content: np.ndarray) -> None:
        """A block that was fetched has come."""
        with self.arrived:
            found = self.fetched.pop(number, None)
        if found is None or len(content) != sum(sizes[found.block[0]] for sizes in self.block_bytes):
            raise LabinferError("pipeline.message", "a block arrived that was not asked for")
        found.tell(found.place, content)

    def fail(self, error: LabinferError) -> None:
        """The pipeline is broken: whoever waits gets ``error``, and the processes are ended."""
        self.end(error)
        self.workers.kill()

    def end(self, error: LabinferError) -> None:
        """Nothing comes any more: tell whoever waits."""
        with self.arrived:
            self.broken, lost = self.broken or error, self.fetched
            self.fetched = {}
            self.arrived.notify_all()
        for each in lost.values():
            each.tell(each.place, None)

    def close(self) -> None:
        """End the stages and give everything back."""
        self.workers.stop()
        self.collector.join()
        self.workers.release()
        self.end(LabinferError("run.closed", "the model is closed"))
