"""Draws a token from a row of logits without sorting the vocabulary."""

from __future__ import annotations

import numpy as np

LOOKS = (256, 4096)
"""So many of the likeliest tokens are put in order first; seldom are more needed."""


def draw(logits: np.ndarray, temperature: float, top_k: int, top_p: float, randoms: np.ndarray) -> np.ndarray:
    """A token from float32 ``logits`` [vocab] for each of ``randoms``, numbers in [0, 1).

    The inverse of the distribution function by ``temperature``, ``top_k`` (0: off) and ``top_p``.
    It walks the tokens from the most to the least likely, equal ones by their ids, until their probability passes the
    number. Most walks are short, so only the likeliest tokens are put in order first.
    """
    count = min(top_k, len(logits)) if top_k > 0 else len(logits)
    if count == len(logits):
        total = weights(logits, logits.max(), temperature).sum()
        target = (top_p if top_p < 1 else randoms.max()) * total
        for look in (*LOOKS, count):
            order, cumulative = likeliest(logits, temperature, min(look, count))
            if cumulative[-1] > target:
                break
    else:
        order, cumulative = likeliest(logits, temperature, count)
        total = cumulative[-1]
    if top_p < 1:
        kept = int(np.searchsorted(cumulative, top_p * total)) + 1
        order, cumulative = order[:kept], cumulative[:kept]
        total = cumulative[-1]
    found: np.ndarray = order[np.minimum(np.searchsorted(cumulative, randoms * total, side="right"), len(order) - 1)]
    return found


def likeliest(logits: np.ndarray, temperature: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` likeliest tokens, equal ones by their ids, and the running sum of their weights, float64."""
    order = greatest(logits, count)
    return order, np.cumsum(weights(logits[order], logits[order[0]], temperature))


def greatest(logits: np.ndarray, count: int) -> np.ndarray:
    """Ids of the ``count`` greatest of float32 ``logits``, from the greatest on, equal ones in order, int64."""
    if count == 0:
        return np.zeros(0, np.int64)
    if count < len(logits):
        least = np.partition(logits, len(logits) - count)[len(logits) - count]
        keep = np.flatnonzero(logits >= least)
    else:
        keep = np.arange(len(logits))
    bits = (logits[keep] + np.float32(0)).view(np.int32)  # adding 0 makes -0 and 0 equal
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    keys = np.sort((~rising).astype(np.int64) << 32 | keep)  # faster than a stable sort of the floats
    ids: np.ndarray = keys[:count] & 0xFFFFFFFF
    return ids


def weights(logits: np.ndarray, greatest: float, temperature: float) -> np.ndarray:
    """Probabilities up to a factor, float64: 1 for the greatest logit."""
    scaled = logits.astype(np.float64)
    scaled -= greatest
    scaled /= temperature
    return np.exp(scaled, out=scaled)
