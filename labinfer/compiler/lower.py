"""Lowering: a map and one model's configuration become the op graph of that model.

Blocks are expanded, expressions evaluated, shapes inferred, weights tied to checkpoint tensors. Layers whose per-layer
values are equal share all evaluated results, so the work grows with the kinds of layer, not with their number.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from labinfer.compiler.blueprint import Blueprint, Line, OpLine, RepeatLine, UseLine
from labinfer.compiler.expressions import Expression, Scope, parse_expression
from labinfer.compiler.graph import Op, OpGraph, Origin, State
from labinfer.compiler.settings import ModelSource, as_list, model_scope
from labinfer.compiler.weight_table import User, WeightTable
from labinfer.errors import Errors, ErrorSink, InvalidFile, LabinferError, Place, WeightsError, did_you_mean
from labinfer.home import graphs_dir
from labinfer.ops import OPS
from labinfer.ops.base import OpAttrs, OpSpec, ShapeMismatch, TensorType

MAX_LAYERS = 1024
GRAPH_INPUTS = {"token_ids": TensorType(("T",), "i32"), "positions": TensorType(("T",), "i32")}


@dataclass(slots=True)
class Names:
    """What the lines of one block can see: their own values first, then those of the block that uses them."""

    outer: Names | None = None
    own: dict[str, str | None] = field(default_factory=dict)

    def find(self, name: str) -> tuple[bool, str | None]:
        """Whether ``name`` is known here, and the value it stands for (None when that value failed to lower)."""
        if name in self.own:
            return True, self.own[name]
        return self.outer.find(name) if self.outer else (False, None)

    def visible(self) -> set[str]:
        """Every name that could be meant here."""
        return set(self.own) | (self.outer.visible() if self.outer else set())


@dataclass(frozen=True, slots=True)
class Context:
    """Where lowering stands: the path of names, the scope of values, the layer and its group, the blocks around it."""

    path: str
    scope: Scope
    key: str = ""
    group: str | None = None
    layer: int | None = None
    device: str | None = None
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The result of an op line for one set of per-layer values and input types."""

    attrs: OpAttrs
    outputs: list[TensorType]
    weight_shapes: Mapping[str, tuple[int, ...]]


def map_name(file: Path) -> str:
    """How a map file is named: a shipped one by its name alone, so that plans mean the same on every machine."""
    return file.name if file.resolve().parent == graphs_dir() else str(file)


def lower(blueprint: Blueprint, source: ModelSource) -> OpGraph:
    """The op graph of the model in ``source``; raises every error found, each at its place in the map."""
    return _Lowering(blueprint, source).run()


def unused(name: str, taken: Container[str]) -> str:
    """``name``, or ``name.2`` and so on when it is taken."""
    full, count = name, 1
    while full in taken:
        count += 1
        full = f"{name}.{count}"
    return full


def attribute_errors(line: OpLine, failure: ValidationError) -> list[InvalidFile]:
    """What pydantic found wrong with the attributes of ``line``, each at its place."""
    found = []
    for detail in failure.errors(include_url=False):
        name = str(detail["loc"][0]) if detail["loc"] else None
        got = f" (got {detail['input']!r:.80})" if name else ""
        where = f"{line.op}.{name}" if name else line.op
        found.append(InvalidFile("map.attribute", f"{where}: {detail['msg']}{got}", place=line.place(name)))
    return found


