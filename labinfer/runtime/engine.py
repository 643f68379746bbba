"""The engine: schedule, run, postprocess, for many requests in each step."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import numpy as np

from labinfer.errors import LabinferError, UsageError
from labinfer.runtime.batch import Part
from labinfer.runtime.capture import Capture
from labinfer.runtime.delivery import Delivery
from labinfer.runtime.interrupts import interrupts_held
from labinfer.runtime.model import Model
from labinfer.runtime.multi_step import multi_step_of
from labinfer.runtime.outputs import RequestOutput, RequestOutputKind
from labinfer.runtime.request import Request, Sequence
from labinfer.runtime.sampling import Sampled, SamplingRules, SamplingState, prompt_logprobs, sample
from labinfer.runtime.scheduler import Policy, Scheduler, Unrunnable
from labinfer.runtime.speculation import speculation_of
from labinfer.runtime.step_costs import StepCosts
from labinfer.runtime.step_memory import StepBatch
from labinfer.runtime.step_stats import StepStats, step_stats
from labinfer.runtime.streaming import EngineThread, stream


class Scheduled(NamedTuple):
    """A step ready to run."""

    part: Part
    batch: StepBatch


class Engine:
    """Runs requests on a model. ``eos_ids`` are the tokens that end a text, ``policy`` decides what a step computes;
    ``seed`` makes requests without one repeatable.

    Every step serves all requests, whoever asks for it. Steps of one model are run one at a time (``model.lock``).
    """

    def __init__(
        self, model: Model, eos_ids: Iterable[int] = (), policy: Policy | None = None, seed: int | None = None
    ) -> None:
        self.model, self.batch, self.eos_ids = model, model.batch, frozenset(eos_ids)
        self.costs, self.capture = StepCosts(), Capture(model)
        self.scheduler = self.new_scheduler(policy or Policy())
        self.speculation = speculation_of(model.proposer, self.scheduler)
        self.multi_step = None if self.speculation or overlaps(model) else multi_step_of(self)
        self.numbers, self.random = count(), random.Random(seed)
        self.is_eos = np.zeros(model.vocab_size + 1, np.bool_)  # token -1 is none
        self.is_eos[[-1, *(token for token in self.eos_ids if token < model.vocab_size)]] = True
        self.device = ThreadPoolExecutor(1, "labinfer-device") if overlaps(model) else None
        self.inbox: deque[Callable[[], None]] = deque()
        self.thread: EngineThread | None = None
        self.starting, self.closed = threading.Lock(), False
        self.prepared: Scheduled | None = None
        self.stepping = False
        self.fault: LabinferError | None = None  # found in the cache's books: nothing can be computed any more
        self.ending: list[Sequence] = []  # ended, and their rows not given back yet
        self.delivery = Delivery(model.tokenizer, self.end, self.done)
        self.finished: list[Request] = []
        self.stats: deque[StepStats] = deque(maxlen=1024)
        self.num_tokens = 0  # computed by all steps

    def new_scheduler(self, policy: Policy) -> Scheduler:
        """What decides who runs."""
        model = self.model
        return Scheduler(self.batch, model.plan.limits, policy, self.costs, model.cache.swap, model.adapters)

    # Requests

    def add(self, request: Request) -> Request:
        """Queue ``request``, which is new; one that can never fit is a ``UsageError``."""
        self.check(request)
        with self.model.lock:
            self.queue(request)
        if self.thread is not None:
            self.thread.wake.set()
        return request

    def check(self, request: Request) -> None:
        """Work out what ``request`` asks for; ``UsageError`` for one that can never run."""
        self.check_open()
        if self.fault is not None:
            raise self.fault
        tokens = request.prompt = self.model.check_tokens(request.prompt)
        if not tokens:
            raise UsageError("run.empty-prompt", "the prompt has no tokens")
        if len(tokens) >= self.model.max_len:
            message = f"a prompt of {len(tokens)} tokens leaves no room in a context of {self.model.max_len}"
            raise UsageError("run.too-long", message, remedy="compile with a larger --max-model-len")
        if request.lora is not None:
            self.model.adapters.check(request.lora)
        self.capture.check(request)
        params = request.params
        if request.num_made > params.n and params.logprobs is None:
            params = replace(params, logprobs=0)  # tells which answers are the likeliest
        request.rules = SamplingRules(params, self.model.vocab_size, self.eos_ids, self.model.tokenizer)

    def queue(self, request: Request) -> None:
        """Let a checked request wait."""
        self.capture.attach(request)
        seed = request.params.seed
        request.number, request.seed = next(self.numbers), self.random.getrandbits(64) if seed is None else seed
        first = Sequence(weakref.ref(request), 0, self.batch, np.array(request.prompt, np.int32))
        if not request.rules.plain:
            first.state = SamplingState(request.rules, request.seed, 0, request.prompt)
        request.sequences = [first]
        self.scheduler.wait(first)
        self.prepared = None

    def abort(self, request: Request) -> None:
        """Stop ``request`` wherever it is; what it has made stays. A finished one stays as it is."""
        with self.model.lock:
            for sequence in request.sequences:
                self.end(sequence, "abort")

    def abort_all(self) -> None:
        """Stop every request."""
        with self.model.lock:
            self.make_changes()
            for sequence in self.scheduler.sequences:
                self.end(sequence, "abort")

    def submit(self, change: Callable[[], None]) -> None:
        """Call ``change()`` before the next step; for those who must not wait for the step that runs."""
        self.inbox.append(change)

    def make_changes(self) -> None:
        """Do what was submitted."""
        while self.inbox:
            self.inbox.popleft()()

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute or to tell."""
        return bool(self.scheduler.running or self.scheduler.waiting or self.delivery.news or self.inbox)

    @property
    def overlapping(self) -> bool:
        """Whether the host works while the device does; not while values are captured, of which telling lets go."""
        return self.device is not None and not self.capture.wanted

    def start(self) -> None:
        """Have a thread run the steps from now on, if none does; ``close`` ends it, and none is started after that."""
        with self.starting:
            if self.thread is None and not self.closed:
                self.thread = EngineThread(self)
            if self.thread is not None:
                self.thread.wake.set()

    def check_open(self) -> None:
        """Raise ``UsageError`` once the engine is closed."""
        if self.closed:
            raise UsageError("run.closed", "the model is closed")

    def stream(
        self, request: Request, kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    ) -> AsyncIterator[RequestOutput]:
        """Run ``request`` in the background: ``async for output in engine.stream(Request(prompt, params))``.

        Each output holds all that has been made by then, or what ``kind`` says: a long answer is cheaper in deltas.
        Whoever is slow gets fewer outputs. Leaving the loop, or cancelling the task, aborts the request. Raises what
        ``add`` raises, and the error of a request that fails.
        """
        return stream(self, request, kind)

    def finish(self, requests: Iterable[Request]) -> None:
        """Step until ``requests``, which were added, are done; while a thread steps, wait for it."""
        with interrupts_held() as check:
            for request in requests:
                while not request.finished:
                    if self.thread is None:
                        self.step()
                    else:
                        with self.delivery.concluded:
                            self.delivery.concluded.wait(0.1)
                    check()

    def close(self) -> None:
        """Stop every request and end the engine's threads."""
        with self.starting:
            self.closed = True
        if self.thread is not None:
            self.thread.close()
            self.thread = None
        self.abort_all()
        self.delivery.deliver()
        if self.device is not None:
            self.device.shutdown()

    # Steps

    def run(self) -> Iterator[Request]:
        """Step until every request is done; each request once it is."""
        while self.busy:
            with interrupts_held():
                done = self.step()
            yield from done

    def step(self) -> list[Request]:
        """Compute one step for all requests; those that it finished. Call it with ``interrupts_held``."""
        with self.model.lock:
            started, self.finished = time.perf_counter(), []
            self.make_changes()
            scheduled, self.prepared = self.prepared or self.schedule(), None
            if scheduled is None:
                self.delivery.deliver()
                return self.finished
            self.begin(scheduled)
            try:
                part, logits = self.compute(scheduled)
                self.postprocess(part, logits)
            finally:
                self.stepping = False
                self.release()
            self.observe(part, time.perf_counter() - started)
            if not self.overlapping:
                self.delivery.deliver()
            return self.finished

    def schedule(self, ahead: bool = False) -> Scheduled | None:
        """What the next step computes; None when there is nothing. A sequence that can never go on fails."""
        while True:
            try:
                part = self.scheduler.schedule(ahead)
            except Unrunnable as failure:
                self.fail(failure.sequence, failure.error)
                if ahead:  # it leaves the queue after the step that runs
                    return None
            else:
                if part is not None and self.speculation is not None and not ahead:
                    part = self.speculation.extend(part)
                if part is not None and self.multi_step is not None:
                    part = self.multi_step.extend(part)
                return None if part is None else Scheduled(part, self.batch.step(part))

    def compute(self, scheduled: Scheduled) -> tuple[Part, np.ndarray]:
        """Run the step; meanwhile tell of the tokens of the one before it and prepare the one after it.

        Gives what was run, of several steps perhaps fewer, and its logits or tokens; see ``choose``.
        """
        try:
            if scheduled.part.steps > 1 and self.multi_step is not None:
                return self.multi_step.run(scheduled)
            if self.device is None or not self.overlapping:
                return scheduled.part, self.model.run(scheduled.batch)
            running = self.device.submit(self.model.run, scheduled.batch)
            try:
                self.delivery.deliver()
                guessing = self.speculation is not None and not self.speculation.payoff.paused
                if self.batch.blocks.recompute_after is None and not self.ending and not guessing:
                    self.prepared = self.schedule(ahead=True)
            finally:
                running.exception()  # waits
            return scheduled.part, running.result()
        except BaseException:
            self.undo(scheduled.part)
            raise

    def begin(self, scheduled: Scheduled) -> None:
        """Count the tokens of a step as computed, and those that it makes as known, before they are."""
        self.stepping = True
        batch, part, step = self.batch, scheduled.part, scheduled.batch
        rows = part.rows
        if self.capture.wanted:
            self.capture.begin(part, [self.scheduler.owners[row] for row in rows.tolist()])
        batch.num_computed[rows] = step.context_len if part.steps == 1 else batch.num_computed[rows] + part.counts
        batch.num_tokens[rows] = batch.num_tokens[rows] + part.new  # numpy is quicker so than with +=

    def undo(self, part: Part) -> None:
        """Take back ``begin``: the step failed."""
        self.prepared = None
        self.batch.num_computed[part.rows] -= part.counts
        self.batch.num_tokens[part.rows] -= part.new

    def postprocess(self, part: Part, logits: np.ndarray) -> None:
        """Choose the tokens, and see to the sequences to which that means more than one token more."""
        batch, rows = self.batch, part.rows
        if not part.decodes:
            last = np.cumsum(part.wanted) - 1
            self.score(part, last, logits)
            rows = rows[part.new > 0]
        if part.proposed is not None and self.speculation is not None:
            self.speculation.verify(part, logits, self.take)
        elif part.steps > 1 and self.multi_step is not None:
            self.multi_step.take(rows, logits)
        elif len(rows):
            self.take(rows, logits if part.decodes else logits[last[part.new > 0]])
        batch.commit(part)
        batch.start_anew(rows)
        if self.prepared is not None:
            again = np.repeat(self.prepared.part.rows, self.prepared.part.counts)
            self.prepared.batch.token_ids[:] = batch.token_ids[again, self.prepared.batch.positions]

    def take(self, rows: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Make the next token of each of ``rows`` from float32 ``logits`` [rows, vocab], int64, and see to its end."""
        sampled = self.choose(rows, logits)
        lengths = self.batch.put(rows, sampled.tokens)
        for index, error in sampled.errors.items():
            self.batch.num_tokens[rows[index]] -= 1
            self.fail(self.scheduler.owners[int(rows[index])], error)
        happens = (lengths >= self.batch.end[rows]) | self.is_eos[sampled.tokens] | self.batch.watched[rows]
        for index in happens.nonzero()[0].tolist() if np.count_nonzero(happens) else ():
            self.look(self.scheduler.owners[int(rows[index])], index, sampled, logits)
        return sampled.tokens

    def score(self, part: Part, last: np.ndarray, logits: np.ndarray) -> None:
        """Keep the log-probabilities of prompts that want them; ``last`` is each sequence's last row of logits."""
        for index in self.batch.scored[part.rows].nonzero()[0].tolist():
            request = self.scheduler.owners[int(part.rows[index])].request
            stop, count = int(last[index]) + 1, int(part.wanted[index])
            first = int(self.batch.num_computed[part.rows[index]]) - count + 1  # the token that the first row is about
            tokens = request.prompt[first : first + count]
            if (wanted := request.params.prompt_logprobs) is not None:
                about = logits[stop - count : stop][: len(tokens)]
                found = prompt_logprobs(about, tokens, wanted, request.rules.decode)
                request.prompt_logprobs[first : first + len(tokens)] = found

    def choose(self, rows: np.ndarray, logits: np.ndarray) -> Sampled:
        """A token for each of ``rows``: from float32 logits [rows, vocab], or chosen already, in int32 column 0."""
        if logits.dtype != np.int32:
            return sample(logits, self.states(rows))
        sampled = Sampled(logits[:, 0].astype(np.int64))
        for index in (sampled.tokens < 0).nonzero()[0].tolist():
            sampled.errors[index] = LabinferError("run.not-a-number", "the logits are not numbers")
        return sampled

    def states(self, rows: np.ndarray) -> dict[int, SamplingState]:
        """The sampling states of those of ``rows`` that have one, by their place there."""
        plain, owners = self.batch.plain[rows], self.scheduler.owners
        if np.count_nonzero(plain) == len(rows):
            return {}
        drawn = (~plain).nonzero()[0].tolist()
        return {index: state for index in drawn if (state := owners[int(rows[index])].state) is not None}

    def look(self, sequence: Sequence, index: int, sampled: Sampled, logits: np.ndarray) -> None:
        """See to a sequence whose token is that of row ``index``: it may be its first, its last, or waited for."""
        if sequence.finish_reason is not None:
            return
        request, token = sequence.request, int(sampled.tokens[index])
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = time.perf_counter()
            self.branch(sequence, logits[index : index + 1])
        if index in sampled.logprobs:
            sequence.logprobs.append(sampled.logprobs[index])
        try:
            stop = sequence.state.accept(token) if sequence.state else request.rules.stop(token)
        except LabinferError as error:
            self.fail(sequence, error)
            return
        if sequence.row >= 0:
            self.batch.watched[sequence.row] = sequence.watched
        if stop is not None:
            sequence.stop_reason, sequence.ends_in_text = stop
            self.end(sequence, "stop", token)
        elif len(sequence.token_ids) >= self.scheduler.longest(request):
            self.end(sequence, "length", token)
        elif sequence.heard:
            self.delivery.put(sequence, token, last=False)

    def branch(self, sequence: Sequence, logits: np.ndarray) -> None:
        """Begin the other answers of a request whose prompt is computed, each with a first token of its own."""
        request = sequence.request
        for index in range(1, request.num_made):
            other = Sequence(sequence.owner, index, self.batch, sequence.saved)
            other.state = sequence.state and sequence.state.fork(index)
            other.captured = {name: dict(rows) for name, rows in sequence.captured.items()}
            request.sequences.append(other)
            self.prepared = None
            self.scheduler.fork(sequence, other)
            sampled = sample(logits, {0: other.state} if other.state else {})
            other.token_ids[-1] = sampled.tokens[0]
            if 0 in sampled.errors:
                self.fail(other, sampled.errors[0])
            self.look(other, 0, sampled, logits)

    # Ends

    def end(self, sequence: Sequence, reason: str, token: int | None = None) -> None:
        """Stop a sequence for ``reason``, with its last ``token``; its row is given back once no step uses it."""
        if sequence.finish_reason is None:
            sequence.finish_reason, self.prepared = reason, None
            self.ending.append(sequence)
            self.delivery.put(sequence, token, last=True)
            if not self.stepping:
                self.release()

    def fail(self, sequence: Sequence, error: LabinferError) -> None:
        """End the request of ``sequence`` with ``error``."""
        sequence.request.error = error
        for each in sequence.request.sequences:
            self.end(each, "error")

    def fail_all(self, error: LabinferError) -> None:
        """End every request with ``error``; the next step tells so."""
        with self.model.lock:
            for sequence in self.scheduler.sequences:
                self.fail(sequence, error)

    def recover(self, error: LabinferError) -> None:
        """The model cannot run since ``error``: make it run again, if it can."""

    def release(self) -> None:
        """Give back the rows of sequences that have ended."""
        if self.ending:
            self.scheduler.stop(self.ending)
            self.ending.clear()
            if self.speculation is not None:
                self.speculation.proposer.release()

    def done(self, request: Request) -> None:
        """Everything is told of ``request``."""
        self.capture.detach(request)
        self.finished.append(request)

    def observe(self, part: Part, seconds: float) -> None:
        """Remember what a step cost, or several in one call."""
        accepted = self.speculation.accepted if self.speculation and part.proposed is not None else 0
        stats = step_stats(part, seconds, len(self.scheduler.waiting), accepted, self.costs)
        others = stats.num_tokens - stats.num_decodes
        self.stats.append(stats)
        self.num_tokens += stats.num_tokens * stats.num_steps
        if self.speculation is not None:
            self.speculation.observe(stats)
        if stats.num_prompt_tokens or not stats.num_proposed:
            self.costs.observe(stats.num_decodes, others, stats.seconds)


def overlaps(model: Model) -> bool:
    """Whether the host prepares a step while the one before it runs: ``LABINFER_OVERLAP``, else as the device likes."""
    chosen = os.environ.get("LABINFER_OVERLAP")
    return chosen != "0" if chosen else any(each.device.overlaps for each in model.interpreters)
