"""Prompts in, texts out: the engine run to the end, with the tokenizer on both sides."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from labinfer.errors import UsageError
from labinfer.runtime.engine import Engine
from labinfer.runtime.lora import LoRARequest
from labinfer.runtime.sampling_params import SamplingParams
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
    lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
) -> list[Completion]:
    """Complete ``prompts`` together, many in each step.

    ``on_token(index, text)`` is called with the text that became certain for prompt ``index``. An end-of-text token is
    in ``token_ids`` but not in ``text``. ``lora_request`` is the adapter of all prompts, or a list with each one's.
    """
    started, tokenizer = time.perf_counter(), model.tokenizer
    engine = Engine(model, tokenizer.eos_ids if tokenizer else ())
    params, listed = params or SamplingParams(), tokenize(model, prompts)
    adapters = lora_requests(lora_request, len(listed))
    requests = [engine.add(tokens, params, lora) for tokens, lora in zip(listed, adapters, strict=True)]
    streams = [tokenizer.stream(request.prompt) if tokenizer else None for request in requests]
    texts = ["" for _ in requests]
    times: list[list[float]] = [[] for _ in requests]

    def say(index: int, text: str) -> None:
        texts[index] += text
        if on_token and text:
            on_token(index, text)

    try:
        for made in engine.run():
            index, stream = made.request.number, streams[made.request.number]
            times[index] = [*times[index][:1], time.perf_counter() - started]
            if stream and made.finish_reason != "stop":
                say(index, stream.put(made.token_id))
            if stream and made.finish_reason:
                say(index, stream.finish())
    finally:
        engine.abort()
    return [_completion(*each) for each in zip(requests, texts, times, strict=True)]


def _completion(request: Request, text: str, times: list[float]) -> Completion:
    reason = request.finish_reason or "abort"
    return Completion(request.prompt, request.generated, text, reason, times[0], times[-1])


def lora_requests(given: LoRARequest | Sequence[LoRARequest | None] | None, count: int) -> Sequence[LoRARequest | None]:
    """The adapter of each of ``count`` prompts."""
    kinds = (LoRARequest, type(None))
    listed = [given] * count if isinstance(given, kinds) else given
    if not isinstance(listed, list | tuple) or not all(isinstance(each, kinds) for each in listed):
        raise UsageError("lora.request", f"lora_request must be a LoRARequest or a list of them, got {given!r:.60}")
    if len(listed) != count:
        raise UsageError("lora.request", f"lora_request names {len(listed)} adapters for {count} prompts")
    return listed


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
