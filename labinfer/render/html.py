"""The page: one self-contained HTML file, without network: the drawing, the arena over time and a summary.

All text from files reaches the page as JSON or as escaped SVG text; the content security policy admits this page's own
script and style, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any
from xml.sax.saxutils import escape

from labinfer.compiler.graph import fold_name, layer_of
from labinfer.ops.base import TensorType
from labinfer.ops.formats import stored_bytes
from labinfer.render.arena_map import arena_map
from labinfer.render.drawing import Drawing, Node
from labinfer.render.palette import CATEGORIES, DEVICES, HEAT_LEVELS, drawing_css
from labinfer.render.picture import block_picture, cards, first_nodes, overview
from labinfer.render.svg import TEXT_CSS, framed, picture_svg
from labinfer.render.timeline import Timeline, timelines


def render_html(drawing: Drawing) -> str:
    """The whole page."""
    template = files("labinfer.render").joinpath("page.html").read_text("utf-8")
    style = between(template, "<style>", "</style>").replace(
        "/*DRAWING*/", TEXT_CSS + drawing_css(0) + drawing_css(1, "[data-theme=dark] ")
    )
    script = between(template, "<script>", "</script>")
    main = overview(drawing)
    frames = [(block, *framed(block_picture(drawing, block), drawing, block, tips=False)) for block in cards(drawing)]
    shapes = {block: [width, height] for block, _, width, height in frames}
    hashes = f"script-src {_digest(script)}; style-src {_digest(style)}"
    policy = f"default-src 'none'; {hashes}; base-uri 'none'; form-action 'none'"
    blocks = "\n".join(
        f'<g class="block" data-block="{block}" visibility="hidden">{text}</g>' for block, text, _, _ in frames
    )
    page = {
        "TITLE": escape(drawing.plan.source.name),
        "POLICY": policy,
        "STYLE": style,
        "OVERVIEW": picture_svg(main),
        "BLOCKS": blocks,
        "DATA": _json(page_data(drawing, shapes, [main.width, main.height])),
        "SCRIPT": script,
    }
    head, tail = template.split("<style>")[0], template.split("</style>")[1].split("<script>")[0]
    text = f"{head}<style>{{STYLE}}</style>{tail}<script>{{SCRIPT}}</script>\n</body>\n</html>\n"
    pieces = text.split("{")  # one pass, so that no inserted text is read as a marker
    return pieces[0] + "".join(_fill(piece, page) for piece in pieces[1:])


def between(text: str, start: str, end: str) -> str:
    """What stands between the first ``start`` and the next ``end``."""
    return text.split(start, 1)[1].split(end, 1)[0]


def _fill(piece: str, page: Mapping[str, str]) -> str:
    name, closed, rest = piece.partition("}")
    return page[name] + rest if closed and name in page else "{" + piece


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(drawing: Drawing, shapes: Mapping[int, list[float]], overview_size: list[float]) -> dict[str, Any]:
    """What the page's script knows of the plan, as plain data."""
    plan, letters = drawing.plan, cards(drawing)
    return {
        "name": plan.source.name,
        "source": plan.source.model_dump(mode="json"),
        "limits": plan.limits.model_dump(mode="json"),
        "version": plan.labinfer,
        "size": overview_size,
        "categories": {name: list(kinds) for name, kinds in CATEGORIES.items()},
        "hues": len(DEVICES),
        "heat": HEAT_LEVELS,
        "nodes": [_node_data(drawing, node, block) for block, each in enumerate(drawing.blocks) for node in each.nodes],
        "blocks": [
            {"title": block.title, "letter": letters.get(index), "first": first, "size": shapes.get(index)}
            for index, (block, first) in enumerate(zip(drawing.blocks, first_nodes(drawing), strict=True))
        ],
        "sections": [{"block": s.block, "stage": s.stage, "layers": s.layers} for s in drawing.sections],
        "weights": [_weight_data(line) for line in plan.weights],
        "devices": {name: device.model_dump(mode="json") for name, device in plan.devices.items()},
        "placement": plan.placement and plan.placement.model_dump(mode="json"),
        "timelines": [_timeline_data(drawing, line) for line in timelines(drawing)],
        "stages": [_stage_data(drawing, number) for number in range(len(plan.stages))],
    }


def _node_data(drawing: Drawing, node: Node, block: int) -> dict[str, Any]:
    return {
        "name": node.name,
        "kind": node.op.kind,
        "category": node.category,
        "block": block,
        "in": [[name, *_type(drawing, full)] for name, full in zip(node.inputs, node.op.inputs, strict=True)],
        "out": [[name, str(kind), drawing.value_bytes(kind)] for name, kind in node.outputs],
        "weights": node.weights,
        "attrs": node.attrs,
        "state": node.state,
        "group": drawing.states[node.op.state].group if node.op.state else None,
        "origin": str(node.op.origin),
        "flops": node.cost.flops,
        "bytes": node.cost.owned,
        "cost": node.op.cost,
        "parts": [_node_data(drawing, part, block) for part in node.parts],
    }


def _timeline_data(drawing: Drawing, line: Timeline) -> dict[str, Any]:
    """Seconds of each layer (or of what stands outside of them), by stage, one after another."""
    stages: list[list[list[Any]]] = [[] for _ in drawing.plan.stages]
    for instance in drawing.instances:
        name = drawing.blocks[instance.block].title if instance.layer is None else f"layer {instance.layer}"
        stages[instance.stage].append([name, sum(line.of(op) for op in instance.ops)])
    return {"title": line.title, "hops": line.hops, "stages": stages}


def _type(drawing: Drawing, name: str) -> list[Any]:
    kind: TensorType = drawing.values[name]
    return [str(kind), drawing.value_bytes(kind)]


def _weight_data(line: Any) -> dict[str, Any]:
    count = 1 if line.layers is None else line.layers[1] - line.layers[0] + 1
    return {
        "name": line.name,
        "layers": line.layers,
        "shape": line.shape,
        "format": line.format,
        "tensor": line.tensor if line.stack is None else f"{line.tensor} × {line.stack}",
        "bytes": stored_bytes(line.format, line.shape),
        "count": count,
    }


def _stage_data(drawing: Drawing, number: int) -> dict[str, Any]:
    """A stage and its arena; names are folded and listed once, ``sets`` point into the lists."""
    stage, arena = drawing.plan.stages[number], arena_map(drawing, number)
    names: dict[str, int] = {}

    def index(name: str) -> int:
        return names.setdefault(fold_name(name), len(names))

    def layer(name: str) -> int:
        found = layer_of(name)
        return -1 if found is None else found[1]

    numbers: dict[str, int] = {}
    nodes = [(part.op.name, part) for b in drawing.blocks for n in b.nodes for part in (n.parts or (n,))]
    kinds = list(dict.fromkeys((part.op.kind, part.category) for _, part in nodes))
    for position, (kind, _) in enumerate(kinds):
        numbers.setdefault(kind, position)
    return {
        "device": stage.device,
        "bytes": stage.bytes.model_dump(),
        "arena": stage.arena.model_dump(),
        "kinds": kinds,
        "steps": [[index(op.name), numbers[op.kind], -1 if op.layer is None else op.layer] for op in arena.ops],
        "sets": [
            [s.lower, s.upper, s.at, s.size, [[index(name), layer(name)] for name in s.values]] for s in arena.sets
        ],
        "live": arena.live,
        "peak": arena.peak,
        "names": list(names),
    }
