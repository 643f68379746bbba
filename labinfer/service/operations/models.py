"""/v1/models: what is served."""

from __future__ import annotations

from typing import Any

from labinfer.service.call import Call
from labinfer.service.service import Service


def described(service: Service) -> dict[str, Any]:
    """The model as clients read it."""
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "labinfer",
        "root": service.model.plan.source.name,
        "max_model_len": service.model.max_len,
    }


async def models(call: Call) -> Any:
    """All models."""
    return {"object": "list", "data": [described(call.service)]}


async def model(call: Call) -> Any:
    """One model, by its name."""
    call.service.check_model(call.scope["path_params"]["model"])
    return described(call.service)
