"""Beam search: the likeliest answers as wholes, as far as a beam of a few unfinished ones finds them.

Each beam is a row of the batch. Where several answers go on from one, its row is forked: they share its cache blocks,
and copy the one that they write to. Which candidates survive and which finish is as in Hugging Face's ``generate`` with
``early_stopping="never"``; the names are vLLM's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from labinfer.errors import UsageError
from labinfer.runtime.batch import Part
from labinfer.runtime.generate import Prompts, list_prompts, tokenize
from labinfer.runtime.interrupts import interrupts_held
from labinfer.runtime.request import Request
from labinfer.runtime.sampling.sampler import not_a_number

if TYPE_CHECKING:
    from labinfer.runtime.model import Model


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """``beam_width`` answers of at most ``max_tokens`` tokens. Wrong values are one ``UsageError``.

    An end-of-text token finishes an answer, unless ``ignore_eos``, and is in its text with
    ``include_stop_str_in_output``. ``temperature`` divides the logits, 0 leaves them as they are. Answers are ranked by
    their log-probability divided by their length, an end-of-text token included, to the power of ``length_penalty``.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        wrong = []
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                wrong.append(f"{name} must be a whole number, 1 or more, got {value!r}")
        for name, least in (("temperature", 0.0), ("length_penalty", -math.inf)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < least:
                wrong.append(f"{name} must be a number{', 0 or more' if least == 0 else ''}, got {value!r}")
        if wrong:
            raise UsageError("beam-search.params", "; ".join(wrong))


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """An answer: ``tokens`` of prompt and answer, as in vLLM, and the ``text`` of the answer alone, empty for a model
    without a tokenizer; the log-probability of its tokens, and by what it is ranked. ``finish_reason`` is ``stop`` or
    ``length``.
    """

    tokens: list[int]
    text: str
    cum_logprob: float
    score: float
    finish_reason: str


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The answers to a prompt, the best first; fewer than ``beam_width`` where there are not so many."""

    sequences: list[BeamSearchSequence]


class Candidate(NamedTuple):
    """A token that may come after a beam, and the log-probability of the answer with it."""

    beam: int
    token: int
    logprob: float


class Finished(NamedTuple):
    """An answer that is complete."""

    score: float
    cum_logprob: float
    tokens: list[int]
    reason: str


@dataclass(slots=True)
class Beams:
    """The search for one prompt: ``rows`` of the batch with their log-probabilities ``logprobs``, float64."""

    model: Model
    prompt: list[int]
    params: BeamSearchParams
    eos_ids: frozenset[int]
    rows: list[int] = field(default_factory=list)
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(1))
    finished: list[Finished] = field(default_factory=list)
    made: int = 0

    @property
    def longest(self) -> int:
        """Tokens of an answer at most."""
        return min(self.params.max_tokens, self.model.max_len - len(self.prompt))

    def start(self) -> None:
        """Take a row for the prompt, and what the cache has of it."""
        self.rows = [self.model.batch.add(self.prompt)]
        self.model.batch.attach(self.rows[0])

    def step(self, logits: np.ndarray) -> None:
        """Go on by a token: float32 ``logits`` [rows, vocab_size]; without rows left the search is over."""
        width, self.made = self.params.beam_width, self.made + 1
        survivors: list[Candidate] = []
        count = (1 + max(1, len(self.eos_ids))) * width  # enough for as many survivors
        for rank, each in enumerate(candidates(logits, self.logprobs, self.params.temperature, count)):
            ends = each.token in self.eos_ids
            if (ends or self.made == self.longest) and rank < width:
                self.finish(each, "stop" if ends else "length")
            elif not ends and len(survivors) < width:
                survivors.append(each)
        self.finished = sorted(self.finished, key=lambda each: -each.score)[:width]
        self.replace([] if self.over(survivors) else survivors)

    def finish(self, last: Candidate, reason: str) -> None:
        """An answer is complete with ``last``."""
        tokens = [*self.model.batch.tokens(self.rows[last.beam]).tolist(), last.token]
        self.finished.append(Finished(self.score(last.logprob, self.made), last.logprob, tokens, reason))

    def score(self, logprob: float, length: int) -> float:
        """By what an answer of ``length`` tokens is ranked."""
        return logprob / math.pow(length, self.params.length_penalty)

    def over(self, survivors: Listing[Candidate]) -> bool:
        """Whether no survivor can become better than what is finished."""
        if self.made == self.longest or not survivors:
            return True
        length = self.longest if self.params.length_penalty > 0 else self.made
        attainable = self.score(survivors[0].logprob, length)
        return len(self.finished) == self.params.beam_width and attainable <= self.finished[-1].score

    def replace(self, survivors: Listing[Candidate]) -> None:
        """Have the rows be ``survivors``; those that nothing goes on from are given back."""
        batch, before, taken = self.model.batch, self.rows, set()
        self.rows = []
        for each in survivors:
            row = before[each.beam]
            self.rows.append(batch.fork(row) if each.beam in taken else row)
            taken.add(each.beam)
        for beam, row in enumerate(before):
            if beam not in taken:
                batch.remove(row)
        for row, each in zip(self.rows, survivors, strict=True):
            batch.extend(row, [each.token])
        self.logprobs = np.array([each.logprob for each in survivors])

    def output(self) -> BeamSearchOutput:
        """What was found."""
        return BeamSearchOutput(
            [
                BeamSearchSequence(each.tokens, self.text(each), each.cum_logprob, each.score, each.reason)
                for each in self.finished
            ]
        )

    def text(self, answer: Finished) -> str:
        """The text of an answer."""
        tokenizer, with_end = self.model.tokenizer, self.params.include_stop_str_in_output
        if tokenizer is None:
            return ""
        tokens = answer.tokens[len(self.prompt) :]
        if answer.reason == "stop" and not with_end:
            tokens = tokens[:-1]
        decoder = tokenizer.stream(self.prompt, skip_special_tokens=not with_end)
        return decoder.put(*tokens) + decoder.finish()


def beam_search(model: Model, prompts: Prompts, params: BeamSearchParams) -> list[BeamSearchOutput]:
    """The likeliest answers to one or several prompts (texts, or lists of token ids), in order.

    As many prompts as the plan has sequences for run together. Raises ``LabinferError`` when cache blocks run out.
    """
    engine = model.engine
    eos_ids = frozenset() if params.ignore_eos else engine.eos_ids
    searches = []
    for prompt in list_prompts(prompts):
        request = Request(tokenize(model, prompt))
        engine.check(request)
        searches.append(Beams(model, list(request.prompt), params, eos_ids))
    together = max(1, model.plan.limits.max_num_seqs // params.beam_width)
    for first in range(0, len(searches), together):
        run(model, searches[first : first + together])
    return [search.output() for search in searches]


def run(model: Model, searches: list[Beams]) -> None:
    """Search to the end, all of ``searches`` together; others can use the model between two steps."""
    with interrupts_held() as check:
        try:
            with model.lock:
                for search in searches:
                    search.start()
            while going := [search for search in searches if search.rows]:
                with model.lock:
                    advance(model, going)
                check()
        finally:
            with model.lock:
                for search in searches:
                    search.replace([])


def advance(model: Model, going: list[Beams]) -> None:
    """Make each of ``going`` longer by a token."""
    logits, start = last_logits(model, [row for search in going for row in search.rows]), 0
    for search in going:
        count = len(search.rows)
        search.step(logits[start : start + count])
        start += count


def last_logits(model: Model, rows: Listing[int]) -> np.ndarray:
    """Compute what is not computed of ``rows``, in as many steps as it takes: logits after the last token of each."""
    model.mend()
    batch, limits, index = model.batch, model.plan.limits, np.array(rows)
    logits = np.empty((len(rows), model.vocab_size), np.float32)
    while len(behind := (batch.num_tokens[index] > batch.num_computed[index]).nonzero()[0]):
        chosen = behind[: min(limits.max_num_seqs, limits.max_logits_rows)]
        left = batch.num_tokens[index[chosen]] - batch.num_computed[index[chosen]]
        counts = np.clip(limits.max_num_batched_tokens - (np.cumsum(left) - left), 0, left).astype(np.int32)
        chosen, left, counts = chosen[counts > 0], left[counts > 0], counts[counts > 0]
        ends = (counts == left).astype(np.int32)
        logits[chosen[ends > 0]] = model.compute(Part(index[chosen], counts, ends, np.zeros_like(ends)))
    return logits


def candidates(logits: np.ndarray, logprobs: np.ndarray, temperature: float, count: int) -> list[Candidate]:
    """The ``count`` likeliest ways to go on, or all, from the likeliest on.

    ``logits`` float32 [beams, vocab_size] come after answers with log-probabilities ``logprobs``, float64 [beams]; what
    is no number is a ``LabinferError``.
    """
    scaled = logits / np.float32(temperature) if temperature else logits
    greatest = scaled.max(1)
    totals = greatest + np.log(np.exp(scaled - greatest[:, np.newaxis]).sum(1, dtype=np.float64))
    for beam in (~np.isfinite(totals)).nonzero()[0].tolist():
        raise not_a_number(logits[beam], int(logits[beam].argmax()))
    kept = min(count, logits.shape[1])
    tokens = np.argpartition(scaled, -kept, axis=1)[:, -kept:]
    found = (np.take_along_axis(scaled, tokens, 1) + (logprobs - totals)[:, np.newaxis]).ravel()
    order = np.lexsort((tokens.ravel(), -found))[:count]  # equal ones by their tokens
    chosen = zip((order // kept).tolist(), tokens.ravel()[order].tolist(), found[order].tolist(), strict=True)
    return [Candidate(*each) for each in chosen]
