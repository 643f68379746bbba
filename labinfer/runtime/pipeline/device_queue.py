"""Steps on their way on one device that chooses their tokens: to its engine, a pipeline of one stage."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from labinfer.backends.sampling import Choices, TokenSampler
from labinfer.errors import LabinferError
from labinfer.runtime.interpreter import Interpreter
from labinfer.runtime.pipeline.message import StepMessage
from labinfer.runtime.pipeline.pipeline import StepResult

HOST = -3
"""The token of a row whose token the host has to choose."""

_NO_ROWS = np.zeros(0, np.intp)


@dataclass(slots=True)
class ChosenStep(StepMessage):
    """A step whose tokens the device chooses; the logits of rows ``seen`` come to the host, which chooses theirs.

    Without ``choices`` no row's token is chosen. ``pending`` tokens are those of the step before.
    """

    choices: Choices | None = None
    seen: np.ndarray = field(default_factory=lambda: _NO_ROWS)


@dataclass(slots=True)
class ChosenResult(StepResult):
    """``logits`` are those of rows ``seen``, whose token is ``HOST``."""

    seen: np.ndarray = field(default_factory=lambda: _NO_ROWS)


@dataclass(slots=True)
class Waiting:
    """A step that was queued at ``start``: ``tokens()`` waits for it."""

    message: ChosenStep
    start: float
    tokens: Callable[[], np.ndarray]
    logits: np.ndarray | None


class DeviceQueue:
    """Puts steps on the device of ``interpreter``; ``sampler`` chooses their tokens. ``close`` it."""

    def __init__(self, interpreter: Interpreter, sampler: TokenSampler) -> None:
        self.interpreter, self.sampler = interpreter, sampler
        [*_, self.output] = interpreter.stage.outputs
        self.numbers = itertools.count(1)
        self.steps: dict[int, Waiting | LabinferError] = {}
        self.done = time.monotonic()

    def submit(self, message: ChosenStep) -> int:
        """Queue a step; the number to ``wait`` for."""
        number = next(self.numbers)
        try:
            self.steps[number] = self.queue(message)
        except LabinferError as error:
            self.steps[number] = error
        return number

    def queue(self, message: ChosenStep) -> Waiting:
        """Put a step, and the choice of its tokens, on the device, behind what is there."""
        start, batch, interpreter = time.monotonic(), message.batch, self.interpreter
        batch.token_ids[message.pending[:, 0]] = -1 - message.pending[:, 2]
        tape = interpreter.prepare(batch)
        if len(message.pending):
            self.sampler.feed(interpreter.step_memory.arrays["token_ids"])
        rows = len(batch.logits_rows)
        logits = interpreter.execute(tape, len(batch.token_ids), rows)[self.output]
        seen = None
        if len(message.seen):  # before biases and penalties change them
            seen = np.stack([interpreter.device.move_out(logits[row]) for row in message.seen.tolist()])
        if message.choices is None:
            return Waiting(message, start, lambda: np.full(rows, HOST, np.int32), seen)
        return Waiting(message, start, self.sampler.choose(tape.values[self.output], message.choices), seen)

    def wait(self, number: int) -> ChosenResult:
        """What step ``number`` made, once; raises what went wrong with it. Asked for in order."""
        step = self.steps.pop(number)
        if isinstance(step, LabinferError):
            raise step
        tokens = step.tokens()
        tokens[step.message.seen] = HOST
        began, self.done = max(step.start, self.done), time.monotonic()
        return ChosenResult(tokens, np.array([[began, self.done]]), step.logits, step.message.seen)

    def close(self) -> None:
        """Give the sampler's memory back; nothing is on its way any more."""
        self.sampler.close()
