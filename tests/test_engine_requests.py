"""Requests and what becomes of them: streams, aborts at every phase, priorities, preemption, values, metrics."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer import SamplingParams
from labinfer.errors import LabinferError, UsageError
from labinfer.llm import LLM
from labinfer.runtime.engine import Engine
from labinfer.runtime.outputs import RequestOutput, RequestOutputKind
from labinfer.runtime.request import Request
from labinfer.runtime.scheduler import Policy

from .tiny import GOLDEN

LLAMA = GOLDEN / "llama-llama3"
PROMPTS = [[5], [1, 2, 3], list(range(40)), [9] * 17]


def greedy(count: int = 10, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """The answers to PROMPTS, each alone."""
    with labinfer.load(LLAMA) as model:
        return [model.generate([prompt], greedy())[0].token_ids for prompt in PROMPTS]


@pytest.fixture(params=["0", "1"], ids=["serial", "overlap"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """A model whose engine prepares steps ahead, or does not."""
    monkeypatch.setenv("LABINFER_OVERLAP", request.param)
    with labinfer.load(LLAMA, max_num_batched_tokens=16) as loaded:
        yield loaded
        loaded.blocks.check_integrity()
        assert loaded.blocks.usage == 0


async def collected(outputs: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in outputs]


def test_streams_grow_token_by_token_to_what_generate_gives(model: LLM, alone: list[list[int]]) -> None:
    async def run() -> list[list[RequestOutput]]:
        streams = [model.engine.stream(Request(prompt, greedy())) for prompt in PROMPTS]
        return await asyncio.gather(*map(collected, streams))

    for outputs, tokens in zip(asyncio.run(run()), alone, strict=True):
        assert outputs[-1].token_ids == tokens
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        for output in outputs:
            assert output.token_ids == tokens[: len(output.token_ids)]
    assert not model.engine.busy


def test_streams_and_generate_from_several_threads_share_the_steps(model: LLM, alone: list[list[int]]) -> None:
    answers: dict[int, list[int]] = {}

    def answer(index: int) -> None:
        answers[index] = model.generate([PROMPTS[index]], greedy())[0].token_ids

    def answer_in_a_loop(index: int) -> None:
        outputs = asyncio.run(collected(model.engine.stream(Request(PROMPTS[index], greedy()))))
        answers[index + 4] = outputs[-1].token_ids

    targets = [(each, index) for each in (answer, answer_in_a_loop) for index in range(4)]
    threads = [threading.Thread(target=target, args=(index,)) for target, index in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(8)] == alone + alone


def test_deltas_are_the_answer_in_pieces(tiny_model: Path) -> None:
    wanted = {"temperature": 1.5, "seed": 3, "max_tokens": 20, "ignore_eos": True, "n": 3, "logprobs": 2}
    with labinfer.load(tiny_model) as loaded:
        prompt = list(range(5, 15))
        [whole] = loaded.generate([prompt], SamplingParams(**wanted))
        stop = " ".join(whole.outputs[1].text.split()[8:10])
        params = SamplingParams(**wanted, stop=stop)
        [whole] = loaded.generate([prompt], params)
        stream = loaded.engine.stream(Request(prompt, params), RequestOutputKind.DELTA)
        outputs = asyncio.run(collected(stream))
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert all(output.outputs for output in outputs)
        for answer in whole.outputs:
            pieces = [each for output in outputs for each in output.outputs if each.index == answer.index]
            assert "".join(each.text for each in pieces) == answer.text
            assert [token for each in pieces for token in each.token_ids] == answer.token_ids
            assert [entry for each in pieces for entry in each.logprobs or []] == answer.logprobs
            ends = [each.finish_reason for each in pieces]
            assert ends == [None] * (len(pieces) - 1) + [answer.finish_reason]
            assert pieces[-1].cumulative_logprob == pytest.approx(answer.cumulative_logprob)
            assert pieces[-1].stop_reason == answer.stop_reason
        assert {answer.finish_reason for answer in whole.outputs} == {"stop", "length"}


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_only_the_end_is_told_of_the_likeliest_answers_and_where_it_is_asked_for(
    model: LLM, kind: RequestOutputKind
) -> None:
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=12, n=2, best_of=4, ignore_eos=True)
    [whole] = model.generate([PROMPTS[1]], params)
    [only] = asyncio.run(collected(model.engine.stream(Request(PROMPTS[1], params), kind)))
    assert only.finished
    assert [each.token_ids for each in only.outputs] == [each.token_ids for each in whole.outputs]
    final = asyncio.run(collected(model.engine.stream(Request(PROMPTS[1], greedy()), RequestOutputKind.FINAL_ONLY)))
    assert [len(output.token_ids) for output in final] == [10]


@pytest.mark.parametrize("limits", [{"max_logits_rows": 2}, {"max_num_batched_tokens": 3}], ids=str)
def test_every_sequence_that_runs_grows_in_each_step(limits: dict[str, int]) -> None:
    with labinfer.load(LLAMA, **limits) as model:
        engine = Engine(model)
        requests = [engine.add(Request([index], greedy())) for index in range(7)]
        while not all(request.finished for request in requests):
            before = [len(request.sequences[0].token_ids) for request in requests]
            engine.step()
            for request, length in zip(requests, before, strict=True):
                [sequence] = request.sequences
                assert sequence.row < 0 or len(sequence.token_ids) == length + 1


def test_leaving_a_stream_aborts_its_request(model: LLM, alone: list[list[int]]) -> None:
    async def run() -> RequestOutput:
        stays = asyncio.create_task(collected(model.engine.stream(Request(PROMPTS[1], greedy(40)))))
        cancelled = asyncio.create_task(collected(model.engine.stream(Request(PROMPTS[2], greedy(10_000)))))
        request = Request(PROMPTS[3], greedy(10_000))
        async for output in model.engine.stream(request):
            if len(output.token_ids) > 2:
                break
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return (await stays)[-1]

    assert asyncio.run(run()).token_ids[:10] == alone[1]
    model.engine.finish([])
    while model.engine.busy:
        model.engine.step()


def test_a_stream_raises_what_is_wrong_with_its_request(model: LLM, alone: list[list[int]]) -> None:
    async def run(prompt: list[int]) -> list[RequestOutput]:
        return await collected(model.engine.stream(Request(prompt, greedy())))

    with pytest.raises(UsageError) as caught:
        asyncio.run(run([]))
    assert caught.value.code == "run.empty-prompt"
    broken = model.listen("layers.1.attn.out", lambda array: array * np.float32(np.nan))
    with broken, pytest.raises(LabinferError) as failed:
        asyncio.run(run(PROMPTS[1]))
    assert failed.value.code == "run.not-a-number"

    def fail(array: np.ndarray) -> None:
        raise ValueError("a user's mistake")

    with model.listen("layers.1.attn.out", fail), pytest.raises(LabinferError) as failed:
        asyncio.run(run(PROMPTS[1]))
    assert "a user's mistake" in failed.value.message
    assert asyncio.run(run(PROMPTS[1]))[-1].token_ids == alone[1]


def test_closing_the_model_ends_streams() -> None:
    before = set(threading.enumerate())  # those of tests before this one
    loaded = labinfer.load(LLAMA)

    async def run() -> RequestOutput:
        last = None
        async for output in loaded.engine.stream(Request(PROMPTS[0], greedy(10_000))):
            if last is None:
                threading.Thread(target=loaded.close).start()
            last = output
        assert last is not None
        return last

    output = asyncio.run(run())
    assert (output.finished, output.finish_reason) == (True, "abort")
    after = set(threading.enumerate()) - before
    assert not [thread for thread in after if thread.name.startswith("labinfer")]


def test_abort_at_every_phase(alone: list[list[int]]) -> None:
    with labinfer.load(LLAMA, max_num_batched_tokens=16, max_num_seqs=2, num_blocks=8, swap_space=0.001) as model:
        engine = model.engine
        engine.costs.prompt_seconds = lambda tokens: float("inf")  # type: ignore[method-assign]  # swapping is cheaper
        first, second, queued = (engine.add(Request([token] * 40, greedy(30))) for token in (1, 2, 3))
        engine.step()
        assert 0 < engine.batch.num_computed[first.sequences[0].row] < 40  # in the middle of its prompt
        engine.abort(first)
        engine.abort(queued)
        while not second.sequences[0].token_ids[40:].any():
            engine.step()
        other = engine.add(Request([4] * 50, greedy(60)))
        while not other.metrics.num_preemptions and not second.metrics.num_preemptions:
            engine.step()
        swapped = next(each for each in (second, other) if each.sequences[0].swapped is not None)
        engine.abort(swapped)
        engine.abort(swapped)
        model.blocks.check_integrity()
        left = second if swapped is other else other
        engine.step()
        assert left.sequences[0].row >= 0
        engine.abort(left)
        engine.step()
        for request in (first, second, queued, other):
            assert (request.finished, request.sequences[0].finish_reason) == (True, "abort")
        assert model.blocks.usage == 0
        assert not engine.scheduler.waiting
        assert model.generate([PROMPTS[1]], greedy())[0].token_ids == alone[1]


def test_priorities_then_first_come_first_served() -> None:
    with labinfer.load(LLAMA, max_num_seqs=1) as model:
        engine = Engine(model)
        requests = [engine.add(Request([1, 2], greedy(2), priority)) for priority in (0, 2, 1, 2, 0)]
        assert [requests.index(request) for request in engine.run()] == [0, 4, 2, 1, 3]


@pytest.mark.parametrize("way", ["swap", "no room to swap", "swapping is dearer"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_preemption_changes_no_token(way: str, block_size: int) -> None:
    params = [greedy(40), SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)]
    prompts = [[token] * 30 for token in range(1, 7)]
    with labinfer.load(LLAMA) as model:
        expected = [model.generate([prompt], each)[0].token_ids for each in params for prompt in prompts]
    options = {"num_blocks": 192 // block_size, "block_size": block_size, "max_num_seqs": 6}
    with labinfer.load(LLAMA, swap_space=0 if way == "no room to swap" else 0.01, **options) as model:
        engine = model.engine
        seconds = float("inf") if way == "swap" else 0.0
        engine.costs.prompt_seconds = lambda tokens: seconds  # type: ignore[method-assign]
        requests = [engine.add(Request(prompt, each)) for each in params for prompt in prompts]
        engine.finish(requests)
        assert [request.generated for request in requests] == expected
        assert engine.scheduler.num_preemptions > 2
        assert (model.cache.swap is not None and model.cache.swap.num_in > 0) == (way == "swap")
        assert sum(request.metrics.num_preemptions for request in requests) == engine.scheduler.num_preemptions
        assert model.blocks.usage == 0


def test_the_newest_of_the_lowest_priority_is_preempted() -> None:
    with labinfer.load(LLAMA, num_blocks=6, max_num_seqs=3) as model:
        engine = Engine(model)
        requests = [
            engine.add(Request([token] * 16, greedy(40), priority)) for token, priority in ((1, 0), (2, 1), (3, 0))
        ]
        engine.finish(requests)
        assert requests[1].metrics.num_preemptions > 0
        assert requests[0].metrics.num_preemptions == 0


def test_several_answers_to_a_prompt(model: LLM) -> None:
    params = SamplingParams(temperature=1.5, n=5, seed=7, max_tokens=12, ignore_eos=True)
    [result] = model.generate([PROMPTS[2]], params)
    assert [output.index for output in result.outputs] == [0, 1, 2, 3, 4]
    assert len({tuple(output.token_ids) for output in result.outputs}) == 5
    assert result.token_ids == result.outputs[0].token_ids
    [single] = model.generate([PROMPTS[2]], SamplingParams(temperature=1.5, seed=7, max_tokens=12, ignore_eos=True))
    assert single.token_ids == result.token_ids
    assert model.blocks.counters.copies > 0  # the block where the prompt ends was shared
    with labinfer.load(LLAMA, max_num_seqs=2) as small:  # not all of them run at once
        [again] = small.generate([PROMPTS[2]], params)
        assert [output.token_ids for output in again.outputs] == [output.token_ids for output in result.outputs]


def test_captured_values_are_those_of_the_request_alone(model: LLM) -> None:
    name = "layers.1.attn.out"
    requests = [Request(prompt, greedy(6), capture=[name] if index % 2 else []) for index, prompt in enumerate(PROMPTS)]
    for request in requests:
        model.engine.add(request)
    model.engine.finish(requests)
    for index, request in enumerate(requests):
        captured = labinfer.runtime.outputs.output_of(request).outputs[0].captured
        if not index % 2:
            assert captured == {}
            continue
        seen: list[np.ndarray] = []
        with model.listen(name, seen.append):
            model.logits([*request.prompt, *request.generated[:-1]])
        expected = np.concatenate(seen)
        assert captured[name].shape == expected.shape
        np.testing.assert_allclose(captured[name], expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert all(interpreter.inner_memory is None for interpreter in model.interpreters)
    with pytest.raises(UsageError) as caught:
        model.engine.add(Request([1], capture=["layers.99.attn.out"]))
    assert caught.value.code == "run.unknown-value"


def test_metrics_and_statistics() -> None:
    with labinfer.load(LLAMA, max_num_seqs=1) as model:
        prompt = list(range(40))
        [first] = model.generate([prompt], greedy(5))
        [second, waits] = model.generate([prompt, [1, 2]], greedy(5))
        assert (first.metrics.num_cached_tokens, second.metrics.num_cached_tokens) == (0, 32)
        assert (waits.metrics.num_generation_tokens, waits.metrics.num_preemptions) == (5, 0)
        times = first.metrics
        assert times.queue_seconds is not None
        assert times.first_token_seconds is not None
        assert times.seconds is not None
        assert 0 <= times.queue_seconds <= times.first_token_seconds <= times.seconds
        assert times.inter_token_seconds == pytest.approx((times.seconds - times.first_token_seconds) / 4)
        assert waits.metrics.queue_seconds is not None
        assert waits.metrics.queue_seconds > (second.metrics.first_token_seconds or 0)
        stats = model.engine.stats
        assert len(stats) == 15
        assert [stats[at].num_tokens for at in (0, 1, 5, 10)] == [40, 1, 8, 2]
        assert {each.num_decodes for each in stats} == {0, 1}


def test_a_policy_of_ones_own_decides() -> None:
    class ShortestFirst(Policy):
        def rank(self, sequence: Any) -> int:
            return len(sequence.token_ids)

        def split(self, remaining: np.ndarray, budget: int, prompt_budget: int) -> np.ndarray:
            counts = np.zeros_like(remaining)
            counts[0] = min(int(remaining[0]), 2)  # one sequence at a time, two tokens a step
            return counts

    with labinfer.load(LLAMA) as model:
        expected = [model.generate([prompt], greedy(3))[0].token_ids for prompt in PROMPTS]
        engine = Engine(model, policy=ShortestFirst())
        requests = [engine.add(Request(prompt, greedy(3))) for prompt in PROMPTS]
        assert [requests.index(request) for request in engine.run()] == [0, 1, 3, 2]
        assert [request.generated for request in requests] == expected
        assert {each.num_tokens for each in engine.stats} == {1, 2}


def test_prompts_that_arrive_together_share_their_beginning() -> None:
    """What the first computes, the others need not, though nothing was cached when they were admitted."""
    shared = [7 + number % 50 for number in range(64)]
    prompts = [[*shared, number, number + 1] for number in range(8)]
    with labinfer.load(LLAMA, max_num_batched_tokens=48, max_num_seqs=8, max_model_len=128) as model:
        engine = Engine(model)
        requests = [engine.add(Request(prompt, greedy(3))) for prompt in prompts]
        engine.finish(requests)
        cached = [request.metrics.num_cached_tokens for request in requests]
        assert cached[0] == 0
        assert cached[3:] == [64] * 5
        assert sum(each.num_tokens for each in engine.stats) == sum(map(len, prompts)) + 8 * 2 - sum(cached)
        model.blocks.check_integrity()
    with labinfer.load(LLAMA, max_model_len=128, enable_prefix_caching=False) as model:
        assert [each.token_ids for each in model.generate(prompts, greedy(3))] == [each.generated for each in requests]


def test_a_long_prompt_comes_in_pieces_while_somebody_waits_for_tokens() -> None:
    class Careful(Policy):
        short = 99

    with labinfer.load(LLAMA, max_num_batched_tokens=64, max_model_len=256) as model:
        engine = Engine(model, policy=Careful())
        told: list[int] = []
        waited = engine.add(Request([1], greedy(60), interactive=True, listener=lambda sequence: told.append(1)))
        for _ in range(8):
            engine.step()
        engine.costs.decode, engine.costs.beside.per_token = {1: 1.0}, 0.045  # 4 prompt tokens lengthen a step by 0.2
        engine.costs.beside.tokens = 50.0
        engine.costs.observe = lambda *measured: None  # type: ignore[method-assign]
        long = engine.add(Request([2] * 100, greedy(1)))
        before = len(told)
        steps = 0
        while not long.finished:
            engine.step()
            steps += 1
        assert [each.num_tokens for each in list(engine.stats)[-steps:]] == [5] * 25
        assert len(told) == before + steps
        short = engine.add(Request([4] * 98, greedy(1)))
        engine.step()
        assert engine.stats[-1].num_tokens == 1 + 16  # 22 lengthen it by 1.0
        engine.abort(short)
        engine.abort(waited)
        hurried = engine.add(Request([3] * 100, greedy(1)))
        engine.finish([hurried])
        assert [each.num_tokens for each in list(engine.stats)[-2:]] == [64, 36]


@pytest.mark.parametrize(
    ("interactive", "lengths", "steps"),
    [
        (True, [4] * 4, [8, 8]),
        (False, [4] * 4, [16]),
        (True, [40, 4, 4], [32, 8, 8]),  # the rest of the first ends soon too
        (True, [20, 12], [32]),
    ],
)
def test_prompts_that_end_soon_do_not_wait_for_one_another(
    interactive: bool, lengths: list[int], steps: list[int]
) -> None:
    with labinfer.load(LLAMA, max_num_batched_tokens=32, max_num_seqs=4) as model:
        requests = [
            Request([first + 5] * length, greedy(1), interactive=interactive) for first, length in enumerate(lengths)
        ]
        for request in requests:
            model.engine.add(request)
        model.engine.finish(requests)
        assert [each.num_tokens for each in model.engine.stats] == steps


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (lambda remaining: remaining * 0, "no sequence would ever go on"),
        (lambda remaining: remaining + 1, "between 0 and what remains"),
        (lambda remaining: -remaining, "between 0 and what remains"),
        (lambda remaining: remaining, "more than the budget of 16"),
        (lambda remaining: remaining[:1], "whole numbers"),
        (lambda remaining: remaining.tolist(), "whole numbers"),
        (lambda remaining: remaining / 2, "whole numbers"),
    ],
)
def test_a_split_that_cannot_be_is_an_error_that_says_so(split: Any, said: str) -> None:
    class Wrong(Policy):
        def split(self, remaining: np.ndarray, budget: int, prompt_budget: int) -> np.ndarray:
            made: np.ndarray = split(remaining)
            return made

    with labinfer.load(LLAMA, max_num_batched_tokens=16, policy=Wrong()) as model:
        with pytest.raises(UsageError, match=said):
            model.generate(PROMPTS, greedy())
        model.blocks.check_integrity()
        assert not model.engine.scheduler.sequences


def test_a_request_that_is_done_is_freed_without_the_garbage_collector(model: LLM) -> None:
    made = []

    async def run() -> None:
        request = Request(PROMPTS[1], greedy(3, n=2))
        made.append(weakref.ref(request))
        await collected(model.engine.stream(request))
        left = Request(PROMPTS[2], greedy(200))
        made.append(weakref.ref(left))
        async with aclosing(model.engine.stream(left)) as outputs:
            await anext(outputs)

    gc.collect()
    gc.disable()
    try:
        asyncio.run(run())
        made.append(weakref.ref(model.engine.add(Request(PROMPTS[0], greedy(3)))))
        model.generate(PROMPTS, greedy(3))
        model.generate(PROMPTS[0], greedy(3))
        assert [each() for each in made] == [None, None, None]
    finally:
        gc.enable()


def test_the_more_prompts_wait_the_longer_steps_may_be() -> None:
    class Careful(Policy):
        short = 0

    with labinfer.load(LLAMA, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256) as model:
        engine = Engine(model, policy=Careful())
        engine.add(Request([1], greedy(60), interactive=True))
        engine.step()
        engine.costs.decode, engine.costs.beside.per_token = {1: 1.0}, 0.045
        engine.costs.beside.tokens = 100.0
        engine.costs.observe = lambda *measured: None  # type: ignore[method-assign]
        prompts = [engine.add(Request([number] * 100, greedy(1))) for number in range(2, 8)]
        engine.step()
        assert engine.stats[-1].num_tokens == 1 + 24  # 26 prompt tokens lengthen a step by 6 * 0.2
        for each in prompts[1:]:
            engine.abort(each)
        engine.step()
        assert engine.stats[-1].num_tokens == 1 + 4
