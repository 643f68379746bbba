"""Turns a model's graph into what one rank of a tensor-parallel group runs: its heads, features, rows and experts.

Where ``layouts`` says that ranks hold parts of a value that all of them need, an ``all_reduce`` or an ``all_gather``
follows. Weights that are cut, and states, are named after the rank (``layers.3.q_proj@1``); values keep their names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from labinfer.compiler.graph import Op, OpGraph, Part, Weight
from labinfer.compiler.passes.layouts import PARTIAL, Layout, Layouts
from labinfer.compiler.shares import Columns, Cut, cut_rows, width
from labinfer.errors import DoesNotFit, UsageError
from labinfer.ops import OPS
from labinfer.ops.base import OpAttrs
from labinfer.ops.formats import FORMATS


def shard(graph: OpGraph, split: Sequence[float], rank: int) -> str:
    """Keep of ``graph`` what rank ``rank`` computes, where ranks share the work in proportion to ``split``."""
    for op in graph.ops:
        if op.device is not None:
            message = f"'{op.name}' is pinned to device '{op.device}' (at {op.origin})"
            raise UsageError("shard.pinned", f"{message}: ranks of a group each have their own")
    rewriter = _Rewriter(graph, split, rank)
    rewriter.run()
    counts = Counter(op.kind for op in graph.ops)
    return f"rank {rank} of {len(split)}: {counts['all_reduce']} x all_reduce, {counts['all_gather']} x all_gather"


class _Rewriter:
    """Writes the ops of one rank."""

    def __init__(self, graph: OpGraph, split: Sequence[float], rank: int) -> None:
        self.graph, self.split, self.rank = graph, split, rank
        self.layouts = Layouts(graph, split)
        self.ops: list[Op] = []
        self.values = {name: graph.values[name] for name in graph.inputs if name in graph.values}
        self.weights: dict[str, Weight] = {}
        self.windows: dict[tuple[str, Cut], str] = {}

    def run(self) -> None:
        """Rewrite the graph in place."""
        graph = self.graph
        for op in graph.ops:
            self.rewrite(op)
        used = {name for op in self.ops for name in op.weights.values()}
        graph.ops, graph.values = self.ops, self.values
        graph.weights = {name: weight for name, weight in self.weights.items() if name in used}
        graph.states = {
            self.named(name): replace(state, name=self.named(name), widths=self.widths(name, state.widths))
            for name, state in graph.states.items()
        }

    def named(self, name: str) -> str:
        """The name of this rank's part of a weight or of its state."""
        return f"{name}@{self.rank}"

    def widths(self, state: str, widths: Mapping[str, int]) -> dict[str, int]:
        """Numbers per token of this rank's part of a state."""
        heads = self.layouts.heads.get(state)
        if heads is None:
            return dict(widths)
        count = max(stop for columns in heads.keys for _, stop in columns)
        return {part: size // count * width(heads.keys[self.rank]) for part, size in widths.items()}

    def rewrite(self, op: Op) -> None:
        """Append what this rank runs for ``op``, and the collective that makes its result whole if that is needed."""
        takes = self.layouts.needed[op.name]
        inputs = tuple(self.input(name, layout, op) for name, layout in zip(op.inputs, takes, strict=True))
        makes = [self.layouts.made[name] for name in op.outputs]
        attrs = op.attrs.model_copy(update=self.changes(op, makes))
        collectives = {name: self.collective(name, layout) for name, layout in zip(op.outputs, makes, strict=True)}
        outputs = tuple(f"{name}.part" if collectives[name] else name for name in op.outputs)
        found = {slot: self.weight(op, slot, name, takes, makes) for slot, name in op.weights.items()}
        weights = {slot: name for slot, name in found.items() if name is not None}
        state = op.state and self.named(op.state)
        name = outputs[0] if outputs and op.name == op.outputs[0] else op.name
        self.append(replace(op, name=name, inputs=inputs, outputs=outputs, attrs=attrs, weights=weights, state=state))
        for name, part in zip(op.outputs, outputs, strict=True):
            if collective := collectives[name]:
                kind, attributes = collective
                self.append(Op(name, kind, (part,), (name,), attributes, {}, op.origin, op.layer))

    def append(self, op: Op) -> None:
        """Add an op, and the types of what it makes."""
        types = OPS[op.kind].infer(op.attrs, [self.values[name] for name in op.inputs])
        self.values.update(zip(op.outputs, types, strict=True))
        self.ops.append(op)

    def collective(self, name: str, layout: Layout) -> tuple[str, OpAttrs] | None:
        """What makes a value whole on every rank, if anybody needs that."""
        if layout is None or name in self.layouts.summed_later:
            return None
        if layout == PARTIAL:
            return "all_reduce", OPS["all_reduce"].Attrs()
        users = self.layouts.consumers[name]
        whole = any(self.layouts.needed[user.name][user.inputs.index(name)] is None for user in users)
        if not whole and name not in self.graph.outputs:
            return None
        return "all_gather", OPS["all_gather"].Attrs.model_validate({"sizes": tuple(width(c) for c in layout)})

    def input(self, name: str, layout: Layout, op: Op) -> str:
        """The value that this rank reads for ``name`` in ``layout``: itself, its part, or a window of the whole."""
        made = self.layouts.made[name]
        if layout == made:
            return f"{name}.part" if f"{name}.part" in self.values else name
        if layout is None:
            return name
        assert made is None or name in self.values
        return self.window(name, layout, op)

    def window(self, name: str, layout: Layout, op: Op) -> str:
        """This rank's columns of a value that is whole."""
        assert isinstance(layout, tuple)
        key = (name, layout)
        if key not in self.windows:
            columns, total = layout[self.rank], self.layouts.features(name)
            if len(columns) > 1:
                message = f"'{op.name}' (from {op.origin}) needs columns {columns} of '{name}', not one run of them"
                raise DoesNotFit("shard.window", message, remedy="use another --tensor-parallel-size")
            [(start, stop)] = columns
            parts = {"before": start, "own": stop - start, "after": total - stop}
            sizes = {part: size for part, size in parts.items() if size}
            attrs = OPS["split"].Attrs.model_validate({"sizes": tuple(sizes.values())})
            outputs = tuple(f"{name}.{part}" for part in sizes)
            self.append(Op(f"{name}.own", "split", (name,), outputs, attrs, {}, op.origin, op.layer))
            self.windows[key] = f"{name}.own"
        return self.windows[key]

    def changes(self, op: Op, makes: Sequence[Layout]) -> dict[str, Any]:
        """The attributes that differ on this rank."""
        layout = makes[0] if makes else None
        if op.kind == "embedding" and layout == PARTIAL:
            [(start, stop)] = self.rows(op)
            return {"num_embeddings": stop - start, "first_id": start}
        if op.kind == "moe":
            [(start, stop)] = self.rows(op)
            return {"num_experts": stop - start, "first_expert": start}
        if not isinstance(layout, tuple):
            return {}
        if op.kind == "linear":
            return {"out_features": width(layout[self.rank])}
        if op.kind == "split":
            return {"sizes": tuple(width(each[self.rank]) for each in makes if isinstance(each, tuple))}
        if op.kind == "attention":
            heads = self.layouts.heads[op.state or ""]
            return {
                "num_heads": width(heads.queries[self.rank]),
                "num_kv_heads": width(heads.keys[self.rank]),
            }
        if op.kind == "mla_attention":
            return {"num_heads": width(layout[self.rank]) // op.attrs.model_dump()["v_dim"]}
        return {}

    def rows(self, op: Op) -> Columns:
        """This rank's rows of an embedding's table, or its experts."""
        attrs = op.attrs.model_dump()
        if op.kind == "moe":
            return cut_rows(attrs["num_experts"], self.split, "experts")[self.rank]
        return cut_rows(attrs["num_embeddings"], self.split, "rows of the vocabulary")[self.rank]

    def weight(self, op: Op, slot: str, name: str, takes: Sequence[Layout], makes: Sequence[Layout]) -> str | None:
        """The weight that this rank has in ``slot``: the whole, its part, or none for a bias that another rank adds."""
        weight, layout = self.graph.weights[name], makes[0] if makes else None
        cut: tuple[Literal[0, 1], Columns] | None = None
        if op.kind == "linear" and layout == PARTIAL:
            if slot == "bias":
                return self.keep(weight) if self.rank == 0 else None
            columns = takes[0]
            assert isinstance(columns, tuple)
            cut = 1, columns[self.rank]
        elif op.kind == "linear" and isinstance(layout, tuple):
            cut = 0, layout[self.rank]
        elif layout == PARTIAL:  # an embedding's table, a mixture's experts
            cut = 0, self.rows(op)
        elif op.kind == "mla_attention":
            assert isinstance(layout, tuple)
            heads = tuple((a // (v := op.attrs.model_dump()["v_dim"]), b // v) for a, b in layout[self.rank])
            each = weight.shape[0] // op.attrs.model_dump()["num_heads"]
            cut = 0, tuple((a * each, b * each) for a, b in heads)
        return self.keep(weight) if cut is None else self.keep(self.part(weight, *cut))

    def keep(self, weight: Weight) -> str:
        """Note a weight that this rank uses; its name."""
        self.weights[weight.name] = weight
        return weight.name

    def part(self, weight: Weight, axis: Literal[0, 1], columns: Columns) -> Weight:
        """This rank's part of a weight: rows (``axis`` 0) or columns, which must be whole blocks of its format."""
        block = FORMATS[weight.format].block_size if axis == 1 else 1
        if any(bound % block for run in columns for bound in run):
            message = f"'{weight.name}' is stored in blocks of {block} numbers, a rank would need columns {columns}"
            raise DoesNotFit("shard.blocks", message, remedy="use another --tensor-parallel-size or --tensor-split")
        shape = list(weight.shape)
        shape[axis] = width(columns)
        part = Part(axis, weight.shape[axis], columns)
        stack = weight.stack and (shape[0] if axis == 0 else weight.stack)
        return replace(weight, name=self.named(weight.name), shape=tuple(shape), part=part, stack=stack)
