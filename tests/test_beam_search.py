"""Beam search: against every answer of a small vocabulary, and against a search that keeps no cache."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labinfer
from labinfer import BeamSearchParams
from labinfer.errors import LabinferError, UsageError
from labinfer.llm import LLM
from labinfer.runtime.beam_search import BeamSearchSequence

from .tiny import GOLDEN, tiny_checkpoint, tiny_map

Rows = Callable[[tuple[int, ...]], np.ndarray]
ENDS = {1, *range(10, 64, 9)}
PROMPTS = [[5, 6, 7], [9] * 17, [30], list(range(10, 31))]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def logprob(model: LLM, prompt: list[int], answer: list[int]) -> float:
    """The log-probability of a whole answer."""
    rows = log_softmax(model.logits([*prompt, *answer]))[len(prompt) - 1 : -1]
    return float(rows[np.arange(len(answer)), answer].sum())


def next_logprobs(model: LLM) -> Rows:
    """What the model says comes after a text, computed from the text's beginning; asked again, remembered."""
    return cache(lambda text: log_softmax(model.logits(list(text))[-1:])[0])


def search_without_cache(
    logprobs: Rows, prompt: list[int], width: int, most: int, penalty: float, eos: set[int]
) -> list[tuple[list[int], float, float]]:
    """(answer, log-probability, score) of the best, each step computed from the beginning, to the very end."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[tuple[list[int], float, float]] = []
    for length in range(1, most + 1):
        found = []
        for answer, so_far in beams:
            row = logprobs((*prompt, *answer))
            found += [([*answer, token], so_far + float(row[token])) for token in range(len(row))]
        found = sorted(found, key=lambda each: -each[1])[: (1 + max(1, len(eos))) * width]
        ended = [each for each in found[:width] if each[0][-1] in eos or length == most]
        finished += [(answer, total, total / length**penalty) for answer, total in ended]
        beams = [each for each in found if each[0][-1] not in eos][:width]
    return sorted(finished, key=lambda each: -each[2])[:width]


def assert_same(model: LLM, found: list[BeamSearchSequence], expected: list[Any], prompt: list[int]) -> None:
    assert [each.tokens for each in found] == [[*prompt, *answer] for answer, _, _ in expected]
    np.testing.assert_allclose([each.cum_logprob for each in found], [each[1] for each in expected], rtol=1e-5)
    np.testing.assert_allclose([each.score for each in found], [each[2] for each in expected], rtol=1e-5)
    assert model.blocks.usage == 0
    model.blocks.check_integrity()


def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all_answers(tmp_path: Path) -> None:
    path = tiny_map(tmp_path)
    plan = labinfer.compile(path, weights=tiny_checkpoint(tmp_path / "model"), max_model_len=64, block_size=2)
    with labinfer.load(plan) as model:
        prompt, size = [3, 1, 4], model.vocab_size
        every = {answer: logprob(model, prompt, list(answer)) for answer in product(range(size), repeat=2)}
        best = sorted(every, key=lambda answer: -every[answer])[:size]
        [output] = model.beam_search(prompt, BeamSearchParams(beam_width=size, max_tokens=2))
        assert_same(model, output.sequences, [(list(each), every[each], every[each] / 2) for each in best], prompt)


@pytest.fixture(scope="module")
def with_ends(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose text many tokens end."""
    folder = tmp_path_factory.mktemp("models") / "ends"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": sorted(ENDS)}))
    return folder


@pytest.fixture(scope="module")
def ends_logprobs(with_ends: Path) -> Iterator[Rows]:
    with labinfer.load(with_ends) as model:
        yield next_logprobs(model)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_answers_are_those_of_a_search_without_cache(
    with_ends: Path, ends_logprobs: Rows, width: int, penalty: float
) -> None:
    options = {"block_size": 4, "max_num_batched_tokens": 7, "max_num_seqs": 6, "max_logits_rows": 5}
    with labinfer.load(with_ends, **options) as model:
        params = BeamSearchParams(width, 7, length_penalty=penalty)
        outputs = model.beam_search(PROMPTS, params)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            expected = search_without_cache(ends_logprobs, prompt, width, 7, penalty, ENDS)
            assert_same(model, output.sequences, expected, prompt)
        ends = [each.finish_reason for output in outputs for each in output.sequences]
        assert width == 1 or (model.blocks.counters.copies > 0 and {*ends} == {"stop", "length"})


