"""The knobs against Hugging Face's logits processors, on the same logits."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the live comparison needs torch")
pytest.importorskip("transformers", reason="the live comparison needs transformers")

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from labinfer import SamplingParams
from labinfer.runtime.sampling import SamplingRules, SamplingState
from labinfer.runtime.sampling.sampler import sample_row
from labinfer.runtime.tokenizer import Tokenizer

VOCAB = 500
PROMPT, OUTPUT, EOS = [5, 9, 9, 77], [3, 9, 101, 4, 5], 2


def words() -> Tokenizer:
    """Every token is a word: t0, t1, ..."""
    backend = Backend(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend, vocab_size=VOCAB, bos_id=None, eos_ids=[EOS], token_text={}, chat_templates={})


CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "top_k": ({"top_k": 20}, [TopKLogitsWarper(20)]),
    "top_p": ({"top_p": 0.85}, [TopPLogitsWarper(0.85)]),
    "top_k, top_p": (
        {"temperature": 1.7, "top_k": 60, "top_p": 0.7},
        [TemperatureLogitsWarper(1.7), TopKLogitsWarper(60), TopPLogitsWarper(0.7)],
    ),
    "min_p": ({"temperature": 1.4, "min_p": 0.07}, [TemperatureLogitsWarper(1.4), MinPLogitsWarper(0.07)]),
    "typical_p": ({"temperature": 1.2, "typical_p": 0.6}, [TemperatureLogitsWarper(1.2), TypicalLogitsWarper(0.6)]),
    "all cuts": (
        {"temperature": 1.5, "min_p": 0.01, "typical_p": 0.95, "top_k": 50, "top_p": 0.9},
        [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.01), TypicalLogitsWarper(0.95), TopKLogitsWarper(50),
         TopPLogitsWarper(0.9)],
    ),
    "repetition_penalty": ({"repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
    "min_tokens": ({"min_tokens": 7}, [MinNewTokensLengthLogitsProcessor(len(PROMPT), 7, EOS, device="cpu")]),
    "bad_words": (
        {"bad_words": ["t8", "t4 t5 t6", "t5 t11", "t4 t7"]},
        [NoBadWordsLogitsProcessor([[8], [4, 5, 6], [5, 11], [4, 7]], eos_token_id=EOS)],
    ),
    "several": (
        {"min_tokens": 9, "bad_words": ["t5 t11"], "repetition_penalty": 0.7, "temperature": 0.9, "top_p": 0.8},
        [MinNewTokensLengthLogitsProcessor(len(PROMPT), 9, EOS, device="cpu"),
         NoBadWordsLogitsProcessor([[5, 11]], eos_token_id=EOS), RepetitionPenaltyLogitsProcessor(0.7),
         TemperatureLogitsWarper(0.9), TopPLogitsWarper(0.8)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CASES)
def test_the_distribution_is_that_of_hugging_face(name: str, seed: int) -> None:
    """For numbers all over [0, 1), the token drawn is the one that Hugging Face's probabilities have there."""
    knobs, processors = CASES[name]
    logits = (np.random.default_rng(seed).standard_normal(VOCAB) * 2.5).astype(np.float32)
    logits[[EOS, 8, 11]] += 6  # banned ones matter
    ids = torch.tensor([PROMPT + OUTPUT])
    scores = LogitsProcessorList(processors)(ids, torch.from_numpy(logits)[None].clone())[0]
    expected = torch.softmax(scores.double(), 0).numpy()
    tokenizer = words()
    rules = SamplingRules(SamplingParams(**knobs), VOCAB, [EOS], tokenizer)
    state = SamplingState(rules, 1, 0, PROMPT, OUTPUT)
    order = np.argsort(-scores.numpy(), kind="stable")
    upper = np.cumsum(expected[order])
    for random in np.random.default_rng(seed).random(400):
        place = int(np.searchsorted(upper, random, side="right"))
        if abs(upper[max(place - 1, 0) : place + 1] - random).min() < 1e-6:
            continue  # float32 there, float64 here
        assert sample_row(logits, state, np.array([random])) == [order[place]]
