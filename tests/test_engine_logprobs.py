"""Log-probabilities and several answers through the engine: those of the model, however the work is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer import LLM, SamplingParams
from labinfer.runtime.outputs import RequestOutput
from labinfer.runtime.sampling import Logprob

from .tiny import GOLDEN

LLAMA = GOLDEN / "llama-llama3"
PROMPTS = [[5], [1, 2, 3], list(range(40)), [9] * 17, list(range(20))]
CUTS: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 7},
    {"max_num_batched_tokens": 7, "max_logits_rows": 3},
    {"max_num_seqs": 2},
    {"block_size": 4, "num_blocks": 22},  # some are preempted
]


@pytest.fixture(scope="module")
def whole() -> Any:
    """A model whose ``logits`` are the truth."""
    with labinfer.load(LLAMA) as model:
        yield model


def log_softmax(model: LLM, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of what follows each of ``tokens``, float64 [len(tokens), vocab]."""
    logits = model.logits(tokens).astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def check(entry: dict[int, Logprob], row: np.ndarray, token: int, count: int) -> None:
    """An entry tells of the likeliest tokens and of the one that is there."""
    order = np.argsort(-row, kind="stable")
    assert set(entry) == {*order[:count].tolist(), token}
    for each, told in entry.items():
        assert told.logprob == pytest.approx(row[each], abs=1e-4)
        assert told.rank == int((row > row[each] + 1e-9).sum()) + 1


def check_answer(whole: LLM, answer: RequestOutput, count: int) -> None:
    prompt = list(answer.prompt_token_ids)
    for output in answer.outputs:
        rows = log_softmax(whole, prompt + output.token_ids)[len(prompt) - 1 : -1]
        assert output.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids)
        for entry, row, token in zip(output.logprobs, rows, output.token_ids, strict=True):
            check(entry, row, token, count)
        total = rows[np.arange(len(rows)), output.token_ids].sum()
        assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_logprobs_are_the_models(options: dict[str, Any], whole: LLM) -> None:
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.3, "seed": 4, "n": 2, "top_k": 20}]
    with labinfer.load(LLAMA, **options) as model:
        for count in (0, 3):
            for kind in kinds:
                params = SamplingParams(**kind, max_tokens=9, ignore_eos=True, logprobs=count)
                for answer in model.generate(PROMPTS, params):
                    check_answer(whole, answer, count)
        if "num_blocks" in options:
            assert model.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_prompt_logprobs_are_the_models(options: dict[str, Any], whole: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=2)
    with labinfer.load(LLAMA, **options) as model:
        for prompt in PROMPTS:  # what is cached of a prompt must be computed again
            model.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
        plain = model.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        for answer, other in zip(model.generate(PROMPTS, params), plain, strict=True):
            prompt = list(answer.prompt_token_ids)
            assert answer.token_ids == other.token_ids
            assert answer.prompt_logprobs is not None
            assert len(answer.prompt_logprobs) == len(prompt)
            assert answer.prompt_logprobs[0] is None
            for entry, row, token in zip(
                answer.prompt_logprobs[1:], log_softmax(whole, prompt), prompt[1:], strict=False
            ):
                assert entry is not None
                check(entry, row, token, 2)
            assert answer.outputs[0].logprobs is None


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_the_best_of_many_are_the_likeliest_of_them(options: dict[str, Any], whole: LLM) -> None:
    common: dict[str, Any] = {"temperature": 1.5, "seed": 9, "max_tokens": 7, "ignore_eos": True}
    with labinfer.load(LLAMA, **options) as model:
        every = model.generate(PROMPTS, SamplingParams(**common, n=5, logprobs=0))
        best = model.generate(PROMPTS, SamplingParams(**common, n=2, best_of=5))
        for all_of_them, two in zip(every, best, strict=True):
            order = sorted(all_of_them.outputs, key=lambda output: -(output.cumulative_logprob or 0))
            assert [each.token_ids for each in two.outputs] == [each.token_ids for each in order[:2]]
            assert [each.logprobs for each in two.outputs] == [None, None]
            assert two.outputs[0].cumulative_logprob == pytest.approx(order[0].cumulative_logprob)
            check_answer(whole, all_of_them, 0)
        assert model.blocks.usage == 0


def test_n_greedy_answers_are_one() -> None:
    with labinfer.load(LLAMA) as model:
        [answer] = model.generate([PROMPTS[1]], SamplingParams(temperature=0, n=3, max_tokens=5, ignore_eos=True))
        assert len({tuple(output.token_ids) for output in answer.outputs}) == 1
        assert answer.metrics.num_generation_tokens == 15
