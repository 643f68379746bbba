"""The engine of devices of which the last chooses the tokens: a pipeline that is never left without a step.

Only for what the device cannot do does a row wait until the host has chosen its token.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from typing import Any

import numpy as np

from labinfer.backends.sampling import ALL_BANNED, RULE, Choices, TokenSampler
from labinfer.runtime.batch import Part
from labinfer.runtime.engine import Engine, Scheduled, overlaps
from labinfer.runtime.model import Model
from labinfer.runtime.pipeline.device_queue import HOST, ChosenResult, ChosenStep, DeviceQueue
from labinfer.runtime.pipeline.engine import PipelinedEngine
from labinfer.runtime.pipeline.pipeline import StepResult
from labinfer.runtime.pipeline.scheduler import GroupScheduler
from labinfer.runtime.request import Sequence
from labinfer.runtime.sampling import Sampled, sample
from labinfer.runtime.sampling.rules import SamplingRules
from labinfer.runtime.sampling.sampler import no_token
from labinfer.runtime.scheduler import Policy, Scheduler


class RowRules:
    """By row of the batch: how its tokens are chosen (``rules``), whether ``by_host``, and whether it ``lists`` tokens.

    A rule's ``number`` lacks the tokens known so far.
    """

    def __init__(self) -> None:
        self.rules, self.by_host, self.lists = np.zeros(0, RULE), np.zeros(0, np.bool_), np.zeros(0, np.bool_)

    def put(self, row: int, sequence: Sequence) -> None:
        """``row`` is that of ``sequence`` from now on."""
        if row >= len(self.rules):
            more = max(64, row + 1 - len(self.rules))
            for name in ("rules", "by_host", "lists"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros(more, column.dtype)]))
        rules = sequence.request.rules
        self.rules[row] = rule_of(rules, sequence)
        self.by_host[row] = not rules.simple
        self.lists[row] = rules.simple and rules.changes_logits


def rule_of(rules: SamplingRules, sequence: Sequence) -> tuple[Any, ...]:
    """The ``RULE`` of a sequence."""
    params, request = rules.params, sequence.request
    floor = params.temperature * np.log(params.min_p) if params.min_p > 0 else -np.inf
    return (
        params.temperature, params.top_p, floor, request.seed, sequence.index, -len(request.prompt),
        max(params.top_k, 0), -1, params.repetition_penalty, params.frequency_penalty, params.presence_penalty, 0,
    )  # fmt: skip


class ChoosingScheduler(GroupScheduler):
    """A scheduler of a group for each stage that knows how the tokens of its rows are chosen."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.row_rules = RowRules()

    def take(self, sequence: Sequence, row: int) -> None:
        """``row`` is that of ``sequence`` from now on."""
        self.row_rules.put(row, sequence)
        super().take(sequence, row)


