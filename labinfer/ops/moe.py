"""Mixture of experts: ``router`` chooses experts for each token, ``moe`` runs the chosen ones.

Shazeer et al., arXiv:1701.06538; gated experts as in Mixtral, arXiv:2401.04088; expert groups and the correction bias
as in DeepSeek-V2 and V3, arXiv:2405.04434 and arXiv:2412.19437.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from labinfer.ops.activations import FUNCTIONS, Activation, sigmoid
from labinfer.ops.base import (
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
class Router(OpSpec):
    """The ``top_k`` best experts of each token and their weights.

    Scores are the softmax or sigmoid of ``x @ weight.T``. ``bias`` (V3's ``e_score_correction_bias``) is added for
    choosing only. With groups, experts outside the ``top_groups`` best groups cannot be chosen. Equal scores go to the
    lower expert.
    """

    kind = "router"
    outputs = ("ids", "weights")
    weights = (WeightSlot("weight"), WeightSlot("bias", optional=True))

    class Attrs(OpAttrs):
        """``normalize``: make a token's weights sum to 1; ``scale`` then multiplies them.

        ``num_groups`` equal groups of neighbouring experts, of which ``top_groups`` are kept; a group's score is its
        best expert's (``max``, V2) or the sum of its best two (``top2``, V3).
        """

        num_experts: PositiveInt
        top_k: PositiveInt
        score: Literal["softmax", "sigmoid"] = "softmax"
        normalize: bool = False
        scale: float = 1.0
        num_groups: PositiveInt | None = None
        top_groups: PositiveInt | None = None
        group_score: Literal["max", "top2"] = "max"

        @model_validator(mode="after")
        def _choosable(self) -> Router.Attrs:
            groups = self.num_groups or 1
            kept = self.top_groups or groups
            size = self.num_experts // groups
            if self.num_experts % groups:
                _refuse(f"{self.num_experts} experts do not divide into {groups} groups")
            if kept > groups:
                _refuse(f"top_groups {kept} is more than num_groups {groups}")
            if self.top_k > kept * size:
                _refuse(f"top_k {self.top_k} is more than the {kept * size} experts to choose from")
            if self.group_score == "top2" and groups > 1 and size < 2:
                _refuse(f"group_score 'top2' needs two experts in a group, {groups} groups have {size}")
            return self

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, d] -> ids i32 [T, top_k], weights f32 [T, top_k]``."""
        last_dim(inputs[0])
        shape = (inputs[0].shape[0], attrs.top_k)
        return [TensorType(shape, "i32"), TensorType(shape)]

    def weight_shapes(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, tuple[int, ...]]:
        """``weight`` [num_experts, d], ``bias`` [num_experts]."""
        return {"weight": (attrs.num_experts, last_dim(inputs[0])), "bias": (attrs.num_experts,)}

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Two per weight element and token."""
        return 2 * elements(inputs[0].shape, tokens, rows) * int(attrs.num_experts)

    def reference(self, call: Call) -> list[np.ndarray]:
        """Score, choose, gather, normalise."""
        import numpy as np

        attrs = call.attrs
        logits = call.inputs[0] @ call.weights["weight"].T
        scores = sigmoid(logits) if attrs.score == "sigmoid" else _softmax(logits)
        choice = scores + call.weights["bias"] if "bias" in call.weights else scores
        if attrs.num_groups and attrs.top_groups:
            choice = _within_best_groups(choice, attrs)
        ids = _top_k(choice, attrs.top_k)
        weights = np.take_along_axis(scores, ids, axis=1)
        if attrs.normalize:
            weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)  # V3's guard against 0 / 0
        return [ids.astype(np.int32), weights * attrs.scale]


def _refuse(message: str) -> None:
    raise PydanticCustomError("router_choice", "{message}", {"message": message})


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax of each row."""
    import numpy as np

    weights: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the ``k`` largest scores of each row, best first, the lower column first among equals."""
    import numpy as np

    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _within_best_groups(choice: np.ndarray, attrs: Any) -> np.ndarray:
    """``choice`` [T, experts] with minus infinity outside the best groups."""
    import numpy as np

    groups = choice.reshape(len(choice), attrs.num_groups, -1)
    counted = 2 if attrs.group_score == "top2" else 1
    best = _top_k(np.sort(groups, axis=2)[:, :, -counted:].sum(axis=2), attrs.top_groups)
    kept = np.zeros(groups.shape[:2], dtype=bool)
    np.put_along_axis(kept, best, True, axis=1)
    return np.where(kept[:, :, None], groups, -np.inf).reshape(choice.shape)


@register
class Moe(OpSpec):
    """``y = sum over chosen e of weights_e * down_e @ (function(gate_e @ x) * (up_e @ x))``.

    Chosen experts that are not among its own add nothing: other ranks have them.
    """

    kind = "moe"
    inputs = ("x", "ids", "weights")
    weights = (WeightSlot("gate"), WeightSlot("up"), WeightSlot("down"))

    class Attrs(OpAttrs):
        """``expert_size``: hidden features of one expert; ``function``: its activation.

        Its ``num_experts`` experts are those from number ``first_expert`` on.
        """

        num_experts: PositiveInt
        first_expert: NonNegativeInt = 0
        expert_size: PositiveInt
        function: Activation

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``x [T, d], ids i32 [T, k], weights f32 [T, k] -> [T, d]``."""
        x, ids, weights = inputs
        last_dim(x)
        if ids.dtype != "i32":
            raise ShapeMismatch(f"expected expert ids i32[T, top_k], got {ids}", [1])
        if ids.shape != weights.shape:
            raise ShapeMismatch(f"ids {ids} and weights {weights} must have one shape", [1, 2])
        if len(ids.shape) != 2 or ids.shape[0] != x.shape[0]:
            raise ShapeMismatch(f"x {x} and ids {ids} must have the same rows", [0, 1])
        return [x]

    def weight_shapes(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, tuple[int, ...]]:
        """``gate``, ``up`` [num_experts, expert_size, d], ``down`` [num_experts, d, expert_size]."""
        features = last_dim(inputs[0])
        into = (attrs.num_experts, attrs.expert_size, features)
        return {"gate": into, "up": into, "down": (attrs.num_experts, features, attrs.expert_size)}

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Two per weight element of each chosen expert and token."""
        return 6 * elements(inputs[1].shape, tokens, rows) * last_dim(inputs[0]) * int(attrs.expert_size)

    def reference(self, call: Call) -> list[np.ndarray]:
        """Expert by expert over the tokens that chose it; weights of other experts are not touched."""
        import numpy as np

        x, ids, weights = call.inputs
        gate, up, down = (call.weights[name] for name in ("gate", "up", "down"))
        y = np.zeros_like(x)
        own = range(call.attrs.first_expert, call.attrs.first_expert + call.attrs.num_experts)
        for number in np.unique(ids):
            if number not in own:
                continue
            token, rank = np.nonzero(ids == number)
            expert = number - own.start
            hidden = FUNCTIONS[call.attrs.function](x[token] @ gate[expert].T) * (x[token] @ up[expert].T)
            y[token] += hidden @ down[expert].T * weights[token, rank, None]
        return [y]
