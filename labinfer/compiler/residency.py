"""Which layers' matrices stay on the device, and which are streamed through a window of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from labinfer.compiler.fold import layer_matrices
from labinfer.compiler.graph import Op, Weight
from labinfer.compiler.target import Target

SLOTS = 2
"""Layers that a window holds: one is computed while the next one is copied."""

ALIGNMENT = 64


def spread(layers: Sequence[int], count: int) -> list[int]:
    """``count`` of ``layers``, as far apart as possible, so that copying one has the computing of others to hide in."""
    return [layers[(2 * index + 1) * len(layers) // (2 * count)] for index in range(count)]


def choose_streamed(
    ops: Sequence[Op], weights: Mapping[str, Weight], target: Target, count: int
) -> tuple[list[int], int, int]:
    """The layers of a stage that are streamed, ``count`` of them; bytes of the window, and of them all in the host."""
    matrices = layer_matrices(ops, weights)
    layers = spread(sorted(matrices), min(count, len(matrices)))
    sizes = [sum(target.weight_bytes(each.format, each.shape) for each in matrices[layer]) for layer in layers]
    largest = -(-max(sizes, default=0) // ALIGNMENT) * ALIGNMENT
    return layers, SLOTS * largest, sum(sizes)
