"""Attention over a paged key-value cache: ``kv_write``, ``attention`` and DeepSeek's ``mla_attention``.

The cache of a layer is two matrices of slots, cut into blocks that sequences own (PagedAttention, Kwon et al.,
arXiv:2309.06180); ``Step`` says where. A token sees the tokens of its own sequence at positions up to its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from labinfer.ops.base import (
    Call,
    Dim,
    OpAttrs,
    OpSpec,
    ShapeMismatch,
    Step,
    TensorType,
    WeightSlot,
    dim,
    expect_features,
    last_dim,
    register,
)

if TYPE_CHECKING:
    import numpy as np

QUERY_CHUNK = 128
"""Queries that the reference scores at once: bounds its memory to heads x QUERY_CHUNK x context floats."""


@register
class KvWrite(OpSpec):
    """Stores a token's keys and values: ``cache.k[slot_mapping[t]] = k[t]``, and ``v`` likewise where there is one."""

    kind = "kv_write"
    inputs = ("k", "v")
    optional_inputs = 1
    outputs = ()
    state = True

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``k`` [T, width of the cache's k], ``v`` [T, width of the cache's v]; no outputs."""
        for operand, x in enumerate(inputs):
            last_dim(x, operand)
        if inputs[0].shape[0] != inputs[-1].shape[0]:
            raise ShapeMismatch(f"k {inputs[0]} and v {inputs[-1]} must have the same rows", [0, 1])
        return []

    def state_widths(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, int]:
        """Parts are called as the operands are, and as wide."""
        return {part: last_dim(x, operand) for operand, (part, x) in enumerate(zip(self.inputs, inputs, strict=False))}

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """None: rows are copied."""
        return 0

    def reference(self, call: Call) -> list[np.ndarray]:
        """Write the rows into the cache in place."""
        assert call.step is not None
        for part, values in zip(("k", "v"), call.inputs, strict=False):
            call.cache[part][call.step.slot_mapping] = values
        return []


@register
class Attention(OpSpec):
    """Softmax attention of queries over the cache, heads side by side in a row.

    ``num_heads / num_kv_heads`` query heads share a key-value head (Ainslie et al., arXiv:2305.13245).
    """

    kind = "attention"
    inputs = ("q",)
    state = True

    class Attrs(OpAttrs):
        """``scale`` multiplies scores; ``softcap`` bounds them then to ``±softcap`` (Gemma 2).

        ``window``: a token sees itself and the ``window - 1`` tokens before it (Mistral, arXiv:2310.06825);
        None sees all. ``v_head_dim``: width of a value head, ``head_dim`` when None.
        """

        num_heads: PositiveInt
        num_kv_heads: PositiveInt
        head_dim: PositiveInt
        v_head_dim: PositiveInt | None = None
        scale: float
        window: PositiveInt | None = None
        softcap: PositiveFloat | None = None

        @model_validator(mode="after")
        def _whole_groups(self) -> Attention.Attrs:
            if self.num_heads % self.num_kv_heads:
                message = "num_heads {heads} is not a multiple of num_kv_heads {kv_heads}"
                raise PydanticCustomError(
                    "head_groups", message, {"heads": self.num_heads, "kv_heads": self.num_kv_heads}
                )
            return self

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, num_heads * head_dim] -> [T, num_heads * v_head_dim]``."""
        expect_features(inputs[0], attrs.num_heads * attrs.head_dim, "num_heads * head_dim")
        width = attrs.num_heads * (attrs.v_head_dim or attrs.head_dim)
        return [TensorType((inputs[0].shape[0], width), inputs[0].dtype)]

    def state_widths(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, int]:
        """``k`` num_kv_heads * head_dim, ``v`` num_kv_heads * v_head_dim."""
        v_head_dim = attrs.v_head_dim or attrs.head_dim
        return {"k": attrs.num_kv_heads * attrs.head_dim, "v": attrs.num_kv_heads * v_head_dim}

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Two per query, key and feature, for scores and for the weighted sum of values."""
        seen = min(context, attrs.window or context)
        width = attrs.num_heads * (attrs.head_dim + (attrs.v_head_dim or attrs.head_dim))
        return int(2 * _rows(inputs, tokens, rows) * seen * width)

    def reference(self, call: Call) -> list[np.ndarray]:
        """Gather each sequence's keys and values from its blocks, then attend."""
        import numpy as np

        attrs, q = call.attrs, call.inputs[0]
        v_head_dim = attrs.v_head_dim or attrs.head_dim
        y = np.empty((len(q), attrs.num_heads, v_head_dim), np.float32)
        for seen in seen_tokens(call.step, attrs.window):
            k = call.cache["k"][seen.slots].reshape(-1, attrs.num_kv_heads, attrs.head_dim)
            v = call.cache["v"][seen.slots].reshape(-1, attrs.num_kv_heads, v_head_dim)
            queries = q[seen.queries].reshape(-1, attrs.num_heads, attrs.head_dim)
            y[seen.queries] = attend(queries, k, v, seen, attrs.scale, attrs.window, attrs.softcap)
        return [y.reshape(len(q), -1)]


