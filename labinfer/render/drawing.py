"""What a plan looks like before any format: its blocks, each drawn once, and the sections that say where they repeat.

Every format starts from a ``Drawing``. A plan's blocks differ in byte offsets too; here only structure counts, so that
layers which merely lie elsewhere in the arena are drawn once. Layers that alternate (local, global, local, global ...)
become one repeated group of sections.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from labinfer.compiler.fold import GRAPH_INPUTS, Slot, unfold_inputs, unfold_ops, unfold_states, unfold_weights
from labinfer.compiler.graph import Op, State, Weight, fold_name, plain_attrs
from labinfer.compiler.plan import Entry, Limits, Plan, Stage
from labinfer.ops import OPS
from labinfer.ops.base import TensorType
from labinfer.ops.formats import stored_bytes
from labinfer.render.measured import MeasuredStep
from labinfer.render.palette import category_of

MAX_PERIOD = 12
"""Longest pattern of differing layers that is looked for (Gemma 3 has five local layers and a global one)."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one op takes at the plan's upper bounds: ``flops``, and bytes of its weights, operands and results."""

    flops: int
    weights: int
    reads: int
    writes: int

    @property
    def owned(self) -> int:
        """Bytes that exist because of the op: its weights and what it writes."""
        return self.weights + self.writes

    @property
    def moved(self) -> int:
        """Bytes it reads and writes."""
        return self.weights + self.reads + self.writes


@dataclass(frozen=True, slots=True)
class Node:
    """An op as it is drawn: names hold ``{i}`` for the layer, ``parts`` are the ops that a fused op stands for."""

    op: Op
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, TensorType], ...]
    weights: Mapping[str, str]
    state: str | None
    category: str
    cost: Cost
    parts: tuple[Node, ...] = ()

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes that are not at their default."""
        return plain_attrs(self.op.attrs)

    @property
    def short_name(self) -> str:
        """The name without its layer: ``attn.qkv.q``."""
        return self.name.split(".{i}.", 1)[-1]

    @property
    def group(self) -> str:
        """The block of the map that the op stands in, '' for none: ``attn.qkv``."""
        path = [part for part in self.short_name.split(".") if not part.isdigit()]
        return ".".join(path[:-1])


@dataclass(frozen=True, slots=True)
class Link:
    """A dependency between two ops of a block, by index; None stands for what lies outside of the block.

    ``cache`` marks an order that goes through the state (write the cache, then read it) and not through a value.
    """

    source: int | None
    target: int | None
    value: str
    cache: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """Ops that stand together, once for all layers alike, and how they hang together."""

    title: str
    nodes: tuple[Node, ...]
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """A block in one place of the schedule, with full names: its ops in order, the slots of the values they make."""

    stage: int
    block: int
    layer: int | None
    ops: tuple[Op, ...]
    slots: Mapping[str, Slot]


@dataclass(slots=True)
class Section:
    """A block drawn once for its ``layers`` (empty for ops outside every layer); ``group``: its repeated pattern."""

    stage: int
    block: int
    layers: list[int]
    first: Instance
    group: int | None = None


@dataclass(slots=True)
class Drawing:
    """A whole plan, folded (``sections`` of ``blocks``) and written out (``instances``), with types of all values."""

    plan: Plan
    blocks: list[Block]
    instances: list[Instance]
    sections: list[Section]
    repeats: list[int]
    values: dict[str, TensorType]
    weights: dict[str, Weight]
    states: dict[str, State]
    measured: Sequence[MeasuredStep] = ()

    def device(self, stage: int) -> str:
        """The name of the device that runs ``stage``."""
        return self.plan.stages[stage].device

    def nodes(self, instance: Instance) -> Iterator[tuple[Op, Node]]:
        """Each op of ``instance`` beside its folded node."""
        return zip(instance.ops, self.blocks[instance.block].nodes, strict=True)

    def value_bytes(self, kind: TensorType) -> int:
        """Bytes of a value at the plan's bounds."""
        return kind.nbytes(self.plan.limits.max_num_batched_tokens, self.plan.limits.max_logits_rows)

    def weight_bytes(self, name: str) -> int:
        """Bytes of a weight as it is stored; what it takes in a device's own layout only that device knows."""
        weight = self.weights[name]
        return stored_bytes(weight.format, weight.shape)


