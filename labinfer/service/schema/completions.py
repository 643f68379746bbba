"""The body of /v1/completions."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from labinfer.service.schema.sampling import SamplingBody


class CompletionRequest(SamplingBody):
    """Texts, or lists of token ids, to go on from."""

    REFUSED: ClassVar[dict[str, str]] = SamplingBody.REFUSED | {
        "suffix": "the models go on from the end of a text only"
    }
    ACCEPTED: ClassVar[frozenset[str]] = frozenset({"user"})

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    add_special_tokens: bool | None = None
