"""Replaces runs of ops by the fused ops that devices have kernels for, as ``labinfer/ops/fusions.py`` declares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from labinfer.compiler.graph import Op, OpGraph
from labinfer.ops.base import OpAttrs
from labinfer.ops.fusions import Fusion, Part

COMMUTATIVE = {"add"}


def fuse(graph: OpGraph, fusions: Sequence[Fusion]) -> str:
    """Fuse every match, scanning the schedule once; each fused op keeps its parts as its body."""
    consumers = graph.consumers()
    counts: Counter[str] = Counter()
    result: list[Op] = []
    index = 0
    while index < len(graph.ops):
        for fusion in fusions:
            window = graph.ops[index : index + len(fusion.parts)]
            if matches(fusion, window) and (outputs := results(window, consumers, graph.outputs)) is not None:
                result.append(fused(fusion.kind, window, outputs))
                counts[fusion.kind] += 1
                index += len(window)
                break
        else:
            result.append(graph.ops[index])
            index += 1
    graph.ops = result
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items()) or "nothing to fuse"


def matches(fusion: Fusion, window: Sequence[Op]) -> bool:
    """Whether the ops of ``window`` are the parts of ``fusion``, wired as declared, in one layer and on one device."""
    if len(window) != len(fusion.parts) or len({(op.layer, op.device) for op in window}) != 1:
        return False
    bound: dict[str, str] = {}
    return all(op.kind == part.kind and bind(part, op, bound) for part, op in zip(fusion.parts, window, strict=True))


def bind(part: Part, op: Op, bound: dict[str, str]) -> bool:
    """Bind the names of ``part`` to the values of ``op``; False when they contradict earlier bindings."""
    orders = [op.inputs, op.inputs[::-1]] if part.kind in COMMUTATIVE else [op.inputs]
    if (len(part.inputs), len(part.outputs)) != (len(op.inputs), len(op.outputs)):
        return False
    for inputs in orders:
        tried = dict(bound)
        pairs = zip((*part.inputs, *part.outputs), (*inputs, *op.outputs), strict=True)
        if all(tried.setdefault(name, value) == value for name, value in pairs):
            bound.update(tried)
            return True
    return False


def results(window: Sequence[Op], consumers: dict[str, list[Op]], outputs: Sequence[str]) -> tuple[str, ...] | None:
    """The values that leave the window; None when a value is used both inside and outside."""
    inside = {op.name for op in window}
    leaving = []
    for op in window:
        for name in op.outputs:
            users = {user.name in inside for user in consumers[name]} | ({False} if name in outputs else set())
            if users == {True, False}:
                return None
            if users != {True}:
                leaving.append(name)
    return tuple(leaving)


def fused(kind: str, window: Sequence[Op], outputs: tuple[str, ...]) -> Op:
    """The fused op: named after its last result, at the place of its first part."""
    made = {name for op in window for name in op.outputs}
    inputs = tuple(dict.fromkeys(name for op in window for name in op.inputs if name not in made))
    state = next((op.state for op in window if op.state), None)
    first = window[0]
    name = window[-1].name
    return Op(
        name, kind, inputs, outputs, OpAttrs(), {}, first.origin, first.layer, state, first.device, body=tuple(window)
    )
