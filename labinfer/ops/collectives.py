"""What the ranks of a tensor-parallel group do at once: ``all_reduce`` sums their parts, ``all_gather`` joins them.

Every rank runs the same collectives in the same order. Sums are taken in the order of ranks on every rank, so that all
have the same bits (Shoeybi et al., arXiv:1909.08053, say where a transformer needs them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveInt

from labinfer.ops.base import (
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


@register
class AllReduce(OpSpec):
    """``y = sum over ranks of their x``."""

    kind = "all_reduce"
    inplace = OVER_FIRST
    inserted = True

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, d] -> [T, d]``."""
        last_dim(inputs[0])
        return [inputs[0]]

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """One per element: a rank's own share of the additions."""
        return elements(inputs[0].shape, tokens, rows)

    def reference(self, call: Call) -> list[np.ndarray]:
        """Add the parts in the order of ranks."""
        assert call.peers is not None
        x = call.inputs[0]
        first, *others = call.peers.exchange(x, [x.shape[1]] * call.peers.ranks)
        y = first.copy()
        for part in others:
            y += part
        return [y]


@register
class AllGather(OpSpec):
    """``y``: the columns of all ranks' ``x``, side by side in the order of ranks."""

    kind = "all_gather"
    inserted = True

    class Attrs(OpAttrs):
        """``sizes``: columns of each rank."""

        sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, one of sizes] -> [T, sum(sizes)]``."""
        if (features := last_dim(inputs[0])) not in attrs.sizes:
            raise ShapeMismatch(f"{features} features are no rank's of {list(attrs.sizes)}", [0])
        return [TensorType((inputs[0].shape[0], sum(attrs.sizes)), inputs[0].dtype)]

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """None: rows are copied."""
        return 0

    def reference(self, call: Call) -> list[np.ndarray]:
        """All parts side by side."""
        import numpy as np

        assert call.peers is not None
        return [np.concatenate(call.peers.exchange(call.inputs[0], call.attrs.sizes), axis=1)]
