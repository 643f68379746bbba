"""How the next token is chosen and when an answer ends, per request, under the names and with the meanings of vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from math import isnan
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import numpy as np

from labinfer.errors import UsageError

LogitsProcessor = Callable[[Sequence[int], np.ndarray], np.ndarray]
"""``processor(output_token_ids, logits)``: the logits float32 [vocab_size] to use instead."""

INFINITY = float("inf")


class Number(NamedTuple):
    """The numbers, or switches, that a field may have: what they are called, and which those are."""

    kind: Any
    limits: str = ""
    allows: Callable[[Any], bool] = lambda value: True


SWITCH = Number(bool)
COUNT = Number(Integral, "1 or more", lambda value: value >= 1)
COUNT_OR_0 = Number(Integral, "0 or more", lambda value: value >= 0)
COUNT_OR_ALL = Number(Integral, "-1 (all) or more", lambda value: value >= -1)
COUNT_OR_OFF = Number(Integral, "0 (off) or more", lambda value: value >= -1)
SEED = Number(Integral, "from 0 to 2**64 - 1", lambda value: 0 <= value < 1 << 64)
TEMPERATURE = Number(Real, "0 or more", lambda value: 0 <= value < INFINITY)
FACTOR = Number(Real, "above 0", lambda value: 0 < value < INFINITY)
PENALTY = Number(Real, "between -2 and 2", lambda value: -2 <= value <= 2)
MASS = Number(Real, "above 0 and at most 1", lambda value: 0 < value <= 1)
PART = Number(Real, "between 0 and 1", lambda value: 0 <= value <= 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What an answer must look like: exactly one of a JSON schema (object or text), a regular expression, a list of
    texts of which one is chosen, and a grammar in Lark's or llama.cpp's (GBNF) notation.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}
        if len(given) != 1:
            message = (
                f"structured_outputs takes one of json, regex, choice and grammar, not {' and '.join(given) or 'none'}"
            )
            raise UsageError("sampling.params", message)
        [(name, value)] = given.items()
        checked = {"json": schema_text, "choice": choices}.get(name, one_text)
        object.__setattr__(self, name, checked(f"structured_outputs.{name}", value))


def schema_text(name: str, schema: object) -> str:
    """A JSON schema as text."""
    if isinstance(schema, str):
        return schema
    try:
        if isinstance(schema, Mapping):
            return json.dumps(dict(schema), allow_nan=False)
        problem = f"not {type(schema).__name__}"
    except (TypeError, ValueError, RecursionError) as error:
        problem = str(error)
    raise UsageError("sampling.params", f"{name} must be a JSON schema, as an object or as text: {problem}")


def choices(name: str, value: object) -> tuple[str, ...]:
    """Texts to choose from."""
    if isinstance(value, str) or not (listed := texts(name, value)):
        raise UsageError("sampling.params", f"{name} must be a list of texts, got {value!r}")
    return listed


def one_text(name: str, value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise UsageError("sampling.params", f"{name} must be text, not {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Everything a request can say about its answer. Wrong values are one ``UsageError`` that names every field.

    The logits of a token go through, in this order: ``logits_processors``; ``structured_outputs``,
    ``allowed_token_ids``, ``bad_words`` and ``min_tokens``, which ban tokens; ``logit_bias``; ``repetition_penalty``,
    ``frequency_penalty`` and ``presence_penalty``. With ``temperature`` 0 the greatest is taken then (the first of
    equals); else they are divided by ``temperature``, cut by ``min_p``, ``typical_p``, ``top_k`` and ``top_p``, and
    one is drawn from what is left. Log-probabilities are those of the model, before all of this.
    """

    n: Annotated[int, COUNT, "answers to a prompt"] = 1
    best_of: Annotated[int | None, COUNT, "answers made, of which the ``n`` likeliest are given back"] = None
    temperature: Annotated[float, TEMPERATURE, "divides the logits; 0 takes the likeliest token each time"] = 1.0
    top_k: Annotated[int, COUNT_OR_OFF, "choose among that many likeliest tokens; 0 or -1: all"] = 0
    top_p: Annotated[float, MASS, "choose among the likeliest tokens that make up this probability"] = 1.0
    min_p: Annotated[float, PART, "choose among tokens with this part of the likeliest one's probability"] = 0.0
    typical_p: Annotated[float, MASS, "choose among tokens of usual surprise that make up this probability"] = 1.0
    repetition_penalty: Annotated[
        float, FACTOR, "divides positive, multiplies negative logits of tokens in prompt or answer"
    ] = 1.0
    presence_penalty: Annotated[float, PENALTY, "taken from the logits of tokens in the answer"] = 0.0
    frequency_penalty: Annotated[float, PENALTY, "the same, for each time that they are there"] = 0.0
    logit_bias: Annotated[Mapping[int, float] | None, "added to the logits of these tokens, cut to -100 … 100"] = None
    bad_words: Annotated[Sequence[str], "texts that are not completed, at the start of a word or after a space"] = ()
    allowed_token_ids: Annotated[Sequence[int] | None, "choose among these tokens only"] = None
    logits_processors: Annotated[Sequence[LogitsProcessor], "[your own functions](#logits-processors)"] = ()
    structured_outputs: Annotated[StructuredOutputs | None, "[the form](#structured-output) of the answer"] = None
    seed: Annotated[int | None, SEED, "makes a request repeatable, alone or among others"] = None
    stop: Annotated[str | Sequence[str], "texts that end the answer, which stops before them"] = ()
    stop_token_ids: Annotated[Sequence[int], "tokens that end the answer"] = ()
    include_stop_str_in_output: Annotated[bool, SWITCH, "leave what ended the answer in its text"] = False
    ignore_eos: Annotated[bool, SWITCH, "go on past the end of the text; nothing is banned"] = False
    min_tokens: Annotated[int, COUNT_OR_0, "tokens of the answer before a token or text may end it"] = 0
    max_tokens: Annotated[int | None, COUNT, "tokens of the answer; none: to the end of the context"] = 16
    logprobs: Annotated[int | None, COUNT_OR_ALL, "log-probabilities of so many likeliest tokens; -1: of all"] = None
    prompt_logprobs: Annotated[int | None, COUNT_OR_ALL, "the same for the tokens of the prompt"] = None
    detokenize: Annotated[bool, SWITCH, "make text of the tokens"] = True
    skip_special_tokens: Annotated[bool, SWITCH, "leave special tokens out of the text"] = True

    def __post_init__(self) -> None:
        wrong = [told for each in numbers() if (told := each.wrong(getattr(self, each.name)))]
        for name, normalize in _NORMALIZE.items():
            try:
                object.__setattr__(self, name, normalize(name, getattr(self, name)))
            except UsageError as error:
                wrong.append(error.message)
        if not wrong:
            wrong = self._contradictions()
        if wrong:
            raise UsageError("sampling.params", "; ".join(wrong))

    def _contradictions(self) -> list[str]:
        """What is wrong with fields that are right alone."""
        found = [
            (self.best_of is not None and self.best_of < self.n, "best_of must be at least n"),
            (
                self.max_tokens is not None and self.min_tokens > self.max_tokens,
                "min_tokens must be at most max_tokens",
            ),
            (bool(self.stop) and not self.detokenize, "stop needs detokenize: it is found in the text"),
            (self.allowed_token_ids == (), "allowed_token_ids is empty: no token is left"),
        ]
        return [message for failed, message in found if failed]

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, and not drawn."""
        return self.temperature == 0 or self.top_k == 1


class NumberField(NamedTuple):
    """A field of ``SamplingParams`` that is a number or a switch, or None where it is ``optional``."""

    name: str
    number: Number
    optional: bool

    def wrong(self, value: Any) -> str | None:
        """What is wrong with a value."""
        name, (kind, limits, allows), optional = self
        if value is None and optional:
            return None
        if kind is bool:
            return None if isinstance(value, bool | np.bool_) else f"{name} must be true or false, got {value!r}"
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} must be a {'whole ' if kind is Integral else ''}number, got {value!r}"
        return None if allows(value) else f"{name} must be {limits}, got {value}"


@cache
def numbers() -> list[NumberField]:
    """The fields of ``SamplingParams`` that are numbers or switches."""
    hints = get_type_hints(SamplingParams, include_extras=True).items()
    return [
        NumberField(name, hint.__metadata__[0], type(None) in get_args(hint.__origin__))
        for name, hint in hints
        if isinstance(hint.__metadata__[0], Number)
    ]


def several(name: str, value: Any, what: str, right: Callable[[Any], bool]) -> tuple[Any, ...]:
    """The elements of ``value``, None for none; each of them must be ``right``."""
    if value is None:
        return ()
    listed = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else (None,)
    if not all(map(right, listed)):
        raise UsageError("sampling.params", f"{name} must be {what}, got {value!r}")
    return listed


def texts(name: str, value: Any) -> tuple[str, ...]:
    """One text or several, none of them empty."""
    listed = [value] if isinstance(value, str) else value
    return several(name, listed, "texts that are not empty", lambda each: isinstance(each, str) and each != "")


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids as a tuple of Python's integers."""
    return tuple(map(int, several(name, value, "token ids", is_token)))


