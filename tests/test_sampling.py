"""Sampling: exact distributions, random numbers that depend on nothing else, rows that do not touch each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labinfer import SamplingParams
from labinfer.errors import UsageError
from labinfer.runtime.sampling import SamplingRules, sample, token_logprobs
from labinfer.runtime.sampling.draw import draw, greatest
from labinfer.runtime.sampling.random_numbers import philox, uniform
from labinfer.runtime.sampling.sampler import sample_row

from .sampling_cases import chi_square, softmax, state_of

VOCAB, DRAWS = 32, 100_000
LOGITS = (np.random.default_rng(4).standard_normal(VOCAB) * 2).astype(np.float32)
PROMPT, OUTPUT = [3, 3, 8, 20], [5, 8, 5, 5, 31]


def keep(p: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.where(kept, p, 0) / p[kept].sum()


def nucleus(p: np.ndarray, mass: float) -> np.ndarray:
    """The smallest set of the likeliest tokens that has the mass."""
    order = np.argsort(-p, kind="stable")
    return keep(p, np.isin(np.arange(len(p)), order[: int((np.cumsum(p[order]) < mass).sum()) + 1]))


def typical(p: np.ndarray, mass: float) -> np.ndarray:
    distance = np.abs(-np.log(p) + (p * np.log(p)).sum())
    order = np.argsort(distance)
    return keep(p, np.isin(np.arange(len(p)), order[: int((np.cumsum(p[order]) < mass).sum()) + 1]))


def seen(tokens: list[int]) -> np.ndarray:
    return np.isin(np.arange(VOCAB), tokens)


TIMES = np.bincount(OUTPUT, minlength=VOCAB)
REPEATED = np.where(seen(PROMPT + OUTPUT), np.where(LOGITS > 0, LOGITS / 1.7, LOGITS * 1.7), LOGITS)
SOME = softmax(LOGITS)
KNOBS: dict[str, tuple[dict[str, Any], np.ndarray]] = {
    "nothing": ({}, SOME),
    "temperature 0.5": ({"temperature": 0.5}, softmax(LOGITS / 0.5)),
    "temperature 3": ({"temperature": 3}, softmax(LOGITS / 3)),
    "top_k": ({"top_k": 5}, keep(SOME, np.argsort(np.argsort(-LOGITS)) < 5)),
    "top_k beyond all": ({"top_k": 100}, SOME),
    "top_k off": ({"top_k": -1}, SOME),
    "top_p": ({"top_p": 0.7}, nucleus(SOME, 0.7)),
    "top_p tiny": ({"top_p": 1e-9}, nucleus(SOME, 1e-9)),
    "top_k and top_p": (
        {"temperature": 2.0, "top_k": 9, "top_p": 0.8},
        nucleus(keep(softmax(LOGITS / 2), np.argsort(np.argsort(-LOGITS)) < 9), 0.8),
    ),
    "min_p": ({"min_p": 0.1}, keep(SOME, 0.1 * SOME.max() <= SOME)),
    "min_p before top_p": (
        {"temperature": 1.5, "min_p": 0.2, "top_p": 0.8},
        nucleus(keep(softmax(LOGITS / 1.5), softmax(LOGITS / 1.5) >= 0.2 * softmax(LOGITS / 1.5).max()), 0.8),
    ),
    "typical_p": ({"typical_p": 0.6}, typical(SOME, 0.6)),
    "repetition_penalty": ({"repetition_penalty": 1.7}, softmax(REPEATED)),
    "presence_penalty": ({"presence_penalty": 1.5}, softmax(LOGITS - 1.5 * (TIMES > 0))),
    "frequency_penalty": ({"frequency_penalty": -0.5}, softmax(LOGITS + 0.5 * TIMES)),
    "all penalties": (
        {"repetition_penalty": 1.7, "frequency_penalty": 0.3, "presence_penalty": 0.2},
        softmax(REPEATED - 0.3 * TIMES - 0.2 * (TIMES > 0)),
    ),
    "logit_bias": ({"logit_bias": {1: 2.5, 30: -100}}, softmax(LOGITS + 2.5 * seen([1]) - 100 * seen([30]))),
    "allowed_token_ids": ({"allowed_token_ids": [2, 9, 17]}, keep(SOME, seen([2, 9, 17]))),
    "a function": ({"logits_processors": [lambda ids, x: x * len(ids)]}, softmax(LOGITS * len(OUTPUT))),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOBS)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    knobs, expected = KNOBS[name]
    randoms = uniform(7, 0, np.arange(DRAWS, dtype=np.uint64))
    state = state_of(prompt=PROMPT, output=OUTPUT, **knobs)

    tokens = sample_row(LOGITS, state, randoms)
    statistic, bound = chi_square(tokens, expected)
    assert statistic < bound


def test_tokens_of_many_sequences_follow_the_distribution() -> None:
    """The whole way: a state for each sequence, its seed and index, its random number, one row of a batch."""
    count = 4000
    states = {row: state_of(seed=row // 4, index=row % 4, top_k=8) for row in range(count)}
    made = sample(np.broadcast_to(LOGITS, (count, VOCAB)), states)
    statistic, bound = chi_square(made.tokens, keep(SOME, np.argsort(np.argsort(-LOGITS)) < 8))
    assert statistic < bound


def test_the_chi_square_test_can_fail() -> None:
    tokens = draw(LOGITS, 1.03, 0, 1.0, uniform(7, 0, np.arange(DRAWS, dtype=np.uint64)))
    statistic, bound = chi_square(tokens, SOME)
    assert statistic > bound


def test_random_numbers_are_philox() -> None:
    """Known answers from the authors' Random123."""
    ones, words = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox(words, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_number_alone_is_that_of_an_array(seed: int, index: int, number: int) -> None:
    arrays = [np.array([value, 5], np.uint64) for value in (seed, index, number)]
    alone = uniform(seed, index, number)
    assert uniform(*arrays)[0] == alone
    assert 0 <= alone < 1


def test_numbers_of_sequences_and_tokens_are_independent() -> None:
    numbers = np.array([[uniform(seed, index, k) for k in range(200)] for seed in range(8) for index in range(8)])
    assert len(np.unique(numbers)) == numbers.size
    correlation = np.corrcoef(numbers)
    assert abs(correlation[np.triu_indices(len(numbers), 1)]).max() < 0.35


@settings(max_examples=200)
@given(
    logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32) | st.just(-np.inf), min_size=1, max_size=50),
    count=st.integers(1, 50),
)
def test_greatest_is_a_stable_sort(logits: list[float], count: int) -> None:
    row = np.array(logits, np.float32)
    count = min(count, len(row))
    assert greatest(row, count).tolist() == np.argsort(-row, kind="stable")[:count].tolist()


