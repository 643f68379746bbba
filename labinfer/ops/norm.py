"""Normalisation of each token's features: ``rms_norm`` and ``layer_norm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat, PositiveInt

from labinfer.ops.base import (
    OVER_FIRST,
    Call,
    OpAttrs,
    OpSpec,
    ShapeMismatch,
    TensorType,
    WeightSlot,
    elements,
    last_dim,
    register,
)

if TYPE_CHECKING:
    import numpy as np


@register
class RmsNorm(OpSpec):
    """``y = x / sqrt(mean(x * x) + eps) * (weight + offset)`` (Zhang & Sennrich, arXiv:1910.07467)."""

    kind = "rms_norm"
    weights = (WeightSlot("weight", optional=True),)
    inplace = OVER_FIRST

    class Attrs(OpAttrs):
        """``offset``: what the checkpoint left out of ``weight`` (Gemma stores ``weight - 1``).

        ``group``: normalise each run of ``group`` features by itself, as the norms of queries and keys per head do;
        None takes the whole row.
        """

        eps: NonNegativeFloat
        offset: float = 0.0
        group: PositiveInt | None = None

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, d] -> [T, d]``, ``d`` a multiple of ``group``."""
        features = last_dim(inputs[0])
        if attrs.group and features % attrs.group:
            raise ShapeMismatch(f"{features} features do not divide into groups of {attrs.group}", [0])
        return [inputs[0]]

    def weight_shapes(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, tuple[int, ...]]:
        """``weight`` [group], or [d] without groups."""
        return {"weight": (attrs.group or last_dim(inputs[0]),)}

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Four per element: square, sum, two products."""
        return 4 * elements(inputs[0].shape, tokens, rows)

    def reference(self, call: Call) -> list[np.ndarray]:
        """Normalise in float32, then multiply by ``weight + offset``."""
        import numpy as np

        x, attrs = call.inputs[0], call.attrs
        groups = x.reshape(len(x), -1, attrs.group or x.shape[-1])
        y = groups / np.sqrt(np.mean(groups * groups, axis=-1, keepdims=True) + attrs.eps)
        if "weight" in call.weights:
            y = y * (call.weights["weight"] + attrs.offset)
        return [y.reshape(x.shape)]


@register
class LayerNorm(OpSpec):
    """``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` (Ba et al., arXiv:1607.06450)."""

    kind = "layer_norm"
    weights = (WeightSlot("weight"), WeightSlot("bias", optional=True))
    inplace = OVER_FIRST

    class Attrs(OpAttrs):
        """``eps`` is added to the variance."""

        eps: NonNegativeFloat

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, d] -> [T, d]``."""
        last_dim(inputs[0])
        return [inputs[0]]

    def weight_shapes(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, tuple[int, ...]]:
        """``weight`` [d], ``bias`` [d]."""
        features = last_dim(inputs[0])
        return {"weight": (features,), "bias": (features,)}

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Seven per element: mean, difference, square, sum, two products, bias."""
        return 7 * elements(inputs[0].shape, tokens, rows)

    def reference(self, call: Call) -> list[np.ndarray]:
        """Centre, normalise by the biased variance, scale and shift."""
        import numpy as np

        centred = call.inputs[0] - np.mean(call.inputs[0], axis=-1, keepdims=True)
        y = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + call.attrs.eps)
        y = y * call.weights["weight"]
        return [y + call.weights["bias"] if "bias" in call.weights else y]
