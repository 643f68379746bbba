"""The arena over time, read back from a plan: which bytes hold which values during which ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from labinfer.compiler.arena import aligned
from labinfer.compiler.fold import Slot, unfold_inputs
from labinfer.compiler.graph import Op
from labinfer.ops import OPS
from labinfer.render.drawing import Drawing


@dataclass(slots=True)
class StorageSet:
    """Values that share one piece of memory: ``size`` bytes at offset ``at``, needed by the ops ``[lower, upper)``."""

    lower: int
    upper: int
    at: int
    size: int
    values: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ArenaMap:
    """One stage: its primitive ops in order, its storage sets, live bytes at each op, and the op where they peak."""

    ops: Sequence[Op]
    sets: Sequence[StorageSet]
    live: Sequence[int]
    peak: int


def arena_map(drawing: Drawing, stage: int) -> ArenaMap:
    """The arena of a stage; a result written over an operand, or a window of it, belongs to the operand's set."""
    plan = drawing.plan.stages[stage]
    received = unfold_inputs(plan)
    slots: dict[str, Slot] = dict(received)
    ops: list[Op] = []
    for instance in drawing.instances:
        if instance.stage == stage:
            slots.update(instance.slots)
            ops += [part for op in instance.ops for part in op.primitives()]
    last = {name: index for index, op in enumerate(ops) for name in (*op.outputs, *op.inputs)}
    last.update(dict.fromkeys(plan.outputs, len(ops)))
    sets: list[StorageSet] = []
    home: dict[str, StorageSet] = {}

    def fresh(name: str, born: int) -> StorageSet:
        size = aligned(drawing.value_bytes(slots[name].type))
        sets.append(StorageSet(born, born + 1, slots[name].at, size))
        return sets[-1]

    for name in received:
        home[name] = fresh(name, 0)
    for index, op in enumerate(ops):
        for position, name in enumerate(op.outputs):
            over = _shared(op, position, index, slots, last)
            home[name] = home[over] if over in home else fresh(name, index)
            home[name].values.append(name)
        for name in (*op.inputs, *op.outputs):
            if name in home:
                home[name].upper = max(home[name].upper, last[name] + 1)
    change = [0] * (len(ops) + 2)
    for each in sets:
        change[each.lower] += each.size
        change[each.upper] -= each.size
    peak = next((i for i, op in enumerate(ops) if op.name == plan.arena.peak_op), max(0, len(ops) - 1))
    return ArenaMap(ops, sets, list(accumulate(change))[: len(ops)], peak)


def _shared(op: Op, position: int, index: int, slots: dict[str, Slot], last: dict[str, int]) -> str:
    """The operand in whose memory output ``position`` lies, '' if it has its own."""
    spec = OPS[op.kind]
    if spec.view:
        return op.inputs[0]
    for operand in spec.inplace.get(position, ()):
        name = op.inputs[operand] if operand < len(op.inputs) else ""
        if name in slots and slots[name] == slots[op.outputs[position]] and last[name] <= index:
            return name
    return ""
