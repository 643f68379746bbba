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
from typing import Any, Protocol

import numpy as np

from labinfer.compiler.plan import Plan
from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.message import (
    FAILED,
    LOGITS,
    STEP,
    StepMessage,
    decode_error,
    view,
    views,
)
from labinfer.runtime.pipeline.process import StageDied
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
        self.numbers = itertools.count(1)
        self.results: dict[int, StepResult | LabinferError] = {}
        self.arrived = threading.Condition()
        self.broken: LabinferError | None = None
        self.spans: deque[np.ndarray] = deque(maxlen=MAX_SPANS)
        self.collector = threading.Thread(target=self.collect, name="labinfer-results", daemon=True)
        workers.watch(lambda message: self.fail(StageDied("pipeline.stage-died", message)))
        self.collector.start()

    def submit(self, message: StepMessage) -> int:
        """Send a step down the pipeline; the number to ``wait`` for."""
        if self.copies:
            message.copies, self.copies = np.array(self.copies, np.int32), []
        number = next(self.numbers)
        sections = views([message.encode()])
        if self.broken is None:  # `wait` raises what broke it
            with contextlib.suppress(ChannelClosed):
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
                    result.times -= self.workers.clock_offsets()[:, None]
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

        def place(header: Header) -> list[memoryview]:
            kinds = [np.uint8] if header.kind == FAILED else [np.int32, np.float64, np.float32]
            for size, kind in zip(header.sizes, kinds, strict=False):
                arrays.append(np.empty(size // np.dtype(kind).itemsize, kind))
            return [view(array) for array in arrays]

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
        self.workers.kill()

    def close(self) -> None:
        """End the stages and give everything back."""
        self.workers.stop()
        self.collector.join()
        self.workers.release()
        with self.arrived:
            self.broken = self.broken or LabinferError("run.closed", "the model is closed")
            self.arrived.notify_all()
