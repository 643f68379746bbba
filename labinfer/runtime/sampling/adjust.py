"""Changes to a row of logits, float32 [vocab_size], in place; a token that is banned gets minus infinity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from labinfer.runtime.sampling.draw import weights
from labinfer.runtime.sampling.token_counts import TokenCounts

NEVER = np.float32(-np.inf)


def allow_only(logits: np.ndarray, ids: np.ndarray) -> None:
    """Ban every token but ``ids``."""
    kept = logits[ids]
    logits.fill(NEVER)
    logits[ids] = kept


def ban_bad_words(logits: np.ndarray, words: Sequence[tuple[int, ...]], output: Sequence[int]) -> None:
    """Ban the last token of each of ``words`` (tuples of tokens) whose others are what ``output`` ends with."""
    for word in words:
        before = len(word) - 1
        if before <= len(output) and tuple(output[len(output) - before :]) == word[:-1]:
            logits[word[-1]] = NEVER


def penalize(logits: np.ndarray, tokens: TokenCounts, repetition: float, frequency: float, presence: float) -> None:
    """Repetition penalty (Keskar et al., CTRL, 2019), then those of OpenAI, which look at the answer only."""
    ids, counts = tokens.ids, tokens.counts
    of_those = logits[ids]
    if repetition != 1:
        factor = np.float32(repetition)
        of_those = np.where(of_those > 0, of_those / factor, of_those * factor)
    if frequency or presence:
        of_those = of_those - np.float32(frequency) * counts.astype(np.float32) - np.float32(presence) * (counts > 0)
    logits[ids] = of_those


def cut_by_min_p(logits: np.ndarray, min_p: float, temperature: float) -> None:
    """Ban tokens with less than ``min_p`` of the greatest probability (Nguyen et al., Min-p sampling, 2024)."""
    logits[logits < logits.max() + temperature * np.log(min_p)] = NEVER


def cut_by_typical_p(logits: np.ndarray, typical_p: float, temperature: float) -> None:
    """Keep the tokens whose surprise is nearest to the entropy and that make up ``typical_p`` together.

    Meister et al.: Locally typical sampling (2022).
    """
    mass = weights(logits, logits.max(), temperature)
    mass /= mass.sum()
    with np.errstate(divide="ignore"):
        surprise = -np.log(mass)
    distance = np.abs(surprise - mass[mass > 0] @ surprise[mass > 0])
    order = np.argsort(distance)
    last = min(int(np.searchsorted(np.cumsum(mass[order]), typical_p)), len(order) - 1)
    logits[distance > distance[order[last]]] = NEVER
