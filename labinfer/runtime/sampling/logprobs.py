"""Log-probabilities of tokens as the model gives them, before any knob, in vLLM's form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from labinfer.runtime.sampling.draw import greatest

Decode = Callable[[int], str]
"""The text of one token."""


class Logprob(NamedTuple):
    """The natural logarithm of a token's probability, and its rank: 1 is the likeliest.

    ``decoded_token`` is its text, None where no text is made.
    """

    logprob: float
    rank: int
    decoded_token: str | None


def token_logprobs(logits: np.ndarray, token: int, count: int, decode: Decode | None = None) -> dict[int, Logprob]:
    """By token id: ``token`` first, then the ``count`` likeliest (-1: all), from float32 ``logits`` [vocab_size]."""
    best = greatest(logits, len(logits) if count < 0 else min(count, len(logits)))
    shifted = logits.astype(np.float64) - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    ranks = {token: int(np.count_nonzero(logits >= logits[token]))}
    ranks |= {each: rank for rank, each in enumerate(best.tolist(), 1)}
    return {each: Logprob(float(shifted[each]), rank, decode(each) if decode else None) for each, rank in ranks.items()}


def prompt_logprobs(
    logits: np.ndarray, tokens: Sequence[int], count: int, decode: Decode | None = None
) -> list[dict[int, Logprob]]:
    """For each of ``tokens``, those of the row of ``logits`` [len(tokens), vocab_size] that stands before it."""
    return [token_logprobs(row, token, count, decode) for row, token in zip(logits, tokens, strict=True)]
