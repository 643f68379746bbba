"""Speculation: the same tokens as without, whatever is guessed, and nothing of wrong guesses left in the cache."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import labinfer
from labinfer import SamplingParams
from labinfer.errors import UsageError
from labinfer.llm import LLM
from labinfer.runtime.manager import Manager
from labinfer.runtime.outputs import RequestOutput
from labinfer.runtime.request import Request
from labinfer.runtime.request import Sequence as RunningSequence
from labinfer.runtime.speculation import PromptLookup, SpeculationCounters, SpeculativeConfig
from labinfer.runtime.speculation.draft_model import DraftModel
from labinfer.runtime.speculation.payoff import FIRST, LONGEST, SHORTEST, WINDOW, Payoff

from .tiny import GOLDEN

LLAMA = GOLDEN / "llama-llama3"
PROMPTS = [[5], [1, 2, 3], list(range(40)), [9] * 17, [7, 8], list(range(30, 50)), [95] * 33, [4, 5] * 9]
NGRAM = {"prompt_lookup_min": 1, "num_speculative_tokens": 3}
SELF = {"model": LLAMA, "num_speculative_tokens": 3}
OTHER = {"model": GOLDEN / "llama-biases", "num_speculative_tokens": 5}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
KNOBS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=0.7, seed=3, max_tokens=16, ignore_eos=True, logprobs=2),
    "hot": SamplingParams(temperature=1.5, seed=8, top_k=30, top_p=0.9, min_p=0.01, max_tokens=16, n=2),
    "penalties": SamplingParams(
        temperature=0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, max_tokens=16, logprobs=0
    ),
    "ends": SamplingParams(
        temperature=0.9, seed=5, min_tokens=6, max_tokens=13, stop_token_ids=[*range(0, 96, 7)], logit_bias={3: 2.0}
    ),
    "prompt": SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=1),
}


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess in every step, whether it pays or not."""
    monkeypatch.setenv("LABINFER_SPECULATION", "1")


def answers(model: LLM, prompts: list[list[int]], params: SamplingParams) -> list[Any]:
    """All that is told of the answers to ``prompts``."""
    return [told(result) for result in model.generate(prompts, params)]


def told(result: RequestOutput) -> list[Any]:
    """All that is told of the answers to a prompt, in a form that ``==`` compares; log-probabilities approximately."""
    found: list[Any] = [comparable(result.prompt_logprobs)]
    for answer in result.outputs:
        found += [answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason, comparable(answer.logprobs)]
    return found


def comparable(logprobs: Any) -> Any:
    """Tokens and ranks, and log-probabilities to 1e-4."""
    return logprobs and [
        each and [(token, of.rank, pytest.approx(of.logprob, abs=1e-4)) for token, of in each.items()]
        for each in logprobs
    ]


def counted(model: LLM) -> SpeculationCounters:
    assert model.engine.speculation is not None
    return model.engine.speculation.counted


def check_books(model: LLM) -> None:
    """Nobody owns a block, and all blocks are accounted for, the draft's too."""
    for each in [model, *([model.proposer.model] if isinstance(model.proposer, DraftModel) else [])]:
        assert each.blocks.usage == 0
        each.blocks.check_integrity()


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with labinfer.load(LLAMA) as model:
        yield model


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("config", [NGRAM, SELF, OTHER], ids=["ngram", "itself", "another"])
def test_the_tokens_are_those_without_speculation(plain: LLM, config: dict[str, Any], knobs: str) -> None:
    params = KNOBS[knobs]
    expected = answers(plain, PROMPTS, params)
    with labinfer.load(LLAMA, speculative_config=config) as model:
        assert answers(model, PROMPTS, params) == expected
        check_books(model)
        assert [answers(model, [prompt], params)[0] for prompt in PROMPTS[1:4]] == expected[1:4]
        check_books(model)
        assert counted(model).proposed > 0