def is_token(value: object) -> bool:
    """Whether ``value`` could be a token id."""
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 1 << 31


def bias(name: str, value: Any) -> dict[int, float] | None:
    """Token ids, as numbers or as JSON's texts, with what is added to their logits, cut as vLLM cuts it."""
    if value is None:
        return None
    try:
        pairs = {int(token): float(amount) for token, amount in value.items()}
        if all(map(is_token, pairs)) and not any(map(isnan, pairs.values())):
            return {token: min(max(amount, -100.0), 100.0) for token, amount in pairs.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        pass
    raise UsageError("sampling.params", f"{name} must give token ids numbers, got {value!r}")


def structure(name: str, value: Any) -> StructuredOutputs | None:
    """``StructuredOutputs``, which may be given as a mapping."""
    if value is None or isinstance(value, StructuredOutputs):
        return value
    known = {each.name for each in fields(StructuredOutputs)}
    if not isinstance(value, Mapping) or not value.keys() <= known:
        raise UsageError("sampling.params", f"{name} must be StructuredOutputs, got {value!r}")
    return StructuredOutputs(**value)


_NORMALIZE: dict[str, Callable[[str, Any], Any]] = {
    "logit_bias": bias,
    "bad_words": texts,
    "allowed_token_ids": lambda name, value: None if value is None else token_ids(name, value),
    "logits_processors": lambda name, value: several(name, value, "functions of token ids and logits", callable),
    "structured_outputs": structure,
    "stop": texts,
    "stop_token_ids": token_ids,
}
