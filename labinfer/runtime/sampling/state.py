"""What sampling must know of a sequence beside its last row of logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from labinfer.errors import LabinferError
from labinfer.runtime.sampling import adjust
from labinfer.runtime.sampling.params import LogitsProcessor
from labinfer.runtime.sampling.random_numbers import uniform
from labinfer.runtime.sampling.rules import SamplingRules, Stop
from labinfer.runtime.sampling.token_counts import TokenCounts


class SamplingState:
    """Sequence ``index`` of a request, whose random numbers ``seed`` (64 bits) gives.

    It depends on nothing but its arguments: made again from the prompt and the tokens of the answer so far, it goes on
    with the same tokens.
    """

    def __init__(
        self, rules: SamplingRules, seed: int, index: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = ()
    ) -> None:
        self.rules, self.seed, self.index = rules, seed, index
        self.output: list[int] = []
        self.counts = TokenCounts(prompt if rules.params.repetition_penalty != 1 else ()) if rules.penalizes else None
        self.matcher = rules.grammar.matcher() if rules.grammar else None
        for token in output:
            self.accept(token)

    @property
    def random(self) -> float:
        """The number in [0, 1) that draws the next token."""
        number: float = uniform(self.seed, self.index, len(self.output))
        return number

    @property
    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that penalties look at, int64, and how often each is in the answer, int32."""
        counts = self.counts or TokenCounts(())
        return counts.ids, counts.counts

    def accept(self, token: int) -> Stop | None:
        """``token`` is the next one of the answer; the end that it makes of it, if any.

        A token that the request's grammar does not allow is an error of the request.
        """
        self.output.append(token)
        if self.counts is not None:
            self.counts.add(token)
        stop = self.rules.stop(token)
        if stop is None and self.matcher is not None:
            self.matcher.accept(token)
            if self.matcher.ended:
                stop = Stop(None, token not in self.rules.eos_ids)
        return stop

    def fork(self, index: int) -> SamplingState:
        """Sequence ``index`` of the same request, which goes on from here."""
        other = object.__new__(SamplingState)
        other.rules, other.seed, other.index = self.rules, self.seed, index
        other.output = list(self.output)
        other.counts = self.counts.copy() if self.counts is not None else None
        other.matcher = self.matcher.copy() if self.matcher is not None else None
        return other

    def adjusted(self, logits: np.ndarray) -> np.ndarray:
        """The model's ``logits`` after everything that stands before temperature: a copy where that is anything."""
        rules, params = self.rules, self.rules.params
        if not rules.changes_logits:
            return logits
        logits = logits.copy()
        for processor in params.logits_processors:
            logits = processed(processor, ReadOnly(self.output), logits)
        if self.matcher is not None:
            self.matcher.mask(logits)
        if rules.allowed is not None:
            adjust.allow_only(logits, rules.allowed)
        if rules.bad_words:
            adjust.ban_bad_words(logits, rules.bad_words, self.output)
        if len(self.output) < params.min_tokens:
            logits[rules.end_ids] = adjust.NEVER
        if len(rules.bias_ids):
            logits[rules.bias_ids] += rules.bias
        if self.counts is not None:
            repetition, frequency = params.repetition_penalty, params.frequency_penalty
            adjust.penalize(logits, self.counts, repetition, frequency, params.presence_penalty)
        return logits


class ReadOnly(Sequence[int]):
    """The tokens of an answer, to be looked at: copying a long one for each of its tokens would take long."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def __getitem__(self, index: Any) -> Any:
        return self._tokens[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)


def processed(processor: LogitsProcessor, output: Sequence[int], logits: np.ndarray) -> np.ndarray:
    """What a user's function makes of ``logits``; its failure is one of the request."""
    name = getattr(processor, "__name__", type(processor).__name__)
    try:
        made = np.ascontiguousarray(processor(output, logits), np.float32)
    except Exception as problem:
        message = f"the logits processor {name} failed: {type(problem).__name__}: {problem}"
        raise LabinferError("sampling.processor", message) from problem
    if made.shape != logits.shape:
        message = f"the logits processor {name} must return {len(logits)} logits, not an array of shape {made.shape}"
        raise LabinferError("sampling.processor", message)
    return made
