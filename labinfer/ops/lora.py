"""``lora_add``: what low-rank adapters add to a linear op, each sequence with its own adapter or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from labinfer.ops.base import (
    OVER_FIRST,
    Call,
    OpAttrs,
    OpSpec,
    TensorType,
    WeightSlot,
    elements,
    last_dim,
    register,
)

if TYPE_CHECKING:
    import numpy as np


@register
class LoraAdd(OpSpec):
    """``z = y + (x @ a[slot].T) @ b[slot].T`` for the adapter slot of each sequence, ``z = y`` where it has none.

    The compiler puts it after linear ops (Hu et al. 2021, "LoRA", arXiv:2106.09685); maps do not write it. ``b`` holds
    the adapter's scale; an adapter of a smaller rank leaves the rest of its slot zero.
    """

    kind = "lora_add"
    inputs = ("y", "x")
    weights = (WeightSlot("a"), WeightSlot("b"))
    inplace = OVER_FIRST
    inserted = True

    class Attrs(OpAttrs):
        """``max_loras``: slots; ``rank``: the greatest rank of an adapter."""

        max_loras: PositiveInt
        rank: PositiveInt

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, out_features], [T, in_features] -> [T, out_features]``."""
        for operand, each in enumerate(inputs):
            last_dim(each, operand)
        return [inputs[0]]

    def weight_shapes(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, tuple[int, ...]]:
        """``a`` [max_loras, rank, in_features], ``b`` [max_loras, out_features, rank]."""
        out_features, in_features = last_dim(inputs[0]), last_dim(inputs[1], 1)
        return {
            "a": (attrs.max_loras, attrs.rank, in_features),
            "b": (attrs.max_loras, out_features, attrs.rank),
        }

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Two per element of one slot and token: what it takes when every sequence has an adapter."""
        return 2 * int(attrs.rank) * sum(elements(x.shape, tokens, rows) for x in inputs)

    def reference(self, call: Call) -> list[np.ndarray]:
        """Sequence by sequence."""
        (y, x), a, b, step = call.inputs, call.weights["a"], call.weights["b"], call.step
        z: np.ndarray = y.copy()
        if step is None or step.adapter is None:
            return [z]
        for sequence, slot in enumerate(step.adapter):
            if slot >= 0:
                rows = slice(step.query_start[sequence], step.query_start[sequence + 1])
                z[rows] += x[rows] @ a[slot].T @ b[slot].T
        return [z]
