"""What the tests of sampling share: a row, its state, and chi-square."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from labinfer.runtime.sampling import SamplingParams, SamplingRules, SamplingState


def state_of(
    params: SamplingParams | None = None, *, vocab_size: int = 32, prompt: Sequence[int] = (),
    output: Sequence[int] = (), seed: int = 1, index: int = 0, **knobs: Any,
) -> SamplingState:  # fmt: skip
    """The state of a sequence without a tokenizer."""
    return SamplingState(SamplingRules(params or SamplingParams(**knobs), vocab_size), seed, index, prompt, output)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64."""
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


def chi_square(tokens: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Pearson's statistic of ``tokens`` against probabilities, and what it exceeds once in a million times.

    Classes expected less than five times are one. The bound is Wilson and Hilferty's.
    """
    counts = np.bincount(tokens, minlength=len(expected))
    assert (counts[expected == 0] == 0).all(), "a token that has no probability"
    means = expected * len(tokens)
    often = means >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(means[often], means[~often].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = max(len(wanted) - 1, 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 4.753 * np.sqrt(2 / (9 * freedom))) ** 3
    return float(((observed - wanted) ** 2 / wanted).sum()), float(bound)
