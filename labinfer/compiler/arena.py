"""The activation arena of one stage: an offset for every storage, planned at the upper bounds of T and R.

Sizes are monotone in T and R, so offsets that hold at the bounds hold for every smaller step. Layers that use memory in
the same way are planned once and share their offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from labinfer.compiler.graph import Op
from labinfer.compiler.packing import Buffer, pack, verify
from labinfer.compiler.storage import Storage, Window, plan_storage
from labinfer.ops.base import TensorType

ALIGNMENT = 256
"""Bytes; every offset is a multiple, so that vector loads and GPU transactions never straddle."""


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """Offsets of storages, windows of values, and how good the packing is (bytes)."""

    offsets: Mapping[str, int]
    windows: Mapping[str, Window]
    size: int
    lower_bound: int
    optimal: bool
    algorithm: str
    peak_op: str
    live_at_peak: tuple[str, ...]


def plan_arena(
    ops: Sequence[Op],
    values: Mapping[str, TensorType],
    inputs: Sequence[str],
    outputs: Sequence[str],
    tokens: int,
    rows: int,
    workspace: Callable[[Op], int] = lambda op: 0,
    effort_seconds: float = 1.0,
) -> ArenaPlan:
    """Plan the arena of a stage that runs ``ops`` for at most ``tokens`` tokens and ``rows`` logit rows."""
    storages, windows = plan_storage(ops, values, inputs, outputs, workspace)
    buffers = {s.name: Buffer(s.name, s.lower, s.upper, aligned(s.type.nbytes(tokens, rows))) for s in storages}
    copies = fold_layers(storages, buffers, ops)
    packing = pack([buffer for name, buffer in buffers.items() if name not in copies], effort_seconds=effort_seconds)
    offsets = dict(packing.offsets)
    offsets.update({name: offsets[model] for name, model in copies.items()})
    verify(list(buffers.values()), offsets, packing.peak)
    step, live = peak(buffers.values())
    name = ops[step].name if step < len(ops) else "end"
    return ArenaPlan(
        offsets, windows, packing.peak, packing.lower_bound, packing.optimal, packing.algorithm, name, tuple(live)
    )


def aligned(size: int) -> int:
    """``size`` rounded up to the arena's alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def fold_layers(storages: Sequence[Storage], buffers: Mapping[str, Buffer], ops: Sequence[Op]) -> dict[str, str]:
    """Storages that may take the offset of another: ``{name: model}`` for every layer that repeats an earlier one.

    Two layers are alike when their inner storages have equal sizes and relative lifetimes, and the storages that reach
    beyond the layer are the same ones over the same relative span.
    """
    spans: dict[int, tuple[int, int]] = {}
    for index, op in enumerate(ops):
        if op.layer is not None:
            spans[op.layer] = (spans.get(op.layer, (index, 0))[0], index + 1)
    inner: dict[int, list[Buffer]] = {layer: [] for layer in spans}
    crossing: list[Buffer] = []
    for storage in storages:
        start, end = spans.get(storage.layer, (0, 0)) if storage.layer is not None else (0, 0)
        inside = start <= storage.lower and storage.upper <= end
        (inner[storage.layer] if inside and storage.layer is not None else crossing).append(buffers[storage.name])
    models: dict[object, list[Buffer]] = {}
    copies: dict[str, str] = {}
    for layer, (start, end) in spans.items():
        own = [(b.lower - start, b.upper - start, b.size) for b in inner[layer]]
        through = [
            (b.id, max(b.lower - start, 0), min(b.upper, end) - start)
            for b in crossing
            if b.lower < end and start < b.upper
        ]
        model = models.setdefault((tuple(own), tuple(through)), inner[layer])
        if model is not inner[layer]:
            copies.update({b.id: m.id for b, m in zip(inner[layer], model, strict=True)})
    return copies


def peak(buffers: Iterable[Buffer]) -> tuple[int, list[str]]:
    """The step at which most bytes are live, and what lives then, largest first."""
    listed = list(buffers)
    change: dict[int, int] = {}
    for buffer in listed:
        change[buffer.lower] = change.get(buffer.lower, 0) + buffer.size
        change[buffer.upper] = change.get(buffer.upper, 0) - buffer.size
    load, best, step = 0, -1, 0
    for at in sorted(change):
        load += change[at]
        if load > best:
            best, step = load, at
    live = [b for b in listed if b.lower <= step < b.upper]
    return step, [b.id for b in sorted(live, key=lambda b: (-b.size, b.id))]
