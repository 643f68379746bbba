"""What the sampling parameters of a request mean for a model's vocabulary, worked out once per request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from labinfer.errors import UsageError
from labinfer.runtime.sampling.grammar import Grammar, compile_grammar
from labinfer.runtime.sampling.params import SamplingParams

if TYPE_CHECKING:
    from labinfer.runtime.tokenizer import Tokenizer


class Stop(NamedTuple):
    """The end of an answer by a token: ``reason`` is the token if the request named it, None for an end-of-text token
    and for the end of a grammar. ``in_text`` says whether the token's text belongs to the answer's.
    """

    reason: int | None
    in_text: bool


class SamplingRules:
    """``params`` for a vocabulary of ``vocab_size`` tokens of which ``eos_ids`` end a text.

    Raises UsageError, naming every wrong field, for tokens that do not exist, for what needs the tokenizer that the
    model has not, and for a grammar that cannot be used.
    """

    def __init__(
        self, params: SamplingParams, vocab_size: int, eos_ids: Iterable[int] = (), tokenizer: Tokenizer | None = None
    ) -> None:
        self.params, self.vocab_size, self.tokenizer = params, vocab_size, tokenizer
        check_tokens(params, vocab_size, tokenizer)
        self.eos_ids = frozenset(eos_ids)
        self.stop_token_ids = frozenset(params.stop_token_ids)
        ends = self.stop_token_ids if params.ignore_eos else self.stop_token_ids | self.eos_ids
        self.end_ids = np.array(sorted(token for token in ends if token < vocab_size), np.int64)
        bias = params.logit_bias or {}
        self.bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        self.allowed = None if params.allowed_token_ids is None else np.array(params.allowed_token_ids, np.int64)
        self.bad_words = bad_word_tokens(params.bad_words, tokenizer) if tokenizer and params.bad_words else ()
        self.grammar: Grammar | None = None
        if params.structured_outputs is not None and tokenizer is not None:
            self.grammar = compile_grammar(params.structured_outputs, tokenizer, vocab_size)

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there are penalized."""
        params = self.params
        return params.repetition_penalty != 1 or bool(params.frequency_penalty or params.presence_penalty)

    @property
    def changes_logits(self) -> bool:
        """Whether anything is done to the logits before temperature."""
        params = self.params
        return (
            bool(params.logits_processors or params.bad_words or params.min_tokens or params.logit_bias)
            or self.grammar is not None
            or self.allowed is not None
            or self.penalizes
        )

    @property
    def plain(self) -> bool:
        """Whether every token is just that of the greatest logit: nothing needs to be known of the sequence."""
        return self.params.greedy and not self.changes_logits and self.params.logprobs is None

    @property
    def simple(self) -> bool:
        """Whether a device that chooses tokens can: nothing but the biases and penalties of tokens, and the draw."""
        params = self.params
        others = params.logits_processors or params.bad_words or params.typical_p < 1 or params.logprobs is not None
        return not others and self.grammar is None and self.allowed is None

    def biases(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """What is added to which logits of token ``number``: ids, int32, and float32 numbers, minus infinity to ban."""
        ended = self.end_ids if number < self.params.min_tokens else self.end_ids[:0]
        others = ~np.isin(self.bias_ids, ended)
        ids = np.concatenate([ended, self.bias_ids[others]]).astype(np.int32)
        return ids, np.concatenate([np.full(len(ended), -np.inf, np.float32), self.bias[others]])

    @property
    def decode(self) -> Callable[[int], str] | None:
        """Gives the text of one token, where text is made."""
        tokenizer = self.tokenizer
        if tokenizer is None or not self.params.detokenize:
            return None
        return lambda token: tokenizer.decode([token], skip_special_tokens=False)

    def stop(self, token: int) -> Stop | None:
        """The end that ``token`` makes of an answer, if any."""
        if token in self.stop_token_ids:
            return Stop(token, self.params.include_stop_str_in_output)
        if token in self.eos_ids and not self.params.ignore_eos:
            return Stop(None, self.params.include_stop_str_in_output)
        return None


def check_tokens(params: SamplingParams, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Refuse tokens that are not in the vocabulary and what needs a tokenizer where there is none."""
    wrong = []
    for name in ("logit_bias", "allowed_token_ids"):
        outside = [token for token in getattr(params, name) or () if token >= vocab_size]
        if outside:
            wrong.append(f"{name} has token {outside[0]}, the vocabulary has {vocab_size}")
    if tokenizer is None:
        needing = [name for name in ("stop", "bad_words", "structured_outputs") if getattr(params, name)]
        wrong += [f"{name} needs a tokenizer, and this model has none" for name in needing]
    if wrong:
        raise UsageError("sampling.params", "; ".join(wrong))


def bad_word_tokens(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Tokens of ``words``, as they are at the start of a text and, where those differ, after a space (as in vLLM)."""
    found: list[tuple[int, ...]] = []
    for word in words:
        bare = word.lstrip(" ") or word
        plain, spaced = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}"))
        found += [tokens for tokens in (plain, spaced) if tokens]
    return tuple(dict.fromkeys(found))