@settings(max_examples=200)
@given(
    logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50),
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 50.0]),
    top_k=st.integers(-1, 60),
    top_p=st.floats(1e-6, 1.0),
    min_p=st.sampled_from([0.0, 0.3, 1.0]),
    typical_p=st.sampled_from([1e-6, 0.5, 1.0]),
)
def test_any_finite_logits_give_a_token(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    row = np.array(logits, np.float32)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    made = sample(row[np.newaxis], {0: state_of(vocab_size=len(row), **knobs)})
    assert not made.errors
    assert 0 <= made.tokens[0] < len(row)
    if top_k > 0 and typical_p == 1:
        assert row[made.tokens[0]] >= np.sort(row)[::-1][min(top_k, len(row)) - 1]


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("limits", [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 40, 1.0), (1.0, 3000, 0.95), (3.0, 0, 0.999)])
def test_large_vocabularies_are_walked_as_if_all_were_sorted(spread: float, limits: tuple[float, int, float]) -> None:
    temperature, top_k, top_p = limits
    row = (np.random.default_rng(1).standard_normal(20_000) * spread).astype(np.float32)
    order = np.argsort(-row, kind="stable")[: top_k or None]
    cumulative = np.cumsum(np.exp((row[order].astype(np.float64) - row.max()) / temperature))
    order = order[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1] if top_p < 1 else order
    cumulative = cumulative[: len(order)] / cumulative[len(order) - 1]
    for random in (0.0, 1e-9, 0.25, 0.6, 0.9, 0.999, 1 - 2**-53):
        expected = order[min(np.searchsorted(cumulative, random, side="right"), len(order) - 1)]
        assert draw(row, temperature, top_k, top_p, np.array([random])) == [expected]


def test_greedy_takes_the_first_of_the_greatest() -> None:
    ties = np.array([[0, 3, 3, 1], [5, 5, 5, 5]], np.float32)
    assert sample(ties, {}).tokens.tolist() == [1, 0]
    for knobs in ({"temperature": 0}, {"top_k": 1}):
        states = {row: state_of(vocab_size=4, logprobs=0, **knobs) for row in (0, 1)}
        assert sample(ties, states).tokens.tolist() == [1, 0]