@register
class MlaAttention(OpSpec):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are made from a cached latent.

    The cache holds, for each token, the normalised latent as ``k`` [kv_rank] and the rotated key part that all heads
    share as ``v`` [rope_dim]. A head's key is ``[kv_b_k @ latent, shared part]``, its value ``kv_b_v @ latent``.
    """

    kind = "mla_attention"
    inputs = ("q",)
    weights = (WeightSlot("kv_b"),)
    state = True

    class Attrs(OpAttrs):
        """A query head is ``nope_dim`` features without and ``rope_dim`` with positions; a value head is ``v_dim``.

        ``kv_rank``: size of the latent. ``scale`` multiplies scores (with yarn it holds ``mscale ** 2`` too).
        """

        num_heads: PositiveInt
        nope_dim: PositiveInt
        rope_dim: PositiveInt
        v_dim: PositiveInt
        kv_rank: PositiveInt
        scale: float

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """``[T, num_heads * (nope_dim + rope_dim)] -> [T, num_heads * v_dim]``."""
        head_dim = attrs.nope_dim + attrs.rope_dim
        expect_features(inputs[0], attrs.num_heads * head_dim, "num_heads * (nope_dim + rope_dim)")
        return [TensorType((inputs[0].shape[0], attrs.num_heads * attrs.v_dim), inputs[0].dtype)]

    def weight_shapes(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, tuple[int, ...]]:
        """``kv_b`` [num_heads * (nope_dim + v_dim), kv_rank]."""
        return {"kv_b": (attrs.num_heads * (attrs.nope_dim + attrs.v_dim), attrs.kv_rank)}

    def state_widths(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, int]:
        """``k`` kv_rank, ``v`` rope_dim."""
        return {"k": attrs.kv_rank, "v": attrs.rope_dim}

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """As absorbed by a good kernel: ``kv_b`` once per query, then attention in the latent space."""
        absorb = attrs.kv_rank * (attrs.nope_dim + attrs.v_dim)
        attend = context * (2 * attrs.kv_rank + attrs.rope_dim)
        return int(2 * _rows(inputs, tokens, rows) * attrs.num_heads * (absorb + attend))

    def reference(self, call: Call) -> list[np.ndarray]:
        """Expand keys and values of every head from the latent, as the checkpoint's authors do, then attend."""
        import numpy as np

        attrs, q = call.attrs, call.inputs[0]
        y = np.empty((len(q), attrs.num_heads, attrs.v_dim), np.float32)
        for seen in seen_tokens(call.step, None):
            expanded = call.cache["k"][seen.slots] @ call.weights["kv_b"].T
            k_nope, v = np.split(expanded.reshape(len(seen.slots), attrs.num_heads, -1), [attrs.nope_dim], axis=-1)
            shared = call.cache["v"][seen.slots][:, None, :]
            k = np.concatenate([k_nope, np.broadcast_to(shared, (*k_nope.shape[:2], attrs.rope_dim))], axis=-1)
            queries = q[seen.queries].reshape(-1, attrs.num_heads, attrs.nope_dim + attrs.rope_dim)
            y[seen.queries] = attend(queries, k, v, seen, attrs.scale, None, None)
        return [y.reshape(len(q), -1)]


@dataclass(slots=True)
class SeenTokens:
    """What one sequence's queries of a step look at.

    ``queries``: their rows in the step; ``positions`` [queries] in the sequence; ``slots`` [keys] of the cache, for
    the tokens at positions ``first``, ``first + 1``, … .
    """

    queries: slice
    positions: np.ndarray
    slots: np.ndarray
    first: int


def seen_tokens(step: Step | None, window: int | None) -> Iterator[SeenTokens]:
    """Each sequence with queries in the step; blocks wholly before the window are not looked up."""
    import numpy as np

    assert step is not None
    for sequence, length in enumerate(step.context_len):
        queries = slice(step.query_start[sequence], step.query_start[sequence + 1])
        positions = step.positions[queries]
        if len(positions) == 0:
            continue
        first = max(0, int(positions.min()) - window + 1) if window else 0
        tokens = np.arange(first, length)
        blocks = step.block_table[sequence][tokens // step.block_size]
        yield SeenTokens(queries, positions, blocks * step.block_size + tokens % step.block_size, first)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    seen: SeenTokens,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> np.ndarray:
    """Causal attention of one sequence: ``q`` [Q, heads, dim], ``k`` [K, kv_heads, dim], ``v`` [K, kv_heads, v_dim].

    Returns [Q, heads, v_dim].
    """
    import numpy as np

    y = np.empty((*q.shape[:2], v.shape[-1]), np.float32)
    for start in range(0, len(q), QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        positions = seen.positions[chunk]
        # No query of the chunk sees tokens before `oldest` or after its last position.
        oldest = max(seen.first, int(positions.min()) - window + 1) if window else seen.first
        tokens = np.arange(oldest, int(positions.max()) + 1)
        hidden = tokens > positions[:, None]
        if window:
            hidden |= tokens <= positions[:, None] - window
        keys = slice(oldest - seen.first, oldest - seen.first + len(tokens))
        y[chunk] = _softmax_average(q[chunk], k[keys], v[keys], hidden, scale, softcap)
    return y


def _softmax_average(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, hidden: np.ndarray, scale: float, softcap: float | None
) -> np.ndarray:
    """``softmax(q @ k * scale) @ v`` per head, where ``hidden`` [Q, K] masks keys; shapes as in ``attend``."""
    import numpy as np

    count, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(count, kv_heads, -1, head_dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
    scores = (grouped * scale) @ k.transpose(1, 2, 0)  # [kv_heads, heads / kv_heads * Q, K]
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    weights = scores.reshape(heads, count, -1)
    weights += np.where(hidden, np.float32(-np.inf), np.float32(0))
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    y: np.ndarray = weights.reshape(kv_heads, -1, len(k)) @ v.transpose(1, 0, 2)
    y = y.reshape(heads, count, -1)
    return y.transpose(1, 0, 2)


def _rows(inputs: Sequence[TensorType], tokens: int, rows: int) -> int:
    """Rows of the first input in a step."""
    first: Dim = inputs[0].shape[0]
    return dim(first, tokens, rows)
