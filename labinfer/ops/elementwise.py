"""Ops that work on each number by itself: ``add``, ``scale``, ``softcap``, ``activation`` and the gated ``glu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat

from labinfer.ops.activations import FUNCTIONS, Activation
from labinfer.ops.base import (
    OVER_EITHER,
    OVER_FIRST,
    Call,
    OpAttrs,
    OpSpec,
    ShapeMismatch,
    TensorType,
    elements,
    last_dim,
    register,
)

if TYPE_CHECKING:
    import numpy as np


def _same_type(inputs: Sequence[TensorType]) -> list[TensorType]:
    """The one type that all inputs share, as the type of one output."""
    last_dim(inputs[0])
    if len(inputs) == 2 and inputs[0] != inputs[1]:
        raise ShapeMismatch(f"both inputs must have one type, got {inputs[0]} and {inputs[1]}", [0, 1])
    return [inputs[0]]


@register
class Add(OpSpec):
    """``y = a + b``, of one shape."""

    kind = "add"
    inputs = ("a", "b")
    inplace = OVER_EITHER

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """Both ``[T, d]``, and so is the sum."""
        return _same_type(inputs)

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """One per element."""
        return elements(inputs[0].shape, tokens, rows)

    def reference(self, call: Call) -> list[np.ndarray]:
        """``a + b``."""
        return [call.inputs[0] + call.inputs[1]]


@register
class Scale(OpSpec):
    """``y = x * by``: Gemma's embedding multiplier, for one."""

    kind = "scale"
    inplace = OVER_FIRST

    class Attrs(OpAttrs):
        """``by``: the multiplier."""

        by: float

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, d] -> [T, d]``."""
        return _same_type(inputs)

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """One per element."""
        return elements(inputs[0].shape, tokens, rows)

    def reference(self, call: Call) -> list[np.ndarray]:
        """``x * by`` in float32."""
        return [call.inputs[0] * call.attrs.by]


@register
class Softcap(OpSpec):
    """``y = cap * tanh(x / cap)``: keeps logits within ``±cap`` (Gemma 2, arXiv:2408.00118)."""

    kind = "softcap"
    inplace = OVER_FIRST

    class Attrs(OpAttrs):
        """``cap``: the bound."""

        cap: PositiveFloat

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, d] -> [T, d]``."""
        return _same_type(inputs)

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Three per element, the tanh counted as one."""
        return 3 * elements(inputs[0].shape, tokens, rows)

    def reference(self, call: Call) -> list[np.ndarray]:
        """``cap * tanh(x / cap)``."""
        import numpy as np

        return [np.tanh(call.inputs[0] / call.attrs.cap) * call.attrs.cap]


@register
class ActivationOp(OpSpec):
    """``y = function(x)``, the non-linearity of a feed-forward network without a gate."""

    kind = "activation"
    inplace = OVER_FIRST

    class Attrs(OpAttrs):
        """``function``: a name of Hugging Face's ``ACT2FN``, kept as its canonical spelling."""

        function: Activation

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, d] -> [T, d]``."""
        return _same_type(inputs)

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Four per element, about what a sigmoid costs."""
        return 4 * elements(inputs[0].shape, tokens, rows)

    def reference(self, call: Call) -> list[np.ndarray]:
        """``function(x)``."""
        return [FUNCTIONS[call.attrs.function](call.inputs[0])]


@register
class Glu(OpSpec):
    """``y = function(gate) * up``: the gated linear unit (Shazeer, arXiv:2002.05202); SwiGLU with ``silu``."""

    kind = "glu"
    inputs = ("gate", "up")
    inplace = OVER_EITHER

    class Attrs(OpAttrs):
        """``function``: a name of Hugging Face's ``ACT2FN``, kept as its canonical spelling."""

        function: Activation

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """Both ``[T, d]``, and so is the result."""
        return _same_type(inputs)

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Five per element: the activation and the product."""
        return 5 * elements(inputs[0].shape, tokens, rows)

    def reference(self, call: Call) -> list[np.ndarray]:
        """``function(gate) * up``."""
        gate, up = call.inputs
        return [FUNCTIONS[call.attrs.function](gate) * up]
