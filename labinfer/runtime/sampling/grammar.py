"""Structured output: which tokens a JSON schema, a regular expression or a grammar allows next, by llguidance.

Texts of unknown origin are compiled here, so their size is limited and llguidance counts its steps: in compiling, in
every mask, and for the memory it keeps. None of its failures gets further than the request that asked for it.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakMethod

import numpy as np

from labinfer.errors import LabinferError, UsageError
from labinfer.extras import missing
from labinfer.runtime.sampling.adjust import NEVER
from labinfer.runtime.sampling.params import StructuredOutputs
from labinfer.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

MAX_GRAMMAR_CHARACTERS = 64 << 10
MAX_LEXER_STATES = 25_000  # of 1 to 2 kB each

_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Else a text that has no choice is written to its end at once, whatever its length: `(((a{999}){999}){999}){999}`."""

_BYTES = np.arange(256, dtype=np.uint8)[:, np.newaxis]
_BANS = np.where(np.unpackbits(_BYTES, axis=1, bitorder="little"), np.float32(0), NEVER)
"""For each byte of a bit mask, what to add to the logits of its 8 tokens."""


class Matcher:
    """Where a sequence stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._words = matcher, np.zeros((vocab_size + 31) // 32, np.int32)

    @property
    def ended(self) -> bool:
        """Whether the grammar allows nothing more."""
        return bool(self._matcher.is_stopped())

    def accept(self, token: int) -> None:
        """Go on by a token."""
        if not self._matcher.consume_token(token):
            raise self._error()

    def mask(self, logits: np.ndarray) -> None:
        """Ban the tokens that cannot come next, in place."""
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            raise self._error()
        logits += _BANS.take(self._words.view(np.uint8), axis=0).reshape(-1)[: len(logits)]

    def copy(self) -> Matcher:
        """Another sequence that goes on from here."""
        return Matcher(self._matcher.deep_copy(), len(self._words) * 32)

    def _error(self) -> LabinferError:
        said = first_line(self._matcher.get_error()) or self._matcher.stop_reason()
        return LabinferError("sampling.grammar-failed", f"the structured output cannot go on: {said}")


class Grammar:
    """A compiled grammar, from which sequences start."""

    def __init__(self, start: llguidance.LLMatcher, vocab_size: int) -> None:
        self._start, self._vocab_size = start, vocab_size

    def matcher(self) -> Matcher:
        """The beginning."""
        return Matcher(self._start.deep_copy(), self._vocab_size)


def compile_grammar(structure: StructuredOutputs, tokenizer: Tokenizer, vocab_size: int) -> Grammar:
    """The grammar of ``structure`` over the tokens of ``tokenizer``; a wrong or too large one is a UsageError.

    Raises what says how to install llguidance where it is missing.
    """
    try:
        import llguidance
    except ImportError:
        raise missing("llguidance") from None
    tokens = vocabulary(tokenizer, vocab_size)
    limits = llguidance.LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES, precompute_large_lexemes=False, verbose_errors=False
    )
    start = llguidance.LLMatcher(tokens, lark_of(structure) + _NO_FORCING, log_level=0, limits=limits)
    if start.is_error():
        raise unusable(start.get_error())
    return Grammar(start, vocab_size)


def lark_of(structure: StructuredOutputs) -> str:
    """``structure`` as a grammar in llguidance's Lark; what cannot be one is a UsageError."""
    texts = [structure.json or structure.regex or structure.grammar or "", *(structure.choice or ())]
    if (size := sum(len(str(text)) for text in texts)) > MAX_GRAMMAR_CHARACTERS:
        raise unusable(f"it has {size} characters, more than {MAX_GRAMMAR_CHARACTERS}")
    try:
        if structure.regex is not None:
            lark = regex_lark(structure.regex)
        elif structure.choice is not None:  # a terminal, in capitals, is one automaton however many there are
            lark = "start: CHOICE\nCHOICE: " + " | ".join(
                json.dumps(text, ensure_ascii=False) for text in structure.choice
            )
        elif structure.grammar is not None:
            lark = grammar_lark(structure.grammar)
        else:
            lark = f"start: %json {json.dumps(json.loads(str(structure.json)))}"
        lark.encode()
        return lark
    except Exception as problem:  # the converters raise bare Exception
        raise unusable(str(problem)) from None


def regex_lark(regex: str) -> str:
    """A regular expression, with the meaning of Python's and Rust's ``\\d``, ``\\w`` and ``\\s``, as Lark."""
    from llguidance import regex_to_lark

    return f"start: /{regex_to_lark(regex, '')}/" if regex else 'start: ""'


def grammar_lark(grammar: str) -> str:
    """A grammar in Lark or GBNF as Lark, without options of its own: they could undo the limits."""
    from llguidance.gbnf_to_lark import any_to_lark

    if "%llguidance" in grammar:
        raise ValueError("%llguidance is not allowed")
    return str(any_to_lark(grammar)).replace("%llguidance {}", "")


def unusable(problem: str) -> UsageError:
    """The error of a structure that cannot be used."""
    return UsageError("sampling.grammar", f"structured_outputs cannot be used: {first_line(problem)}")


def first_line(text: str) -> str:
    """The beginning of a message, and what stands after "error:"; the rest repeats what was given."""
    first, *others = text.split("\n")
    return " ".join([first[:200], *(line[:100] for line in others if line.startswith("error:"))])


_VOCABULARIES: WeakKeyDictionary[Tokenizer, dict[int, llguidance.LLTokenizer]] = WeakKeyDictionary()
_lock = threading.Lock()


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> llguidance.LLTokenizer:
    """llguidance's view of a tokenizer; made once, in some tenths of a second."""
    with _lock:
        sizes = _VOCABULARIES.setdefault(tokenizer, {})
        if vocab_size not in sizes:
            from llguidance import LLTokenizer, TokenizerWrapper

            tokens = _Tokens(tokenizer, vocab_size)
            sizes[vocab_size] = LLTokenizer(TokenizerWrapper(tokens), eos_token=tokens.eos_ids)
        return sizes[vocab_size]


class _Tokens:
    """A tokenizer in the form that llguidance's wrapper reads.

    Rows of logits that no token stands for are empty tokens, which are never allowed. A model without an end-of-text
    token gets one beyond its vocabulary, where no mask reaches.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        ends = sorted(token for token in tokenizer.eos_ids if token < vocab_size)
        self.tokens = tokenizer.token_bytes(vocab_size)
        self.special_token_ids = sorted(token for token in tokenizer.special_ids if token < vocab_size)
        if not ends:
            ends = [vocab_size]
            self.tokens.append(b"<end>")
            self.special_token_ids += ends
        self.eos_ids, self.eos_token_id, self.bos_token_id = ends, ends[0], tokenizer.bos_id
        self._encode = WeakMethod(tokenizer.encode)  # the vocabulary must not keep its tokenizer alive

    def __call__(self, text: str) -> list[int]:
        encode = self._encode()
        return encode(text, add_special_tokens=False) if encode else []
