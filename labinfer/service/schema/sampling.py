"""The fields of a request that say how its answer is sampled, for all of OpenAI's generating endpoints."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import Field

from labinfer.runtime.sampling import SamplingParams, StructuredOutputs
from labinfer.service.errors import ApiError
from labinfer.service.options import ServiceOptions
from labinfer.service.schema.base import Body, ResponseFormat, StreamOptions

DIRECT = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "bad_words", "allowed_token_ids", "stop", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "n", "best_of", "prompt_logprobs",
)  # fmt: skip
"""Fields that are the engine's own, of the same name."""

SAMPLERS = "the samplers are temperature, top_k, top_p, min_p and typical_p"
FORM = "use 'response_format' or 'structured_outputs'"

Number = float | int


class SamplingBody(Body):
    """Fields that mean the same to the engine; ``None`` is the default of each.

    Those refused are what vLLM, SGLang and llama.cpp know beside ours.
    """

    REFUSED: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), FORM),
        **dict.fromkeys(("json_schema", "regex", "grammar", "ebnf"), FORM),
        **dict.fromkeys(
            ("mirostat", "xtc_probability", "dry_multiplier", "dynatemp_range", "top_a", "tfs_z"), SAMPLERS
        ),
        "repeat_penalty": "use 'repetition_penalty'",
        "n_predict": "use 'max_tokens'",
        "use_beam_search": "answers are sampled",
        "logits_processors": "functions of clients are not run",
        "custom_logit_processor": "functions of clients are not run",
        "stop_regex": "use 'stop'",
        "repetition_detection": "use 'stop' or a penalty",
        "truncate_prompt_tokens": "a prompt is never cut",
        "prompt_embeds": "a prompt is text or token ids",
        "return_tokens_as_token_ids": "tokens are told as texts",
    }

    temperature: Number | None = Field(default=None, ge=0, le=100)
    top_p: Number | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=1 << 31)
    min_p: Number | None = Field(default=None, ge=0, le=1)
    typical_p: Number | None = Field(default=None, gt=0, le=1)
    presence_penalty: Number | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(default=None, gt=0, le=100)
    logit_bias: dict[str, Number] | None = Field(default=None, max_length=1024)
    bad_words: list[str] | None = Field(default=None, max_length=64)
    allowed_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=256)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    skip_special_tokens: bool | None = None
    n: int | None = Field(default=None, ge=1)
    best_of: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    cache_salt: str | None = Field(default=None, max_length=256)
    priority: int | None = Field(default=None, ge=-(1 << 31), lt=1 << 31)

    def params(self, options: ServiceOptions, max_tokens: int | None, **more: Any) -> SamplingParams:
        """The engine's parameters; ``max_tokens`` as the endpoint calls it, ``more`` in the engine's own names."""
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(400, "prompt_logprobs: they are not told in a stream", param="prompt_logprobs")
        stops = self.stop if isinstance(self.stop, list) else []
        check_bound("stop", len(stops), options.max_stops)
        check_bound("n", max(self.n or 1, self.best_of or 1), options.max_choices)
        found = {name: value for name in DIRECT if (value := getattr(self, name)) is not None}
        if stops == [] and isinstance(self.stop, list):
            found.pop("stop")
        if self.seed is not None:
            found["seed"] = self.seed % (1 << 64)
        if self.min_tokens is not None:
            found["min_tokens"] = self.min_tokens if max_tokens is None else min(self.min_tokens, max_tokens)
        return SamplingParams(max_tokens=max_tokens, **{"structured_outputs": self.structure(), **found, **more})

    def structure(self) -> StructuredOutputs | None:
        """The form that the answer must have."""
        wanted = self.response_format
        if self.structured_outputs is not None:
            if wanted is not None and wanted.type != "text":
                raise ApiError(400, "give response_format or structured_outputs, not both", param="structured_outputs")
            known = {name: value for name, value in self.structured_outputs.items() if value is not None}
            if unknown := known.keys() - {"json", "regex", "choice", "grammar"}:
                raise ApiError(400, f"structured_outputs has no '{min(unknown)}'", param="structured_outputs")
            return StructuredOutputs(**known) if known else None
        return None if wanted is None else structure_of(wanted)


def check_bound(name: str, count: int, bound: int) -> None:
    """Refuse more of something than the service gives."""
    if count > bound:
        raise ApiError(400, f"{name}: at most {bound} are allowed here, got {count}", param=name, code="invalid_value")


def structure_of(wanted: ResponseFormat) -> StructuredOutputs | None:
    """What a ``response_format`` asks for."""
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return StructuredOutputs(json={"type": "object"})
    if wanted.type == "json_schema" and wanted.json_schema is not None:
        schema = wanted.json_schema.schema_
        return StructuredOutputs(json=json.dumps({} if schema is None else schema))
    if wanted.type in ("regex", "grammar") and (text := getattr(wanted, wanted.type)) is not None:
        return StructuredOutputs(**{wanted.type: text})
    known = "text, json_object, json_schema, regex and grammar"
    message = f"response_format.type '{wanted.type[:40]}' is unknown or lacks its field; {known} are known"
    raise ApiError(400, message, param="response_format", code="invalid_value")
