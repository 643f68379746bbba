"""Pictures: the overview of a drawing and each of its blocks, laid out as boxes, links and groups in pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from labinfer.compiler.fold import GRAPH_INPUTS
from labinfer.ops.base import TensorType
from labinfer.render.drawing import Block, Drawing, Node, Section, layers_text, outside_reads
from labinfer.render.layout import Point, layered

OP_SIZE = (180.0, 39.0)
CARD_SIZE = (206.0, 56.0)
PILL_HEIGHT = 26.0
MONO = 7.25
"""Width of a character of the small monospaced text, in pixels."""

MAX_USERS = 4
"""Users of a value that comes in, beyond which each gets a pill of its own."""

GROUP_PAD = 9.0
GROUP_LABEL = 18.0
"""Room for a group's name, which stands upright along its left side."""


@dataclass(slots=True)
class Box:
    """A thing drawn: an op, a pill (a value that comes in or goes out) or a card (a block that repeats)."""

    kind: Literal["op", "pill", "card"]
    title: str
    detail: str = ""
    corner: str = ""
    category: str = ""
    node: int | None = None
    section: int | None = None
    stage: int = 0
    group: str = ""
    tip: str = ""
    at: Point = (0.0, 0.0)

    @property
    def size(self) -> Point:
        """Width and height."""
        if self.kind == "pill":
            return max(64.0, len(self.title) * MONO + 28), PILL_HEIGHT
        return OP_SIZE if self.kind == "op" else CARD_SIZE


@dataclass(frozen=True, slots=True)
class Line:
    """A link between two boxes by index, its points in the picture's pixels."""

    source: int
    target: int
    cache: bool
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Group:
    """What belongs together: a frame behind boxes, or a bracket to their left; ``area`` is x, y, width, height."""

    label: str
    kind: Literal["group", "bracket"]
    area: tuple[float, float, float, float]


@dataclass(slots=True)
class Picture:
    """One laid-out picture; ``first_node`` numbers its first op among all nodes of the drawing."""

    title: str
    boxes: list[Box] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0


def first_nodes(drawing: Drawing) -> list[int]:
    """The number of the first node of each block, counting through all blocks."""
    firsts, count = [], 0
    for block in drawing.blocks:
        firsts.append(count)
        count += len(block.nodes)
    return firsts


def letter(number: int) -> str:
    """``A``, ``B``, ... for the blocks that repeat."""
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def cards(drawing: Drawing) -> dict[int, str]:
    """The letter of each block that is drawn apart, under a card, because it stands for layers."""
    found = dict.fromkeys(section.block for section in drawing.sections if section.layers)
    return {block: letter(number) for number, block in enumerate(found)}


def overview(drawing: Drawing) -> Picture:
    """The whole model: ops outside the layers one by one, layers as cards."""
    picture = Picture(drawing.plan.source.name)
    firsts, letters = first_nodes(drawing), cards(drawing)
    made: dict[str, int] = {}
    section_of: dict[tuple[int, int, int | None], int] = {}
    edges: dict[tuple[int, int], bool] = {}
    taken = dict.fromkeys(name for section in drawing.sections for name in outside_reads(section.first))
    for name in [name for name in GRAPH_INPUTS if name in taken]:
        made[name] = len(picture.boxes)
        picture.boxes.append(_pill(name, drawing.values[name]))
    for number, section in enumerate(drawing.sections):
        section_of.update(
            dict.fromkeys(((section.stage, section.block, layer) for layer in section.layers), len(picture.boxes))
        )
        block = drawing.blocks[section.block]
        if section.layers:
            for name in outside_reads(section.first):
                if name in made:
                    edges[made[name], len(picture.boxes)] = False
            picture.boxes.append(_card(drawing, number, section, block, letters[section.block]))
        else:
            _write_out(picture, section, block, firsts[section.block], made, edges)
        for instance in drawing.instances:
            box = section_of.get((instance.stage, instance.block, instance.layer))
            if box is not None and instance.stage == section.stage:
                made.update(dict.fromkeys(instance.slots, box))
    for name in drawing.plan.stages[-1].outputs:
        edges[made[name], len(picture.boxes)] = False
        picture.boxes.append(_pill(name, drawing.values[name]))
    _lay_out(picture, edges)
    for number, times in enumerate(drawing.repeats):
        _bracket(picture, f"× {times}", [box for box in picture.boxes if box.group == str(number)])
    for stage in range(len(drawing.plan.stages)) if len(drawing.plan.stages) > 1 else ():
        _bracket(
            picture, drawing.device(stage), [box for box in picture.boxes if box.kind != "pill" and box.stage == stage]
        )
    _fit(picture)
    return picture


