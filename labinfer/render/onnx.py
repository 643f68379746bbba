"""ONNX as JSON (the protobuf JSON mapping of ``onnx.ModelProto``), with one function for each block: opens in Netron.

Ops are of the domain ``labinfer``; a layer is one node whose function holds its ops, and a fused op one whose function
holds its parts. Weights are initializers without data that name their checkpoint tensor. The cache is a value that
``kv_write`` makes and ``attention`` reads. Source: onnx.proto3, IR version 10, onnx.ai/onnx/repo-docs/IR.html.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from labinfer.compiler.fold import GRAPH_INPUTS
from labinfer.compiler.graph import Op, fold_name
from labinfer.ops.base import TensorType
from labinfer.render.drawing import Drawing, Instance, Node, outside_reads

IR_VERSION = 10
DOMAIN = "labinfer"
DATA_TYPES = {
    "f32": 1,
    "f16": 10,
    "bf16": 16,
    "f64": 11,
    "i32": 6,
    "i64": 7,
    "i16": 5,
    "i8": 3,
    "u8": 2,
    "u16": 4,
    "u32": 12,
    "u64": 13,
    "bool": 9,
}
"""``onnx.TensorProto.DataType`` by our names; block formats are bytes (2) to ONNX."""

Json = dict[str, Any]
Rename = Callable[[str], str]


def render_onnx(drawing: Drawing) -> str:
    """The model as one JSON document, a node or initializer a line."""
    plan = drawing.plan
    functions: list[Json] = []
    names = _function_names(drawing)
    nodes: list[Json] = []
    called: set[int] = set()
    for instance in drawing.instances:
        prefix = names[instance.block]
        if instance.layer is None:
            nodes += _nodes(drawing, instance, str, prefix, functions if instance.block not in called else [])
        else:
            if instance.block not in called:
                functions.append(_block_function(drawing, instance, prefix, functions))
            nodes.append(_layer_node(drawing, instance, prefix))
        called.add(instance.block)
    weights = _weights(op for instance in drawing.instances for op in instance.ops)
    read = [name for name in GRAPH_INPUTS if any(name in op.inputs for i in drawing.instances for op in i.ops)]
    graph = {
        "name": plan.source.name,
        "node": nodes,
        "input": [_value_info(name, drawing.values[name]) for name in read],
        "output": [_value_info(name, drawing.values[name]) for name in plan.stages[-1].outputs],
        "initializer": [_initializer(drawing, name) for name in weights],
    }
    model = {
        "irVersion": str(IR_VERSION),
        "producerName": "labinfer",
        "producerVersion": plan.labinfer,
        "opsetImport": [{"domain": DOMAIN, "version": "1"}],
        "metadataProps": _properties(
            {"family": plan.source.family, "maps": ", ".join(plan.source.maps), **plan.limits.model_dump()}
        ),
        "graph": graph,
        "functions": functions,
    }
    return _lines(model, {"graph": {"node", "initializer"}, "functions": set()})


def _function_names(drawing: Drawing) -> list[str]:
    """A name for each block that no other has."""
    names: list[str] = []
    for block in drawing.blocks:
        name, count = block.title, 1
        while name in names:
            count += 1
            name = f"{block.title}_{count}"
        names.append(name)
    return names


def _layer_node(drawing: Drawing, instance: Instance, function: str) -> Json:
    slots = {name: slot.at for name, slot in instance.slots.items()}
    return {
        "name": f"layer {instance.layer}",
        "opType": function,
        "domain": DOMAIN,
        "input": [*outside_reads(instance), *_weights(instance.ops)],
        "output": _handed_on(drawing, instance),
        "metadataProps": _properties(
            {"device": drawing.device(instance.stage), "layer": instance.layer, "offsets": json.dumps(slots)}
        ),
    }


def _received_names(values: Iterable[str]) -> dict[str, str]:
    """Names for the inputs of a function that none of the values it makes has."""
    names: dict[str, str] = {}
    for value in values:
        name = value if value in GRAPH_INPUTS else f"in/{_short(value)}"
        names[value] = name if name not in names.values() else f"{name}/{len(names)}"
    return names


def _short(name: str) -> str:
    """A name without its layer."""
    return fold_name(name).split(".{i}.", 1)[-1]


def _handed_on(drawing: Drawing, instance: Instance) -> list[str]:
    links = {link.value for link in drawing.blocks[instance.block].links if link.target is None}
    return [name for name in instance.slots if fold_name(name) in links]


def _block_function(drawing: Drawing, instance: Instance, name: str, functions: list[Json]) -> Json:
    received = _received_names(outside_reads(instance))

    def rename(value: str) -> str:
        return received.get(value) or _short(value)

    return _function(
        name,
        inputs=[*received.values(), *map(rename, _weights(instance.ops))],
        outputs=[rename(value) for value in _handed_on(drawing, instance)],
        nodes=_nodes(drawing, instance, rename, name, functions),
    )


def _function(name: str, inputs: Sequence[str], outputs: Sequence[str], nodes: Sequence[Json]) -> Json:
    return {
        "name": name,
        "domain": DOMAIN,
        "input": list(inputs),
        "output": list(outputs),
        "opsetImport": [{"domain": DOMAIN, "version": "1"}],
        "node": list(nodes),
    }


def _nodes(drawing: Drawing, instance: Instance, rename: Rename, prefix: str, functions: list[Json]) -> list[Json]:
    nodes = []
    for op, node in drawing.nodes(instance):
        kind = op.kind
        if op.body:
            kind = f"{prefix}.{node.short_name}.{op.kind}"
            functions.append(_fused_function(drawing, instance, op, node, kind))
        made = {"device": drawing.device(instance.stage)} if instance.layer is None else {}
        nodes.append(_node(op, node, kind, rename, made | _facts(instance, op, node)))
    return nodes


def _fused_function(drawing: Drawing, instance: Instance, op: Op, node: Node, name: str) -> Json:
    received = _received_names([*op.inputs, *_states(op, written=False)])

    def rename(value: str) -> str:
        return received.get(value) or _short(value)

    return _function(
        name,
        inputs=[*received.values(), *map(rename, _weights([op]))],
        outputs=[rename(value) for value in (*op.outputs, *_states(op, written=True))],
        nodes=[
            _node(part, inner, part.kind, rename, _facts(instance, part, inner))
            for part, inner in zip(op.body, node.parts, strict=True)
        ],
    )


def _node(op: Op, node: Node, kind: str, rename: Rename, facts: Mapping[str, Any]) -> Json:
    return {
        "name": rename(op.name),
        "opType": kind,
        "domain": DOMAIN,
        "input": [rename(v) for v in (*op.inputs, *_states(op, written=False), *_weights([op]))],
        "output": [rename(v) for v in (*op.outputs, *_states(op, written=True))],
        "attribute": [_attribute(key, value) for key, value in node.attrs.items() if value is not None],
        "metadataProps": _properties(facts),
    }


def _facts(instance: Instance, op: Op, node: Node) -> dict[str, Any]:
    facts: dict[str, Any] = {"flops": node.cost.flops, "bytes_moved": node.cost.moved}
    if op.origin.file:
        facts["origin"] = str(op.origin)
    if offsets := [instance.slots[name].at for name in op.outputs if name in instance.slots]:
        facts["offset"] = ", ".join(map(str, offsets))
    return facts


def _states(op: Op, written: bool) -> list[str]:
    """The caches that ``op`` writes, or reads after another op wrote them."""
    writers = {part.state for part in op.primitives() if part.state and not part.outputs}
    readers = {part.state for part in op.primitives() if part.state and part.outputs}
    return sorted(f"{name}:cache" for name in (writers if written else readers - writers) if name)


def _weights(ops: Iterable[Op]) -> list[str]:
    """Weights as values, under names that no other value has."""
    return list(
        dict.fromkeys(f"{name}:weight" for op in ops for part in op.primitives() for name in part.weights.values())
    )


def _attribute(name: str, value: Any) -> Json:
    if isinstance(value, bool | int):
        return {"name": name, "type": "INT", "i": str(int(value))}
    if isinstance(value, float):
        return {"name": name, "type": "FLOAT", "f": value}
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return {"name": name, "type": "INTS", "ints": [str(item) for item in value]}
    text = value if isinstance(value, str) else json.dumps(value)
    return {"name": name, "type": "STRING", "s": base64.b64encode(text.encode()).decode()}


def _value_info(name: str, kind: TensorType) -> Json:
    dims = [{"dimParam": size} if isinstance(size, str) else {"dimValue": str(size)} for size in kind.shape]
    return {"name": name, "type": {"tensorType": {"elemType": DATA_TYPES[kind.dtype], "shape": {"dim": dims}}}}


def _initializer(drawing: Drawing, name: str) -> Json:
    weight = drawing.weights[name.removesuffix(":weight")]
    return {
        "name": name,
        "dims": [str(size) for size in weight.shape],
        "dataType": DATA_TYPES.get(weight.format, 2),
        "dataLocation": "EXTERNAL",
        "externalData": [{"key": "location", "value": weight.tensor}],
        "docString": weight.format,
    }


def _properties(facts: Mapping[str, Any]) -> list[Json]:
    return [{"key": key, "value": str(value)} for key, value in facts.items()]


def _lines(data: Json, broken: Mapping[str, set[str]], indent: str = " ") -> str:
    """JSON whose lists named in ``broken`` have an item a line."""
    parts = []
    for key, value in data.items():
        if isinstance(value, list) and key in broken and value:
            text = (
                "[\n"
                + ",\n".join(f"{indent} {json.dumps(item, ensure_ascii=False)}" for item in value)
                + f"\n{indent}]"
            )
        elif isinstance(value, dict) and key in broken:
            text = _lines(value, {name: set() for name in broken[key]}, indent + " ").rstrip("\n")
        else:
            text = json.dumps(value, ensure_ascii=False)
        parts.append(f"{indent}{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + f"\n{indent[:-1]}}}\n"
