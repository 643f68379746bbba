"""/health and /ready: for those who watch the service, and may know nothing else of it."""

from __future__ import annotations

from typing import Any

from labinfer.service.call import Call
from labinfer.service.errors import ApiError


async def health(call: Call) -> Any:
    """Whether the process should go on: it does unless the engine stands still."""
    if any(each.stalled for each in call.services.all):
        raise ApiError(503, "the engine makes no progress", code="stalled")
    return {"status": "ok"}


async def ready(call: Call) -> Any:
    """Whether new requests are welcome."""
    await health(call)
    if call.services.draining:
        raise ApiError(503, "the server is shutting down", code="draining", retry_after=5)
    return {"status": "ready"}
