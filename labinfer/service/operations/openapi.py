"""/openapi.json: the paths and bodies of the service as an OpenAPI document, made from the table of paths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from labinfer import __version__
from labinfer.service.call import Call
from labinfer.service.endpoint import Operation

ERROR = {
    "description": "What went wrong",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
                    }
                },
            }
        }
    },
}
STATUSES = ("400", "401", "404", "405", "408", "413", "415", "421", "431", "500", "503")


@cache
def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The document of these operations."""
    bodies = [each.body for each in operations if each.body is not None]
    _, schemas = models_json_schema(
        [(body, "validation") for body in dict.fromkeys(bodies)], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for each in operations:
        path = re.sub(r"\{(\w+):path\}", r"{\1}", each.path)
        paths.setdefault(path, {})[each.method.lower()] = described(each, re.findall(r"\{(\w+)\}", path))
    schemes = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "LABInfer", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {}), "securitySchemes": schemes},
        "security": [{"key": []}],
    }


def described(operation: Operation, parameters: Sequence[str]) -> dict[str, Any]:
    """An operation in the document."""
    found: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer"}, **dict.fromkeys(STATUSES, ERROR)},
    }
    if operation.public:
        found["security"] = []
    found["parameters"] = [
        {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}
        for place, names in (("path", parameters), ("query", operation.query))
        for name in names
    ]
    if operation.body is not None:
        reference = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return found


async def openapi(call: Call) -> Any:
    """The document."""
    return document(call.scope["app"].operations)