def test_only_plain_greedy_rules_are_plain() -> None:
    def plain(**knobs: Any) -> bool:
        return SamplingRules(SamplingParams(**knobs), VOCAB).plain

    assert plain(temperature=0)
    assert plain(temperature=0, seed=1, top_p=0.5, min_p=0.5, typical_p=0.5, stop_token_ids=[1], ignore_eos=True)
    assert plain(top_k=1)
    for knobs in (
        {"min_tokens": 1}, {"logit_bias": {1: 1}}, {"allowed_token_ids": [1]}, {"logits_processors": [max]},
        {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"logprobs": 0},
        {"temperature": 1},
    ):  # fmt: skip
        assert not plain(**{"temperature": 0, **knobs}), knobs


def test_a_seeded_sequence_gets_the_same_tokens_alone_in_company_and_anew() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12, VOCAB)).astype(np.float32)
    knobs: dict[str, Any] = {"temperature": 1.4, "repetition_penalty": 1.3, "presence_penalty": 0.4, "min_p": 0.01}
    alone = state_of(prompt=PROMPT, seed=5, **knobs)
    tokens = []
    for row in rows:
        tokens.append(int(sample(row[np.newaxis], {0: alone}).tokens[0]))
        alone.accept(tokens[-1])
    for cut in (0, 1, 7, 11):
        company = rng.standard_normal((5, VOCAB)).astype(np.float32)
        company[3] = rows[cut]
        others = {row: state_of(seed=row, temperature=2) for row in (0, 1, 4)}
        again = state_of(prompt=PROMPT, output=tokens[:cut], seed=5, **knobs)
        forked = again.fork(0)
        again.accept(2)
        assert sample(company, {**others, 3: forked}).tokens[3] == tokens[cut]
    assert len(set(tokens)) > 4


def test_forks_part_ways() -> None:
    state = state_of(seed=9, temperature=1.5, frequency_penalty=1, output=[1, 2])
    forks = [state.fork(index) for index in range(200)]
    forks[0].accept(7)
    forks[1].accept(30)
    assert state.counts is not None
    assert (state.output, state.counts.ids.tolist(), state.counts.counts.tolist()) == ([1, 2], [1, 2], [1, 1])
    numbers = [fork.random for fork in forks]
    assert len(set(numbers)) == len(numbers)


def test_a_bad_row_is_an_error_of_its_own() -> None:
    rows = np.tile(LOGITS, (7, 1))
    rows[0, 3], rows[1, 5], rows[2] = np.nan, np.inf, -np.inf

    def fails(ids: tuple[int, ...], logits: np.ndarray) -> np.ndarray:
        raise RuntimeError("no idea")

    def without_4(ids: tuple[int, ...], logits: np.ndarray) -> np.ndarray:
        return np.where(np.arange(VOCAB) == 4, -np.inf, logits)

    states = {
        1: state_of(),
        3: state_of(logits_processors=[fails]),
        4: state_of(logits_processors=[lambda ids, x: x[:5]]),
        5: state_of(temperature=0, allowed_token_ids=[4], logits_processors=[without_4]),
    }  # fmt: skip
    made = sample(rows, states)
    assert {row: error.code for row, error in made.errors.items()} == {
        0: "run.not-a-number", 1: "run.not-a-number", 2: "sampling.no-token",
        3: "sampling.processor", 4: "sampling.processor", 5: "sampling.no-token",
    }  # fmt: skip
    assert made.tokens.tolist() == [-1] * 6 + [LOGITS.argmax()]
    assert "token 3 has nan" in made.errors[0].message
    assert "no idea" in made.errors[3].message
    np.testing.assert_array_equal(rows[3:], np.tile(LOGITS, (4, 1)))


def test_processors_get_the_answer_and_a_copy() -> None:
    told = []

    def look(ids: Sequence[int], logits: np.ndarray) -> np.ndarray:
        told.append((list(ids), len(ids), ids[-2:]))
        with pytest.raises(TypeError):
            ids[0] = 3  # type: ignore[index]
        logits[:] = 0
        logits[ids[-1]] = 9
        return logits

    row = LOGITS.copy()
    state = state_of(temperature=0, logits_processors=[look, lambda ids, x: x.astype(np.float64)], output=[4, 6])
    assert sample(row[np.newaxis], {0: state}).tokens[0] == 6
    assert told == [([4, 6], 2, [4, 6])]
    np.testing.assert_array_equal(row, LOGITS)


def test_min_tokens_bans_every_end() -> None:
    row = np.zeros(VOCAB, np.float32)
    row[[2, 7]] = 5, 4
    rules = SamplingRules(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[7, 500]), VOCAB, [2])
    state = state_of(rules.params)
    state.rules = rules
    made = []
    for _ in range(3):
        made.append(int(sample(row[np.newaxis], {0: state}).tokens[0]))
        stop = state.accept(made[-1])
    assert made == [0, 0, 2]
    assert stop is not None
    assert stop.reason is None


