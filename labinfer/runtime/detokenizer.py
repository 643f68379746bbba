"""Turn token ids into text one at a time, exactly as decoding all of them at once would.

A token may hold a part of a character, so text comes out as soon as no later token can change it: at once for whole
characters, at the end for broken ones (U+FFFD). The work per token is constant.
"""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from labinfer.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CONTEXT = 16  # prompt tokens looked at: enough for the four bytes of one character


class StreamDecoder(Protocol):
    """Text of a growing sequence of token ids; the parts joined equal the text of the whole."""

    def put(self, *token_ids: int) -> str:
        """The next tokens; text that is now certain, '' when there is none yet."""
        ...

    def finish(self) -> str:
        """What was held back; the stream is over."""
        ...


def token_strings(backend: Backend, ids: Iterable[int], special_ids: frozenset[int]) -> list[str]:
    """The tokens' strings without those of ``special_ids``; an id outside the vocabulary has none, as in transformers.

    Raises UsageError for an id that is negative or not below 2**32.
    """
    strings = (backend.id_to_token(token) for token in map(check_token_id, ids) if token not in special_ids)
    return [string for string in strings if string is not None]


def check_token_id(token_id: int) -> int:
    """``token_id`` as int; raises UsageError when it cannot be a token id."""
    try:
        value = operator.index(token_id)
    except TypeError:
        raise UsageError("tokenizer.token-id", f"a token id is an integer, not {token_id!r}") from None
    if not 0 <= value < 1 << 32:
        raise UsageError("tokenizer.token-id", f"{value} is no token id", remedy="token ids are from 0 to 2**32 - 1")
    return value


def stream_decoder(backend: Backend, prompt_ids: Sequence[int], special_ids: frozenset[int]) -> StreamDecoder:
    """A decoder for the tokens that follow ``prompt_ids``; tokens of ``special_ids`` have no text."""
    kind = _ByteStream if "ByteLevel" in _decoder_kinds(backend) else _StringStream
    stream = kind(backend, special_ids)
    stream.begin(token_strings(backend, prompt_ids[-_CONTEXT:], special_ids))
    return stream


def token_bytes(backend: Backend, ids: Iterable[int]) -> list[bytes]:
    """What each token adds to a text that has begun: UTF-8, or the part of it that the token holds."""
    strings = [backend.id_to_token(token) or "" for token in ids]
    kinds = _decoder_kinds(backend)
    if "ByteLevel" in kinds:
        return list(map(_byte_level_bytes, strings))
    decode: Callable[[list[str]], str] = backend.decoder.decode if backend.decoder else " ".join
    if "ByteFallback" not in kinds:
        return [decode(["x", string])[1:].encode() if string else b"" for string in strings]
    found = [_BYTE_TOKEN.fullmatch(string) for string in strings]
    return [
        bytes.fromhex(string[3:5]) if byte else decode(["x", string])[1:].encode()
        for string, byte in zip(strings, found, strict=True)
    ]


def _byte_level_bytes(string: str) -> bytes:
    """The bytes that a byte-level token stands for; an added token is written as itself."""
    alphabet = byte_level_alphabet()
    try:
        return bytes(alphabet[character] for character in string)
    except KeyError:
        return string.encode()


def _decoder_kinds(backend: Backend) -> list[str]:
    """Types of the decoder's steps, a Sequence flattened; [] without a decoder."""

    def flatten(state: dict[str, Any]) -> list[str]:
        steps = state.get("decoders")
        return [state["type"]] if steps is None else [kind for step in steps for kind in flatten(step)]

    return flatten(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []


@cache
def byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable stand-in for each byte (GPT-2's bytes_to_unicode), character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class _Stream:
    def __init__(self, backend: Backend, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids

    def put(self, *token_ids: int) -> str:
        return self._add(token_strings(self._backend, token_ids, self._special_ids))

    def _add(self, strings: list[str]) -> str:
        raise NotImplementedError


class _ByteStream(_Stream):
    """Byte-level BPE: every token is a run of bytes, the text is their UTF-8 with errors replaced."""

    def __init__(self, backend: Backend, special_ids: frozenset[int]) -> None:
        super().__init__(backend, special_ids)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def begin(self, prompt: list[str]) -> None:
        """UTF-8 finds its place again after at most four bytes, so the prompt's last tokens set the state."""
        self._add(prompt)

    def _add(self, strings: list[str]) -> str:
        return self._utf8.decode(b"".join(map(_byte_level_bytes, strings)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _StringStream(_Stream):
    """Every other decoder: tokens are independent but for the first (its space is dropped) and runs of byte tokens.

    A run of byte tokens is text only when all of it is valid UTF-8, so it is held back until another token ends it.
    """

    def __init__(self, backend: Backend, special_ids: frozenset[int]) -> None:
        super().__init__(backend, special_ids)
        self._decode: Callable[[list[str]], str] = backend.decoder.decode if backend.decoder else " ".join
        self._has_bytes = "ByteFallback" in _decoder_kinds(backend)
        self._held: list[str] = []
        self._started = False

    def begin(self, prompt: list[str]) -> None:
        """A prompt that ends inside a character leaves its bytes to the generated text."""
        self._add(prompt)
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(bytes(int(string[3:5], 16) for string in self._held))
        unfinished = len(utf8.getstate()[0])
        self._started = self._started or bool(self._held)
        self._held = self._held[len(self._held) - unfinished :]

    def _add(self, strings: list[str]) -> str:
        certain = len(strings)
        while certain and self._has_bytes and _BYTE_TOKEN.fullmatch(strings[certain - 1]):
            certain -= 1
        if not certain:
            self._held += strings
            return ""
        ended, self._held = self._held + strings[:certain], strings[certain:]
        return self._text(ended)

    def finish(self) -> str:
        held, self._held = self._held, []
        return self._text(held) if held else ""

    def _text(self, strings: list[str]) -> str:
        # "x" stands for the text so far, so that only the true start is treated as a start.
        later = self._decode(["x", *strings])[1:]
        text = later if self._started else self._decode(strings)
        self._started = self._started or bool(later)
        return text