def _write_out(
    picture: Picture,
    section: Section,
    block: Block,
    first: int,
    made: dict[str, int],
    edges: dict[tuple[int, int], bool],
) -> None:
    """Add the ops of a block that stands outside the layers, and note who makes what."""
    base = len(picture.boxes)
    for number, node in enumerate(block.nodes):
        picture.boxes.append(_op(node, first + number, section.stage))
    for link in block.links:
        if link.source is not None and link.target is not None:
            edges[base + link.source, base + link.target] = link.cache
    for number, op in enumerate(section.first.ops):
        for name in op.inputs:
            if name in made and made[name] < base:
                edges[made[name], base + number] = False
        made.update({name: base + number for part in op.primitives() for name in part.outputs})


def block_picture(drawing: Drawing, index: int) -> Picture:
    """One block: what it receives, its ops in their groups, what it hands on."""
    block, first = drawing.blocks[index], first_nodes(drawing)[index]
    picture = Picture(block.title)
    received = dict.fromkeys(link.value for link in block.links if link.source is None)
    made = dict.fromkeys(link.value for link in block.links if link.target is None)
    inlets = {value: number for number, value in enumerate(received)}
    picture.boxes += [_pill(value.split(".{i}.", 1)[-1], None) for value in received]
    base = len(picture.boxes)
    picture.boxes += [_op(node, first + number) for number, node in enumerate(block.nodes)]
    outlets = {value: len(picture.boxes) + number for number, value in enumerate(made)}
    picture.boxes += [_pill(value.split(".{i}.", 1)[-1], None) for value in made]
    edges: dict[tuple[int, int], bool] = {}
    for link in block.links:
        source = inlets[link.value] if link.source is None else base + link.source
        target = outlets[link.value] if link.target is None else base + link.target
        edges.setdefault((source, target), link.cache)
    _lay_out(picture, edges)
    for label in dict.fromkeys(box.group for box in picture.boxes if box.group):
        inside = [box for box in picture.boxes if box.group == label]
        group = _frame(label, inside)
        group = _frame(label, inside + [box for box in picture.boxes if box.kind == "pill" and _touches(group, box)])
        if len(inside) > 1 and not any(
            _touches(group, box) for box in picture.boxes if box.kind == "op" and box.group != label
        ):
            picture.groups.append(group)
    _fit(picture)
    return picture


def _lay_out(picture: Picture, edges: dict[tuple[int, int], bool]) -> None:
    for index in [index for index, box in enumerate(picture.boxes) if box.kind == "pill"]:
        users = [target for source, target in edges if source == index]
        for target in users[1:] if len(users) > MAX_USERS else ():  # one pill for each user, not many long lines
            edges[len(picture.boxes), target] = edges.pop((index, target))
            picture.boxes.append(replace(picture.boxes[index]))
    layout = layered([box.size for box in picture.boxes], list(edges))
    for box, (x, y) in zip(picture.boxes, layout.centres, strict=True):
        box.at = (x - box.size[0] / 2, y - box.size[1] / 2)
    picture.lines = [
        Line(*ends, cache, route) for (ends, cache), route in zip(edges.items(), layout.routes, strict=True)
    ]
    picture.width, picture.height = layout.width, layout.height


