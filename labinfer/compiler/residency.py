"""Which layers' matrices stay on the device, and which are streamed through a window of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from labinfer.compiler.fold import layer_matrices
from labinfer.compiler.graph import OpGraph
from labinfer.compiler.plan import Stage
from labinfer.compiler.target import Placement

SLOTS = 2
"""Layers that a window holds: one is computed while the next one is copied."""

ALIGNMENT = 64


def spread(layers: Sequence[int], count: int) -> list[int]:
    """``count`` of ``layers``, as far apart as possible, so that copying one has the computing of others to hide in."""
    return [layers[(2 * index + 1) * len(layers) // (2 * count)] for index in range(count)]


def stream_layers(stage: Stage, placed: Placement, graph: OpGraph, count: int, source: Literal["host", "disk"]) -> None:
    """Have layers of ``stage``, which is ``placed``, come from ``source``, through a window on its device.

    They are those that the placement names, else ``count`` of them.
    """
    target, matrices = placed.target, layer_matrices(placed.ops, graph.weights)
    chosen = list(placed.streamed) or spread(sorted(matrices), min(count, len(matrices)))
    stage.streamed, stage.streamed_from = chosen, source
    sizes = [sum(target.weight_bytes(each.format, each.shape) for each in matrices[layer]) for layer in stage.streamed]
    stage.bytes.weights -= sum(sizes)
    stage.bytes.window = SLOTS * -(-max(sizes, default=0) // ALIGNMENT) * ALIGNMENT
    stage.bytes.host = sum(sizes) if source == "host" else 0