class _Lowering:
    def __init__(self, blueprint: Blueprint, source: ModelSource) -> None:
        self.blueprint, self.source, self.sink = blueprint, source, ErrorSink()
        self.map_names = {str(file): map_name(file) for file in blueprint.files}
        self.scope = model_scope(blueprint, source)
        self.table = WeightTable(blueprint, source, self.sink)
        self.graph = OpGraph(source.name or blueprint.family, tuple(blueprint.inputs), ())
        self.silent: set[str] = set()  # names of the ops that make no value
        self.expressions: dict[tuple[int, str], Expression] = {}
        self.evaluated: dict[tuple[int, str, tuple[TensorType, ...]], Evaluated | None] = {}

    def run(self) -> OpGraph:
        graph, names = self.graph, Names()
        for name in graph.inputs:
            graph.values[name] = GRAPH_INPUTS[name]
            names.own[name] = name
        self.lines(self.blueprint.graph, names, Context("", self.scope))
        graph.outputs = tuple(filter(None, (names.own.get(name) for name in self.blueprint.outputs)))
        for name in self.blueprint.outputs:
            if name not in names.own:
                remedy = did_you_mean(name, names.own)
                place = self.blueprint.place("outputs")
                self.sink.add(
                    InvalidFile("map.undefined-name", f"output '{name}' is never made", place=place, remedy=remedy)
                )
        graph.weights, graph.modules = self.table.weights, self.table.modules
        if all(isinstance(error, WeightsError) for error in self.sink.errors):
            self.table.check_unused()
        self.sink.check()
        return graph

    def lines(self, lines: Sequence[Line], names: Names, context: Context) -> None:
        for line in lines:
            try:
                if isinstance(line, OpLine):
                    self.op(line, names, context)
                elif isinstance(line, UseLine):
                    self.use(line, names, context)
                else:
                    self.repeat(line, names, context)
            except LabinferError as error:
                self.sink.add(error)
                names.own.update(dict.fromkeys(self.made_by(line)))  # what depends on it is not reported again

    def made_by(self, line: Line) -> list[str]:
        """The names that ``line`` makes known where it stands; a repeated block hands on what was known before."""
        if isinstance(line, OpLine):
            return as_list(line.out)
        if isinstance(line, RepeatLine):
            return []
        inner = [each for each in self.blueprint.blocks[line.use] if isinstance(each, OpLine)]
        return [f"{line.name or line.use}.{name}" for each in inner for name in as_list(each.out)]

    def value(self, line: Line, key: str, text: Any, scope: Scope) -> Any:
        """The value of the expression under ``key`` of ``line``, parsed once."""
        if not isinstance(text, str):
            return text
        known = self.expressions.get((id(line), key))
        if known is None:
            known = self.expressions[(id(line), key)] = parse_expression(text, line.place(key))
        return known.evaluate(scope)

    def device(self, line: OpLine | RepeatLine, scope: Scope) -> str | None:
        """The device that ``line`` is pinned to, by name."""
        name = self.value(line, "device", line.device, scope)
        if name is not None and not isinstance(name, str):
            message = f"'device' must be a device's name in quotes, got {name!r}"
            raise InvalidFile("map.device", message, place=line.place("device"))
        return name

    def use(self, line: UseLine, names: Names, context: Context) -> None:
        if not self.value(line, "when", line.when, context.scope):
            return
        inner = self.enter(line.use, line.place("use"), context, f"{line.name or line.use}.")
        made = Names(names)
        self.lines(self.blueprint.blocks[line.use], made, inner)
        names.own.update({f"{line.name or line.use}.{name}": value for name, value in made.own.items()})

    def enter(self, block: str, place: Place | None, context: Context, step: str, **changes: Any) -> Context:
        """The context inside ``block``; a block inside itself is an error."""
        if block in context.blocks:
            chain = " -> ".join((*context.blocks, block))
            raise InvalidFile("map.block-cycle", f"block '{block}' contains itself: {chain}", place=place)
        kept = {name: getattr(context, name) for name in ("scope", "key", "group", "layer", "device")}
        return Context(path=context.path + step, blocks=(*context.blocks, block), **{**kept, **changes})

    def repeat(self, line: RepeatLine, names: Names, context: Context) -> None:
        if context.layer is not None:
            message = f"block '{line.repeat}' is repeated inside the repeated '{context.group}': layers do not nest"
            raise InvalidFile("map.repeat", message, place=line.place("repeat"))
        times = self.value(line, "times", line.times, context.scope)
        if not isinstance(times, int) or not 1 <= times <= MAX_LAYERS:
            message = f"'times' must be a number from 1 to {MAX_LAYERS}, got {times!r}"
            raise InvalidFile("map.repeat", message, place=line.place("times"))
        for name in as_list(line.carry):
            if not names.find(name)[0]:
                raise self.undefined(name, names, line.place("carry"))
        per_layer = sorted(context.scope.dependents([line.index]) & set(self.blueprint.config))
        for i in range(times):
            scope = context.scope.derive({line.index: i})
            key = repr([scope[name] for name in per_layer])
            device = self.device(line, scope)
            inner = self.enter(
                line.repeat, line.place("repeat"), context, f"{line.name}.{i}.",
                scope=scope, key=key, group=line.name, layer=i, device=device,
            )  # fmt: skip
            made = Names(names)
            self.lines(self.blueprint.blocks[line.repeat], made, inner)
            names.own.update({name: made.own[name] for name in as_list(line.carry) if name in made.own})
            if any(not isinstance(error, WeightsError) for error in self.sink.errors):
                break  # a wrong layer is reported once, not once per layer

    def undefined(self, name: str, names: Names, place: Place | None) -> InvalidFile:
        remedy = did_you_mean(name, names.visible())
        made_at = next(
            (other for other in self.all_lines() if isinstance(other, OpLine) and name in as_list(other.out)), None
        )
        if made_at is not None and remedy is None:
            remedy = f"it is made at {made_at.place()}: lines run in order, so reading it here would be a cycle"
        return InvalidFile("map.undefined-name", f"'{name}' is not defined here", place=place, remedy=remedy)

    def all_lines(self) -> list[Line]:
        return [*self.blueprint.graph, *(line for block in self.blueprint.blocks.values() for line in block)]

    def op(self, line: OpLine, names: Names, context: Context) -> None:
        if not self.value(line, "when", line.when, context.scope):
            return
        spec = OPS[line.op]
        wanted, outs = as_list(line.inputs), as_list(line.out)
        inputs: list[str] = []
        failed = False
        for name in wanted:
            known, value = names.find(name)
            if not known:
                self.sink.add(self.undefined(name, names, line.place("in")))
            failed |= value is None
            inputs.append(value or "")
        types = () if failed else tuple(self.graph.values[name] for name in inputs)
        result = None if failed else self.evaluate(line, spec, types, inputs, context)
        if result is None:
            names.own.update(dict.fromkeys(outs))
            return
        if len(outs) != len(result.outputs):
            message = f"op '{line.op}' makes {len(result.outputs)} values, 'out' names {len(outs)}"
            raise InvalidFile("map.outputs", message, place=line.place("out"))
        self.emit(line, tuple(inputs), result, names, context)

    def evaluate(
        self, line: OpLine, spec: OpSpec, types: tuple[TensorType, ...], inputs: list[str], context: Context
    ) -> Evaluated | None:
        """Attributes and output types of ``line``; None when they are wrong (already reported)."""
        key = (id(line), context.key, types)
        if key not in self.evaluated:
            self.evaluated[key] = None
            self.evaluated[key] = self.evaluate_now(line, spec, types, inputs, context)
        return self.evaluated[key]

    def evaluate_now(
        self, line: OpLine, spec: OpSpec, types: tuple[TensorType, ...], inputs: list[str], context: Context
    ) -> Evaluated:
        texts = line.model_extra or {}
        given = {
            name: self.value(line, name, texts[name], context.scope)
            for name in texts
            if name in spec.Attrs.model_fields
        }
        try:
            attrs = spec.Attrs(**given)
        except ValidationError as failure:
            raise Errors(attribute_errors(line, failure)) from None
        low, high = (len(spec.inputs) - spec.optional_inputs, len(spec.inputs))
        if not low <= len(types) <= high:
            message = f"op '{line.op}' takes {', '.join(spec.inputs)}; 'in' names {len(types)}"
            raise InvalidFile("map.inputs", message, place=line.place("in"))
        try:
            return Evaluated(attrs, spec.infer(attrs, types), spec.weight_shapes(attrs, types))
        except ShapeMismatch as mismatch:
            raise self.mismatch(line, inputs, mismatch) from None

    def mismatch(self, line: OpLine, inputs: list[str], mismatch: ShapeMismatch) -> InvalidFile:
        """A shape error that names who made each value involved."""
        producers = self.graph.producers()
        parts = []
        for index in mismatch.inputs or range(len(inputs)):
            name = inputs[index]
            origin = (
                f"made by '{producers[name].kind}' at {producers[name].origin}"
                if name in producers
                else "a graph input"
            )
            parts.append(f"'{name}' is {self.graph.values[name]}, {origin}")
        message = f"{line.op}: {mismatch}; {'; '.join(parts)}"
        return InvalidFile("map.shape-mismatch", message, place=line.place("in"))

    def emit(self, line: OpLine, inputs: tuple[str, ...], result: Evaluated, names: Names, context: Context) -> None:
        graph, outputs = self.graph, []
        for name, kind in zip(as_list(line.out), result.outputs, strict=True):
            full = unused(context.path + name, graph.values)
            graph.values[full] = kind
            names.own[name] = full
            outputs.append(full)
        weights = {}
        user = User(context.group, context.layer, context.scope)
        texts = line.model_extra or {}
        for slot in OPS[line.op].weights:
            if slot.name in texts:
                shape = result.weight_shapes[slot.name]
                place = line.place(slot.name)
                if found := self.table.resolve(texts[slot.name], shape, place, user):
                    weights[slot.name] = found
                elif not slot.optional:
                    message = f"op '{line.op}' cannot do without '{texts[slot.name]}'"
                    self.sink.add(InvalidFile("map.missing-weight", message, place=place))
        place = line.place()
        origin = Origin(self.map_names[place.file], place.line, place.column) if place else Origin("", 0, 0)
        state = self.state(line, context) if line.state else None
        device = self.device(line, context.scope) or context.device
        name = outputs[0] if outputs else unused(f"{context.path}{line.op}", self.silent)
        if not outputs:
            self.silent.add(name)
        op = Op(name, line.op, inputs, tuple(outputs), result.attrs, weights, origin, context.layer, state, device)
        graph.ops.append(op)

    def state(self, line: OpLine, context: Context) -> str:
        """The state of this layer, declared on first use."""
        prefix = f"{context.group}.{context.layer}." if context.group else ""
        name = f"{prefix}{line.state}"
        if name not in self.graph.states:
            widths = self.blueprint.states[str(line.state)]
            sizes = {part: parse_expression(text).evaluate(context.scope) for part, text in widths.items()}
            if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
                raise InvalidFile("map.state", f"state '{name}' has sizes {sizes}", place=line.place("state"))
            self.graph.states[name] = State(name, sizes)  # type: ignore[arg-type]
        return name
