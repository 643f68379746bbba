"""Several decode steps in one call: the tokens are those of steps one by one, whatever ends, comes or is in the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import labinfer
from labinfer import SamplingParams
from labinfer.backends.cpu.device import CpuDevice
from labinfer.backends.cpu.greedy import GreedyDecode
from labinfer.llm import LLM
from labinfer.ops.base import Step
from labinfer.runtime import multi_step
from labinfer.runtime.engine import Engine
from labinfer.runtime.outputs import RequestOutputKind
from labinfer.runtime.request import Request

from ..tiny import GOLDEN

NAMES = (
    "llama-llama3", "llama-dynamic_crossed", "gemma3_text-linear_global", "mixtral-window", "deepseek_v2-group_limited",
    "phi3-longrope_crossed",
)  # fmt: skip
PROMPTS = [[5], [1, 2, 3], list(range(40)), [9] * 17, [7, 8] * 11]
LENGTHS = [50, 33, 17, 61, 40]


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": count, "ignore_eos": True, **options})


def loaded(name: str = NAMES[0], **options: Any) -> LLM:
    return labinfer.load(GOLDEN / name, devices="cpu", **{"max_model_len": 128, "max_num_seqs": 8, **options})


def answers(llm: LLM, params: list[SamplingParams], prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """Those of a new engine to all prompts at once; it leaves nothing behind."""
    engine = Engine(llm, seed=0)
    requests = [engine.add(Request(prompt, each)) for prompt, each in zip(prompts, params, strict=True)]
    engine.finish(requests)
    assert llm.blocks.usage == 0
    llm.blocks.check_integrity()
    assert engine.num_tokens >= sum(len(request.generated) for request in requests)
    return [request.generated for request in requests]


def most_steps(engine: Engine) -> int:
    return max(each.num_steps for each in engine.stats)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with loaded() as model:
        yield model


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, several steps are run."""
    monkeypatch.setattr(multi_step, "SECONDS", 60.0)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """Answers without multi-step scheduling."""

    def run(*args: Any) -> list[list[int]]:
        with monkeypatch.context() as patch:
            patch.setenv("LABINFER_MULTI_STEP", "0")
            return answers(*args)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_each_family_alone_and_together(name: str, one_by_one: Callable[..., list[list[int]]]) -> None:
    with loaded(name) as model:
        params = [greedy(count) for count in LENGTHS]
        expected = [one_by_one(model, [each], [prompt])[0] for prompt, each in zip(PROMPTS, params, strict=True)]
        assert [len(each) for each in expected] == LENGTHS
        assert answers(model, params) == expected
        assert [answers(model, [each], [prompt])[0] for prompt, each in zip(PROMPTS, params, strict=True)] == expected


@pytest.mark.parametrize("options", [{"block_size": 64}, {"num_blocks": 14}, {"max_num_seqs": 2}, {"kv_dtype": "bf16"}])
def test_blocks_that_run_out_and_sequences_that_wait(
    options: dict[str, Any], one_by_one: Callable[..., list[list[int]]]
) -> None:
    with loaded(**options) as model:
        params = [greedy(count) for count in LENGTHS]
        assert answers(model, params) == one_by_one(model, params)


def test_sampled_and_penalized_company(llm: LLM, one_by_one: Callable[..., list[list[int]]]) -> None:
    others: list[dict[str, Any]] = [
        {}, {"temperature": 0.9, "seed": 3}, {"repetition_penalty": 1.3}, {"logprobs": 2}, {"n": 2},
    ]  # fmt: skip
    params = [greedy(count, **other) for count, other in zip(LENGTHS, others, strict=True)]
    assert answers(llm, params) == one_by_one(llm, params)


def test_tokens_after_a_stop_are_dropped(llm: LLM, one_by_one: Callable[..., list[list[int]]]) -> None:
    full = one_by_one(llm, [greedy(count) for count in LENGTHS])
    for at in range(1, 17):  # any step of a call
        params = [greedy(count, stop_token_ids=[each[at]]) for count, each in zip(LENGTHS, full, strict=True)]
        assert answers(llm, params) == [each[: each.index(each[at]) + 1] for each in full]


def test_the_end_of_a_text(llm: LLM) -> None:
    [full] = answers(llm, [greedy(50)], [[1, 2, 3]])
    for token in set(full):
        engine = Engine(llm, {token})
        requests = [
            engine.add(Request(prompt, greedy(50, ignore_eos=no))) for prompt in PROMPTS for no in (False, True)
        ]
        engine.finish(requests)
        made = requests[2]
        assert made.generated == full[: full.index(token) + 1]
        assert made.sequences[0].finish_reason == "stop"
        assert requests[3].generated == full
        assert llm.blocks.usage == 0
        llm.blocks.check_integrity()