def draw(plan: Plan, measured: Sequence[MeasuredStep] = ()) -> Drawing:
    """The drawing of ``plan``, with what steps of it took."""
    drawing = Drawing(plan, [], [], [], [], {}, unfold_weights(plan), unfold_states(plan), measured)
    drawing.values.update(dict.fromkeys(GRAPH_INPUTS, TensorType(("T",), "i32")))
    known: dict[str, int] = {}
    for number, stage in enumerate(plan.stages):
        drawing.values.update({name: slot.type for name, slot in unfold_inputs(stage).items()})
        for entry, layer, ops, slots in _instances(stage):
            drawing.values.update({name: slot.type for name, slot in slots.items()})
            key = _structure(stage, entry.block)
            if key not in known:
                known[key] = len(drawing.blocks)
                drawing.blocks.append(_block(drawing, entry.block, ops))
            drawing.instances.append(Instance(number, known[key], layer, ops, slots))
    _add_outlets(drawing)
    drawing.sections, drawing.repeats = _fold_patterns(_sections(drawing.instances))
    return drawing


def outside_reads(instance: Instance) -> list[str]:
    """The values that an instance of a block takes from elsewhere, in order of their first use."""
    made = {name for op in instance.ops for part in op.primitives() for name in part.outputs}
    return list(dict.fromkeys(name for op in instance.ops for name in op.inputs if name not in made))


def _add_outlets(drawing: Drawing) -> None:
    """Give each block a link outwards for every value that is needed outside of it."""
    needed = {name for stage in drawing.plan.stages for name in stage.outputs}
    for instance in drawing.instances:
        needed.update(outside_reads(instance))
    seen: set[int] = set()
    for instance in drawing.instances:
        if instance.block not in seen:
            seen.add(instance.block)
            outlets = [
                Link(index, None, fold_name(name))
                for index, op in enumerate(instance.ops)
                for part in op.primitives()
                for name in part.outputs
                if name in needed
            ]
            block = drawing.blocks[instance.block]
            drawing.blocks[instance.block] = replace(block, links=(*block.links, *outlets))


def _instances(stage: Stage) -> Iterator[tuple[Entry, int | None, tuple[Op, ...], dict[str, Slot]]]:
    ops = unfold_ops(stage)
    for entry in stage.schedule:
        layers = [None] if entry.layers is None else range(entry.layers[0], entry.layers[1] + 1)
        for layer in layers:
            made = list(islice(ops, len(stage.blocks[entry.block])))
            yield (
                entry,
                layer,
                tuple(op for op, _ in made),
                {name: slot for _, own in made for name, slot in own.items()},
            )


def _structure(stage: Stage, block: str) -> str:
    """A block as text without its place in the arena, and without its costs."""

    def strip(op: dict[str, Any]) -> dict[str, Any]:
        types = {name: value["type"] for name, value in op["out"].items()}
        return {**op, "cost": None, "out": types, "body": [strip(part) for part in op["body"]]}

    return json.dumps([strip(op.model_dump(mode="json", by_alias=True)) for op in stage.blocks[block]])


def _block(drawing: Drawing, title: str, ops: Sequence[Op]) -> Block:
    nodes = tuple(_node(drawing, op) for op in ops)
    producers = {name: index for index, op in enumerate(ops) for part in op.primitives() for name in part.outputs}
    links: list[Link] = []
    writers: dict[str, int] = {}
    for index, op in enumerate(ops):
        inner = {name for part in op.body for name in part.outputs}
        for name in dict.fromkeys(name for name in op.inputs if name not in inner):
            links.append(Link(producers.get(name), index, fold_name(name)))
        for part in op.primitives():
            if part.state and part.outputs and writers.get(part.state, index) != index:
                links.append(Link(writers[part.state], index, fold_name(part.state), cache=True))
            elif part.state:
                writers[part.state] = index
    return Block(title, nodes, tuple(links))