@pytest.mark.parametrize("config", [NGRAM, SELF, OTHER], ids=["ngram", "itself", "another"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 3, "max_num_seqs": 3},
        {"max_logits_rows": 2},
        {"max_logits_rows": 5, "max_num_batched_tokens": 7},
        {"num_blocks": 16, "block_size": 4, "max_model_len": 60},
        {"num_blocks": 16, "block_size": 4, "max_model_len": 60, "swap_space": 1e-3},
        {"block_size": 1, "num_blocks": 61, "max_model_len": 60},
    ],
    ids=str,
)
def test_small_budgets_change_no_token(plain: LLM, config: dict[str, Any], options: dict[str, Any]) -> None:
    expected = answers(plain, PROMPTS, GREEDY)
    with labinfer.load(LLAMA, speculative_config=config, **options) as model:
        assert answers(model, PROMPTS, GREEDY) == expected
        check_books(model)
        if "num_blocks" in options:
            assert model.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize(
    "family",
    ["mistral-window", "gemma3_text-linear_global", "phi3-longrope_crossed", "llama-dynamic_crossed",
     "deepseek_v2-group_limited", "mixtral-window"],
)  # fmt: skip
@pytest.mark.parametrize("own_draft", [False, True], ids=["ngram", "itself"])
def test_windows_and_lengths_that_change_keys(family: str, own_draft: bool) -> None:
    config = SELF | {"model": GOLDEN / family} if own_draft else NGRAM
    prompts = [*PROMPTS, [3] * 14, list(range(20))]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    limits = {"block_size": 4, "max_model_len": 90}
    with labinfer.load(GOLDEN / family, **limits) as model:
        expected = answers(model, prompts, params)
    with labinfer.load(GOLDEN / family, speculative_config=config, **limits) as model:
        assert answers(model, prompts, params) == expected
        check_books(model)
        assert counted(model).accepted > 0


def test_a_draft_that_is_the_model_is_always_right_and_another_seldom() -> None:
    for params in (GREEDY, KNOBS["sampled"], KNOBS["penalties"]):
        with labinfer.load(LLAMA, speculative_config=SELF) as model:
            model.generate(PROMPTS, params)
            found = counted(model)
            assert found.accepted == found.proposed > 80
            assert found.mean_accepted_length == 1 + found.accepted / found.drafts > 3
            steps = model.engine.stats
            assert sum(step.num_proposed for step in steps) == found.proposed
            assert sum(step.num_accepted for step in steps) == found.accepted
            assert sum(step.num_prompt_tokens for step in steps) == sum(map(len, PROMPTS)) - 1  # one is a single token
    with labinfer.load(LLAMA, speculative_config=OTHER) as model:
        model.generate(PROMPTS, GREEDY)
        assert counted(model).accepted < counted(model).proposed / 5


def test_steps_without_guesses_accept_none() -> None:
    with labinfer.load(LLAMA, speculative_config=SELF, max_num_batched_tokens=6) as model:
        engine = model.engine
        requests = [engine.add(Request([1, 2, 3], GREEDY))]
        while not counted(model).accepted:
            engine.step()
        requests.append(engine.add(Request([7] * 40, GREEDY)))
        engine.finish(requests)
        assert any(step.num_prompt_tokens and not step.num_proposed for step in engine.stats)
        assert sum(step.num_accepted for step in engine.stats) == counted(model).accepted


def test_wrong_guesses_leave_nothing_in_the_draft() -> None:
    class Checked(DraftModel):
        checked = 0

        def propose(self, sequences: Sequence[RunningSequence], most: Sequence[int]) -> list[np.ndarray]:
            guesses = [tokens.copy() for tokens in super().propose(sequences, most)]
            assert model.engine.speculation is not None
            payoff = model.engine.speculation.payoff
            payoff.always, payoff.pause = False, self.checked % 3  # some steps go without guesses
            for sequence, tokens in zip(sequences, guesses, strict=True):
                text = [*sequence.token_ids.tolist(), *tokens.tolist()]
                if len(tokens):
                    self.checked += 1
                    assert self.model.logits(text)[-len(tokens) - 1 : -1].argmax(1).tolist() == tokens.tolist()
            return guesses

    with labinfer.load(LLAMA) as model:
        model.proposer = draft = Checked(labinfer.load(OTHER["model"], block_size=4), 5)
        model.generate(PROMPTS, GREEDY)
        assert draft.checked > 50
        assert counted(model).accepted < counted(model).proposed
        check_books(model)


def test_fewer_steps_are_made() -> None:
    steps = {}
    for config in (None, SELF):
        with labinfer.load(LLAMA, speculative_config=config) as model:
            model.generate([PROMPTS[1]], SamplingParams(temperature=0, max_tokens=33, ignore_eos=True))
            steps[config is None] = len(model.engine.stats)
    assert steps == {True: 33, False: 9}  # the prompt, then eight times one token and three guesses


