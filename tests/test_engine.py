"""The engine: small budgets, sampling, ends of generation, wrong prompts, and nothing held afterwards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import labinfer
from labinfer import SamplingParams
from labinfer.errors import LabinferError, UsageError
from labinfer.llm import LLM
from labinfer.runtime.engine import Engine
from labinfer.runtime.request import Request

from .hf.agreement import assert_agree
from .tiny import GOLDEN, tiny_checkpoint, tiny_map

LLAMA = GOLDEN / "llama-llama3"
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = [[5], [1, 2, 3], list(range(40)), [9] * 17, [7, 8], list(range(30, 50)), [95] * 33]


def open_model(**options: Any) -> LLM:
    return labinfer.load(LLAMA, **options)


def tokens(model: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [result.token_ids for result in model.generate(prompts, params)]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    with open_model() as model:
        return [tokens(model, [prompt], GREEDY)[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 3, "max_num_seqs": 3},
        {"max_logits_rows": 1},
        {"max_num_batched_tokens": 5, "max_logits_rows": 2},
        {"max_num_seqs": 1},
        {"num_blocks": 4},  # only one long sequence at a time
        {"num_blocks": 4, "max_num_batched_tokens": 3, "max_logits_rows": 1, "max_num_seqs": 2},
        {"block_size": 1, "num_blocks": 60},
        {"block_size": 7},
        {"block_size": 300},
    ],
    ids=str,
)
def test_small_budgets_change_no_token(alone: list[list[int]], options: dict[str, int]) -> None:
    with open_model(**options) as model:
        assert tokens(model, PROMPTS, GREEDY) == alone
        assert model.blocks.usage == 0
        model.blocks.check_integrity()


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    budget=st.integers(1, 9),
    rows=st.integers(1, 4),
    sequences=st.integers(1, 5),
    blocks=st.integers(2, 9),
)
def test_any_budget_gives_the_tokens_of_each_alone(
    lengths: list[int], budget: int, rows: int, sequences: int, blocks: int
) -> None:
    prompts = [list(range(length)) for length in lengths]
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with open_model() as model:
        expected = [tokens(model, [prompt], params)[0] for prompt in prompts]
    limits = {"max_num_batched_tokens": budget, "max_logits_rows": rows, "max_num_seqs": sequences}
    with open_model(num_blocks=blocks, **limits) as model:
        assert tokens(model, prompts, params) == expected


def test_a_seeded_request_is_the_same_alone_and_in_company() -> None:
    params = SamplingParams(temperature=1.5, top_k=40, top_p=0.95, max_tokens=12, seed=11, ignore_eos=True)
    with open_model() as model:
        alone = [tokens(model, [prompt], params)[0] for prompt in PROMPTS]
        assert tokens(model, PROMPTS, params) == alone
    with open_model(max_num_batched_tokens=3, max_num_seqs=2) as model:
        assert tokens(model, PROMPTS, params) == alone
    assert len({tuple(made) for made in alone}) > 3


def test_seeds_differ_and_none_is_not_a_seed() -> None:
    with open_model() as model:

        def run(seed: int | None) -> tuple[int, ...]:
            params = SamplingParams(temperature=2.0, max_tokens=12, seed=seed, ignore_eos=True)
            return tuple(tokens(model, [[1, 2]], params)[0])

        assert run(1) == run(1)
        assert len({run(seed) for seed in range(5)}) > 3
        assert len({run(None) for _ in range(5)}) > 3


def test_not_a_number_inside_the_model_ends_the_run_and_frees_the_cache() -> None:
    with open_model() as model:
        with (
            model.listen("layers.1.attn.out", lambda array: array * np.float32(np.nan)),
            pytest.raises(LabinferError) as caught,
        ):
            model.generate(PROMPTS, GREEDY)
        assert caught.value.code == "run.not-a-number"
        assert model.blocks.usage == 0
        model.blocks.check_integrity()
        assert len(tokens(model, [[1, 2]], GREEDY)[0]) == 10


def test_ends_of_generation(alone: list[list[int]]) -> None:
    first = alone[1]
    with open_model() as model:
        stop = first[3]
        cut = first.index(stop) + 1
        params = SamplingParams(temperature=0, max_tokens=10, stop_token_ids=[stop], ignore_eos=True)
        [result] = model.generate([PROMPTS[1]], params)
        assert (result.token_ids, result.finish_reason) == (first[:cut], "stop")
        [result] = model.generate([PROMPTS[1]], GREEDY)
        assert (result.token_ids, result.finish_reason) == (first, "length")
        engine = Engine(model, eos_ids=[stop])
        seen: list[tuple[int, str | None]] = []
        listener = lambda sequence: seen.append((len(sequence.generated), sequence.finish_reason))  # noqa: E731
        params = SamplingParams(temperature=0, max_tokens=10)
        stopped = engine.add(Request(PROMPTS[1], params, listener=listener))
        ignoring = engine.add(Request(PROMPTS[1], GREEDY))
        assert list(engine.run()) == [stopped, ignoring]
        assert (stopped.generated, stopped.sequences[0].finish_reason) == (first[:cut], "stop")
        assert (ignoring.generated, ignoring.sequences[0].finish_reason) == (first, "length")
        assert seen == [(number, None) for number in range(1, cut)] + [(cut, "stop")]


def test_knobs_hold_for_each_request_alone_and_in_company() -> None:
    knobs: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "min_p": 0.02, "logit_bias": {3: 2.0}}
    params = SamplingParams(temperature=1.2, seed=4, max_tokens=12, min_tokens=12, **knobs)
    with open_model() as model:
        alone = [tokens(model, [prompt], params)[0] for prompt in PROMPTS]
        assert tokens(model, PROMPTS, params) == alone
        few = SamplingParams(temperature=1.5, allowed_token_ids=[7, 9], max_tokens=30, ignore_eos=True)
        assert {token for made in tokens(model, PROMPTS, few) for token in made} == {7, 9}
        biased = SamplingParams(temperature=0, logit_bias={5: 100}, max_tokens=3, ignore_eos=True)
        assert tokens(model, [[1]], biased) == [[5, 5, 5]]


def test_stop_strings_cut_the_text_and_not_what_is_streamed(tiny_model: Path) -> None:
    with labinfer.load(tiny_model) as model:
        greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
        [whole] = model.generate("w10 w11 w12", SamplingParams(**greedy))
        stop = " ".join(whole.text.split()[4:6])
        cut = whole.text.index(stop)
        said: list[str] = []
        params = SamplingParams(**greedy, stop=["never", stop])
        [result] = model.generate("w10 w11 w12", params, lambda index, text: said.append(text))
        assert (result.text, result.finish_reason) == (whole.text[:cut], "stop")
        assert "".join(said) == result.text
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
        assert 2 <= len(result.token_ids) < 20
        kept = SamplingParams(**greedy, stop=stop, include_stop_str_in_output=True)
        assert model.generate("w10 w11 w12", kept)[0].text == whole.text[: cut + len(stop)]
        silent = SamplingParams(**greedy, detokenize=False)
        assert (model.generate("w10 w11 w12", silent)[0].text, model.blocks.usage) == ("", 0)


def test_structured_output_of_a_model(tiny_model: Path) -> None:
    pytest.importorskip("llguidance")
    with labinfer.load(tiny_model) as model:
        for seed in range(5):
            form = {"regex": "( w1[0-9]){2,5} w20"}
            params = SamplingParams(temperature=2, seed=seed, max_tokens=None, structured_outputs=form)
            [result] = model.generate("w10", params)
            assert re.fullmatch(form["regex"], result.text)
            assert result.finish_reason == "stop"


def test_generation_stops_at_the_longest_sequence() -> None:
    with open_model(max_model_len=20) as model:
        [result] = model.generate([[1] * 15], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        assert (len(result.token_ids), result.finish_reason) == (5, "length")
        [endless] = model.generate([[1] * 15], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
        assert (endless.token_ids, endless.finish_reason) == (result.token_ids, "length")
        assert len(tokens(model, [[1] * 19], GREEDY)[0]) == 1
        assert model.logits([1] * 20).shape == (20, 96)
        for call in (lambda: model.generate([[1] * 20], GREEDY), lambda: model.logits([1] * 21)):
            with pytest.raises(UsageError) as caught:
                call()
            assert caught.value.code == "run.too-long"
        assert model.blocks.usage == 0
        model.blocks.check_integrity()


@pytest.mark.parametrize(
    ("prompts", "code"),
    [
        ([[]], "run.empty-prompt"),
        ([[1], []], "run.empty-prompt"),
        ([[1, 96]], "run.token-id"),
        ([[-1]], "run.token-id"),
        ([[2**70]], "run.token-id"),
        ("text", "run.no-tokenizer"),
        (["text", [1]], "run.no-tokenizer"),
        ([[1.5]], "run.token-id"),
        ([["a"]], "run.token-id"),
        ([[None]], "run.token-id"),
        ([None], "run.token-id"),
        (7, "run.prompt"),
        ([[1], 2], "run.token-id"),
        ([1, [2]], "run.token-id"),
        (None, "run.prompt"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_run(prompts: Any, code: str) -> None:
    with open_model() as model:
        with pytest.raises(UsageError) as caught:
            model.generate(prompts, GREEDY)
        assert caught.value.code == code
        assert model.blocks.usage == 0
        model.blocks.check_integrity()


def test_prompts_in_every_form(alone: list[list[int]]) -> None:
    with open_model() as model:
        assert model.generate([], GREEDY) == []
        ids = [1, 2, 3]
        forms: list[Any] = [
            ids,
            tuple(ids),
            np.array(ids),
            [np.int32(1), np.int64(2), 3],
            [ids],
            np.array([ids]),
            iter(ids),
        ]
        for form in forms:
            assert tokens(model, form, GREEDY) == [alone[1]]


@pytest.mark.parametrize(
    "option",
    [{"max_num_batched_tokens": "8"}, {"max_num_batched_tokens": None}, {"max_num_batched_tokens": 0},
     {"max_model_len": 8.5}, {"num_blocks": "many"}, {"threads": "4"},
     {"arena_effort_seconds": "1"}],
    ids=str,
)  # fmt: skip
def test_wrong_limits_name_the_option(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        open_model(**option)
    assert caught.value.code == "limits.range"
    assert caught.value.message.startswith(next(iter(option)))


def test_a_failing_callback_leaves_nothing_behind(alone: list[list[int]]) -> None:
    with open_model() as model:
        engine = Engine(model)
        for prompt in PROMPTS:
            engine.add(Request(prompt, GREEDY))
        engine.step()
        assert model.blocks.usage > 0
        engine.abort_all()
        assert model.blocks.usage == 0
        model.blocks.check_integrity()

        def fail(array: np.ndarray) -> None:
            raise KeyboardInterrupt

        with model.listen("logits", fail), pytest.raises(KeyboardInterrupt):
            model.generate(PROMPTS, GREEDY)
        assert model.blocks.usage == 0
        model.blocks.check_integrity()
        assert tokens(model, PROMPTS, GREEDY) == alone


def test_sessions_and_generation_share_the_cache() -> None:
    with open_model(num_blocks=4) as model:
        whole = model.logits(list(range(40)))
        with model.session() as session:
            session.append(list(range(20)))  # two of the four blocks
            with pytest.raises(LabinferError) as caught:
                model.generate([list(range(40))], GREEDY)
            assert caught.value.code == "run.cache-full"
            with model.session() as other, pytest.raises(UsageError) as full:
                other.append(list(range(40)))
            assert full.value.code == "run.cache-full"
            assert len(tokens(model, [[1, 2]], GREEDY)[0]) == 10
            assert_agree(session.append(list(range(20, 40))), whole[20:], "after the others")
        assert model.blocks.usage == 0


def test_a_refused_append_changes_nothing() -> None:
    with open_model(num_blocks=4) as model, model.session() as one, model.session() as two:
        one.append([1] * 33)
        two.append([2] * 3)
        with pytest.raises(UsageError):
            two.append([3] * 20)
        expected = open_model().logits([2, 2, 2, 4])
        assert_agree(two.append([4]), expected[3:], "after a refused append")
        assert two.append([]).shape == (0, 96)


def test_a_closed_model_says_so() -> None:
    model = open_model()
    model.close()
    model.close()
    for call in (lambda: model.logits([1]), lambda: model.generate([[1]], GREEDY)):
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.code == "run.closed"


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_crossing_the_original_length_recomputes_the_cache(budget: int) -> None:
    folder = GOLDEN / "phi3-longrope_crossed"
    with np.load(folder / "expected.npz") as expected:
        prompt, generated = expected["prompt"].tolist(), expected["generated"].tolist()
        step_logits = expected["step_logits"]
    with labinfer.load(folder, max_num_batched_tokens=budget) as model:
        crossing = model.plan.recompute_after
        assert crossing is not None
        assert len(prompt) <= crossing < len(prompt) + len(step_logits)
        with model.session() as session:
            session.append(prompt)
            for step, (token, row) in enumerate(zip(generated, step_logits, strict=False)):
                assert_agree(session.append([token]), row[np.newaxis], f"step {step}")
        params = SamplingParams(temperature=0, max_tokens=len(step_logits), ignore_eos=True)
        others = [[3] * 5, list(range(20))]
        assert tokens(model, [others[0], prompt, others[1]], params)[1] == generated[: len(step_logits)]


def test_an_unshipped_family_runs_too(tmp_path: Path) -> None:
    path = tiny_map(tmp_path)
    plan = labinfer.compile(path, weights=tiny_checkpoint(tmp_path / "model"), max_num_batched_tokens=3)
    with labinfer.load(plan) as model:
        assert len(tokens(model, [[1, 2, 3, 4, 5], [7]], GREEDY)[0]) == 10
