"""``rope``: rotary position embedding of queries or keys (Su et al., arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

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
from labinfer.ops.rope_frequencies import (
    LENGTH_DEPENDENT,
    RopeScaling,
    check_scaling,
    inverse_frequencies,
    trained_length,
)

if TYPE_CHECKING:
    import numpy as np


@register
class Rope(OpSpec):
    """Turns pairs of features of each head by angles proportional to the token's position.

    ``freq_factors`` [rotary_dim / 2] divide the frequencies: GGUF stores llama3 scaling so (``rope_freqs.weight``).
    ``long_freq_factors`` do instead in sequences longer than longrope's trained length (``rope_factors_long.weight``).
    """

    kind = "rope"
    inputs = ("x", "positions")
    weights = (WeightSlot("freq_factors", optional=True), WeightSlot("long_freq_factors", optional=True))
    inplace = OVER_FIRST

    class Attrs(OpAttrs):
        """Heads are ``head_dim`` wide; features ``rotary_start`` … ``rotary_start + rotary_dim - 1`` of each turn.

        ``rotary_dim``: None turns all from ``rotary_start`` on; an odd one turns one feature more, at the frequencies
        of the odd number, as Hugging Face does. ``style``: ``half`` pairs feature i with i + rotary_dim / 2 (Llama,
        GPT-NeoX), ``interleaved`` pairs 2i with 2i + 1 (GPT-J, DeepSeek); results stay where the features were.
        ``scaling``: the config's ``rope_parameters`` or ``rope_scaling``; ``max_position``: its
        ``max_position_embeddings``; ``original_max_position``: its ``original_max_position_embeddings`` where that
        stands outside ``scaling`` (Phi-3), and then wins.
        """

        head_dim: PositiveInt
        rotary_dim: PositiveInt | None = None
        rotary_start: NonNegativeInt = 0
        theta: Annotated[float, Field(gt=1)]
        style: Literal["half", "interleaved"] = "half"
        scaling: RopeScaling | None = None
        max_position: PositiveInt | None = None
        original_max_position: Annotated[int, Field(gt=1)] | None = None

        @model_validator(mode="after")
        def _fits(self) -> Rope.Attrs:
            turned, start = self.turned, self.rotary_start
            if turned <= 0 or start + turned > self.head_dim:
                message = "{turned} features from {start} on (rotary_dim, made even) do not fit in head_dim {head_dim}"
                context = {"turned": turned, "start": start, "head_dim": self.head_dim}
                raise PydanticCustomError("rotary_dim", message, context)
            if self.scaling:
                check_scaling(self.scaling, self.rotary_dim or turned, self.max_position, self.original_max_position)
            return self

        @property
        def turned(self) -> int:
            """Features of a head that turn, an even number."""
            size = self.head_dim - self.rotary_start if self.rotary_dim is None else self.rotary_dim
            return size + size % 2

        @property
        def length_dependent(self) -> bool:
            """Whether ``frequencies`` looks at ``total_len``."""
            return self.scaling is not None and self.scaling.rope_type in LENGTH_DEPENDENT

        @property
        def recompute_after(self) -> int | None:
            """The length past which every position turns by other frequencies, so that cached keys no longer hold."""
            if self.scaling is None or self.scaling.rope_type != "longrope":
                return None
            trained = trained_length(self.scaling, self.max_position, self.original_max_position)
            return int(trained) if trained else None

        @property
        def reuse_until(self) -> int | None:
            """The length past which keys depend on how long the sequence is (dynamic NTK), so that none can share."""
            return self.max_position if self.scaling is not None and self.scaling.rope_type == "dynamic" else None

        def frequencies(self, total_len: int | None = None) -> tuple[np.ndarray, float]:
            """Inverse frequencies, float32 [turned / 2], and the factor on cosine and sine, at ``total_len``."""
            return inverse_frequencies(
                self.rotary_dim or self.turned,
                self.theta,
                self.scaling,
                max_position=self.max_position,
                original_max_position=self.original_max_position,
                total_len=total_len,
            )

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``x [T, heads * head_dim], positions i32 [T] -> [T, heads * head_dim]``."""
        x, positions = inputs
        if (features := last_dim(x)) % attrs.head_dim:
            raise ShapeMismatch(f"{features} features do not divide into heads of {attrs.head_dim}", [0])
        if positions != TensorType((x.shape[0],), "i32"):
            raise ShapeMismatch(f"expected positions i32[{x.shape[0]}], got {positions}", [1])
        return [x]

    def weight_shapes(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, tuple[int, ...]]:
        """``freq_factors``, ``long_freq_factors`` [rotary_dim / 2]."""
        return {"freq_factors": (attrs.turned // 2,), "long_freq_factors": (attrs.turned // 2,)}

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Three per turned feature; the sines come from a table."""
        return int(3 * elements(inputs[0].shape, tokens, rows) * attrs.turned // attrs.head_dim)

    def reference(self, call: Call) -> list[np.ndarray]:
        """Turn the pairs of every head: ``(a cos - b sin, b cos + a sin)``."""
        x, attrs = call.inputs[0], call.attrs
        cos, sin = (table[:, None, :] for table in _cos_sin(call))
        y = x.reshape(len(x), -1, attrs.head_dim).copy()
        half, stop = attrs.turned // 2, attrs.rotary_start + attrs.turned
        if attrs.style == "half":
            middle = attrs.rotary_start + half
            first, second = slice(attrs.rotary_start, middle), slice(middle, stop)
        else:
            first, second = slice(attrs.rotary_start, stop, 2), slice(attrs.rotary_start + 1, stop, 2)
        a, b = y[..., first].copy(), y[..., second].copy()
        y[..., first] = a * cos - b * sin
        y[..., second] = b * cos + a * sin
        return [y.reshape(x.shape)]


def _cos_sin(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every token's angles, float32 [T, rotary_dim / 2]."""
    import numpy as np

    attrs, positions = call.attrs, call.inputs[1]
    short = call.weights.get("freq_factors", np.float32(1))
    long = call.weights.get("long_freq_factors", short)
    spans: list[tuple[slice, int | None]] = [(slice(None), None)]
    if attrs.length_dependent:
        assert call.step is not None
        bounds = call.step.query_start
        spans = [(slice(bounds[s], bounds[s + 1]), int(length)) for s, length in enumerate(call.step.total_len)]
    cos = np.empty((len(positions), attrs.turned // 2), np.float32)
    sin = np.empty_like(cos)
    for tokens, total_len in spans:
        inv_freq, factor = attrs.frequencies(total_len)
        divisor = long if total_len and attrs.recompute_after and total_len > attrs.recompute_after else short
        angles = positions[tokens, None].astype(np.float32) * (inv_freq / divisor)
        cos[tokens], sin[tokens] = np.cos(angles) * factor, np.sin(angles) * factor
    return cos, sin
