"""The engine of a device that chooses tokens itself: the tokens of the engine that chooses them on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer import SamplingParams
from labinfer.errors import LabinferError
from labinfer.runtime.pipeline.device_engine import DeviceEngine
from labinfer.runtime.request import Request

from .choosing import choosing
from .tiny import GOLDEN
from .workload import alone, together, workload

LLAMA = GOLDEN / "llama-llama3"
VOCABULARY = 96


def run(asks: list[tuple[list[int], dict[str, Any]]], **options: Any) -> list[list[list[int]]]:
    """The answers to prompts with parameters, all at once."""
    with labinfer.load(LLAMA, seed=3, **options) as model:
        params = [SamplingParams(max_tokens=10, **knobs) for _, knobs in asks]
        results = model.generate([prompt for prompt, _ in asks], params)
        assert model.blocks.usage == 0
        model.blocks.check_integrity()
        return [[answer.token_ids for answer in result.outputs] for result in results]


def both(asks: list[tuple[list[int], dict[str, Any]]], **options: Any) -> None:
    """The tokens are those that the host chooses."""
    expected = run(asks, **options)
    with choosing() as samplers:
        assert run(asks, **options) == expected
    assert samplers


KNOBS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.3, "seed": 5},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.8, "seed": 1},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 0, "repetition_penalty": 1.4},
    {"temperature": 1.5, "repetition_penalty": 0.7, "frequency_penalty": 0.5, "presence_penalty": -0.3},
    {"temperature": 1.0, "logit_bias": {3: 4.0, 9: -100.0}, "frequency_penalty": 1.9},
    {"temperature": 3.0, "min_tokens": 6, "stop_token_ids": list(range(40))},
    {"temperature": 1.0, "typical_p": 0.6},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 1.0, "allowed_token_ids": [4, 5, 6, 7, 8]},
    {"temperature": 1.0, "logits_processors": [lambda output, logits: logits * np.float32(0.5)]},
    {"temperature": 1.2, "n": 3, "seed": 2},
    {"temperature": 0, "prompt_logprobs": 1},
]
PROMPTS = [list(range(index, index + 1 + 5 * (index % 4))) for index in range(len(KNOBS))]


STAGES = {"devices": "reference:0=0-0,reference:1=1-2"}


@pytest.mark.parametrize("options", [{}, STAGES], ids=["one stage", "two stages"])
@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: "-".join(knobs))
def test_every_kind_of_request_gets_the_hosts_tokens(knobs: dict[str, Any], options: dict[str, Any]) -> None:
    both([(prompt, knobs | {"ignore_eos": True}) for prompt in PROMPTS[:5]], **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 5, "max_num_seqs": 4}, {"num_blocks": 6}, {"max_logits_rows": 3}],
    ids=str,
)
@pytest.mark.parametrize("stages", [{}, STAGES], ids=["one stage", "two stages"])
def test_all_kinds_together_too(options: dict[str, Any], stages: dict[str, Any]) -> None:
    both(list(zip(PROMPTS, KNOBS, strict=True)), **options, **stages)


def test_only_rows_that_need_it_are_chosen_by_the_host() -> None:
    drawn = {"temperature": 1.0, "ignore_eos": True}
    with choosing() as samplers:
        run([([5], drawn), ([7], drawn | {"logprobs": 1})])
    assert samplers[0].fed >= 8  # the first sequence did not wait for the second one


def test_the_next_step_is_sent_before_the_tokens_are_known() -> None:
    with choosing() as samplers, labinfer.load(LLAMA) as model:
        engine = model.engine
        assert isinstance(engine, DeviceEngine)
        engine.add(Request([1, 2, 3], SamplingParams(temperature=1.0, max_tokens=9, ignore_eos=True)))
        engine.step()
        assert (samplers[0].chosen, samplers[0].waiting) == (2, [1])
        list(engine.run())
        assert (samplers[0].chosen, samplers[0].fed, samplers[0].waiting) == (9, 8, [0])


def test_each_stage_has_a_micro_batch_to_compute() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=9, ignore_eos=True)
    with choosing() as samplers, labinfer.load(LLAMA, **STAGES) as model:
        engine = model.engine
        assert isinstance(engine, DeviceEngine)
        for prompt in ([1, 2, 3], [4, 5]):
            engine.add(Request(prompt, params))
        engine.step()
        assert sorted(flight.group for flight in engine.flights) == [0, 1, 1]
        list(engine.run())
        assert (samplers[0].chosen, samplers[0].fed, samplers[0].waiting) == (18, 16, [0, 0])


def test_lists_that_do_not_fit_are_the_hosts() -> None:
    asks = [(prompt, {"temperature": 1.0, "repetition_penalty": 1.3, "ignore_eos": True}) for prompt in PROMPTS]
    expected = run(asks)
    with choosing(capacity=40):
        assert run(asks) == expected


@pytest.mark.parametrize("stages", [{}, STAGES], ids=["one stage", "two stages"])
def test_preemption_and_shared_beginnings_change_no_token(stages: dict[str, Any]) -> None:
    asks = workload(12, VOCABULARY)
    expected = alone(LLAMA, asks, devices="reference")
    with choosing(), labinfer.load(LLAMA, num_blocks=30, max_num_seqs=6, **stages) as llm:
        assert together(llm, asks) == expected


def test_logits_that_are_no_numbers_end_the_requests_and_free_the_cache() -> None:
    with choosing(), labinfer.load(LLAMA) as model:
        with (
            model.listen("layers.1.attn.out", lambda array: array * np.float32(np.nan)),
            pytest.raises(LabinferError) as caught,
        ):
            model.generate([[1, 2], [3]], SamplingParams(temperature=1.0))
        assert caught.value.code == "run.not-a-number"
        assert model.blocks.usage == 0


def test_a_request_without_a_token_to_choose_fails_alone() -> None:
    banned = {token: float("-inf") for token in range(VOCABULARY)}
    with choosing(), labinfer.load(LLAMA) as model:
        requests = [
            model.engine.add(Request([1, 2], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))),
            model.engine.add(Request([1, 2], SamplingParams(temperature=0, min_tokens=4, stop_token_ids=list(banned)))),
        ]
        list(model.engine.run())
    assert [request.error and request.error.code for request in requests] == [None, "sampling.no-token"]
    assert len(requests[0].generated) == 4
