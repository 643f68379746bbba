"""Chooses the next token from a row of logits."""

from __future__ import annotations

import numpy as np

from labinfer.errors import LabinferError
from labinfer.runtime.sampling_params import SamplingParams


def sample(logits: np.ndarray, params: SamplingParams, random: np.random.Generator) -> int:
    """A token id from float32 ``logits`` [vocab]; greedy takes the first of equal maxima.

    Temperature first, then top-k, then top-p, as in vLLM. Logits that are not numbers are an error, never a token.
    """
    best = int(np.argmax(logits))  # the first NaN, if there is any
    if not np.isfinite(logits[best]):
        raise LabinferError("run.not-a-number", f"the logits are not numbers (token {best} has {logits[best]})")
    if params.temperature == 0 or params.top_k == 1:
        return best
    keep = np.arange(len(logits))
    if 0 < params.top_k < len(logits):
        keep = np.argpartition(logits, -params.top_k)[-params.top_k :]
    order = keep[np.argsort(-logits[keep], kind="stable")]
    scaled = (logits[order].astype(np.float64) - logits[best]) / params.temperature
    weights = np.exp(scaled)
    cumulative = np.cumsum(weights) / weights.sum()
    if params.top_p < 1:
        kept = int(np.searchsorted(cumulative, params.top_p)) + 1
        order, cumulative = order[:kept], cumulative[:kept] / cumulative[min(kept, len(cumulative)) - 1]
    return int(order[min(int(np.searchsorted(cumulative, random.random(), side="right")), len(order) - 1)])