def _node(drawing: Drawing, op: Op) -> Node:
    parts = tuple(_node(drawing, part) for part in op.body)
    if parts:
        costs = [part.cost for part in parts]
        cost = Cost(*(sum(getattr(c, name) for c in costs) for name in ("flops", "weights", "reads", "writes")))
        category = max(parts, key=lambda part: part.cost.flops).category
    else:
        cost, category = _cost(drawing, op), category_of(op.kind)
    return Node(
        op=op,
        name=fold_name(op.name),
        inputs=tuple(fold_name(name) for name in op.inputs),
        outputs=tuple((fold_name(name), drawing.values[name]) for name in op.outputs),
        weights={slot: fold_name(name) for slot, name in op.weights.items()},
        state=fold_name(op.state) if op.state else None,
        category=category,
        cost=cost,
        parts=parts,
    )


def _cost(drawing: Drawing, op: Op) -> Cost:
    limits: Limits = drawing.plan.limits
    inputs = [drawing.values[name] for name in op.inputs]
    tokens, rows = limits.max_num_batched_tokens, limits.max_logits_rows
    flops = OPS[op.kind].flops(op.attrs, inputs, tokens, rows, limits.max_model_len)
    view = OPS[op.kind].view
    return Cost(
        flops=flops,
        weights=sum(drawing.weight_bytes(name) for name in op.weights.values()),
        reads=0 if view else sum(drawing.value_bytes(kind) for kind in inputs),
        writes=0 if view else sum(drawing.value_bytes(drawing.values[name]) for name in op.outputs),
    )


def _sections(instances: Sequence[Instance]) -> list[Section]:
    """Consecutive layers of the same block as one section."""
    sections: list[Section] = []
    for instance in instances:
        last = sections[-1] if sections else None
        if (
            last
            and instance.layer is not None
            and last.layers
            and (last.stage, last.block) == (instance.stage, instance.block)
        ):
            last.layers.append(instance.layer)
        else:
            layers = [] if instance.layer is None else [instance.layer]
            sections.append(Section(instance.stage, instance.block, layers, instance))
    return sections


def _fold_patterns(sections: list[Section]) -> tuple[list[Section], list[int]]:
    """Sections with every repeated pattern of layers written once, and how often each pattern (``group``) repeats."""
    keys = [(s.stage, s.block, len(s.layers)) for s in sections]
    folded: list[Section] = []
    repeats: list[int] = []
    at = 0
    while at < len(sections):
        period, times = _pattern(keys, at)
        if times > 1:
            for position in range(at, at + period):
                kept = sections[position]
                kept.group = len(repeats)
                kept.layers = [i for turn in range(times) for i in sections[position + turn * period].layers]
                folded.append(kept)
            repeats.append(times)
        else:
            folded.append(sections[at])
        at += period * times
    return folded, repeats


def _pattern(keys: Sequence[tuple[int, int, int]], at: int) -> tuple[int, int]:
    """Length and number of repetitions of the pattern that starts at ``at`` and covers most; (1, 1) for none."""
    best = (1, 1)
    for period in range(2, MAX_PERIOD + 1):
        pattern, times = keys[at : at + period], 1
        if any(count == 0 for _, _, count in pattern):
            break
        while keys[at + times * period : at + (times + 1) * period] == pattern:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def layers_text(layers: Sequence[int]) -> str:
    """``0–27``, or ``0–4, 6–10 …`` for layers with gaps."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    texts = [str(a) if a == b else f"{a}–{b}" for a, b in runs]
    return ", ".join(texts[:3]) + (" …" if len(texts) > 3 else "")
