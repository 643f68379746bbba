"""Chooses the next token of each row of logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from labinfer.errors import LabinferError
from labinfer.runtime.sampling import adjust
from labinfer.runtime.sampling.draw import draw
from labinfer.runtime.sampling.logprobs import Logprob, token_logprobs
from labinfer.runtime.sampling.state import SamplingState


@dataclass(slots=True)
class Sampled:
    """``tokens`` int64 [rows]; by row, the ``logprobs`` of requests that want them and the ``errors`` of those without
    a token, which have -1.
    """

    tokens: np.ndarray
    logprobs: dict[int, dict[int, Logprob]] = field(default_factory=dict)
    errors: dict[int, LabinferError] = field(default_factory=dict)


def sample(logits: np.ndarray, states: Mapping[int, SamplingState]) -> Sampled:
    """A token for each row of float32 ``logits`` [rows, vocab_size].

    ``states`` are those of the rows whose rules are not plain; every other row gets the first of its greatest logits,
    all of them in one call. Whatever goes wrong with a row is an error of that row alone. The states are not told of
    the tokens: ``accept`` does that, so that several rows of one sequence can be sampled in turn and those after a
    wrong guess be left out.
    """
    best = logits.argmax(1)  # the first NaN of a row, if there is any
    made = Sampled(best)
    finite = np.isfinite(logits[np.arange(len(best)), best])
    for row in (~finite).nonzero()[0].tolist() if np.count_nonzero(finite) < len(best) else ():
        made.errors[row] = not_a_number(logits[row], int(best[row]))
    for row, state in states.items():
        if row not in made.errors:
            try:
                made.tokens[row] = sample_row(logits[row], state, np.array([state.random]))[0]
            except LabinferError as error:
                made.errors[row] = error
            else:
                if (count := state.rules.params.logprobs) is not None:
                    made.logprobs[row] = token_logprobs(logits[row], int(best[row]), count, state.rules.decode)
    if made.errors:
        made.tokens[list(made.errors)] = -1
    return made


def sample_row(logits: np.ndarray, state: SamplingState, randoms: np.ndarray) -> np.ndarray:
    """The next token of ``state``'s sequence, by its row of logits, for each of ``randoms``, numbers in [0, 1)."""
    params, logits = state.rules.params, state.adjusted(logits)
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        raise not_a_number(logits, best)
    if params.greedy:
        return np.full(len(randoms), best)
    if params.min_p > 0 or params.typical_p < 1:
        logits = logits.copy()
        if params.min_p > 0:
            adjust.cut_by_min_p(logits, params.min_p, params.temperature)
        if params.typical_p < 1:
            adjust.cut_by_typical_p(logits, params.typical_p, params.temperature)
    return draw(logits, params.temperature, max(params.top_k, 0), params.top_p, randoms)


def not_a_number(logits: np.ndarray, best: int) -> LabinferError:
    """The error of a row whose greatest logit, ``best``, is no finite number."""
    if logits[best] == -np.inf:
        return no_token()
    return LabinferError("run.not-a-number", f"the logits are not numbers (token {best} has {logits[best]})")


def no_token() -> LabinferError:
    """The error of a row whose logits are all minus infinity."""
    return LabinferError("sampling.no-token", "no token is left to choose from: all are banned")
