"""Storage sets: which values share memory, and for how long each piece of memory is needed.

Views (``split``) are windows of their input; an op may write over an input that dies there. What remains are the
buffers that the packing planner places. Lifetimes count the primitive ops of one stage, half-open ``[lower, upper)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from labinfer.compiler.graph import Op
from labinfer.ops.base import ITEM_SIZE, TensorType
from labinfer.ops.fusions import inplace_of, is_joined, is_view


@dataclass(frozen=True, slots=True)
class Window:
    """Where a value lies inside its storage: bytes from the start of each row, and bytes from row to row."""

    storage: str
    offset: int
    row_bytes: int


@dataclass(slots=True)
class Storage:
    """One piece of memory: named after the value that made it, alive over the ops ``[lower, upper)``.

    ``values`` are those that lie in it, but for some that are dead.
    """

    name: str
    type: TensorType
    lower: int
    upper: int
    layer: int | None
    values: list[str] = field(default_factory=list)


def row_bytes(kind: TensorType) -> int:
    """Bytes of one row ``[features]`` of an activation."""
    count = 1
    for size in kind.shape[1:]:
        count *= int(size)
    return count * ITEM_SIZE[kind.dtype]


def plan_storage(
    ops: Sequence[Op],
    values: Mapping[str, TensorType],
    inputs: Sequence[str],
    outputs: Sequence[str],
    workspace: Callable[[Op], int] = lambda op: 0,
) -> tuple[list[Storage], dict[str, Window]]:
    """Storages of a stage's ``ops``, as its device runs them, and the window of every value in them.

    ``inputs`` arrive from another stage before the first op; ``outputs`` are needed after the last. ``workspace`` gives
    the scratch bytes of an op's kernel, which become a storage called ``OP#``.
    """
    last_use = _last_uses(ops, outputs)
    storages: dict[str, Storage] = {}
    windows: dict[str, Window] = {}

    def fresh(born: int, layer: int | None, *names: str) -> None:
        """Memory for values, side by side; named after the first."""
        kind, row, offset = values[names[0]], sum(row_bytes(values[name]) for name in names), 0
        if len(names) > 1:
            kind = TensorType((kind.shape[0], row // ITEM_SIZE[kind.dtype]), kind.dtype)
        storages[names[0]] = Storage(names[0], kind, born, born + 1, layer)
        for name in names:
            put(name, Window(names[0], offset, row))
            offset += row_bytes(values[name])

    def put(name: str, window: Window) -> None:
        windows[name] = window
        storages[window.storage].values.append(name)

    for name in inputs:
        fresh(0, None, name)
    for index, op in enumerate(ops):
        column = 0
        if scratch := workspace(op):
            storages[f"{op.name}#"] = Storage(
                f"{op.name}#", TensorType((scratch // 4,), "i32"), index, index + 1, op.layer
            )
        if is_joined(op.kind):
            fresh(index, op.layer, *op.outputs)
        for position, name in enumerate(() if is_joined(op.kind) else op.outputs):
            if is_view(op.kind):
                base = windows[op.inputs[0]]
                put(name, Window(base.storage, base.offset + column, base.row_bytes))
                column += row_bytes(values[name])
            elif (over := _writable(op, position, index, values, windows, storages, last_use)) is not None:
                put(name, windows[over])
            else:
                fresh(index, op.layer, name)
        for name in (*op.inputs, *op.outputs):
            if name in windows:
                storages[windows[name].storage].upper = max(storages[windows[name].storage].upper, index + 1)
    for name in outputs:
        storages[windows[name].storage].upper = len(ops) + 1
    return list(storages.values()), windows


def _last_uses(ops: Sequence[Op], outputs: Sequence[str]) -> dict[str, int]:
    last = {name: index for index, op in enumerate(ops) for name in (*op.outputs, *op.inputs)}
    return last | dict.fromkeys(outputs, len(ops))


def _writable(
    op: Op,
    position: int,
    index: int,
    values: Mapping[str, TensorType],
    windows: Mapping[str, Window],
    storages: Mapping[str, Storage],
    last_use: Mapping[str, int],
) -> str | None:
    """The input that output ``position`` of ``op`` may be written over: it dies here with all that overlaps it."""
    kind = values[op.outputs[position]]
    taken = {windows[name].storage for name in op.outputs[:position] if name in windows}
    for operand in inplace_of(op.kind).get(position, ()):
        name = op.inputs[operand] if operand < len(op.inputs) else ""
        if name not in windows or values[name] != kind or windows[name].storage in taken:
            continue
        storage = storages[windows[name].storage]
        storage.values = alive = [other for other in storage.values if last_use.get(other, -1) > index]
        if op.inputs.count(name) == 1 and not any(_overlap(name, other, values, windows) for other in alive):
            return name
    return None


def _overlap(one: str, other: str, values: Mapping[str, TensorType], windows: Mapping[str, Window]) -> bool:
    """Whether two values of one storage share bytes."""
    a, b = windows[one], windows[other]
    return a.offset < b.offset + row_bytes(values[other]) and b.offset < a.offset + row_bytes(values[one])
