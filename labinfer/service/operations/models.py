"""/v1/models: what is served."""

from __future__ import annotations

from typing import Any

from labinfer.service.call import Call
from labinfer.service.service import Service


def described(service: Service, name: str) -> dict[str, Any]:
    """The model, or an adapter of it, as clients read it."""
    memory = {name: each for model in service.models for name, each in model.manager.memory_of(model.owner).items()}
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "labinfer",
        "root": service.model.plan.source.name,
        "parent": service.name if name in service.adapters else None,
        "max_model_len": service.model.max_len,
        "memory": {device: each._asdict() for device, each in memory.items()},
    }


async def models(call: Call) -> Any:
    """All models."""
    return {
        "object": "list",
        "data": [described(each, name) for each in call.services.all for name in each.names],
    }


async def model(call: Call) -> Any:
    """One model, by its name."""
    name: str = call.scope["path_params"]["model"]
    return described(call.services.of(name), name)
