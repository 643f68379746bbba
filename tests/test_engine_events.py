"""Random arrivals, aborts, forks and exhaustion: every answer is the one that its request gets alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import labinfer
from labinfer import LoRARequest, SamplingParams
from labinfer.errors import UsageError
from labinfer.runtime.engine import Engine
from labinfer.runtime.request import Request
from labinfer.runtime.session import Session

from .adapters import save_adapter
from .tiny import GOLDEN
from .token_memory import Knowing, expected_tokens, remember_tokens

EXAMPLES, EVENTS = 30, 60
"""For each of the twelve kinds of engine: more than 10,000 events in all."""

TEXTS = [[1, 2, 3, 4, 5, 6, 7] * 6, [1, 2, 3, 4, 5, 6, 8] * 6, [9] * 40]


@cache
def loaded(family: str, **options: Any) -> labinfer.LLM:
    """A model that remembers tokens; machines run on it one after another."""
    model = labinfer.load(GOLDEN / family, **options)
    remember_tokens(model)
    return model


@cache
def adapter(seed: int) -> LoRARequest:
    """One of several adapters of the llama."""
    return LoRARequest(str(seed), save_adapter(Path(mkdtemp()) / "adapter", GOLDEN / "llama-llama3", seed, rank=1))


class EngineEvents(RuleBasedStateMachine):
    """One engine, and what its requests should get."""

    options: ClassVar[dict[str, Any]] = {}
    overlap = "0"
    guesses = 0
    steps_alone = False
    family = "llama-llama3"

    def __init__(self) -> None:
        super().__init__()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LABINFER_OVERLAP", self.overlap)
            limits = {
                "max_model_len": 48,
                "max_num_seqs": 4,
                "block_size": 4,
                "num_blocks": 14,
                "max_num_batched_tokens": 16,
            }
            self.model = loaded(self.family, **(limits | self.options))
            if self.model.blocks.usage:  # an example before this one failed
                loaded.cache_clear()
                self.model = loaded(self.family, **(limits | self.options))
            patch.setattr(self.model.interpreters[0].device, "decodes_alone", self.steps_alone)
            patch.setenv("LABINFER_SPECULATION", "1")
            self.model.proposer = Knowing(self.model, self.guesses, wrong=4) if self.guesses else None
            self.engine = Engine(self.model, seed=0)
        if self.model.cache.swap is not None:
            self.engine.costs.prompt_seconds = lambda tokens: float("inf")  # type: ignore[method-assign]
        self.requests: list[Request] = []
        self.aborted: set[int] = set()
        self.sessions: list[Session] = []

    @rule(
        text=st.sampled_from(TEXTS), length=st.integers(1, 40), n=st.sampled_from([1, 1, 1, 2, 3]),
        most=st.integers(1, 20), temperature=st.sampled_from([0.0, 1.0]), stop=st.lists(st.integers(0, 95), max_size=8),
        priority=st.integers(0, 2), salt=st.sampled_from(["", "", "other"]), listens=st.booleans(),
        lora=st.integers(-2, 2),
    )  # fmt: skip
    def arrive(self, text: list[int], length: int, n: int, most: int, temperature: float, stop: list[int],
               priority: int, salt: str, listens: bool, lora: int) -> None:  # fmt: skip
        params = SamplingParams(temperature=temperature, max_tokens=most, n=n, stop_token_ids=stop)
        request = Request(text[:length], params, priority, salt)
        if lora >= 0 and self.model.adapters.slots:
            request.lora = adapter(lora)
        if listens:
            request.listener, request.interactive = lambda sequence: None, length % 2 == 0
        self.requests.append(self.engine.add(request))

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            if self.engine.busy:
                self.engine.step()

    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        if self.requests:
            request = self.requests[which % len(self.requests)]
            if not request.finished:
                self.aborted.add(request.number)
            self.engine.abort(request)

    @rule(which=st.integers(0, 99), whom=st.integers(0, 99))
    def abort_when_told(self, which: int, whom: int) -> None:
        if self.requests:
            request, other = (self.requests[number % len(self.requests)] for number in (which, whom))
            if not other.finished and request.listener is not None:
                self.aborted.add(other.number)
                request.listener = lambda sequence: self.engine.abort(other)

    @rule(length=st.integers(1, 30))
    def open_session(self, length: int) -> None:
        if len(self.sessions) < 2:
            session = self.model.session()
            if self.model.blocks.fits(session.row, length):
                session.append(TEXTS[0][:length])
                self.sessions.append(session)
            else:
                with pytest.raises(UsageError) as caught:
                    session.append(TEXTS[0][:length])
                assert caught.value.code == "run.cache-full"
                session.close()

    @rule()
    def close_session(self) -> None:
        if self.sessions:
            self.sessions.pop(0).close()

    @invariant()
    def books_are_right(self) -> None:
        self.model.blocks.check_integrity()
        assert len(self.engine.scheduler.running) <= self.model.plan.limits.max_num_seqs
        if self.guesses:  # nothing of wrong guesses is left
            rows = self.engine.scheduler.rows
            needed = -(-self.model.batch.num_computed[rows] // self.model.plan.limits.block_size)
            assert (self.model.blocks.counts[rows] == needed).all()
        if not self.engine.busy:
            assert not self.engine.scheduler.owners
            assert self.sessions or self.model.blocks.usage == 0

    def teardown(self) -> None:
        for session in self.sessions:
            session.close()
        for _ in self.engine.run():
            pass
        for request in self.requests:
            assert request.finished
            self.check(request)
        assert self.model.blocks.usage == 0
        assert not any(slot.users for slot in self.model.adapters.slots)
        self.model.blocks.check_integrity()
        if self.model.cache.swap is not None:
            assert all(
                len(free) + len(cold) == group.swap_blocks
                for free, cold, group in zip(
                    self.model.cache.swap.pool.free,
                    self.model.cache.swap.pool.cold,
                    self.model.plan.limits.groups,
                    strict=True,
                )
            )
        self.engine.close()

    def check(self, request: Request) -> None:
        if request.error is not None:  # sessions held what it needed
            assert request.error.code == "run.cache-full"
            return
        for sequence in request.sequences:
            asked = request.prompt, request.params, request.seed, sequence.index, request.lora
            wanted = expected_tokens(self.model, *asked)
            made = sequence.generated
            if request.number in self.aborted and sequence.finish_reason == "abort":
                assert made == wanted[: len(made)]
            else:
                assert made == wanted
                assert sequence.finish_reason == ("stop" if made[-1] in request.params.stop_token_ids else "length")
        if request.number not in self.aborted:
            assert len(request.sequences) == request.params.n


def machine(name: str, **attributes: Any) -> Any:
    """The test of a kind of engine."""
    made = type(name, (EngineEvents,), attributes)
    case: Any = made.TestCase  # type: ignore[attr-defined]
    case.settings = settings(max_examples=EXAMPLES, stateful_step_count=EVENTS, deadline=None)
    return case


TestPlain = machine("Plain")
TestOverlap = machine("Overlap", overlap="1")
TestSwap = machine("Swap", options={"swap_space": 1e-4})
TestOverlapSwap = machine("OverlapSwap", options={"swap_space": 1e-4, "block_size": 1, "num_blocks": 60}, overlap="1")
TestSmallSteps = machine("SmallSteps", options={"max_num_batched_tokens": 3, "max_logits_rows": 2, "num_blocks": 12})
TestWindows = machine("Windows", family="gemma3_text-linear_global", options={"num_blocks": 14})
TestAdapters = machine("Adapters", options={"max_loras": 2, "max_lora_rank": 1, "swap_space": 1e-4}, overlap="1")
TestMultiStep = machine("MultiStep", options={"num_blocks": 20}, steps_alone=True)
TestMultiStepWindows = machine(
    "MultiStepWindows",
    family="gemma3_text-linear_global",
    options={"swap_space": 1e-4},
    steps_alone=True,
)
TestSpeculation = machine("Speculation", options={"max_logits_rows": 12}, guesses=3)
TestSpeculationSwap = machine(
    "SpeculationSwap", options={"max_logits_rows": 20, "swap_space": 1e-4, "block_size": 1, "num_blocks": 60},
    guesses=5, overlap="1",
)  # fmt: skip
TestSpeculationWindows = machine(
    "SpeculationWindows",
    family="gemma3_text-linear_global",
    options={"num_blocks": 14, "max_logits_rows": 9},
    guesses=4,
)