@pytest.mark.parametrize(
    ("family", "length"),
    [("gemma3_text-linear_global", 28), ("phi3-longrope_crossed", 40), ("deepseek_v2-group_limited", 28)],
)
def test_families_with_other_caches(family: str, length: int) -> None:
    with labinfer.load(GOLDEN / family, block_size=4) as model:
        prompt, changes = list(range(length)), model.plan.recompute_after
        assert changes is None or length <= changes < length + 12  # keys of longer texts are others
        [output] = model.beam_search([prompt], BeamSearchParams(3, 12))
        expected = search_without_cache(next_logprobs(model), prompt, 3, 12, 1.0, set())
        assert_same(model, output.sequences, expected, prompt)


def test_ends_of_the_text_and_its_text(with_ends: Path) -> None:
    with labinfer.load(with_ends) as model:
        for with_end in (False, True):
            params = BeamSearchParams(8, 12, length_penalty=0.0, include_stop_str_in_output=with_end)
            [output] = model.beam_search("w10 w11", params)
            ended = [each for each in output.sequences if each.finish_reason == "stop"]
            assert ended
            for each in ended:
                words = [f"w{token}" for token in each.tokens[2:]]
                assert each.text.split() == (words if with_end else words[:-1])
                assert each.tokens[-1] in ENDS
        [output] = model.beam_search("w10 w11", BeamSearchParams(8, 12, ignore_eos=True))
        assert {(each.finish_reason, len(each.tokens)) for each in output.sequences} == {("length", 14)}


def test_the_context_ends_an_answer_and_temperature_flattens() -> None:
    with labinfer.load(GOLDEN / "llama-llama3", max_model_len=20) as model:
        [cold, hot] = [model.beam_search([[7] * 15], BeamSearchParams(2, 50, temperature=t))[0] for t in (0, 3.0)]
        assert [len(each.tokens) for each in cold.sequences] == [20, 20]
        assert hot.sequences[0].cum_logprob < cold.sequences[0].cum_logprob
        assert model.blocks.usage == 0


def test_a_full_cache_is_an_error_that_leaves_nothing_behind() -> None:
    with labinfer.load(GOLDEN / "llama-llama3", num_blocks=9, block_size=4, max_model_len=36) as model:
        with pytest.raises(LabinferError) as caught:
            model.beam_search([[7] * 20], BeamSearchParams(8, 16))
        assert caught.value.code == "run.cache-full"
        assert model.blocks.usage == 0
        model.blocks.check_integrity()
        assert len(model.beam_search([[7] * 20], BeamSearchParams(1, 16))[0].sequences) == 1


def test_not_a_number_inside_the_model_ends_the_search() -> None:
    with labinfer.load(GOLDEN / "llama-llama3") as model:
        with (
            model.listen("layers.1.attn.out", lambda array: array * np.float32(np.nan)),
            pytest.raises(LabinferError) as caught,
        ):
            model.beam_search([[7] * 20], BeamSearchParams(2, 4))
        assert caught.value.code == "run.not-a-number"
        assert model.blocks.usage == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"beam_width": 0}, "beam_width must be a whole number, 1 or more, got 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"temperature": -1}, "temperature must be a number, 0 or more"),
        ({"length_penalty": float("nan")}, "length_penalty must be a number, got nan"),
        ({"beam_width": True, "temperature": "x"}, "got True; temperature"),
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 4} | values))
    assert caught.value.code == "beam-search.params"


def test_prompts_that_cannot_be_run() -> None:
    with labinfer.load(GOLDEN / "llama-llama3", max_model_len=20) as model:
        for prompts, code in (([[]], "run.empty-prompt"), ([[1] * 20], "run.too-long"), ("text", "run.no-tokenizer")):
            with pytest.raises(UsageError) as caught:
                model.beam_search(prompts, BeamSearchParams(2, 4))  # type: ignore[arg-type]
            assert caught.value.code == code
        assert model.beam_search([], BeamSearchParams(2, 4)) == []
