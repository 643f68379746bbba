"""The drawing as data for programs: every op written out, all layers.

``json`` is the node-link form that ``networkx.node_link_graph(data, edges="edges")`` reads; ``model-explorer`` is what
Google's Model Explorer opens, with namespaces that it folds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from labinfer.compiler.fold import Slot
from labinfer.compiler.graph import Op
from labinfer.render.drawing import Drawing, Node


def ops_written_out(drawing: Drawing) -> Iterator[tuple[int, Op, Node, dict[str, Slot]]]:
    """Every op of every layer: its stage, itself, its folded node and the slots of the values it makes."""
    for instance in drawing.instances:
        for op, node in drawing.nodes(instance):
            made = [name for part in op.primitives() for name in part.outputs]
            yield instance.stage, op, node, {name: instance.slots[name] for name in made}


def edges_written_out(drawing: Drawing) -> Iterator[tuple[str, str, str, bool]]:
    """From op (or graph input) to op: source, target, value, and whether it goes through the cache instead."""
    makers: dict[str, str] = {}
    writers: dict[str, str] = {}
    for _, op, _, _ in ops_written_out(drawing):
        inner = {name for part in op.body for name in part.outputs}
        for name in dict.fromkeys(name for name in op.inputs if name not in inner):
            yield makers.get(name, name), op.name, name, False
        for part in op.primitives():
            if part.state and part.outputs and writers.get(part.state, op.name) != op.name:
                yield writers[part.state], op.name, part.state, True
            elif part.state:
                writers[part.state] = op.name
            makers.update(dict.fromkeys(part.outputs, op.name))


def render_json(drawing: Drawing) -> str:
    """Nodes and edges with all their attributes, for networkx and scripts."""
    plan = drawing.plan
    nodes: list[dict[str, Any]] = [
        {"id": name, "kind": "input", "outputs": {name: {"type": str(drawing.values[name])}}}
        for name in _graph_inputs(drawing)
    ]
    nodes += [_node(drawing, stage, op, node, slots) for stage, op, node, slots in ops_written_out(drawing)]
    edges = [
        {
            "source": source,
            "target": target,
            "key": value,
            "value": value,
            "cache": cache,
            **_value(drawing, value, cache),
        }
        for source, target, value, cache in edges_written_out(drawing)
    ]
    graph = {
        "name": plan.source.name,
        "labinfer": plan.labinfer,
        "limits": plan.limits.model_dump(),
        "devices": {name: device.model_dump() for name, device in plan.devices.items()},
        "stages": [
            {"device": s.device, "arena": s.arena.model_dump(), "bytes": s.bytes.model_dump()} for s in plan.stages
        ],
    }
    return _text(
        {"directed": True, "multigraph": True, "graph": graph, "nodes": nodes, "edges": edges}, ("nodes", "edges")
    )


def _graph_inputs(drawing: Drawing) -> list[str]:
    makers = {name for instance in drawing.instances for name in instance.slots}
    read = dict.fromkeys(name for _, op, _, _ in ops_written_out(drawing) for name in op.inputs)
    return [name for name in read if name not in makers]


def _value(drawing: Drawing, name: str, cache: bool) -> dict[str, Any]:
    return {} if cache else {"type": str(drawing.values[name]), "bytes": drawing.value_bytes(drawing.values[name])}


def _node(drawing: Drawing, stage: int, op: Op, node: Node, slots: dict[str, Slot]) -> dict[str, Any]:
    weights = {slot: name for part in op.primitives() for slot, name in part.weights.items()} if not op.body else {}
    data: dict[str, Any] = {
        "id": op.name,
        "kind": op.kind,
        "layer": op.layer,
        "stage": stage,
        "device": drawing.device(stage),
        "outputs": {
            name: {"type": str(slot.type), "bytes": drawing.value_bytes(slot.type), "offset": slot.at}
            for name, slot in slots.items()
        },
        "weights": {
            slot: {
                "name": name,
                "shape": list(drawing.weights[name].shape),
                "format": drawing.weights[name].format,
                "tensor": drawing.weights[name].tensor,
                "bytes": drawing.weight_bytes(name),
            }
            for slot, name in weights.items()
        },
        "attrs": node.attrs,
        "state": op.state,
        "group": drawing.states[op.state].group if op.state else None,
        "origin": str(op.origin),
        "flops": node.cost.flops,
        "bytes_moved": node.cost.moved,
        "predicted_seconds": op.cost and dict(zip(("decode", "prefill"), op.cost, strict=True)),
    }
    if op.body:
        data["parts"] = [
            {"id": part.name, "kind": part.kind, "weights": dict(part.weights), "attrs": inner.attrs}
            for part, inner in zip(op.body, node.parts, strict=True)
        ]
    return data


def render_model_explorer(drawing: Drawing) -> str:
    """A graph collection for Model Explorer: namespaces by layer and block, costs as attributes of each op."""
    incoming: dict[str, list[dict[str, str]]] = {}
    outlets: dict[str, str] = {}
    nodes: list[dict[str, Any]] = []
    for name in _graph_inputs(drawing):
        nodes.append(
            {"id": name, "label": name, "namespace": "", "outputsMetadata": _outputs({name: str(drawing.values[name])})}
        )
        outlets[name] = "0"
    for _, _, _, slots in ops_written_out(drawing):
        outlets.update({name: str(number) for number, name in enumerate(slots)})
    for source, target, value, _ in edges_written_out(drawing):
        edge = {"sourceNodeId": source, "sourceNodeOutputId": outlets.get(value, "0"), "targetNodeInputId": ""}
        incoming.setdefault(target, []).append({**edge, "targetNodeInputId": str(len(incoming.get(target, [])))})
    for stage, op, node, slots in ops_written_out(drawing):
        facts = {
            "name": op.name,
            "device": drawing.device(stage),
            "origin": str(op.origin),
            "flops": node.cost.flops,
            "bytes_moved": node.cost.moved,
            **node.attrs,
            **{
                f"weight {slot}": f"{name} {list(drawing.weights[name].shape)} {drawing.weights[name].format}"
                for slot, name in op.weights.items()
            },
            **{f"part {number}": part.kind for number, part in enumerate(op.body)},
        }
        nodes.append(
            {
                "id": op.name,
                "label": op.kind,
                "namespace": _namespace(op.name),
                "attrs": [
                    {"key": key, "value": value if isinstance(value, str) else json.dumps(value)}
                    for key, value in facts.items()
                ],
                "incomingEdges": incoming.get(op.name, []),
                "outputsMetadata": _outputs({name: str(slot.type) for name, slot in slots.items()}),
            }
        )
    name = drawing.plan.source.name
    return _text({"label": name, "graphs": [{"id": name, "nodes": nodes}]})


def _namespace(name: str) -> str:
    return "/".join(name.split(".")[:-1])


def _outputs(types: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"id": str(number), "attrs": [{"key": "tensor_name", "value": name}, {"key": "tensor_shape", "value": kind}]}
        for number, (name, kind) in enumerate(types.items())
    ]


def _text(data: dict[str, Any], lists: tuple[str, ...] = ()) -> str:
    """JSON with each item of ``lists`` on a line of its own."""
    parts = []
    for key, value in data.items():
        if key in lists:
            items = ",\n".join("  " + json.dumps(item, ensure_ascii=False) for item in value)
            parts.append(f" {json.dumps(key)}: [\n{items}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
