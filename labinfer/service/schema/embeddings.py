"""The body of /v1/embeddings."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from labinfer.service.schema.base import Body


class EmbeddingRequest(Body):
    """Texts, or lists of token ids, and how the rows of a text become one vector: ``pooling``."""

    ACCEPTED: ClassVar[frozenset[str]] = frozenset({"user"})

    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    pooling: Literal["last", "mean"] | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = Field(default=None, max_length=256)
    priority: int | None = Field(default=None, ge=-(1 << 31), lt=1 << 31)
