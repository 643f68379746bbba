"""Scratch memory of the CPU's kernels, so that a plan can place it; imports nothing that compiles.

Every piece is rounded up to a cache line. The kernels take the same pieces in ``emit``.
"""

from __future__ import annotations

from labinfer.backends.cpu.layout import activation_bytes, panel_format
from labinfer.backends.cpu.machine import default_threads
from labinfer.ops.base import KernelBounds, TensorType, dim

TILE = 64
"""Positions of an attention tile."""

TILE_ROWS = 48
"""Query rows of an attention item, or one token's where they are more."""

MAX_SPLITS = 8
"""Parts that the context of a decoding sequence is cut into at most."""


def lines(nbytes: int) -> int:
    """``nbytes`` rounded up to whole cache lines."""
    return -(-nbytes // 64) * 64


def workspace(bounds: KernelBounds) -> int:
    """Bytes of scratch memory for a kernel at its bounds."""
    sizer = _SIZERS.get(bounds.kind)
    return sizer(bounds) if sizer else 0


def _activations(x: TensorType, formats: list[str], bounds: KernelBounds) -> int:
    """Activation rows of ``x``, one set for quantized weights and one for plain ones of an odd number of columns."""
    tokens, columns = dim(x.shape[0], bounds.tokens, bounds.rows), int(x.shape[1])
    sets = {panel_format(format).quantized: format for format in formats}
    return sum(
        lines(tokens * activation_bytes(format, columns))
        for quantized, format in sets.items()
        if quantized or columns % 2
    )


def _linear(bounds: KernelBounds) -> int:
    return _activations(bounds.inputs[0], [format for format, shape in bounds.weights if len(shape) == 2], bounds)


def _normed(bounds: KernelBounds) -> int:
    x = bounds.inputs[0]
    rows = lines(4 * dim(x.shape[0], bounds.tokens, bounds.rows) * int(x.shape[1]))
    return rows + _linear(bounds)


def _norm_glu(bounds: KernelBounds) -> int:
    size = next(shape[0] for _, shape in bounds.weights if len(shape) == 2)
    return _normed(bounds) + lines(4 * bounds.tokens * size)


def _rope(bounds: KernelBounds) -> int:
    return sum(lines(4 * bounds.tokens) for attrs in bounds.attrs if getattr(attrs, "recompute_after", None))


def _rope_kv_write(bounds: KernelBounds) -> int:
    k_width = int(bounds.inputs[2].shape[1])
    return _rope(bounds) + lines(4 * k_width) * default_threads()


def _attention(bounds: KernelBounds) -> int:
    attrs = bounds.attrs[0]
    value_dim = attrs.v_head_dim or attrs.head_dim
    partials = attention_partials_bytes(attrs.num_heads, value_dim, bounds.sequences)
    each = attention_workspace_bytes(attrs.num_heads // attrs.num_kv_heads, attrs.head_dim, value_dim)
    return lines(partials) + lines(each) * default_threads()


def padded_rows(rows: int) -> int:
    """``rows`` made a sum of groups of 6, 3 and 1 with at most one group of 1."""
    return rows + 1 if rows % 3 == 2 else rows


def out_stride(v_head_dim: int) -> int:
    """Floats from row to row of sums of values: whole vectors."""
    return (v_head_dim + 15) // 16 * 16


def attention_workspace_bytes(group: int, head_dim: int, v_head_dim: int) -> int:
    """Bytes that each thread needs for attention of ``group`` query heads to a key head, whatever the context."""
    rows = padded_rows(max(1, TILE_ROWS // group) * group)
    states = 64 + 8 * TILE + 3 * lines(4 * rows)
    return states + 4 * TILE * rows + lines(4 * rows * head_dim) + 4 * rows * out_stride(v_head_dim)


def attention_partials_bytes(num_heads: int, v_head_dim: int, max_sequences: int) -> int:
    """Bytes for the partial results of split contexts, shared by all threads."""
    return max_sequences * MAX_SPLITS * num_heads * 4 * (out_stride(v_head_dim) + 16)


_SIZERS = {
    "linear": _linear,
    "linear_add": _linear,
    "norm_qkv": _normed,
    "norm_glu": _norm_glu,
    "rope": _rope,
    "rope_kv_write": _rope_kv_write,
    "attention": _attention,
}
