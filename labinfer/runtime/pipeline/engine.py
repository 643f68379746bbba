"""The engine of a pipeline: as many micro-batches as stages are on their way, so that each stage has one to compute.

The next step of a micro-batch is sent before the tokens of the one before are known: the last stage gives those to the
first itself. Only where a token is not simply the likeliest does the step wait until the engine has chosen it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from labinfer.errors import LabinferError
from labinfer.runtime.batch import Part
from labinfer.runtime.engine import Engine, Scheduled
from labinfer.runtime.pipeline.message import StepMessage
from labinfer.runtime.pipeline.pipeline import StepResult, Steps
from labinfer.runtime.pipeline.process import StageDied
from labinfer.runtime.pipeline.scheduler import GroupScheduler
from labinfer.runtime.pipeline.stage_loop import TAG_MASK
from labinfer.runtime.request import Request, Sequence
from labinfer.runtime.scheduler import Policy, Scheduler

DEPTH = 2
"""Steps of a micro-batch on their way: one that is computed, and the next, which waits at the first stage."""


MAX_RESTARTS = 5
"""How often the stages are started before they complete a step."""


@dataclass(slots=True, eq=False)
class Flight:
    """A step on its way. Of rows that are not ``alive`` any more the result is dropped; while ``counted``, the batch
    counts its tokens as computed.
    """

    number: int
    group: int
    part: Part
    alive: np.ndarray
    counted: bool = True


class PipelinedEngine(Engine):
    """Runs requests on a model whose stages are a pipeline; see ``Engine``."""

    scheduler: GroupScheduler

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.speculation = None  # a step is sent before the tokens are known that guesses would follow
        self.restarts = 0  # of the stages, since a step was last completed
        self.recovering = False
        self.elsewhere: Callable[[], PipelinedEngine | None] = lambda: None  # who goes on if stages die
        self.depth = DEPTH if self.batch.blocks.recompute_after is None else 1
        self.flights: deque[Flight] = deque()
        rows = len(self.batch.num_tokens)
        self.uses = np.zeros(rows, np.int32)  # flights that compute something of a row
        self.source = np.zeros(
            (rows, 2), np.int64
        )  # step that makes a row's newest token (0: known), and its row there

    @property
    def pipeline(self) -> Steps:
        """That of the model: another one after its stages were started anew."""
        assert self.model.pipeline is not None
        return self.model.pipeline

    def new_scheduler(self, policy: Policy) -> Scheduler:
        """One group for each stage."""
        model = self.model
        groups, limits = len(model.plan.groups), model.plan.limits
        return GroupScheduler(groups, self.batch, limits, policy, self.costs, None, model.adapters)

    # Requests

    def queue(self, request: Request) -> None:
        """Let a checked request wait; one that looks at values, which changes what stages run, lets them finish."""
        if request.capture:
            self.drain()
        super().queue(request)

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute, to wait for, or to tell."""
        return bool(self.flights) or super().busy

    def finish(self, requests: Iterable[Request]) -> None:
        """Step until ``requests`` are done, and nothing more is on its way for nobody."""
        super().finish(requests)
        self.drain_if_idle()

    def abort(self, request: Request) -> None:
        """Stop ``request`` wherever it is, with another engine too."""
        if request.moved_to is not None and request.moved_to is not self:
            request.moved_to.submit(partial(request.moved_to.abort, request))
            request.moved_to.start()
            return
        super().abort(request)
        self.drain_if_idle()

    def abort_all(self) -> None:
        """Stop every request, and wait until nothing is on its way."""
        super().abort_all()
        self.drain()

    def drain_if_idle(self) -> None:
        """Wait for what is on its way if no sequence needs it."""
        with self.model.lock:
            if self.thread is None and all(each.finish_reason for each in self.scheduler.running):
                self.drain()

    def drain(self) -> None:
        """Wait for all steps on their way."""
        with self.model.lock:
            while self.flights:
                self.settle()

    # Steps

    def step(self) -> list[Request]:
        """Send what can be sent, and see to the oldest step on its way; the requests that it finished."""
        with self.model.lock:
            self.finished = []
            self.make_changes()
            if self.model.fleet is not None and self.model.fleet.improved:
                self.recover(StageDied("pipeline.stage-died", "the stages were placed anew"))
            self.fill()
            if self.flights:
                self.settle()
            self.delivery.deliver()
            return self.finished

    def fill(self) -> None:
        """Send steps of each group in turn until none has one that can be sent."""
        idle, on_way = 0, Counter(flight.group for flight in self.flights)
        while idle < self.scheduler.groups:
            group = self.scheduler.turn
            launched = on_way[group] < self.depth and self.launch(group)
            on_way[group] += launched
            idle = 0 if launched else idle + 1
            self.scheduler.turn = (group + 1) % self.scheduler.groups

    def launch(self, group: int) -> bool:
        """Send the next step of ``group``, if there is one."""
        if self.flights and self.capture.wanted:  # it looks at the steps one by one
            return False
        scheduled = self.schedule(ahead=bool(self.flights))
        if scheduled is None:
            return False
        part, message = scheduled.part, self.message(scheduled)
        self.begin(scheduled)
        self.stepping = False
        number = self.pipeline.submit(message)
        made = part.new > 0
        rows = part.rows[made]
        self.source[rows, 0] = number
        self.source[rows, 1] = (np.cumsum(part.wanted) - 1)[made]
        self.uses[part.rows] += 1
        self.flights.append(Flight(number, group, part, np.ones(len(part.rows), np.bool_)))
        return True

    def message(self, scheduled: Scheduled) -> StepMessage:
        """The step as it is sent."""
        return StepMessage(scheduled.batch, self.wants_logits(scheduled.part), self.pending(scheduled.part))

    def wants_logits(self, part: Part) -> bool:
        """Whether the engine has to see logits of ``part``; holds the rows whose next token it must choose itself."""
        batch, rows = self.batch, part.rows
        self.fit()
        chooses = ~batch.plain[rows]
        for index in batch.watched[rows].nonzero()[0].tolist():  # the first token of a request with several answers
            sequence = self.scheduler.owners[int(rows[index])]
            chooses[index] |= sequence.request.num_made > 1
        chooses &= part.new > 0
        self.scheduler.held[rows[chooses]] = True
        return bool(chooses.any() or batch.scored[rows].any())

    def fit(self) -> None:
        """Have room for every row of the batch."""
        more = len(self.batch.num_tokens) - len(self.uses)
        if more > 0:
            self.uses = np.concatenate([self.uses, np.zeros(more, np.int32)])
            self.source = np.concatenate([self.source, np.zeros((more, 2), np.int64)])

    def pending(self, part: Part) -> np.ndarray:
        """The tokens of ``part`` that a step on its way makes; see ``StepMessage``."""
        last = np.cumsum(part.counts) - 1
        sources = self.source[part.rows]
        unknown = sources[:, 0] > 0
        found = np.column_stack([last[unknown], sources[unknown, 0] & TAG_MASK, sources[unknown, 1]])
        pending: np.ndarray = found.astype(np.int32)
        return pending

    def settle(self) -> None:
        """Wait for the oldest step on its way and see to what it made."""
        flight = self.flights[0]
        result: StepResult | LabinferError
        try:
            result = self.pipeline.wait(flight.number)
        except StageDied as error:
            self.recover(error)
            return
        except LabinferError as error:
            result = error
        self.flights.popleft()
        later = [each for each in self.flights if each.group == flight.group]
        for each in later:
            self.count(each, -1)
        self.stepping = True
        try:
            if isinstance(result, StepResult):
                self.accept(flight, result)
            else:
                self.lose(flight, result)
        finally:
            self.stepping = False
            for each in later:
                self.count(each, 1)
            self.uses[flight.part.rows] -= 1
            self.release()

    def accept(self, flight: Flight, result: StepResult) -> None:
        """Take over the tokens of a step for the sequences that still want them."""
        self.restarts = 0
        if self.model.fleet is not None:
            self.model.fleet.observe(result.times, flight.part)
        for ranks, (began, ended) in zip(self.model.plan.groups, result.times.tolist(), strict=True):
            for stage in ranks:
                self.model.device_seconds[stage.device] += ended - began
        part, alive, values = flight.part, flight.alive, self.values_of(result)
        self.forget_sources(flight)
        made = part.rows[alive & (part.new > 0)]
        self.scheduler.held[made[self.source[made, 0] == 0]] = False  # unless a later step makes one more
        if not alive.all():
            values = values[np.repeat(alive, part.wanted)]
            part = Part(part.rows[alive], part.counts[alive], part.wanted[alive], part.new[alive])
        if len(part.rows):
            self.postprocess(part, values)
        self.observe(flight.part, float((result.times[:, 1] - result.times[:, 0]).max()))

    def values_of(self, result: StepResult) -> np.ndarray:
        """What ``choose`` gets: logits, or tokens that are chosen already."""
        return result.tokens[:, None] if result.logits is None else result.logits

    def lose(self, flight: Flight, error: LabinferError) -> None:
        """A step failed: so do the requests it computed."""
        self.forget_sources(flight)
        self.count(flight, -1)
        for row in flight.part.rows[flight.alive].tolist():
            self.fail(self.scheduler.owners[row], error)

    def recover(self, error: LabinferError) -> None:
        """A stage died, and what is in its cache with it: start the stages anew and compute all of that again.

        Every request goes on with the tokens it has: elsewhere, if it can. They end with an error where the stages
        cannot be started, or die again and again before they have completed a step: with the one that they died of.
        """
        self.recovering = True
        try:
            self.give_up_steps()
            if (other := self.elsewhere()) is not None:
                self.hand_over(other)
            self.start_anew(error)
        finally:
            self.recovering = False

    def give_up_steps(self) -> None:
        """Nothing is on its way any more, and all sequences wait."""
        while self.flights:
            flight = self.flights.pop()
            if flight.counted:
                self.count(flight, -1)
        self.uses[:], self.source[:], self.scheduler.held[:] = 0, 0, False
        self.release()
        self.scheduler.restart()

    def hand_over(self, other: PipelinedEngine) -> None:
        """Have ``other`` go on with all requests, none of which has a row."""
        self.make_changes()  # whoever begins or stops now need not wait until the stages are started
        self.delivery.deliver()
        moving = self.scheduler.let_go()
        for request in moving.values():
            request.moved_to = other
        other.submit(partial(other.take_over, moving))
        other.start()

    def take_over(self, moving: Mapping[Sequence, Request]) -> None:
        """Go on with sequences of another engine."""
        for sequence in moving:
            sequence.batch = self.batch
            self.scheduler.wait(sequence)

    def start_anew(self, error: LabinferError) -> None:
        """Start the stages, again if they die at once; else end every request with ``error``, or the newer one."""
        while self.restarts < MAX_RESTARTS:
            self.restarts += 1
            try:
                self.model.recover()
                self.scheduler.groups, self.scheduler.turn = len(self.model.plan.groups), 0
                return
            except StageDied as again:
                error = again
            except LabinferError as other:
                error = other
                break
        self.restarts = 0
        self.fail_all(error)

    def forget_sources(self, flight: Flight) -> None:
        """The tokens of ``flight`` are known now."""
        rows = flight.part.rows
        self.source[rows[self.source[rows, 0] == flight.number], 0] = 0

    def count(self, flight: Flight, sign: int) -> None:
        """Count the tokens of a step as computed and made (1), or not (-1), for the rows that still want them."""
        rows, alive = flight.part.rows[flight.alive], flight.alive
        self.batch.num_computed[rows] += sign * flight.part.counts[alive]
        self.batch.num_tokens[rows] += sign * flight.part.new[alive]
        flight.counted = sign > 0

    # Ends

    def end(self, sequence: Sequence, reason: str, token: int | None = None) -> None:
        """Stop a sequence; what is on its way for it is dropped when it comes."""
        row = sequence.row
        if sequence.finish_reason is None and row >= 0:
            self.scheduler.held[row] = True
            for flight in self.flights:
                for index in (flight.alive & (flight.part.rows == row)).nonzero()[0].tolist():
                    flight.alive[index] = False
                    if flight.counted:
                        self.batch.num_computed[row] -= flight.part.counts[index]
                        self.batch.num_tokens[row] -= flight.part.new[index]
        super().end(sequence, reason, token)

    def release(self) -> None:
        """Give back the rows of sequences that have ended, unless steps on their way use them."""
        self.fit()
        unused = [each for each in self.ending if each.row < 0 or not self.uses[each.row]]
        if unused:
            self.scheduler.stop(unused)
            self.ending = [each for each in self.ending if each not in unused]
