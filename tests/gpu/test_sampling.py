"""Tokens chosen on the GPU are those that the host chooses from the same logits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")  # the helpers of the CPU's tests

from labinfer import SamplingParams
from labinfer.backends.sampling import ALL_BANNED, NOT_A_NUMBER, RULE, Choices
from labinfer.runtime.manager import Manager
from labinfer.runtime.pipeline.device_engine import DeviceEngine
from labinfer.runtime.sampling import SamplingRules, SamplingState, sample
from tests.cpu.test_models import load
from tests.test_device_engine import KNOBS, PROMPTS
from tests.tiny import GOLDEN

LOGITS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "normal": lambda rng, x: x,
    "flat": lambda rng, x: x * np.float32(1e-3),
    "sharp": lambda rng, x: x * np.float32(8),
    "ties": lambda rng, x: np.round(x),
    "outlier": lambda rng, x: np.where(rng.random(x.shape) < 1e-3, np.float32(80), x),
    "banned": lambda rng, x: np.where(rng.random(x.shape) < 0.9, np.float32(-np.inf), x),
}


@pytest.mark.parametrize("vocabulary", [1, 33, 1025, 32_003, 128_256, 151_936])
@pytest.mark.parametrize("kind", LOGITS)
def test_tokens_are_the_hosts(gpu: Any, kind: str, vocabulary: int) -> None:
    """Twice each: the second time as a graph."""
    rng = np.random.default_rng(vocabulary)
    sampler = gpu.sampler(64, vocabulary)
    for rows in (1, 5, 64):
        logits = LOGITS[kind](rng, rng.standard_normal((rows, vocabulary), np.float32)).astype(np.float32)
        states, choices = cases(rng, rows, vocabulary)
        expected = hosts(logits, states)
        for run in range(2):
            made = sampler.choose(put(gpu, logits), choices)()
            wrong = (made != expected).nonzero()[0]
            for row in wrong.tolist():
                told = [float(logits[row, token]) for token in (made[row], expected[row]) if token >= 0]
                print(f"{kind} {vocabulary} x {rows}, run {run}, row {row}: {made[row]} for {expected[row]}, {told}")
                print(f"  {states[row].rules.params} {choices.rules[row]}")
            assert not len(wrong), f"{len(wrong)} of {rows} tokens are others"
    sampler.close()


def put(gpu: Any, logits: np.ndarray) -> Any:
    """Logits on the device, always at the same place for one shape, as the arena has them."""
    import cupy

    place = PLACES.setdefault(logits.shape, cupy.empty(logits.shape, np.float32))
    gpu.move_in(logits, place)
    return place


PLACES: dict[tuple[int, ...], Any] = {}


def cases(rng: np.random.Generator, rows: int, vocabulary: int) -> tuple[dict[int, SamplingState], Choices]:
    """States with parameters of all kinds, and the same as the device is told."""
    states, rules, spans = {}, np.zeros(rows, RULE), np.zeros((rows, 3), np.int32)
    tokens, numbers = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for row in range(rows):
        bias = {int(token): float(rng.choice([4, -3.3, -100])) for token in rng.integers(0, vocabulary, 4)}
        params = SamplingParams(
            temperature=float(rng.choice([0, 0.05, 0.6, 1, 2, 30])),
            top_k=int(rng.choice([0, 0, 1, 3, 50, 1000, 5000])),
            top_p=float(rng.choice([1, 1, 0.1, 0.5, 0.9, 0.999])), min_p=float(rng.choice([0, 0, 0, 0.02, 0.3, 1])),
            repetition_penalty=float(rng.choice([1, 1.3, 0.8])), frequency_penalty=float(rng.choice([0, 0.4])),
            presence_penalty=float(rng.choice([0, 0.5])), logit_bias=bias if row % 2 else None,
        )  # fmt: skip
        seed, (prompt, output) = int(rng.integers(1 << 63)) * 2 + 1, rng.integers(0, vocabulary, (2, 60)).tolist()
        state = states[row] = SamplingState(SamplingRules(params, vocabulary), seed, row % 3, prompt, output)
        floor = params.temperature * np.log(params.min_p) if params.min_p else -np.inf
        rules[row] = (
            params.temperature, params.top_p, floor, seed, row % 3, len(output), params.top_k, -1,
            params.repetition_penalty, params.frequency_penalty, params.presence_penalty, 0,
        )  # fmt: skip
        bias_ids, biases = state.rules.biases(len(output))
        ids, counts = state.counted
        spans[row] = np.cumsum([spans[row - 1, 2] if row else 0, len(bias_ids), len(ids)])
        tokens += [bias_ids, ids.astype(np.int32)]
        numbers += [biases.view(np.int32), counts]
    return states, Choices(rules, spans, np.concatenate(tokens), np.concatenate(numbers))


def hosts(logits: np.ndarray, states: dict[int, SamplingState]) -> np.ndarray:
    """The host's tokens, or the device's codes for errors."""
    made = sample(logits, states)
    for row, error in made.errors.items():
        made.tokens[row] = ALL_BANNED if error.code == "sampling.no-token" else NOT_A_NUMBER
    return made.tokens


def test_rows_without_numbers(gpu: Any) -> None:
    logits = np.random.default_rng(0).standard_normal((4, 5000), np.float32)
    logits[0, 7], logits[1], logits[2, 4999] = np.nan, -np.inf, np.inf
    rules = np.zeros(4, RULE)
    rules["temperature"], rules["top_p"], rules["repetition"], rules["source"] = 1, 1, 1, -1
    nothing = np.zeros(0, np.int32)
    sampler = gpu.sampler(4, 5000)
    made = sampler.choose(put(gpu, logits), Choices(rules, None, nothing, nothing))()
    sampler.close()
    assert made[:3].tolist() == [NOT_A_NUMBER, ALL_BANNED, NOT_A_NUMBER]
    assert 0 <= made[3] < 5000


def test_fed_tokens_and_fresh_penalties_are_those_of_the_last_step(gpu: Any) -> None:
    import cupy

    sampler, nothing = gpu.sampler(2, 100), np.zeros(0, np.int32)
    rules = np.zeros(2, RULE)
    rules["repetition"], rules["top_p"], rules["source"] = 1, 1, -1
    logits = np.zeros((2, 100), np.float32)
    logits[0, 41], logits[1, 17] = 1, 1
    assert sampler.choose(put(gpu, logits), Choices(rules, None, nothing, nothing))().tolist() == [41, 17]
    ids = cupy.asarray(np.array([5, -2, -1, 9, -1], np.int32))
    sampler.feed(ids, gpu)
    assert gpu.move_out(ids).tolist() == [5, 17, 41, 9, 41]
    rules["presence"], rules["source"] = 2, [1, 0]
    spans = np.array([[0, 0, 1], [1, 1, 1]], np.int32)
    listed = np.array([17], np.int32), np.array([3], np.int32)
    logits[:] = 0
    logits[0, [17, 41]], logits[1, [17, 41]] = [1, 0.5], [0.5, 1]
    assert sampler.choose(put(gpu, logits), Choices(rules, spans, *listed))().tolist() == [41, 17]
    sampler.close()


def answers(manager: Manager, model: Path, knobs: list[dict[str, Any]], **options: Any) -> list[list[list[int]]]:
    params = [SamplingParams(max_tokens=12, **{"seed": 7, "ignore_eos": True} | each) for each in knobs]
    with load(model, "cuda", manager=manager, **options) as llm:
        results = llm.generate(PROMPTS[: len(knobs)], params)
        assert isinstance(llm.engine, DeviceEngine) == (os.environ.get("LABINFER_OVERLAP") != "0")
        assert llm.blocks.usage == 0
    return [[list(answer.token_ids) for answer in result.outputs] for result in results]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: "-".join(knobs))
def test_answers_are_those_of_the_hosts_engine(
    manager: Manager, in_float32: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any]
) -> None:
    model = in_float32(GOLDEN / "llama-llama3")
    made = answers(manager, model, [knobs] * 5)
    monkeypatch.setenv("LABINFER_OVERLAP", "0")
    assert made == answers(manager, model, [knobs] * 5)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 24, "max_num_seqs": 12}], ids=str)
def test_answers_of_all_kinds_together(
    manager: Manager, in_float32: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    """More sequences than the kernels for few tokens take, so that steps are filled up."""
    model = in_float32(GOLDEN / "llama-llama3")
    made = answers(manager, model, KNOBS, **options)
    monkeypatch.setenv("LABINFER_OVERLAP", "0")
    assert made == answers(manager, model, KNOBS, **options)
