"""Matrix products with a weight: ``linear`` and the token ``embedding`` (a product with a one-hot row)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveInt

from labinfer.ops.base import Call, OpAttrs, OpSpec, ShapeMismatch, TensorType, WeightSlot, elements, last_dim, register

if TYPE_CHECKING:
    import numpy as np


@register
class Linear(OpSpec):
    """``y = x @ weight.T + bias`` with ``weight`` [out_features, in_features]."""

    kind = "linear"
    weights = (WeightSlot("weight"), WeightSlot("bias", optional=True))

    class Attrs(OpAttrs):
        """``out_features``: columns of the result; the rows of ``weight``."""

        out_features: PositiveInt

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, in_features] -> [T, out_features]``."""
        last_dim(inputs[0])
        return [TensorType((inputs[0].shape[0], attrs.out_features), inputs[0].dtype)]

    def weight_shapes(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, tuple[int, ...]]:
        """``weight`` [out_features, in_features], ``bias`` [out_features]."""
        return {"weight": (attrs.out_features, last_dim(inputs[0])), "bias": (attrs.out_features,)}

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Two per weight element and row."""
        return 2 * elements(inputs[0].shape, tokens, rows) * int(attrs.out_features)

    def reference(self, call: Call) -> list[np.ndarray]:
        """``x @ weight.T + bias``."""
        y = call.inputs[0] @ call.weights["weight"].T
        return [y + call.weights["bias"] if "bias" in call.weights else y]


@register
class Embedding(OpSpec):
    """``y[t] = weight[ids[t] - first_id]``, zeros for ids beyond the table: those that other ranks have."""

    kind = "embedding"
    inputs = ("ids",)
    weights = (WeightSlot("weight"),)

    class Attrs(OpAttrs):
        """``num_embeddings`` rows of ``embedding_dim`` each, for ids from ``first_id`` on."""

        num_embeddings: PositiveInt
        embedding_dim: PositiveInt
        first_id: NonNegativeInt = 0

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``i32 [T] -> f32 [T, embedding_dim]``."""
        if inputs[0].dtype != "i32" or len(inputs[0].shape) != 1:
            raise ShapeMismatch(f"expected ids i32[T], got {inputs[0]}", [0])
        return [TensorType((inputs[0].shape[0], attrs.embedding_dim))]

    def weight_shapes(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, tuple[int, ...]]:
        """``weight`` [num_embeddings, embedding_dim]."""
        return {"weight": (attrs.num_embeddings, attrs.embedding_dim)}

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """None: rows are copied."""
        return 0

    def reference(self, call: Call) -> list[np.ndarray]:
        """Rows of ``weight``, or zeros."""
        import numpy as np

        rows = call.inputs[0] - call.attrs.first_id
        here = (rows >= 0) & (rows < call.attrs.num_embeddings)
        return [np.where(here[:, None], call.weights["weight"][np.where(here, rows, 0)], np.float32(0))]
