"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from labinfer.runtime.sampling import Logprob

Found = dict[int, Logprob] | None
"""Of a token: by token id, its own first; None for the first of a prompt, which nothing stands before."""


def text_of(token: int, found: Logprob) -> str:
    """The text of a token."""
    return f"token_id:{token}" if found.decoded_token is None else found.decoded_token


def entry(token: int, found: Logprob) -> dict[str, Any]:
    """A token and its log-probability."""
    text = text_of(token, found)
    return {"token": text, "logprob": found.logprob, "bytes": list(text.encode())}


def chat_logprobs(tokens: Sequence[int], found: Sequence[dict[int, Logprob]], top: int) -> list[dict[str, Any]]:
    """The form of chats, with the ``top`` likeliest of each token."""
    return [
        entry(token, of[token])
        | {"top_logprobs": [entry(other, each) for other, each in of.items() if each.rank <= top][:top]}
        for token, of in zip(tokens, found, strict=True)
    ]


def prompt_logprobs(found: Sequence[Found]) -> list[dict[str, Any] | None]:
    """vLLM's form for the tokens of a prompt: by token id."""
    return [None if of is None else {str(token): scored(token, each) for token, each in of.items()} for of in found]


def scored(token: int, found: Logprob) -> dict[str, Any]:
    """A token of a prompt, or one that might have stood in its place."""
    return {"logprob": found.logprob, "rank": found.rank, "decoded_token": text_of(token, found)}


def completion_logprobs(tokens: Sequence[int], found: Sequence[Found], offset: int, first: str = "") -> dict[str, Any]:
    """The form of completions; ``offset`` is the place in the text where the first token begins;
    ``first`` is the text of a token without log-probabilities.
    """
    texts: list[str] = []
    offsets, chosen, top = [], [], []
    for token, of in zip(tokens, found, strict=True):
        texts.append(first if of is None else text_of(token, of[token]))
        offsets.append(offset)
        offset += len(texts[-1])
        chosen.append(None if of is None else of[token].logprob)
        top.append(None if of is None else {text_of(other, each): each.logprob for other, each in of.items()})
    return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}
