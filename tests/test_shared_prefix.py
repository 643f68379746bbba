"""Requests with a common beginning that arrive at once compute it once, and nobody waits for what is not theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from labinfer import SamplingParams
from labinfer.llm import LLM
from labinfer.runtime.request import Request

from .tiny import GOLDEN

LLAMA, WINDOW = GOLDEN / "llama-llama3", GOLDEN / "mistral-window"
RNG = np.random.default_rng(7)
SHARED = RNG.integers(0, 60, 200).tolist()
PROMPTS = [SHARED + RNG.integers(0, 60, 5).tolist() for _ in range(8)]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LIMITS: dict[str, Any] = {"max_num_batched_tokens": 64, "max_model_len": 256, "max_num_seqs": 16, "block_size": 16}


@pytest.mark.parametrize("overlap", ["0", "1"])
@pytest.mark.parametrize("transport", [None, "local"])
def test_a_common_beginning_is_computed_once(
    overlap: str, transport: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABINFER_OVERLAP", overlap)
    with LLM(LLAMA, enable_prefix_caching=False, **LIMITS) as model:
        expected = [model.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]
    with LLM(LLAMA, transport=transport, **LIMITS) as model:
        outputs = model.generate(PROMPTS, GREEDY)
        assert [output.token_ids for output in outputs] == expected
        assert [output.metrics.num_cached_tokens for output in outputs] == [0] + [192] * 7
        prompts = sum(step.num_tokens - step.num_decodes for step in model.engine.stats)
        assert prompts <= 205 + 7 * 13  # the first whole, of each other what comes after the last whole block
        counters = model.blocks.counters
        assert (counters.queries, counters.hits) == (8 * 205, 7 * 192)
        model.blocks.check_integrity()


@pytest.mark.parametrize("overlap", ["0", "1"])
@pytest.mark.parametrize("transport", [None, "local"])
@pytest.mark.parametrize("limits", [{}, {"num_blocks": 20}, {"max_num_batched_tokens": 16, "max_logits_rows": 16}])
def test_of_a_block_that_only_begins_alike_the_rest_is_computed(
    overlap: str, transport: str | None, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABINFER_OVERLAP", overlap)
    prompts = [[*SHARED[:120], number, *RNG.integers(0, 60, 9 + number).tolist()] for number in range(8)]
    with LLM(LLAMA, enable_prefix_caching=False, **LIMITS) as model:
        expected = [model.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    with LLM(LLAMA, transport=transport, **LIMITS | limits) as model:
        for prompt, tokens in zip([prompts[0], *prompts], [expected[0], *expected], strict=True):
            [output] = model.generate(prompt, GREEDY)
            assert output.token_ids == tokens
        assert output.metrics.num_cached_tokens == 120  # seven blocks, and half of one
        outputs = model.generate(prompts, GREEDY)
        assert [output.token_ids for output in outputs] == expected
        assert model.blocks.counters.copies >= 7
        model.blocks.check_integrity()


def test_who_has_borrowed_tokens_of_a_block_waits_for_it_too() -> None:
    with LLM(LLAMA, **LIMITS | {"max_num_batched_tokens": 256}) as model:
        old = SHARED[:10] + SHARED[100:130]
        model.generate(old, GREEDY)
        requests = [model.engine.add(Request(prompt, GREEDY)) for prompt in PROMPTS[:2]]
        model.engine.step()
        rows = [sequence.row for sequence in model.engine.scheduler.running]
        assert (model.batch.num_computed[rows].tolist(), model.blocks.borrowed[rows].tolist()) == ([205, 10], [0, 10])
        model.engine.finish(requests)
        assert [request.metrics.num_cached_tokens for request in requests] == [10, 192]
        assert model.blocks.counters.copies == 1


def test_beginnings_are_shared_where_old_blocks_are_given_back() -> None:
    with LLM(WINDOW, enable_prefix_caching=False, **LIMITS | {"max_model_len": 64, "block_size": 4}) as model:
        expected = [model.generate(prompt[-50:], GREEDY)[0].token_ids for prompt in PROMPTS]
    with LLM(WINDOW, **LIMITS | {"max_model_len": 64, "block_size": 4, "max_num_batched_tokens": 8}) as model:
        assert [output.token_ids for output in model.generate([p[-50:] for p in PROMPTS], GREEDY)] == expected
        model.blocks.check_integrity()


def test_others_compute_what_those_who_wait_leave() -> None:
    with LLM(LLAMA, **LIMITS) as model:
        leader, follower = (model.engine.add(Request(prompt[:60], GREEDY)) for prompt in PROMPTS[:2])
        other = model.engine.add(Request(SHARED[100:120], GREEDY))
        model.engine.step()
        assert leader.metrics.first_token_time is not None
        assert follower.metrics.first_token_time is None
        computed = {each.request: int(model.batch.num_computed[each.row]) for each in model.engine.scheduler.running}
        assert (computed[leader], computed[follower], computed[other]) == (60, 0, 4)
        model.engine.finish([leader, follower, other])
        assert follower.metrics.num_cached_tokens == 48


def test_who_waited_goes_on_alone_when_the_other_one_leaves() -> None:
    with LLM(LLAMA, **LIMITS | {"max_num_batched_tokens": 16}) as model:
        leader, follower = (model.engine.add(Request(prompt, GREEDY)) for prompt in PROMPTS[:2])
        for _ in range(4):
            model.engine.step()
        model.engine.abort(leader)
        model.engine.finish([follower])
        assert follower.metrics.num_cached_tokens == 64
        assert follower.generated == model.generate(PROMPTS[1], GREEDY)[0].token_ids


def test_what_is_scored_whole_waits_for_nobody() -> None:
    with LLM(LLAMA, **LIMITS) as model:
        scored = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=0)
        outputs = model.generate([PROMPTS[0], PROMPTS[0]], scored)
        assert [output.metrics.num_cached_tokens for output in outputs] == [0, 0]
        assert [len(output.prompt_logprobs or ()) for output in outputs] == [205, 205]
