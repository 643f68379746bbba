"""The devices a model is compiled for, and which of them runs which layer (placed by hand)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labinfer.compiler.graph import Op, OpGraph
from labinfer.errors import DoesNotFit, UsageError, did_you_mean
from labinfer.ops.base import DEFAULT_OPTIONS, KernelBounds, KernelOptions


@dataclass(frozen=True, slots=True)
class Target:
    """What the compiler needs to know of a device.

    ``parameters`` names the layout that weights take there, ``weight_bytes(format, shape)`` gives its size; ``fusions``
    are the fused ops it has kernels for; ``workspace`` gives the scratch bytes that a kernel needs at its bounds;
    ``kv_dtypes`` are the cache formats it reads; ``tables`` gives the bytes of constants that ops of equal attributes
    share, ``sampling(rows, groups)`` of what it chooses tokens with, of so many micro-batches in turn; ``threads`` how
    many it uses, None where that means nothing; ``block_multiple`` divides the size of a block of the cache;
    ``activations`` are the ways it multiplies, ``matrix_unit(activations)`` where its matrix unit pays, and ``options``
    what was chosen of that; ``exchange(ranks)`` gives the bytes of its own through which ranks exchange parts;
    ``memory`` is a cap in bytes; ``layers`` the layers (first, last) a person gave it, None for an even share;
    ``declared`` says what a device that is not here is.
    """

    name: str
    kind: str
    parameters: str
    weight_bytes: Callable[[str, Sequence[int]], int]
    fusions: tuple[str, ...]
    workspace: Callable[[KernelBounds], int]
    kv_dtypes: tuple[str, ...]
    tables: Callable[[Any, int], int]
    threads: int | None
    block_multiple: int = 1
    activations: tuple[str, ...] = ("exact",)
    matrix_unit: Callable[[str], Mapping[str, int]] = lambda activations: {}
    sampling: Callable[[int, int], int] = lambda rows, groups: 0
    exchange: Callable[[int], int] = lambda ranks: 0
    options: KernelOptions = DEFAULT_OPTIONS
    memory: int | None = None
    layers: tuple[int, int] | None = None
    declared: str | None = None

    def steps(self, ops: Iterable[Op]) -> list[Op]:
        """``ops`` as this device runs them: fused ops it has no kernel for are run part by part."""
        return [step for op in ops for step in ((op,) if op.kind in self.fusions else op.primitives())]


@dataclass(frozen=True, slots=True)
class Placement:
    """A run of consecutive ops and the device that executes it; ``streamed`` layers are copied there in every step."""

    target: Target
    ops: tuple[Op, ...]
    streamed: tuple[int, ...] = ()


def place(graph: OpGraph, targets: Sequence[Target]) -> list[Placement]:
    """Cut the schedule into one run of ops per device.

    A ``device`` written in the map wins; then the layers given with the devices; else each device gets an even share of
    the weight bytes, in the order given. What stands before the first layer goes with it, what follows with the last.
    """
    known = {target.name: target for target in targets}
    layers = sorted({op.layer for op in graph.ops if op.layer is not None})
    owner = _given(layers, targets) or _even(graph, layers, targets)
    placements: list[Placement] = []
    run: list[Op] = []
    current: Target | None = None
    for op in graph.ops:
        if op.device is not None and op.device not in known:
            message = f"'{op.name}' is pinned to device '{op.device}' (at {op.origin}), which is not among the devices"
            raise DoesNotFit(
                "device.unknown", message, remedy=did_you_mean(op.device, known) or f"devices: {', '.join(known)}"
            )
        target = known[op.device] if op.device else owner[op.layer] if op.layer is not None else current or targets[0]
        if current is not None and target is not current:
            placements.append(Placement(current, tuple(run)))
            run = []
        current = target
        run.append(op)
    if current is not None:
        placements.append(Placement(current, tuple(run)))
    return _join_prologue(placements)


def _join_prologue(placements: list[Placement]) -> list[Placement]:
    """Give ops that stand before the first layer to the device of that layer."""
    head = placements[0]
    if len(placements) > 1 and all(op.layer is None and op.device is None for op in head.ops):
        joined = Placement(placements[1].target, head.ops + placements[1].ops)
        return [joined, *placements[2:]]
    return placements


def _given(layers: Sequence[int], targets: Sequence[Target]) -> dict[int, Target] | None:
    if not any(target.layers for target in targets):
        return None
    owner: dict[int, Target] = {}
    remedy = "name every layer once: reference:0=0-7,reference:1=8-15"
    for layer in layers:
        able = [target for target in targets if target.layers and target.layers[0] <= layer <= target.layers[1]]
        if len(able) != 1:
            names = " and ".join(f"'{target.name}'" for target in able) or "no device"
            message = f"{names} would run layer {layer} (of {len(layers)} layers)"
            raise UsageError("device.layers", message, remedy=remedy)
        owner[layer] = able[0]
    for target in targets:
        if target.layers and not (layers and target.layers[1] <= layers[-1]):
            message = f"'{target.name}' is given layers {target.layers[0]} to {target.layers[1]} of {len(layers)}"
            raise UsageError("device.layers", message, remedy=remedy)
    return owner


def _even(graph: OpGraph, layers: Sequence[int], targets: Sequence[Target]) -> dict[int, Target]:
    size = dict.fromkeys(layers, 0)
    for op in graph.ops:
        if op.layer is not None:
            for part in op.primitives():
                for name in part.weights.values():
                    weight = graph.weights[name]
                    size[op.layer] += targets[0].weight_bytes(weight.format, weight.shape)
    share, done = (sum(size.values()) or 1) / len(targets), 0
    owner = {}
    for layer in layers:
        owner[layer] = targets[min(int((done + size[layer] / 2) / share), len(targets) - 1)]
        done += size[layer]
    return owner
