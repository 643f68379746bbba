"""Folding: layers that are alike are written once in the plan, and read back as if each had been written out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pydantic import ValidationError

from labinfer.compiler.graph import Op, Origin, Part, State, Transform, Weight, fold_name, layer_of, unfold_name
from labinfer.compiler.plan import Entry, Plan, PlanOp, PlanPart, PlanState, PlanValue, PlanWeight, Stage, parse_type
from labinfer.errors import InvalidFile
from labinfer.ops import spec_of
from labinfer.ops.base import OpAttrs, TensorType

GRAPH_INPUTS = ("token_ids", "positions")
MAX_OPS = 40_000
"""Ops of a stage and weights of a plan, unfolded: ten times the largest model's."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a value lies: type, byte offset in the arena (-1: only inside a fused kernel), bytes from row to row."""

    type: TensorType
    at: int
    row_bytes: int

    @property
    def placed(self) -> bool:
        """Whether the value has a place in the arena."""
        return self.at >= 0


def fold_ops(ops: Sequence[Op], write: Callable[[str], dict[str, Any]]) -> tuple[list[Entry], dict[str, list[PlanOp]]]:
    """Schedule and blocks of a stage's ``ops``; ``write`` gives the plan's text of a value."""
    blocks: dict[str, list[dict[str, Any]]] = {}
    names: dict[str, str] = {}
    schedule: list[Entry] = []
    previous: _Group | None = None
    for layer, run in groupby(ops, key=lambda op: op.layer):
        group = _Group(layer, list(run), write)
        key = json.dumps(group.text, sort_keys=True)
        if key not in names:
            names[key] = _block_name(group, blocks, bool(schedule))
            blocks[names[key]] = group.text
        if not (previous and _extend(schedule[-1], names[key], group, previous)):
            layers = None if layer is None else (layer, layer)
            schedule.append(Entry(block=names[key], layers=layers, receives=group.receives))
        previous = group
    return schedule, {name: [PlanOp.model_validate(op) for op in text] for name, text in blocks.items()}


class _Group:
    """The ops of one layer (or of no layer) as the text of a block."""

    def __init__(self, layer: int | None, ops: list[Op], write: Callable[[str], dict[str, Any]]) -> None:
        self.layer, self.write = layer, write
        parts = [part for op in ops for part in op.primitives()]
        self.made = {name for part in parts for name in part.outputs}
        received = dict.fromkeys(name for part in parts for name in part.inputs if name not in self.made)
        labels: dict[str, str] = {}
        for name in received:
            if name not in GRAPH_INPUTS:
                label = "$" + re.sub(r"\.\d+$", "", name).rsplit(".", 1)[-1]
                labels[name] = label if label not in labels.values() else f"{label}{len(labels)}"
        self.receives = {label: name for name, label in labels.items()}
        self.labels = labels
        self.text = [self.op(op) for op in ops]

    def name(self, name: str) -> str:
        return self.labels.get(name) or (name if self.layer is None else fold_name(name))

    def op(self, op: Op, inner: bool = False) -> dict[str, Any]:
        text: dict[str, Any] = {
            "name": self.name(op.name),
            "op": op.kind,
            "in": [self.name(name) for name in op.inputs],
        }
        outputs = op.outputs if not op.body else ()  # a fused op's values are written by its parts
        if outputs:
            text["out"] = {self.name(name): self.write(name) for name in outputs}
        if op.weights:
            text["weights"] = {slot: self.name(weight) for slot, weight in op.weights.items()}
        if attrs := op.attrs.model_dump(mode="json", exclude_defaults=True):
            text["attrs"] = attrs
        if op.workspace:
            text["workspace"] = list(op.workspace)
        if op.state and not op.body:
            text["state"] = self.name(op.state)
        if not inner:
            text["origin"] = str(op.origin)
        if op.body:
            text["body"] = [self.op(part, inner=True) for part in op.body]
        return text


def _block_name(group: _Group, blocks: Mapping[str, Any], started: bool) -> str:
    base = "layer" if group.layer is not None else "end" if started else "start"
    count = sum(name.split(".")[0] == base for name in blocks)
    return base if not count else f"{base}.{count + 1}"


