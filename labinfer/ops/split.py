"""``split``: the parts of a fused projection, side by side in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveInt

from labinfer.ops.base import Call, OpAttrs, OpSpec, ShapeMismatch, TensorType, last_dim, register

if TYPE_CHECKING:
    import numpy as np


@register
class Split(OpSpec):
    """Column windows of ``x``, as many as ``sizes``: a view, so no kernel runs and nothing is copied."""

    kind = "split"
    outputs = ("*parts",)
    view = True

    class Attrs(OpAttrs):
        """``sizes``: columns of each part, left to right; together all columns of ``x``."""

        sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, sum(sizes)] -> [T, size]`` for each size."""
        features, total = last_dim(inputs[0]), sum(attrs.sizes)
        if features != total:
            raise ShapeMismatch(f"sizes {' + '.join(map(str, attrs.sizes))} = {total}, but x has {features}", [0])
        return [TensorType((inputs[0].shape[0], size), inputs[0].dtype) for size in attrs.sizes]

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """None: nothing runs."""
        return 0

    def reference(self, call: Call) -> list[np.ndarray]:
        """Views of the columns of ``x``."""
        import numpy as np

        return np.split(call.inputs[0], np.cumsum(call.attrs.sizes[:-1], dtype=int), axis=1)
