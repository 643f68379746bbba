"""``select_rows``: keep the tokens whose logits are wanted, so that the head is computed for them alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from labinfer.ops.base import Call, OpSpec, ShapeMismatch, TensorType, last_dim, register

if TYPE_CHECKING:
    import numpy as np


@register
class SelectRows(OpSpec):
    """``y[r] = x[step.logits_rows[r]]``."""

    kind = "select_rows"

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, d] -> [R, d]``."""
        features = last_dim(inputs[0])
        if inputs[0].shape[0] != "T":
            raise ShapeMismatch(f"expected one row per token [T, {features}], got {inputs[0]}", [0])
        return [TensorType(("R", features), inputs[0].dtype)]

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """None: rows are copied."""
        return 0

    def reference(self, call: Call) -> list[np.ndarray]:
        """Rows of ``x`` by index."""
        assert call.step is not None
        return [call.inputs[0][call.step.logits_rows]]