def _fit(picture: Picture) -> None:
    """Move everything so that groups that reach out to the left lie inside too."""
    areas = [group.area for group in picture.groups]
    left, top = min((a[0] for a in areas), default=0.0), min((a[1] for a in areas), default=0.0)
    dx, dy = max(0.0, -left), max(0.0, -top)
    picture.width = max([picture.width, *(a[0] + a[2] for a in areas)]) + dx
    picture.height = max([picture.height, *(a[1] + a[3] for a in areas)]) + dy
    for box in picture.boxes:
        box.at = (box.at[0] + dx, box.at[1] + dy)
    picture.lines = [Line(n.source, n.target, n.cache, [(x + dx, y + dy) for x, y in n.points]) for n in picture.lines]
    picture.groups = [
        Group(g.label, g.kind, (g.area[0] + dx, g.area[1] + dy, g.area[2], g.area[3])) for g in picture.groups
    ]


def _frame(label: str, boxes: Iterable[Box]) -> Group:
    areas = [(*box.at, box.at[0] + box.size[0], box.at[1] + box.size[1]) for box in boxes]
    left, top = min(a[0] for a in areas) - GROUP_PAD - GROUP_LABEL, min(a[1] for a in areas) - GROUP_PAD
    right, bottom = max(a[2] for a in areas) + GROUP_PAD, max(a[3] for a in areas) + GROUP_PAD
    return Group(label, "group", (left, top, right - left, bottom - top))


def _bracket(picture: Picture, label: str, boxes: Sequence[Box]) -> None:
    """Add a bracket beside ``boxes``, to the left of all that is there at their height."""
    top, bottom = min(box.at[1] for box in boxes), max(box.at[1] + box.size[1] for box in boxes)
    things = [box.at[0] for box in picture.boxes] + [x for line in picture.lines for x, _ in line.points]
    things += [
        group.area[0] for group in picture.groups if group.area[1] < bottom and top < group.area[1] + group.area[3]
    ]
    picture.groups.append(Group(label, "bracket", (min(things) - 34, top, 24, bottom - top)))


def _touches(group: Group, box: Box) -> bool:
    x, y, width, height = group.area
    return (
        x < box.at[0] + box.size[0] and box.at[0] < x + width and y < box.at[1] + box.size[1] and box.at[1] < y + height
    )


def _pill(name: str, kind: TensorType | None) -> Box:
    return Box("pill", clip(name, 24), tip=f"{name} {kind or ''}".strip())


def _op(node: Node, number: int, stage: int = 0) -> Box:
    parts = dict.fromkeys(part.op.kind for part in node.parts)
    counts = {kind: sum(part.op.kind == kind for part in node.parts) for kind in parts}
    made_of = ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in counts.items())
    types = ", ".join(str(kind) for _, kind in node.outputs)
    return Box(
        "op",
        title=clip(node.op.kind, 20),
        detail=clip(made_of or node.short_name, int((OP_SIZE[0] - 24) / MONO)),
        corner=_corner(node) if len(node.op.kind) < 15 else "",  # a long title takes its place; the tip has both
        category=node.category,
        node=number,
        stage=stage,
        group=node.group.split(".")[0] if ".{i}." in node.name else "",
        tip=f"{node.op.kind} {node.name} {types} ({node.op.origin})",
    )


def _corner(node: Node) -> str:
    if len(node.outputs) != 1:
        return f"{len(node.outputs)} values" if node.outputs else "→ cache" if node.state or node.parts else ""
    return clip("×".join(map(str, node.outputs[0][1].shape)), 9)


def _card(drawing: Drawing, number: int, section: Section, block: Block, mark: str) -> Box:
    count = len(section.layers)
    title = block.title.split(".")[0]
    return Box(
        "card",
        title=f"{clip(title, 10)} × {count}" if count > 1 else clip(title, 14),
        detail=clip(("layers " if count > 1 else "layer ") + layers_text(section.layers), 24),
        corner=mark,
        section=number,
        stage=section.stage,
        group="" if section.group is None else str(section.group),
        tip=f"{block.title}: layers {layers_text(section.layers)} on {drawing.device(section.stage)}",
    )


def clip(text: str, length: int) -> str:
    """``text``, its end replaced by an ellipsis when it is longer than ``length``."""
    return text if len(text) <= length else text[: length - 1] + "…"