def test_stop_strings_and_what_is_streamed(tiny_model: Path) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    prompt = "w10 w11 w12"
    with labinfer.load(tiny_model) as model:
        [whole] = model.generate(prompt, SamplingParams(**greedy))
        words = whole.text.split()
        stops = [" ".join(words[at : at + 2]) for at in range(1, 15)]
        wanted = [SamplingParams(**greedy, stop=stop) for stop in stops]
        expected = [told(model.generate(prompt, params)[0]) for params in wanted]
    with labinfer.load(tiny_model, speculative_config={"model": tiny_model}) as model:
        for params, those in zip(wanted, expected, strict=True):
            said: list[tuple[int, str]] = []
            [result] = model.generate(prompt, params, lambda *piece, said=said: said.append(piece))
            assert told(result) == those
            assert "".join(text for _, text in said) == result.text
            check_books(model)
        assert counted(model).accepted > 0


def test_structured_output(tiny_model: Path) -> None:
    pytest.importorskip("llguidance")
    form = {"regex": "( w1[0-9]){2,9} w20"}
    wanted = [SamplingParams(temperature=2, seed=seed, max_tokens=30, structured_outputs=form) for seed in range(6)]
    with labinfer.load(tiny_model) as model:
        expected = [told(result) for result in model.generate(["w10"] * 6, wanted)]
    for config in ({"model": tiny_model}, NGRAM):
        with labinfer.load(tiny_model, speculative_config=config) as model:
            results = model.generate(["w10"] * 6, wanted)
            assert [told(result) for result in results] == expected
            assert all(re.fullmatch(form["regex"], result.text) for result in results)
            wrong = counted(model).proposed - counted(model).accepted
            assert "model" not in config or wrong <= 6 < counted(model).accepted  # an end is not counted as a guess
            check_books(model)


def test_logits_processors_see_the_tokens_that_were_made() -> None:
    seen: list[tuple[int, ...]] = []

    def processor(output: Sequence[int], logits: np.ndarray) -> np.ndarray:
        seen.append(tuple(output))
        return np.roll(logits, len(output))

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logits_processors=[processor])
    with labinfer.load(LLAMA) as model:
        expected = answers(model, [PROMPTS[3]], params)
    before = list(seen)
    seen.clear()
    with labinfer.load(LLAMA, speculative_config=NGRAM) as model:
        assert answers(model, [PROMPTS[3]], params) == expected
    assert seen == before


def test_what_is_captured_is_of_the_tokens_that_were_made() -> None:
    from labinfer.runtime.generate import generate

    captured = []
    for config in (None, NGRAM):
        with labinfer.load(LLAMA, speculative_config=config) as model:
            [result] = generate(model, [PROMPTS[3]], GREEDY, capture=["layers.1.attn.out"])
            captured.append(result.outputs[0].captured["layers.1.attn.out"])
    assert captured[0].shape == captured[1].shape
    np.testing.assert_allclose(captured[1], captured[0], atol=1e-5)


def test_streamed_answers_are_the_same(plain: LLM) -> None:
    async def streamed(model: LLM, prompt: list[int]) -> list[int]:
        made: list[int] = []
        async for output in model.engine.stream(Request(prompt, KNOBS["sampled"])):
            assert output.token_ids[: len(made)] == made
            made = output.token_ids
        return made

    async def together(model: LLM) -> list[list[int]]:
        return await asyncio.gather(*[streamed(model, prompt) for prompt in PROMPTS])

    expected = [result.token_ids for result in plain.generate(PROMPTS, KNOBS["sampled"])]
    with labinfer.load(LLAMA, speculative_config=SELF) as model:
        assert asyncio.run(together(model)) == expected
        assert counted(model).accepted == counted(model).proposed > 0
        check_books(model)


def test_aborted_requests_leave_nothing_in_the_draft() -> None:
    with labinfer.load(LLAMA, speculative_config=SELF) as model:
        requests = [model.engine.add(Request(prompt, GREEDY)) for prompt in PROMPTS]
        for _ in range(3):
            model.engine.step()
        assert counted(model).proposed > 0
        for request in requests:
            model.engine.abort(request)
        check_books(model)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_prompt_lookup_is_the_latest_longest_match(text: list[int], longest: int, shortest: int, count: int) -> None:
    found = PromptLookup(count, longest, shortest).continuation(np.array(text, np.int32), count).tolist()
    for length in range(longest, shortest - 1, -1):
        ends = [end for end in range(length - 1, len(text) - 1) if text[end - length + 1 : end + 1] == text[-length:]]
        if length <= len(text) and ends:
            going = list(text)
            for _ in range(count):
                going.append(going[ends[-1] + 1 + len(going) - len(text)])
            assert found == going[len(text) :]
            return
    assert found == []


