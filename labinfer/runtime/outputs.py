"""What a request gives back, under the names that vLLM uses."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from labinfer.runtime.capture import captured
from labinfer.runtime.request import Request, RequestMetrics, Sequence
from labinfer.runtime.sampling import Logprob


class RequestOutputKind(Enum):
    """What an output of a stream holds of each answer: all so far, what is new, or all at the end.

    Where ``best_of`` answers are made there is one output, at the end: only then is it known which are the likeliest.
    """

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. ``text`` is empty for a model without a tokenizer.

    ``finish_reason`` is ``stop``, ``length``, ``abort``, or None while more may come; ``stop_reason`` the token or text
    that stopped it, None for an end-of-text token. ``logprobs`` has, for each token, log-probabilities by token id, and
    ``cumulative_logprob`` the sum of those of the answer's own tokens, where they were asked for. Where a stream gives
    what is new, ``text``, ``token_ids`` and ``logprobs`` are, and the rest is of the whole answer. ``captured`` has the
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
    prompt_token_ids: Listing[int]
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


@dataclass(slots=True)
class Given:
    """How much of an answer was given out before: pieces of text, tokens, their log-probability, and its end."""

    pieces: int = 0
    tokens: int = 0
    logprob: float = 0.0
    ended: bool = False


def output_of(request: Request) -> RequestOutput:
    """What ``request`` has made so far."""
    outputs = [completion_of(sequence, Given()) for sequence in request.sequences]
    finished = bool(outputs) and all(output.finish_reason is not None for output in outputs)
    if request.num_made > request.params.n:
        outputs = sorted(outputs, key=lambda output: -(output.cumulative_logprob or 0.0))[: request.params.n]
    return request_output(request, outputs, finished)


class Deltas:
    """Gives out what is new of a request, each token once and each end once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.given: dict[int, Given] = {}

    def take(self) -> RequestOutput:
        """What is new since the last time: of some answers, or of none."""
        outputs = []
        for sequence in self.request.sequences:  # may grow, but not after the first has ended
            given = self.given.setdefault(sequence.index, Given())
            if not given.ended:
                before = given.pieces, given.tokens
                output = completion_of(sequence, given)
                if output.finish_reason is not None or before != (given.pieces, given.tokens):
                    outputs.append(output)
        finished = bool(self.given) and all(given.ended for given in self.given.values())
        return request_output(self.request, outputs, finished)


def request_output(request: Request, outputs: list[CompletionOutput], finished: bool) -> RequestOutput:
    """``outputs`` with all that is about the request."""
    return RequestOutput(
        request_id=request.number,
        prompt=request.text,
        prompt_token_ids=request.prompt,
        outputs=outputs,
        finished=finished,
        metrics=request.metrics,
        prompt_logprobs=None if request.params.prompt_logprobs is None else request.prompt_logprobs,
    )


def completion_of(sequence: Sequence, given: Given) -> CompletionOutput:
    """What ``sequence`` has made after what was ``given``, which is all given then."""
    given.ended = done = sequence.done
    tokens, pieces, params = (
        sequence.generated_after(given.tokens),
        sequence.pieces[given.pieces :],
        sequence.request.params,
    )
    logprobs = sequence.logprobs[given.tokens : given.tokens + len(tokens)]
    given.tokens, given.pieces = given.tokens + len(tokens), given.pieces + len(pieces)
    if logprobs:
        given.logprob += sum(of[token].logprob for of, token in zip(logprobs, tokens, strict=True))
    return CompletionOutput(
        index=sequence.index,
        text="".join(pieces),
        token_ids=tokens,
        finish_reason=sequence.finish_reason if done else None,
        stop_reason=sequence.stop_reason if done else None,
        cumulative_logprob=given.logprob if sequence.request.rules.params.logprobs is not None else None,
        logprobs=logprobs if params.logprobs is not None else None,
        captured=captured(sequence) if done else {},
    )
