"""Chooses the next token from a row of logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from labinfer.errors import LabinferError
from labinfer.runtime.sampling_params import SamplingParams

Draw = Callable[[np.ndarray, float, int, float, float], int]
"""Picks a token from logits by temperature, top_k (0: off), top_p and a number in [0, 1)."""


def sample(
    logits: np.ndarray, params: SamplingParams, random: np.random.Generator, device_draw: Draw | None = None
) -> int:
    """A token id from float32 ``logits`` [vocab]; greedy takes the first of equal maxima.

    Temperature first, then top-k, then top-p, as in vLLM. Logits that are not numbers are an error, never a token. A
    device that can draw without sorting the vocabulary does, with the same result.
    """
    best = int(np.argmax(logits))  # the first NaN, if there is any
    if not np.isfinite(logits[best]):
        raise LabinferError("run.not-a-number", f"the logits are not numbers (token {best} has {logits[best]})")
    if params.temperature == 0 or params.top_k == 1:
        return best
    return (device_draw or draw)(logits, params.temperature, max(params.top_k, 0), params.top_p, random.random())


def draw(logits: np.ndarray, temperature: float, top_k: int, top_p: float, random: float) -> int:
    """Walks the tokens from the most to the least likely until their probability passes ``random``."""
    keep = np.arange(len(logits))
    if 0 < top_k < len(logits):
        keep = np.argpartition(logits, -top_k)[-top_k:]
    order = keep[np.argsort(-logits[keep], kind="stable")]
    weights = np.exp((logits[order].astype(np.float64) - logits[order[0]]) / temperature)
    cumulative = np.cumsum(weights) / weights.sum()
    if top_p < 1:
        kept = int(np.searchsorted(cumulative, top_p)) + 1
        order, cumulative = order[:kept], cumulative[:kept] / cumulative[min(kept, len(cumulative)) - 1]
    return int(order[min(int(np.searchsorted(cumulative, random, side="right")), len(order) - 1)])
