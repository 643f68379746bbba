"""Removes ops whose results nobody reads (a map may make values that only some of its relatives use)."""

from __future__ import annotations

from labinfer.compiler.graph import OpGraph


def prune(graph: OpGraph) -> str:
    """Keep ops that lead to an output or write a state; drop unread values and unread weights with the rest."""
    wanted = set(graph.outputs)
    kept = []
    for op in reversed(graph.ops):
        if wanted.intersection(op.outputs) or (op.state and not op.outputs):
            kept.append(op)
            wanted.update(op.inputs)
    removed = len(graph.ops) - len(kept)
    if removed:
        graph.ops = kept[::-1]
        made = {name for op in graph.ops for name in op.outputs}
        used = {name for op in graph.ops for name in op.weights.values()}
        graph.values = {name: kind for name, kind in graph.values.items() if name in made or name in graph.inputs}
        graph.weights = {name: weight for name, weight in graph.weights.items() if name in used}
    return f"{removed} ops nobody reads" if removed else "nothing to remove"
