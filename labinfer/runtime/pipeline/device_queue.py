"""Steps on their way on the devices of one stage, which choose their tokens: to its engine, a pipeline."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from labinfer.backends.sampling import Choices, TokenSampler
from labinfer.errors import LabinferError
from labinfer.runtime.interpreter import Interpreter
from labinfer.runtime.pipeline.message import StepMessage
from labinfer.runtime.pipeline.pipeline import StepResult
from labinfer.runtime.ranks import Ranks

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
    """A step that was queued at ``start``: ``tokens`` of each rank wait for it."""

    message: ChosenStep
    start: float
    tokens: Sequence[Callable[[], np.ndarray]]
    logits: np.ndarray | None


class DeviceQueue:
    """Puts steps on the devices of ``ranks``, whose ``samplers`` choose the tokens. ``close`` it.

    All ranks have the same bits of all logits, so each chooses all tokens, and they need not tell each other.
    """

    def __init__(self, ranks: Ranks, samplers: Sequence[TokenSampler]) -> None:
        self.ranks, self.samplers = ranks, samplers
        [*_, self.output] = ranks.interpreters[0].stage.outputs
        self.capacity = min(sampler.capacity for sampler in samplers)
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
        """Put a step, and the choice of its tokens, on the devices, behind what is there."""
        start = time.monotonic()
        message.batch.token_ids[message.pending[:, 0]] = -1 - message.pending[:, 2]
        queued = self.ranks.each(partial(self.queue_on, message))
        return Waiting(message, start, [tokens for tokens, _ in queued], queued[0][1])

    def queue_on(
        self, message: ChosenStep, interpreter: Interpreter
    ) -> tuple[Callable[[], np.ndarray], np.ndarray | None]:
        """Put it on the device of one rank: what waits for its tokens, and of the first rank the logits to be seen."""
        batch, rank = message.batch, interpreter.stage.rank
        tape, sampler = interpreter.prepare(batch), self.samplers[rank]
        if len(message.pending):
            sampler.feed(interpreter.step_memory.arrays["token_ids"])
        rows = len(batch.logits_rows)
        logits = interpreter.execute(tape, len(batch.token_ids), rows)[self.output]
        seen = None
        if len(message.seen) and rank == 0:  # before biases and penalties change them
            seen = np.stack([interpreter.device.move_out(logits[row]) for row in message.seen.tolist()])
        if message.choices is None:
            return partial(np.full, rows, HOST, np.int32), seen
        return sampler.choose(tape.values[self.output], message.choices), seen

    def wait(self, number: int) -> ChosenResult:
        """What step ``number`` made, once; raises what went wrong with it. Asked for in order."""
        step = self.steps.pop(number)
        if isinstance(step, LabinferError):
            raise step
        tokens, *_ = [made() for made in step.tokens]
        tokens[step.message.seen] = HOST
        began, self.done = max(step.start, self.done), time.monotonic()
        return ChosenResult(tokens, np.array([[began, self.done]]), step.logits, step.message.seen)

    def close(self) -> None:
        """Give the samplers' memory back; nothing is on its way any more."""
        for sampler in self.samplers:
            sampler.close()
