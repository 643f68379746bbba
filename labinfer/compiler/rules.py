"""The rules every op graph obeys, as a table; verified after lowering and after each pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from labinfer.compiler.graph import Op, OpGraph
from labinfer.errors import ErrorSink, InvalidFile, Place
from labinfer.ops import OPS
from labinfer.ops.base import ShapeMismatch


def read_after_made(graph: OpGraph) -> Iterator[tuple[Op, str]]:
    """Every value is made once, before it is read."""
    made = set(graph.inputs)
    for op in graph.ops:
        for part in op.primitives():
            yield from ((op, f"reads '{name}' before it is made") for name in part.inputs if name not in made)
            yield from ((op, f"makes '{name}' a second time") for name in part.outputs if name in made)
            made.update(part.outputs)


def known_kinds(graph: OpGraph) -> Iterator[tuple[Op, str]]:
    """Every primitive op is declared, with the weights and state that its kind asks for."""
    needed = {kind: {slot.name for slot in spec.weights if not slot.optional} for kind, spec in OPS.items()}
    for op in graph.ops:
        for part in op.primitives():
            spec = OPS.get(part.kind)
            if spec is None:
                yield op, f"is of an undeclared kind '{part.kind}'"
                continue
            yield from ((op, f"lacks its weight '{slot}'") for slot in needed[part.kind] - set(part.weights))
            yield from (
                (op, f"uses weight '{w}', which is not in the graph")
                for w in part.weights.values()
                if w not in graph.weights
            )
            if spec.state and part.state not in graph.states:
                yield op, f"uses state '{part.state}', which is not in the graph"


def types_follow(graph: OpGraph) -> Iterator[tuple[Op, str]]:
    """Every value has the type that its op's shape rule gives it."""
    checked: set[tuple[object, ...]] = set()
    for op in graph.ops:
        for part in op.primitives():
            inputs = tuple(graph.values[name] for name in part.inputs if name in graph.values)
            outputs = tuple(graph.values[name] for name in part.outputs if name in graph.values)
            key = (part.kind, id(part.attrs), inputs, outputs)
            if part.kind not in OPS or key in checked:
                continue
            checked.add(key)  # layers of one kind share their attributes: check each combination once
            try:
                inferred = tuple(OPS[part.kind].infer(part.attrs, inputs))
            except ShapeMismatch as mismatch:
                yield op, f"does not fit its inputs: {mismatch}"
                continue
            if inferred != outputs:
                yield op, f"makes {', '.join(map(str, inferred))}, the graph says {', '.join(map(str, outputs))}"


def states_fit(graph: OpGraph) -> Iterator[tuple[Op, str]]:
    """Every op that uses a state takes its parts to be as wide as they are."""
    for op in graph.ops:
        for part in op.primitives():
            spec = OPS.get(part.kind)
            if spec is None or not spec.state or part.state not in graph.states:
                continue
            try:
                found = spec.state_widths(part.attrs, [graph.values[n] for n in part.inputs if n in graph.values])
            except ShapeMismatch:
                continue  # types_follow tells
            if found != (widths := dict(graph.states[part.state].widths)):
                yield op, f"takes state '{part.state}' to have widths {found}, it has {widths}"


def outputs_made(graph: OpGraph) -> Iterator[tuple[Op, str]]:
    """Every output of the graph is made by an op."""
    made = {name for op in graph.ops for name in op.outputs}
    yield from (
        (graph.ops[-1], f"is last, but output '{name}' was never made") for name in graph.outputs if name not in made
    )


RULES: tuple[Callable[[OpGraph], Iterator[tuple[Op, str]]], ...] = (
    read_after_made,
    known_kinds,
    types_follow,
    states_fit,
    outputs_made,
)


def verify_graph(graph: OpGraph, after: str) -> None:
    """Raise ``InvalidFile`` with every broken rule; ``after`` names the step that the graph comes from."""
    if not graph.ops:
        raise InvalidFile("graph.empty", f"'{graph.name}' has no ops")
    sink = ErrorSink()
    for rule in RULES:
        for op, complaint in rule(graph):
            place = Place(op.origin.file, op.origin.line, op.origin.column)
            sink.add(
                InvalidFile(
                    f"graph.{rule.__name__.replace('_', '-')}", f"after {after}: '{op.name}' {complaint}", place=place
                )
            )
    sink.check()
