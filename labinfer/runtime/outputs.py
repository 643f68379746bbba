"""What a request gives back, under the names that vLLM uses."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

import numpy as np

from labinfer.runtime.capture import captured
from labinfer.runtime.request import Request, RequestMetrics, Sequence
from labinfer.runtime.sampling import Logprob


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. ``text`` is empty for a model without a tokenizer.

    ``finish_reason`` is ``stop``, ``length``, ``abort``, or None while more may come; ``stop_reason`` the token or text
    that stopped it, None for an end-of-text token. ``logprobs`` has, for each token, log-probabilities by token id, and
    ``cumulative_logprob`` the sum of those of the answer's own tokens, where they were asked for. ``captured`` has the
    values that the request asked for, by name, float32 [tokens, features]: a row for each token of prompt and answer
    but the last, which nothing was computed from.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    captured: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to a prompt, the likeliest first where ``best_of`` were made, else by index.

    ``text``, ``token_ids`` and ``finish_reason`` are those of the first. ``prompt_logprobs`` has None for the first
    token, which nothing stands before.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the first answer."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first answer ended."""
        return self.outputs[0].finish_reason


def output_of(request: Request) -> RequestOutput:
    """What ``request`` has made so far."""
    outputs = [completion_of(sequence) for sequence in request.sequences]
    params = request.params
    if request.num_made > params.n:
        outputs = sorted(outputs, key=lambda output: -(output.cumulative_logprob or 0.0))[: params.n]
    return RequestOutput(
        request_id=request.number,
        prompt=request.text,
        prompt_token_ids=list(request.prompt),
        outputs=outputs,
        finished=request.finished,
        metrics=request.metrics,
        prompt_logprobs=None if params.prompt_logprobs is None else request.prompt_logprobs,
    )


def completion_of(sequence: Sequence) -> CompletionOutput:
    """What ``sequence`` has made so far."""
    done, tokens, params = sequence.done, sequence.generated, sequence.request.params
    logprobs = sequence.logprobs[: len(tokens)]
    return CompletionOutput(
        index=sequence.index,
        text=sequence.text,
        token_ids=tokens,
        finish_reason=sequence.finish_reason if done else None,
        stop_reason=sequence.stop_reason,
        cumulative_logprob=cumulative(logprobs, tokens) if sequence.request.rules.params.logprobs is not None else None,
        logprobs=logprobs if params.logprobs is not None else None,
        captured=captured(sequence) if done else {},
    )


def cumulative(logprobs: Listing[dict[int, Logprob]], tokens: Listing[int]) -> float:
    """The log-probability of all of ``tokens``."""
    return sum(of[token].logprob for of, token in zip(logprobs, tokens, strict=True))