def test_steps_that_are_run(llm: LLM) -> None:
    """Calls follow one another where nobody listens, and only eight steps are run where somebody does."""
    engine = Engine(llm)
    engine.finish([engine.add(Request([1, 2, 3], greedy(100)))])
    assert most_steps(engine) == multi_step.STEPS * multi_step.CALLS
    assert sum(each.num_steps for each in engine.stats) == 100
    heard = Engine(llm)
    tokens: list[list[int]] = []
    heard.finish(
        [heard.add(Request([1, 2, 3], greedy(100), listener=lambda sequence: tokens.append(list(sequence.told))))]
    )
    assert most_steps(heard) == multi_step.STEPS
    assert [len(each) for each in tokens] == list(range(1, 101))  # each token is told by itself


def test_whoever_comes_ends_the_calls(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, others = Engine(llm), list[Request]()
    decode = llm.decode

    def decode_and_submit(*args: Any) -> Iterator[np.ndarray]:
        for number, made in enumerate(decode(*args)):
            if number == 1 and not others:
                others.append(Request([4, 5], greedy(9)))
                engine.check(others[0])
                engine.submit(lambda: engine.queue(others[0]))
            yield made

    expected = answers(llm, [greedy(100), greedy(9)], [[1, 2, 3], [4, 5]])
    monkeypatch.setattr(llm, "decode", decode_and_submit)
    first = engine.add(Request([1, 2, 3], greedy(100)))
    engine.finish([first])
    assert [first.generated, others[0].generated] == expected
    assert 2 * multi_step.STEPS in {each.num_steps for each in engine.stats}
    assert llm.blocks.usage == 0


def test_aborted_in_between(llm: LLM) -> None:
    [full] = answers(llm, [greedy(100)], [[1, 2, 3]])
    engine = Engine(llm)
    request = engine.add(Request([1, 2, 3], greedy(100)))
    for _ in range(4):
        engine.step()
    engine.abort(request)
    engine.finish([request])
    assert 1 < len(request.generated) < 100
    assert request.generated == full[: len(request.generated)]
    assert llm.blocks.usage == 0


def test_streams_have_every_token(llm: LLM) -> None:
    expected = answers(llm, [greedy(count) for count in LENGTHS])

    async def run(prompt: list[int], count: int) -> list[int]:
        outputs = engine.stream(Request(prompt, greedy(count)), RequestOutputKind.DELTA)
        return [token async for output in outputs for token in output.token_ids]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*map(run, PROMPTS, LENGTHS))

    engine = Engine(llm)
    try:
        assert asyncio.run(all_of_them()) == expected
    finally:
        engine.close()


def test_listeners_and_captures_see_every_step(llm: LLM) -> None:
    engine, seen = Engine(llm), list[int]()
    with llm.listen(llm.interpreters[0].stage.outputs[-1], lambda array: seen.append(len(array))):
        engine.finish([engine.add(Request([1, 2, 3], greedy(20)))])
    assert len(seen) == 20
    assert most_steps(engine) == 1


def test_an_error_leaves_nothing_counted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    [full] = answers(llm, [greedy(60)], [[1, 2, 3]])
    engine = Engine(llm)
    request = engine.add(Request([1, 2, 3], greedy(60)))
    for _ in range(3):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(llm.interpreters[0], "greedy", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.finish([request])
    assert request.generated == full


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_of_the_greatest_logits(threads: int) -> None:
    """As numpy chooses, with ties, infinities and numbers that are none; and what leads on to the next step."""
    device, random = CpuDevice("cpu", threads=threads), np.random.default_rng(0)
    for vocab in (1, 15, 16, 17, 96, 1000):
        logits = np.ascontiguousarray(random.integers(-3, 4, (6, vocab)).astype(np.float32))
        logits[1] = -np.inf
        logits[2, vocab // 2] = np.nan
        logits[3, -1] = np.inf
        logits[4] = -random.random(vocab)
        table = random.permutation(6 * 5).reshape(6, 5).astype(np.int32)
        numbers = [np.arange(6, dtype=np.int32) + start for start in (0, 29, 30, 31, 0)]
        tokens, positions, context, total, slots = numbers
        rows = np.arange(7, dtype=np.int32)
        step = Step(tokens, positions, rows, context, total, table, slots, rows[:6], block_size=16)
        made = GreedyDecode(device, [], logits, [step]).run(3, 6)
        best = logits.argmax(1)
        chosen = np.where(np.isfinite(logits[np.arange(6), best]), best, -1)
        assert (made == chosen).all()
        assert (tokens == chosen).all()
        assert (positions == np.arange(6) + 32).all()
        assert (context == positions + 1).all()
        assert (total == positions + 2).all()
        assert (slots == table[np.arange(6), positions // 16] * 16 + positions % 16).all()
    device.close()


def test_logits_that_are_no_numbers(llm: LLM) -> None:
    engine = Engine(llm)
    request, other = (engine.add(Request(prompt, greedy(60))) for prompt in ([1, 2, 3], [4, 5, 6]))
    engine.step()
    values = next(iter(llm.cache.arrays[0].parts.values()))["v"]
    [[[block]]] = llm.blocks.block_tables(np.array([request.sequences[0].row]), 1)
    values[16 * block : 16 * block + 16] = np.nan
    engine.finish([request, other])
    assert request.error is not None
    assert request.error.code == "run.not-a-number"
    assert other.error is None
    assert len(other.generated) == 60
    assert llm.blocks.usage == 0
    llm.blocks.check_integrity()
