"""Prompts in, texts out: the engine run to the end, with the tokenizer on both sides."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from labinfer.errors import UsageError
from labinfer.runtime.engine import Engine
from labinfer.runtime.sampling import AnswerText, SamplingParams
from labinfer.runtime.scheduler import Request

if TYPE_CHECKING:
    from labinfer.runtime.model import Model

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer. ``text`` is empty for a model without a tokenizer; ``finish_reason`` is ``stop`` or ``length``.

    ``seconds`` and ``first_token_seconds`` count from the call, for the last and for the first token.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    first_token_seconds: float
    seconds: float


def generate(
    model: Model,
    prompts: Prompts,
    params: SamplingParams | None = None,
    on_token: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Complete ``prompts`` together, many in each step.

    ``on_token(index, text)`` is called with the text that became certain for prompt ``index``. An end-of-text token is
    in ``token_ids`` but not in ``text``.
    """
    started, tokenizer = time.perf_counter(), model.tokenizer
    engine = Engine(model, tokenizer.eos_ids if tokenizer else ())
    requests = [engine.add(tokens, params or SamplingParams()) for tokens in tokenize(model, prompts)]
    texts = [answer_text(model, request) for request in requests]
    times: list[list[float]] = [[] for _ in requests]
    try:
        for made in engine.run():
            request, index = made.request, made.request.number
            times[index] = [*times[index][:1], time.perf_counter() - started]
            if text := texts[index]:
                new = text.put(made.token_id) if made.in_text else ""
                if text.stop is not None and made.finish_reason is None:
                    engine.scheduler.finish(request, "stop")
                new += text.finish() if request.finish_reason else ""
                if on_token and new:
                    on_token(index, new)
    finally:
        engine.abort()
    return [_completion(*each) for each in zip(requests, texts, times, strict=True)]


def answer_text(model: Model, request: Request) -> AnswerText | None:
    """What makes the text of an answer, where there is a tokenizer and text is wanted."""
    if model.tokenizer is None or not request.params.detokenize:
        return None
    skip = request.params.skip_special_tokens
    return AnswerText(model.tokenizer.stream(request.prompt, skip_special_tokens=skip), request.params)


def _completion(request: Request, text: AnswerText | None, times: list[float]) -> Completion:
    reason = request.finish_reason or "abort"
    return Completion(request.prompt, request.generated, text.text if text else "", reason, times[0], times[-1])


def tokenize(model: Model, prompts: Prompts) -> list[Sequence[int]]:
    """Token ids of every prompt, whether it was given as text or as ids."""
    try:
        listed: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    except TypeError:
        message = f"prompts must be texts or lists of token ids, not {type(prompts).__name__}"
        raise UsageError("run.prompt", message) from None
    if listed and isinstance(listed[0], Integral):  # numpy's numbers too
        listed = [listed]
    if model.tokenizer is None and any(isinstance(prompt, str) for prompt in listed):
        raise UsageError("run.no-tokenizer", "this model has no tokenizer: give token ids instead of text")
    return [model.tokenizer.encode(p) if model.tokenizer and isinstance(p, str) else p for p in listed]
