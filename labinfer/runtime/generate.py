"""Prompts in, texts out: the engine run to the end, with the tokenizer on both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from labinfer.errors import UsageError
from labinfer.runtime.interrupts import interrupts_held
from labinfer.runtime.lora import LoRARequest
from labinfer.runtime.outputs import RequestOutput, output_of
from labinfer.runtime.request import Request
from labinfer.runtime.request import Sequence as RunningSequence
from labinfer.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from labinfer.runtime.model import Model

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def generate(
    model: Model,
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    on_token: Callable[[int, str], None] | None = None,
    lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    **options: Any,
) -> list[RequestOutput]:
    """Complete ``prompts`` together, many in each step; ``params`` are for all of them, or one for each.

    ``on_token(index, text)`` is called with the text that became certain for prompt ``index``. An end-of-text token is
    in ``token_ids`` but not in ``text``. ``lora_request`` is the adapter of all prompts, or a list with each one's.
    ``options`` go to each ``Request``.
    """
    engine, given = model.engine, list_prompts(prompts)
    each_params, adapters = params_of_each(params, len(given)), lora_requests(lora_request, len(given))
    requests = [
        Request(tokenize(model, prompt), each, text=prompt if isinstance(prompt, str) else None, lora=lora, **options)
        for prompt, each, lora in zip(given, each_params, adapters, strict=True)
    ]
    tellers = [] if on_token is None else [Teller(index, on_token, engine.abort) for index in range(len(requests))]
    for request, teller in zip(requests, tellers, strict=False):
        request.listener, request.interactive = teller, True
    with interrupts_held():
        try:
            for request in requests:
                engine.add(request)
            engine.finish(requests)
        finally:
            for request in requests:
                engine.abort(request)
    for problem in [*(teller.problem for teller in tellers), *(request.error for request in requests)]:
        if problem is not None:
            raise problem
    return [output_of(request) for request in requests]


def encode_chats(model: Model, messages: Any, names: Mapping[str, Any]) -> list[list[int]]:
    """The prompts of one conversation or of several; ``names`` are for the chat template."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UsageError("chat.messages", f"messages must be a list, not {type(messages).__name__}")
    if model.tokenizer is None:
        raise UsageError("run.no-tokenizer", "this model has no tokenizer, and so no chat")
    if taken := {"messages", "source"} & names.keys():
        raise UsageError("chat.names", f"chat_template_kwargs cannot have the name '{taken.pop()}'")
    conversations = [messages] if any(isinstance(each, Mapping) for each in messages) else messages
    return [model.tokenizer.encode_chat(each, **names) for each in conversations]


class Teller:
    """A listener that hands the new text of its request's first answer to ``on_token``.

    What that raises is kept as ``problem`` and ends the request, not the step: others have a part in it.
    """

    def __init__(self, index: int, on_token: Callable[[int, str], None], abort: Callable[[Request], None]) -> None:
        self.index, self.on_token, self.abort, self.told = index, on_token, abort, 0
        self.problem: Exception | None = None

    def __call__(self, sequence: RunningSequence) -> None:
        """Tell what is new."""
        if sequence.index == 0 and len(sequence.pieces) > self.told and self.problem is None:
            new, self.told = "".join(sequence.pieces[self.told :]), len(sequence.pieces)
            try:
                self.on_token(self.index, new)
            except Exception as problem:
                self.problem = problem
                self.abort(sequence.request)


def params_of_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """The sampling parameters of each of ``count`` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UsageError("sampling.params", f"there are {count} prompts and {len(params)} sampling parameters")
    return list(params)


def lora_requests(given: LoRARequest | Sequence[LoRARequest | None] | None, count: int) -> Sequence[LoRARequest | None]:
    """The adapter of each of ``count`` prompts."""
    kinds = (LoRARequest, type(None))
    listed = [given] * count if isinstance(given, kinds) else given
    if not isinstance(listed, list | tuple) or not all(isinstance(each, kinds) for each in listed):
        raise UsageError("lora.request", f"lora_request must be a LoRARequest or a list of them, got {given!r:.60}")
    if len(listed) != count:
        raise UsageError("lora.request", f"lora_request names {len(listed)} adapters for {count} prompts")
    return listed


def list_prompts(prompts: Prompts) -> list[Any]:
    """One prompt or several as a list."""
    try:
        listed: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    except TypeError:
        message = f"prompts must be texts or lists of token ids, not {type(prompts).__name__}"
        raise UsageError("run.prompt", message) from None
    return [listed] if listed and isinstance(listed[0], Integral) else listed  # numpy's numbers too


def tokenize(model: Model, prompt: str | Sequence[int]) -> Sequence[int]:
    """Token ids of a prompt, whether it was given as text or as ids."""
    if not isinstance(prompt, str):
        return prompt
    if model.tokenizer is None:
        raise UsageError("run.no-tokenizer", "this model has no tokenizer: give token ids instead of text")
    return model.tokenizer.encode(prompt)
