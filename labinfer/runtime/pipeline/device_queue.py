"""Steps on their way on the devices of a model, the last of which choose the tokens: to its engine, a pipeline.

All that devices do is queued. Values, and the tokens of a step that the next one of its micro-batch needs, go from one
device to another in the order of their work, so that none of them waits for the host.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from labinfer.backends.base import Device
from labinfer.backends.sampling import Choices, TokenSampler
from labinfer.errors import LabinferError
from labinfer.runtime.interpreter import Interpreter, Tape
from labinfer.runtime.pipeline.message import StepMessage
from labinfer.runtime.pipeline.pipeline import StepResult
from labinfer.runtime.ranks import Ranks

HOST = -3
"""The token of a row whose token the host has to choose."""

_NO_ROWS = np.zeros(0, np.intp)

Values = dict[str, tuple[Device, Any]]
"""What stages have made, by name, and the device whose array it is."""


@dataclass(slots=True)
class ChosenStep(StepMessage):
    """A step of ``group`` whose tokens the device chooses; the logits of rows ``seen`` come to the host, which chooses
    theirs.

    Without ``choices`` no row's token is chosen. ``pending`` tokens are those of the step of the group before.
    """

    choices: Choices | None = None
    seen: np.ndarray = field(default_factory=lambda: _NO_ROWS)
    group: int = 0


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
    """Puts steps on the devices of ``stages``, one or several of a rank each; the ``samplers`` of the last choose the
    tokens. ``close`` it.

    All ranks have the same bits of all logits, so each chooses all tokens, and they need not tell each other.
    """

    def __init__(self, stages: Sequence[Ranks], samplers: Sequence[TokenSampler]) -> None:
        *before, self.ranks = stages
        self.before = [interpreter for ranks in before for interpreter in ranks.interpreters]
        self.samplers = samplers
        [*_, self.output] = self.ranks.interpreters[0].stage.outputs
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
        rank, rows = interpreter.stage.rank, len(message.batch.logits_rows)
        values, sampler = Values(), self.samplers[rank]
        for each in (*self.before, interpreter):
            tape = self.run(each, message, sampler, values)
        logits, seen = values[self.output][1], None
        if len(message.seen) and rank == 0:  # before biases and penalties change them
            seen = np.stack([interpreter.device.move_out(logits[row]) for row in message.seen.tolist()])
        if message.choices is None:
            return partial(np.full, rows, HOST, np.int32), seen
        return sampler.choose(tape.values[self.output], message.choices, message.group), seen

    def run(self, interpreter: Interpreter, message: ChosenStep, sampler: TokenSampler, values: Values) -> Tape:
        """Put one stage of it on its device, given the ``values`` of those before, and add its own."""
        batch, device = message.batch, interpreter.device
        tape = interpreter.prepare(batch)
        if len(message.pending) and not values:
            sampler.feed(interpreter.step_memory.arrays["token_ids"], device, message.group)
        for name in interpreter.stage.inputs:
            source, array = values[name]
            device.move_from(source, array, tape.values[name][: len(array)])
        made = interpreter.execute(tape, len(batch.token_ids), len(batch.logits_rows))
        values.update({name: (device, array) for name, array in made.items()})
        return tape

    def wait(self, number: int) -> ChosenResult:
        """What step ``number`` made, once; raises what went wrong with it. Asked for in order."""
        step = self.steps.pop(number)
        if isinstance(step, LabinferError):
            raise step
        tokens, *_ = [made() for made in step.tokens]
        tokens[step.message.seen] = HOST
        began, self.done = max(step.start, self.done), time.monotonic()
        times = np.array([[began, self.done]] * (len(self.before) + 1))  # the host does not see one stage end
        return ChosenResult(tokens, times, step.logits, step.message.seen)

    def close(self) -> None:
        """Give the samplers' memory back; nothing is on its way any more."""
        for sampler in self.samplers:
            sampler.close()
