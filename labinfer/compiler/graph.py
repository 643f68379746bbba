"""The op graph: what a map becomes for one model, before anything is placed.

An ordered list of frozen ``Op`` records is the truth, and its order is the schedule. ``networkx()`` gives the same
graph to algorithms that want one (cuts, drawings, reachability). Names are dotted paths, ``layers.3.attn.out``; ``{i}``
forms of a name (``layers.{i}.attn.out``) let identical layers be recognised and folded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from labinfer.ops.base import OpAttrs, TensorType

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an op comes from: map file, line and column (from 1), and the path of blocks that led to it."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Transform:
    """How a checkpoint tensor becomes the weight: rows regrouped (``rows`` reshaped and axes permuted), transposed."""

    rows: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    transpose: bool = False

    def __bool__(self) -> bool:
        return bool(self.rows) or self.transpose


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank has of a weight: ``runs`` [start, stop) of its rows (``axis`` 0) or columns (1), of ``size`` in all.

    Rows are counted as the weight has them, after its transform; a row may be in several runs.
    """

    axis: Literal[0, 1]
    size: int
    runs: tuple[tuple[int, int], ...]

    def indices(self) -> list[int]:
        """The rows or columns, in the order in which the rank has them."""
        return [index for start, stop in self.runs for index in range(start, stop)]


def stacked_names(tensor: str, experts: Sequence[int] | None) -> tuple[str, ...]:
    """``tensor`` itself, or one name for each ``{e}`` of ``experts`` when it is a stack."""
    return (tensor,) if experts is None else tuple(tensor.replace("{e}", str(e)) for e in experts)


LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""What PEFT appends to the name of a module for the two matrices of its adapter."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A logical weight: its shape, stored format, and the checkpoint tensor that it is read from.

    With ``stack``, ``tensor`` is a pattern in ``{e}``, and that many tensors are stacked along a new first axis. With
    ``adapter`` it is a pool: row ``i`` along the first axis is filled at run time from the ``tensor`` of adapter ``i``.
    With ``part`` it is what one rank has of the checkpoint's.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    tensor: str
    stack: int | None = None
    transform: Transform = Transform()
    adapter: bool = False
    part: Part | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of which this is a part, or its own."""
        if self.part is None:
            return self.shape
        return tuple(self.part.size if axis == self.part.axis else size for axis, size in enumerate(self.shape))

    def tensors(self) -> tuple[str, ...]:
        """The names of the checkpoint tensors, in stacking order."""
        if self.stack is None:
            return stacked_names(self.tensor, None)
        return stacked_names(self.tensor, self.part.indices() if self.part else range(self.stack))


@dataclass(frozen=True, slots=True)
class State:
    """What the cache keeps of one layer: numbers per token for each part (``k``, ``v``), in blocks of ``group``."""

    name: str
    widths: Mapping[str, int]
    group: int = 0

    @property
    def width(self) -> int:
        """Numbers per token, all parts."""
        return sum(self.widths.values())


@dataclass(frozen=True, slots=True)
class Op:
    """One node. ``weights`` maps the op's weight slots to logical weights; ``body`` lists what a fused op is made of.

    ``workspace`` is the scratch memory of its kernel, once planned: byte offset in the arena, and bytes. ``cost`` is
    what it is predicted to take in a decode step and in a prefill step, in seconds, once placed by cost.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: OpAttrs
    weights: Mapping[str, str]
    origin: Origin
    layer: int | None = None
    state: str | None = None
    device: str | None = None
    body: tuple[Op, ...] = ()
    workspace: tuple[int, int] | None = None
    cost: tuple[float, float] | None = None

    def primitives(self) -> tuple[Op, ...]:
        """The ops that run when no kernel takes the whole: the body of a fused op, else the op itself."""
        return self.body or (self,)


@dataclass(slots=True)
class OpGraph:
    """A whole model: ``ops`` in schedule order, the type of every value, all weights and states by name.

    ``modules`` tells, for weights of one tensor, how the Hugging Face model holds them: adapters go by its names.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: list[Op] = field(default_factory=list)
    values: dict[str, TensorType] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    modules: dict[str, Weight] = field(default_factory=dict)

    def producers(self) -> dict[str, Op]:
        """The op that makes each value; graph inputs have none."""
        return {name: op for op in self.ops for name in op.outputs}

    def consumers(self) -> dict[str, list[Op]]:
        """The ops that read each value, in schedule order."""
        users: dict[str, list[Op]] = {name: [] for name in self.values}
        for op in self.ops:
            for name in op.inputs:
                users[name].append(op)
        return users

    def networkx(self) -> networkx.MultiDiGraph[str]:
        """The graph for algorithms: a node per op (attribute ``op``), an edge per value (``value``) or state use."""
        import networkx

        graph: networkx.MultiDiGraph[str] = networkx.MultiDiGraph(name=self.name)
        producers = self.producers()
        writers: dict[str, str] = {}
        for op in self.ops:
            graph.add_node(op.name, op=op)
            for name in op.inputs:
                if name in producers:
                    graph.add_edge(producers[name].name, op.name, value=name)
            if op.state in writers:
                graph.add_edge(writers[op.state], op.name, value=op.state)
            if op.state and not op.outputs:
                writers[op.state] = op.name
        return graph


_LAYER = re.compile(r"^([A-Za-z_]\w*)\.(\d+)\.")


def layer_of(name: str) -> tuple[str, int] | None:
    """``("layers", 3)`` for ``layers.3.attn.out``, None for a name outside every layer."""
    match = _LAYER.match(name)
    return (match[1], int(match[2])) if match else None


def fold_name(name: str) -> str:
    """``layers.{i}.attn.out`` for ``layers.3.attn.out``; other names stay."""
    match = _LAYER.match(name)
    return f"{match[1]}.{{i}}.{name[match.end() :]}" if match else name


def unfold_name(name: str, layer: int) -> str:
    """The inverse of ``fold_name`` for layer ``layer``."""
    return name.replace("{i}", str(layer))


def plain_attrs(attrs: OpAttrs) -> dict[str, Any]:
    """An op's attributes as plain data, those at their default left out."""
    return attrs.model_dump(mode="json", exclude_defaults=True)