def test_speculation_pauses_where_it_does_not_pay() -> None:
    payoff = Payoff(always=False)
    for _ in range(FIRST):
        assert payoff.paused
        payoff.plain_step()
    assert not payoff.paused
    for window in range(8):
        for _ in range(WINDOW):
            payoff.step(sequences=2, accepted=1, seconds=1.6, plain_seconds=1.0)
        for _ in range(min(SHORTEST << window, LONGEST)):
            assert payoff.paused
            payoff.plain_step()
        assert not payoff.paused
    for _ in range(2 * WINDOW):
        payoff.step(sequences=2, accepted=1, seconds=1.4, plain_seconds=1.0)
        assert not payoff.paused
    for _ in range(WINDOW):
        payoff.step(sequences=2, accepted=0, seconds=1.01, plain_seconds=1.0)
    assert payoff.paused
    assert payoff.pause == SHORTEST


def test_steps_prepared_ahead_and_steps_with_guesses_take_turns(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LABINFER_SPECULATION")
    monkeypatch.setenv("LABINFER_OVERLAP", "1")
    expected = answers(plain, PROMPTS, KNOBS["sampled"])
    with labinfer.load(LLAMA, speculative_config=SELF) as model:
        assert answers(model, PROMPTS, KNOBS["sampled"]) == expected
        check_books(model)
        decodes = [step for step in model.engine.stats if not step.num_prompt_tokens]
        assert {step.num_proposed > 0 for step in decodes} == {False, True}


def test_an_environment_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABINFER_SPECULATION", "0")
    with labinfer.load(LLAMA, speculative_config=NGRAM) as model:
        assert model.engine.speculation is None
        assert len(model.generate([[1, 2]], GREEDY)[0].token_ids) == 16


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"method": "eagle"}, "method must be one of ngram, draft_model"),
        ({"method": "draft_model"}, "draft_model needs a model"),
        ({"method": "ngram", "model": "x"}, "ngram takes no model"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be a whole number from 1 to"),
        ({"prompt_lookup_max": 2.5}, "prompt_lookup_max must be a whole number"),
        ({"prompt_lookup_max": 1}, "prompt_lookup_min must be at most prompt_lookup_max"),
        ({"num_tokens": 3}, "there is no speculative option 'num_tokens'"),
        ({3: 3}, "there is no speculative option '3'"),
        ("ngram", "speculative_config must be a SpeculativeConfig or a mapping"),
    ],
    ids=str,
)
def test_wrong_configurations_are_refused(config: Any, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        labinfer.load(LLAMA, speculative_config=config)
    assert caught.value.code == "speculation.config"


@pytest.mark.parametrize("limit", ["max_num_batched_tokens", "max_logits_rows"])
def test_a_step_must_have_room_for_a_guess(limit: str) -> None:
    with pytest.raises(UsageError) as caught:
        labinfer.load(LLAMA, speculative_config=NGRAM, **{limit: 1})
    assert caught.value.code == "speculation.no-room"


def test_a_draft_must_have_the_same_vocabulary(tiny_model: Path) -> None:
    assert SpeculativeConfig(model=tiny_model).method == "draft_model"
    manager = Manager()
    with pytest.raises(UsageError) as caught:
        labinfer.load(LLAMA, speculative_config={"model": tiny_model}, manager=manager)
    assert caught.value.code == "speculation.vocabulary"
    assert not manager.grants.given  # both are closed


def test_a_draft_for_shorter_texts_helps_as_far_as_it_goes(plain: LLM) -> None:
    draft = labinfer.compile(LLAMA, max_model_len=30, max_num_seqs=2, num_blocks=40)
    with labinfer.load(LLAMA, speculative_config={"model": draft}) as model:
        assert answers(model, PROMPTS, GREEDY) == answers(plain, PROMPTS, GREEDY)
        assert counted(model).accepted == counted(model).proposed > 0
        check_books(model)
