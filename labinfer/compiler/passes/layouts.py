"""Which part of every value each rank of a tensor-parallel group has: what ``shard`` rewrites the graph by.

Heads belong to ranks from the projections of queries, keys and values through attention to the columns of the output
projection; hidden features likewise from gate and up to down; rows of the vocabulary, and experts. Between them values
are whole on every rank (Megatron-LM, arXiv:1909.08053).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from labinfer.compiler.graph import Op, OpGraph
from labinfer.compiler.shares import Cut, HeadCut, cut_features, cut_heads, cut_rows
from labinfer.ops.formats import FORMATS

PARTIAL: Final = "partial"

Layout = Cut | Literal["partial"] | None
"""Columns of each rank; ``partial`` where the sum over ranks is the value; None where every rank has the whole."""

FEATUREWISE = {"softcap", "scale", "activation", "glu"}
"""Ops that treat each number by itself, so that they work on any columns."""


class Layouts:
    """``made`` says how each value comes out of its op, ``needed`` how each op takes its inputs.

    ``heads`` are the cuts of attention ops by state; ``summed_later`` are partial values that are added to one another
    before their sum over ranks is taken.
    """

    def __init__(self, graph: OpGraph, split: Sequence[float]) -> None:
        self.graph, self.split = graph, split
        self.producers, self.consumers = graph.producers(), graph.consumers()
        self.wanted: dict[str, Cut] = {}
        self.heads: dict[str, HeadCut] = {}
        self.made: dict[str, Layout] = dict.fromkeys(graph.inputs)
        self.needed: dict[str, tuple[Layout, ...]] = {}
        self.summed_later: set[str] = set()
        for name in graph.outputs:
            self.wanted[name] = cut_rows(self.features(name), split, "rows of the vocabulary")
        for op in reversed(graph.ops):
            self.want(op)
        for op in graph.ops:
            self.decide(op)

    def features(self, name: str) -> int:
        """Columns of a value."""
        size = self.graph.values[name].shape[-1]
        assert isinstance(size, int)
        return size

    def block(self, op: Op, slot: str = "weight") -> int:
        """Numbers of a block of a weight of ``op``."""
        return FORMATS[self.graph.weights[op.weights[slot]].format].block_size

    # From the end of the graph to its beginning: which columns are wanted

    def want(self, op: Op) -> None:
        """Say which columns ``op`` wants of its inputs, now that all that read its outputs have."""
        match op.kind:
            case "attention" | "mla_attention":
                self.want_heads(op)
            case "kv_write" if (heads := self.heads.get(op.state or "")) is not None:
                for name in op.inputs:
                    count = max(stop for columns in heads.keys for _, stop in columns)
                    self.wanted[name] = heads.of_keys(self.features(name) // count)
            case "rope" if op.outputs[0] in self.wanted:
                self.wanted[op.inputs[0]] = self.wanted[op.outputs[0]]
            case "rms_norm" | "layer_norm":
                self.want_norm(op)
            case "split" if all(name in self.wanted for name in op.outputs):
                self.want_parts(op)
            case "linear":
                self.want_linear(op)
            case kind if kind in FEATUREWISE and op.outputs[0] in self.wanted:
                self.wanted.update(dict.fromkeys(op.inputs, self.wanted[op.outputs[0]]))

    def want_heads(self, op: Op) -> None:
        """An attention op wants the heads of its rank, and its keys and values likewise."""
        attrs = op.attrs.model_dump()
        blocks = [self.block(user) for user in self.consumers[op.outputs[0]] if user.kind == "linear"]
        dims = (attrs["head_dim"], attrs["v_head_dim"]) if op.kind == "attention" else (0, attrs["v_dim"])
        kv_heads = attrs.get("num_kv_heads") or attrs["num_heads"]
        heads = cut_heads(attrs["num_heads"], kv_heads, dims[1] or dims[0], self.split, max(blocks, default=1))
        assert op.state is not None
        if op.kind == "attention":  # a latent is every rank's
            self.heads[op.state] = heads
        self.wanted[op.inputs[0]] = heads.of_queries(self.features(op.inputs[0]) // attrs["num_heads"])
        self.wanted[op.outputs[0]] = heads.of_queries(dims[1] or dims[0])

    def want_norm(self, op: Op) -> None:
        """Norms of heads work on any of them; others need the whole row, which a product can make column by column."""
        [x], [y] = op.inputs[:1], op.outputs
        if grouped(op):
            if y in self.wanted:
                self.wanted[x] = self.wanted[y]
        elif (producer := self.producers.get(x)) and producer.kind == "linear" and not self.takes_columns(producer):
            self.wanted[x] = cut_features(self.features(x), self.split)

    def want_parts(self, op: Op) -> None:
        """The columns of all parts, where they lie in the whole."""
        starts = [sum(op.attrs.model_dump()["sizes"][:part]) for part in range(len(op.outputs))]
        self.wanted[op.inputs[0]] = tuple(
            tuple(
                (start + a, start + b)
                for start, name in zip(starts, op.outputs, strict=True)
                for a, b in self.wanted[name][rank]
            )
            for rank in range(len(self.split))
        )

    def want_linear(self, op: Op) -> None:
        """The columns that attention or a hidden layer has; their products are partial."""
        if self.takes_columns(op):
            self.wanted.pop(op.outputs[0], None)
            self.wanted.setdefault(op.inputs[0], cut_features(self.features(op.inputs[0]), self.split, self.block(op)))

    def takes_columns(self, op: Op) -> bool:
        """Whether a product's input is made by what can be cut: attention, or the hidden layer of a network."""
        producer = self.producers.get(op.inputs[0])
        return producer is not None and producer.kind in {"attention", "mla_attention", "glu", "activation"}

    # From the beginning to the end: how values are made

    def decide(self, op: Op) -> None:
        """Say how ``op`` takes its inputs and makes its outputs, now that its inputs' are known."""
        takes: list[Layout] = [None] * len(op.inputs)
        makes: list[Layout] = [None] * len(op.outputs)
        out = op.outputs[0] if op.outputs else ""
        match op.kind:
            case "embedding" if op.inputs[0] == "token_ids":
                makes = [PARTIAL]
            case "moe":
                makes = [PARTIAL]
            case "linear" if self.takes_columns(op):
                takes, makes = [self.wanted[op.inputs[0]]], [PARTIAL]
            case "linear":
                makes = [self.wanted.get(out)]
            case "attention" | "mla_attention":
                takes, makes = [self.wanted[op.inputs[0]]], [self.wanted[out]]
            case "kv_write":
                takes = [self.wanted.get(name) for name in op.inputs]
            case "split" if all(name in self.wanted for name in op.outputs):
                takes, makes = [self.wanted[op.inputs[0]]], [self.wanted[name] for name in op.outputs]
            case "add" if self.both_partial(op):
                takes, makes = [PARTIAL, PARTIAL], [PARTIAL]
                self.summed_later.update(op.inputs)
            case "rope" | "rms_norm" if out in self.wanted and (op.kind == "rope" or grouped(op)):
                takes[0] = makes[0] = self.wanted[out]
            case kind if kind in FEATUREWISE and out in self.wanted:
                takes, makes = [self.wanted[out]] * len(takes), [self.wanted[out]]
        self.needed[op.name] = tuple(takes)
        self.made.update(zip(op.outputs, makes, strict=True))

    def both_partial(self, op: Op) -> bool:
        """Whether the operands are partial sums that nobody else reads."""
        return all(self.made[name] == PARTIAL and len(self.consumers[name]) == 1 for name in op.inputs)


def grouped(op: Op) -> bool:
    """Whether a norm treats each head by itself."""
    return getattr(op.attrs, "group", None) is not None
