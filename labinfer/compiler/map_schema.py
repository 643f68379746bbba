"""The map language as a JSON Schema (draft 2020-12), for editors that complete and check YAML as it is typed."""

from __future__ import annotations

import inspect
from typing import Any

from labinfer.compiler.blueprint import Blueprint
from labinfer.ops import OPS, OpSpec

Schema = dict[str, Any]

EXPRESSION: Schema = {"type": "string", "description": "an expression of config names: num_heads * head_dim"}


def map_schema() -> Schema:
    """The schema of a map file, made from the ``Blueprint`` model and from every op's declaration."""
    schema = Blueprint.model_json_schema(by_alias=True)
    definitions: Schema = schema["$defs"]
    line = definitions.pop("OpLine")
    written = {kind: spec for kind, spec in OPS.items() if not spec.inserted}
    for kind, spec in written.items():
        definitions[f"op_{kind}"] = op_line(kind, spec, line["properties"], definitions)
    ops = [{"$ref": f"#/$defs/op_{kind}"} for kind in written]
    definitions["OpLine"] = {"description": first_paragraph(line.get("description", "")), "oneOf": ops}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "LABInfer model map"}
    return {**head, **{key: value for key, value in schema.items() if key != "title"}}


def op_line(kind: str, spec: OpSpec, shared: Schema, definitions: Schema) -> Schema:
    """The schema of a line with this op: its operands, weights, state and attributes."""
    attributes = spec.Attrs.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(attributes.pop("$defs", {}))
    properties: Schema = {"op": {"const": kind}, **{key: shared[key] for key in ("in", "out", "when", "device")}}
    properties["in"] = {**shared["in"], "description": f"values read: {', '.join(spec.inputs)}"}
    required = ["op", "in"]
    if spec.outputs:
        properties["out"] = {**shared["out"], "description": f"values made: {', '.join(spec.outputs)}"}
        required.append("out")
    else:
        del properties["out"]
    if spec.state:
        properties["state"] = {"type": "string", "description": "the state that keeps keys and values"}
        required.append("state")
    for slot in spec.weights:
        text = f"weight of the map for '{slot.name}'" + (", optional" if slot.optional else "")
        properties[slot.name] = {"type": "string", "description": text}
        required += [] if slot.optional else [slot.name]
    for name, field in attributes.get("properties", {}).items():
        about = {"description": field["description"]} if "description" in field else {}
        properties[name] = {**about, "anyOf": [EXPRESSION, field]}
    required += attributes.get("required", [])
    documents = (text for text in (inspect.getdoc(type(spec)), inspect.getdoc(spec.Attrs)) if text)
    return {
        "description": "\n\n".join(documents),
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def first_paragraph(text: str) -> str:
    """The text up to its first empty line."""
    return text.partition("\n\n")[0]
