"""Bytes: JSON that is read strictly, and server-sent events."""

from __future__ import annotations

from typing import Any

import orjson

from labinfer.service.errors import ApiError

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def read_json(body: bytes) -> Any:
    """The value in ``body``; refuses NaN, numbers beyond float64, half surrogates and 1024 levels of nesting."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as problem:
        raise ApiError(400, f"the body is not JSON: {problem}", code="invalid_json") from None


def json_bytes(value: Any) -> bytes:
    """``value`` as JSON."""
    return orjson.dumps(value)


def event(value: Any, name: str | None = None) -> bytes:
    """A server-sent event, with a name for those APIs that have them."""
    data = b"data: " + orjson.dumps(value) + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data