def _extend(entry: Entry, block: str, group: _Group, previous: _Group) -> bool:
    """Make ``entry`` run for ``group``'s layer too, if that is its next layer and receives what it should."""
    if entry.block != block or entry.layers is None or group.layer != entry.layers[1] + 1:
        return False
    step: dict[str, str | None] = {}
    for label, name in group.receives.items():
        if name == previous.receives.get(label):
            step[label] = None
        elif name in previous.made:
            step[label] = fold_name(name)
        else:
            return False
    if entry.next and entry.next != step:
        return False
    entry.next = step
    entry.layers = (entry.layers[0], group.layer)
    return True


def unfold_ops(stage: Stage) -> Iterator[tuple[Op, dict[str, Slot]]]:
    """The ops of a stage in order, each with the slots of the values it makes.

    Raises ``InvalidFile`` for what no plan of ours says (unknown blocks, ops, attributes, types).
    """
    attrs: dict[int, OpAttrs] = {}
    count = 0
    for entry in stage.schedule:
        if entry.block not in stage.blocks:
            raise InvalidFile("plan.unknown-block", f"the schedule names a block '{entry.block}' that does not exist")
        first, last = entry.layers or (0, 0)
        if last - first > 4096 or last < first:
            raise InvalidFile("plan.layers", f"block '{entry.block}' runs for layers {first} to {last}")
        received = dict(entry.receives)
        count += (last - first + 1) * (len(stage.blocks[entry.block]) + 1)
        if count > MAX_OPS:
            raise InvalidFile("plan.too-large", f"the schedule runs more than {MAX_OPS} ops")
        for layer in range(first, last + 1):
            number = layer if entry.layers else None
            for op in stage.blocks[entry.block]:
                yield _unfold_op(op, number, received, attrs)
            for label, name in entry.next.items():
                received[label] = received.get(label, "") if name is None else unfold_name(name, layer)


def _unfold_op(
    op: PlanOp, layer: int | None, received: Mapping[str, str], attrs: dict[int, OpAttrs]
) -> tuple[Op, dict[str, Slot]]:
    def name(text: str) -> str:
        return received.get(text) or (text if layer is None else unfold_name(text, layer))

    slots: dict[str, Slot] = {}
    body: tuple[Op, ...] = ()
    if op.body:
        if any(part.body for part in op.body):
            raise InvalidFile("plan.fused", f"a part of '{op.name}' has parts itself")
        parts = [_unfold_op(part, layer, received, attrs) for part in op.body]
        body = tuple(part for part, _ in parts)
        for _, made in parts:
            slots.update(made)
        used = {value for part in body for value in part.inputs}
        outputs = tuple(value for part in body for value in part.outputs if value not in used)
    else:
        outputs = tuple(name(text) for text in op.out)
        slots = {name(text): _slot(value, op.name) for text, value in op.out.items()}
    if id(op) not in attrs:
        attrs[id(op)] = OpAttrs() if op.body else _attrs(op)
    file, line, column = [*op.origin.rsplit(":", 2), "", ""][:3]
    origin = Origin(file, int(line) if line.isdigit() else 0, int(column) if column.isdigit() else 0)
    weights = {slot: name(weight) for slot, weight in op.weights.items()}
    inputs = tuple(name(text) for text in op.inputs)
    state = next((part.state for part in body if part.state), name(op.state) if op.state else None)
    unfolded = Op(
        name(op.name), op.op, inputs, outputs, attrs[id(op)], weights, origin, layer, state, None, body, op.workspace,
        op.cost,
    )  # fmt: skip
    return unfolded, slots


def _attrs(op: PlanOp) -> OpAttrs:
    try:
        return spec_of(op.op).Attrs(**op.attrs)
    except ValidationError as failure:
        detail = failure.errors(include_url=False)[0]
        where = ".".join(map(str, detail["loc"]))
        raise InvalidFile("plan.attribute", f"op '{op.name}': {op.op}.{where}: {detail['msg']}") from None


def _slot(value: PlanValue, owner: str) -> Slot:
    try:
        kind = parse_type(value.type)
    except ValueError as error:
        raise InvalidFile("plan.type", f"'{owner}': {error}") from None
    return Slot(kind, -1 if value.at is None else value.at, value.row or natural_row(kind))


def steps(op: Op, slots: Mapping[str, Slot]) -> tuple[Op, ...]:
    """The ops that run for ``op``: itself, or its parts when the plan gives every value of theirs a place."""
    whole = any(not slots[name].placed for part in op.body for name in part.outputs)
    return (op,) if whole else op.primitives()


def unfold_inputs(stage: Stage) -> dict[str, Slot]:
    """The slots of the values that a stage receives."""
    return {name: _slot(value, name) for name, value in stage.inputs.items()}


