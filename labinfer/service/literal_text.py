"""Special tokens that are written in messages: text there, never control.

A chat template writes special tokens between messages, and the tokenizer reads them. Whoever writes ``<|im_end|>`` into
a message would end it there and could go on as the system. So before a template is rendered, such texts are replaced by
marks of private characters, and what stands for a mark is encoded apart, as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from labinfer.runtime.tokenizer import Tokenizer

_MARK = re.compile("\U000f0000([0-9]{1,9})\U000f0001")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> list[int]:
    """Token ids of a conversation; special tokens are those of the template only."""
    hidden: list[str] = []
    text = tokenizer.apply_chat_template(hide(list(messages), tokenizer, hidden), **hide(variables, tokenizer, hidden))
    if not hidden:
        return tokenizer.encode(text, add_special_tokens=False)
    tokens: list[int] = []
    for number, part in enumerate(_MARK.split(text)):  # text and what was marked take turns
        literal = number % 2 == 1
        if literal:
            part = hidden[int(part)] if int(part) < len(hidden) else ""
        if part:
            tokens += tokenizer.encode_literal(part) if literal else tokenizer.encode(part, add_special_tokens=False)
    return tokens


def hide(value: Any, tokenizer: Tokenizer, hidden: list[str]) -> Any:
    """``value`` with a mark in place of each special token in its texts and names, which are added to ``hidden``."""
    if isinstance(value, str):
        found: str = tokenizer.special_text.sub(lambda match: mark(match[0], hidden), value)
        return found
    if isinstance(value, Mapping):
        return {hide(name, tokenizer, hidden): hide(each, tokenizer, hidden) for name, each in value.items()}
    return [hide(each, tokenizer, hidden) for each in value] if isinstance(value, list) else value


def mark(text: str, hidden: list[str]) -> str:
    """The mark of a text, which is added to ``hidden``."""
    hidden.append(text)
    return f"\U000f0000{len(hidden) - 1}\U000f0001"