class DeviceEngine(PipelinedEngine):
    """Runs requests on a model, the ranks of whose last stage have ``samplers``; see ``Engine``."""

    scheduler: ChoosingScheduler

    def __init__(self, model: Model, samplers: Listing[TokenSampler], *args: Any) -> None:
        self.steps = DeviceQueue(model.groups, samplers)
        self.seen = np.zeros((0, model.vocab_size), np.float32)
        super().__init__(model, *args)

    @property
    def pipeline(self) -> DeviceQueue:
        """The devices."""
        return self.steps

    def new_scheduler(self, policy: Policy) -> Scheduler:
        """What decides who runs; it may swap, since the device does all in order."""
        model = self.model
        groups, limits = len(model.groups), model.plan.limits
        return ChoosingScheduler(groups, self.batch, limits, policy, self.costs, model.cache.swap, model.adapters)

    def close(self) -> None:
        """Stop every request and give the device's memory back."""
        super().close()
        self.steps.close()

    def message(self, scheduled: Scheduled) -> ChosenStep:
        """The step with how its tokens are chosen; rows whose token the host must choose are held until it has."""
        self.fit()
        part, row_rules = scheduled.part, self.scheduler.row_rules
        pending, group = self.pending(part), self.scheduler.turn
        made = part.rows[part.new > 0]
        if self.batch.scored[part.rows].any():
            self.scheduler.held[made] = True
            everything = np.arange(len(scheduled.batch.logits_rows))
            return ChosenStep(scheduled.batch, pending=pending, seen=everything, group=group)
        by_host, source = row_rules.by_host[made], np.full(len(part.rows), -1, np.int32)
        source[np.searchsorted(scheduled.batch.query_start[1:], pending[:, 0], "right")] = pending[:, 2]
        for index in self.batch.watched[made].nonzero()[0].tolist():
            by_host[index] |= self.will_branch(self.scheduler.owners[int(made[index])])
        choices = self.choices(made, source[part.new > 0], by_host) if len(made) else None
        self.scheduler.held[made[by_host]] = True
        return ChosenStep(scheduled.batch, pending=pending, choices=choices, seen=by_host.nonzero()[0], group=group)

    def will_branch(self, sequence: Sequence) -> bool:
        """Whether the step makes the first token of a request with several answers, all from the same logits."""
        request = sequence.request
        return request.num_made > 1 and request.metrics.first_token_time is None

    def choices(self, rows: np.ndarray, source: np.ndarray, by_host: np.ndarray) -> Choices:
        """How the next tokens of ``rows`` are chosen; where the device has no room for a list, the host does."""
        row_rules, known = self.scheduler.row_rules, self.batch.num_tokens[rows]
        rules = row_rules.rules[rows]
        rules["number"] += known
        rules["source"] = source
        rules["temperature"][by_host] = 0
        listing = (row_rules.lists[rows] & ~by_host).nonzero()[0].tolist()
        tokens, numbers, at = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], 0
        spans = np.zeros((len(rows), 3), np.int32)
        for index in listing:
            state = self.scheduler.owners[int(rows[index])].state
            assert state is not None
            bias_ids, bias = state.rules.biases(int(rules["number"][index]))
            ids, counts = state.counted
            if at + len(bias_ids) + len(ids) > self.steps.capacity:
                by_host[index] = True
                continue
            spans[index] = np.cumsum([at, len(bias_ids), len(ids)])
            tokens += [bias_ids, ids]
            numbers += [bias.view(np.int32), counts]
            at = int(spans[index, 2])
        joined = (np.concatenate(each, dtype=np.int32, casting="same_kind") for each in (tokens, numbers))
        return Choices(rules, spans if listing else None, *joined)

    def values_of(self, result: StepResult) -> np.ndarray:
        """For each row its token, or ``HOST``, and where its logits are among those ``seen``: int32 [rows, 2]."""
        assert isinstance(result, ChosenResult)
        values = np.stack([result.tokens, np.full_like(result.tokens, -1)], axis=1)
        values[result.seen, 1] = np.arange(len(result.seen))
        if result.logits is not None:
            self.seen = result.logits
        return values

    def score(self, part: Part, last: np.ndarray, logits: np.ndarray) -> None:
        """Keep the log-probabilities of prompts that want them."""
        if self.batch.scored[part.rows].any():
            super().score(part, last, self.seen[logits[:, 1]])

    def choose(self, rows: np.ndarray, logits: np.ndarray) -> Sampled:
        """The tokens of ``rows``: of the device, or chosen from logits that it sent."""
        sampled = super().choose(rows, logits)
        for index in (logits[:, 0] == ALL_BANNED).nonzero()[0].tolist():
            sampled.errors[index] = no_token()
        here = (logits[:, 0] == HOST).nonzero()[0]
        if len(here):
            found = sample(self.seen[logits[here, 1]], self.states(rows[here]))
            sampled.tokens[here] = found.tokens
            for index in here.tolist():
                del sampled.errors[index]
            sampled.errors |= {int(here[index]): error for index, error in found.errors.items()}
            sampled.logprobs |= {int(here[index]): told for index, told in found.logprobs.items()}
        return sampled

    def branch(self, sequence: Sequence, logits: np.ndarray) -> None:
        """Begin the other answers of a request, whose first row of logits the device sent."""
        if sequence.request.num_made > 1:
            super().branch(sequence, self.seen[logits[:, 1]])


def engine_of(model: Model, *args: Any) -> Engine:
    """The engine that runs ``model`` fastest; ``args`` are those of ``Engine`` behind it."""
    if model.pipeline is not None:
        return PipelinedEngine(model, *args)
    samplers = samplers_of(model)
    return DeviceEngine(model, samplers, *args) if samplers else Engine(model, *args)


def samplers_of(model: Model) -> list[TokenSampler]:
    """What chooses the tokens of a model, for each rank of the last stage; empty where the host or a guess has to.

    Stages of one rank each can follow one another, all on devices that overlap, the first of which gets the tokens.
    """
    first, last, groups = model.interpreters[0].device, model.groups[-1].interpreters, len(model.groups)
    if (
        model.proposer is not None
        or not overlaps(model)
        or any(each.streamed is not None for each in model.interpreters)
    ):
        return []
    if groups > 1 and not (
        model.plan.ranks == 1
        and all(each.device.overlaps for each in model.interpreters)
        and first.reaches(last[0].device)
    ):
        return []
    rows = model.plan.limits.max_chosen
    found = [interpreter.device.sampler(rows, model.vocab_size, groups) for interpreter in last]
    return [sampler for sampler in found if sampler is not None]