def natural_row(kind: TensorType) -> int:
    """Bytes from row to row of a value that is not a window."""
    return TensorType((1, *kind.shape[1:]), kind.dtype).nbytes(1, 1)


def fold_weights(weights: Mapping[str, Weight]) -> list[PlanWeight]:
    """Weights of consecutive layers that differ only in the layer's number as one line each."""
    folded: list[PlanWeight] = []
    open_lines: dict[str, PlanWeight] = {}
    for weight in weights.values():
        where = layer_of(weight.name)
        layer = where[1] if where else None
        name, tensor = weight.name, weight.tensor
        if layer is not None and f".{layer}." in tensor:
            name, tensor = fold_name(name), tensor.replace(f".{layer}.", ".{i}.", 1)
        line = open_lines.get(name)
        fix = weight.transform
        fresh = PlanWeight(
            name=name, shape=list(weight.shape), format=weight.format, tensor=tensor, stack=weight.stack,
            rows=list(fix.rows), order=list(fix.order), transpose=fix.transpose, adapter=weight.adapter,
            part=plan_part(weight.part) if weight.part else None,
        )  # fmt: skip
        if layer is None or name == weight.name:
            folded.append(fresh)
        elif line and line.layers and line.layers[1] == layer - 1 and line.model_copy(update={"layers": None}) == fresh:
            line.layers = (line.layers[0], layer)
        else:
            fresh.layers = (layer, layer)
            folded.append(fresh)
            open_lines[name] = fresh
    return folded


def plan_part(part: Part) -> PlanPart:
    """A part as the plan has it."""
    return PlanPart(axis=part.axis, size=part.size, runs=list(part.runs))


def unfold_weights(plan: Plan) -> dict[str, Weight]:
    """Every weight of the plan by its full name."""
    found = {}
    for line in plan.weights:
        fix = Transform(tuple(line.rows), tuple(line.order), line.transpose)
        part = Part(line.part.axis, line.part.size, tuple(line.part.runs)) if line.part else None
        for layer in _layers(line):
            name, tensor = (text if layer is None else unfold_name(text, layer) for text in (line.name, line.tensor))
            found[name] = Weight(name, tuple(line.shape), line.format, tensor, line.stack, fix, line.adapter, part)
        if len(found) > MAX_OPS:
            raise InvalidFile("plan.too-large", f"the plan has more than {MAX_OPS} weights")
    return found


def fold_states(states: Mapping[str, State]) -> list[PlanState]:
    """States of consecutive layers with equal widths and group as one line each."""
    folded: list[PlanState] = []
    for state in states.values():
        where = layer_of(state.name)
        layer = where[1] if where else None
        fresh = PlanState(name=fold_name(state.name), widths=dict(state.widths), group=state.group)
        last = folded[-1] if folded else None
        if (
            layer is not None
            and last
            and last.layers
            and last.layers[1] == layer - 1
            and (last.name, last.widths, last.group) == (fresh.name, fresh.widths, fresh.group)
        ):
            last.layers = (last.layers[0], layer)
        else:
            fresh.layers = None if layer is None else (layer, layer)
            folded.append(fresh)
    return folded


def unfold_states(plan: Plan) -> dict[str, State]:
    """Every state of the plan by its full name."""
    found = {}
    for line in plan.states:
        for layer in _layers(line):
            name = line.name if layer is None else unfold_name(line.name, layer)
            found[name] = State(name, line.widths, line.group)
    return found


def _layers(line: PlanWeight | PlanState) -> list[int] | list[None]:
    if line.layers is None:
        return [None]
    first, last = line.layers
    if last < first or last - first > 4096:
        raise InvalidFile("plan.layers", f"'{line.name}' stands for layers {first} to {last}")
    return list(range(first, last + 1))


def layer_matrices(ops: Sequence[Op], weights: Mapping[str, Weight]) -> dict[int, list[Weight]]:
    """The matrices of each layer that no op of another layer uses: what can be streamed with it."""
    users: dict[str, set[int | None]] = {}
    for op in ops:
        for part in op.primitives():
            for name in part.weights.values():
                users.setdefault(name, set()).add(op.layer)
    found: dict[int, list[Weight]] = {}
    for name, used in users.items():
        [layer, *others] = used
        weight = weights[name]
        if layer is not None and not others and len(weight.shape) > 1 and not weight.adapter:
            found.setdefault(layer, []).append(weight)
    return found
