"""Requests of many kinds, and what a model answers to them one by one or all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import labinfer
from labinfer import SamplingParams
from labinfer.llm import LLM
from labinfer.runtime.request import Request

LENGTHS = (1, 3, 17, 40, 33, 8, 25, 16)
TOKENS = 12


class Ask(NamedTuple):
    """A prompt with its parameters."""

    prompt: list[int]
    params: SamplingParams


def workload(count: int, vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[Ask]:
    """``count`` prompts, every second one with the beginning of the one before it; greedy and seeded in turn."""
    rng, asks = np.random.default_rng(5), list[Ask]()
    knobs: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 1.0}, {"temperature": 0, "repetition_penalty": 1.5},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "presence_penalty": 0.3},
    ]  # fmt: skip
    prompt: list[int] = []
    for index in range(count):
        length = lengths[index % len(lengths)]
        shared = prompt[: length - 1] if index % 2 else []
        prompt = [*shared, *rng.integers(0, vocab_size, length - len(shared)).tolist()]
        params = SamplingParams(**knobs[index // 2 % 4], seed=index, max_tokens=TOKENS, ignore_eos=True)
        asks.append(Ask(prompt, params))
    return asks


def alone(model: Path, asks: list[Ask], **options: Any) -> list[list[int]]:
    """The answers, one request after another, nothing of one reused by the next."""
    with labinfer.LLM(model, enable_prefix_caching=False, **options) as llm:
        return [llm.generate([ask.prompt], ask.params)[0].token_ids for ask in asks]


def together(llm: LLM, asks: list[Ask], preempt: bool = False) -> list[list[int]]:
    """The answers to all of them at once; ``preempt`` one after every third step. Nothing is held afterwards."""
    engine = llm.engine
    requests = [engine.add(Request(ask.prompt, ask.params)) for ask in asks]
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
        if preempt and steps % 3 == 0 and len(engine.scheduler.running) > 1:
            engine.scheduler.preempt(engine.scheduler.running[steps % len(engine.scheduler.running)])
    assert llm.blocks.usage == 0
    llm.blocks.check_integrity()
    return [request.generated for request in requests]