def test_tokens_that_end_an_answer() -> None:
    stops = state_of(stop_token_ids=[7]).rules
    stops.eos_ids = frozenset([2, 7])
    assert [stops.stop(token) for token in (1, 2, 7)] == [None, (None, False), (7, False)]
    params = SamplingParams(ignore_eos=True, stop_token_ids=[3], include_stop_str_in_output=True)
    ignoring = SamplingRules(params, VOCAB, [2])
    assert [ignoring.stop(token) for token in (2, 3)] == [None, (3, True)]


def test_logprobs_are_those_of_the_model() -> None:
    state = state_of(temperature=0.3, logit_bias={9: 100}, logprobs=3)
    made = sample(LOGITS[np.newaxis], {0: state})
    assert made.tokens[0] == 9
    order, expected = np.argsort(-LOGITS, kind="stable"), np.log(softmax(LOGITS))
    assert list(made.logprobs[0]) == [9, *order[:3].tolist()]
    assert [each.rank for each in made.logprobs[0].values()] == [int(np.where(order == 9)[0][0]) + 1, 1, 2, 3]
    for token, each in made.logprobs[0].items():
        assert each.logprob == pytest.approx(expected[token], rel=1e-12)
        assert each.decoded_token is None
    assert len(token_logprobs(LOGITS, 9, -1)) == len(token_logprobs(LOGITS, 9, 1000)) == VOCAB
    assert list(token_logprobs(LOGITS, 9, 0)) == [9]
    assert list(token_logprobs(LOGITS, int(order[1]), 2, str)) == [order[1], order[0]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": "hot"}, {"max_tokens": "8"}, {"top_k": None}, {"seed": 1.5}, {"temperature": -1},
        {"temperature": float("nan")}, {"top_k": -2}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}, {"seed": -1},
        {"seed": 2**64}, {"n": 0}, {"n": True}, {"best_of": 0}, {"n": 3, "best_of": 2}, {"min_p": 1.1}, {"min_p": -0.1},
        {"typical_p": 0}, {"repetition_penalty": 0}, {"repetition_penalty": float("inf")}, {"presence_penalty": 2.1},
        {"frequency_penalty": -3}, {"logit_bias": [1]}, {"logit_bias": {"a": 1}}, {"logit_bias": {1: float("nan")}},
        {"logit_bias": {-1: 1}}, {"bad_words": 3}, {"bad_words": ["", "a"]}, {"allowed_token_ids": []},
        {"allowed_token_ids": ["a"]}, {"allowed_token_ids": 3}, {"logits_processors": [1]}, {"logits_processors": max},
        {"structured_outputs": "a+"}, {"structured_outputs": {"regexp": "a+"}}, {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "json": "{}"}}, {"structured_outputs": {"json": 3}},
        {"structured_outputs": {"json": {"a": {1, 2}}}}, {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"choice": [1]}}, {"structured_outputs": {"regex": 1}}, {"stop": [1]}, {"stop": ""},
        {"stop": b"a"}, {"stop_token_ids": [1.5]}, {"stop_token_ids": [-1]}, {"stop_token_ids": "a"}, {"ignore_eos": 1},
        {"ignore_eos": None}, {"min_tokens": -1}, {"min_tokens": 20, "max_tokens": 10}, {"logprobs": -2},
        {"prompt_logprobs": 1.0}, {"stop": "a", "detokenize": False},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_sampling_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**wrong)
    assert caught.value.code == "sampling.params"
    assert any(name in caught.value.message for name in wrong)


def test_every_wrong_parameter_is_named_at_once() -> None:
    wrong: dict[str, Any] = {"temperature": -1, "top_p": 2, "seed": "x", "stop": [""], "logit_bias": {0: "x"}, "n": 0}
    with pytest.raises(UsageError) as caught:
        SamplingParams(**wrong)
    assert all(name in caught.value.message for name in wrong)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"logit_bias": {32: 1}}, "logit_bias"),
        ({"allowed_token_ids": [1, 99]}, "allowed_token_ids"),
        ({"stop": ["a"], "bad_words": ["b"], "logit_bias": {99: 1}}, "stop bad_words logit_bias"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_what_a_model_cannot_do_is_named(knobs: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        state_of(**knobs)
    assert all(name in caught.value.message for name in named.split())


def test_numbers_of_numpy_and_json_are_numbers() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(3), stop="a", logit_bias={"7": 300}, stop_token_ids=np.array([1, 2])
    )  # fmt: skip
    assert (params.stop, params.logit_bias, params.stop_token_ids) == (("a",), {7: 100.0}, (1, 2))
