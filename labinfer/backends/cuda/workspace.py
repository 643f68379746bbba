"""Scratch memory of the kernels, so that a plan can place it; ``emit`` takes the same pieces."""

from __future__ import annotations

from labinfer.backends.cuda.layout import CUBLAS_BYTES, fits_few, pitch, rounded
from labinfer.ops.base import KernelBounds, TensorType, dim

SPLIT_BLOCKS = 264
"""Blocks that attention is split into where there are fewer queries: two for each multiprocessor of a large GPU."""

SHARED_HEADS = 8
"""Query heads that share the reading of a key, at most."""


def scratch_bytes(bounds: KernelBounds) -> int:
    """Bytes of scratch memory for a kernel at its bounds."""
    sizer = _SIZERS.get(bounds.kind)
    return sizer(bounds) if sizer else 0


def narrow_bytes(tokens: int, columns: int) -> int:
    """Bytes of ``tokens`` rows in 16 bits."""
    return rounded(2 * tokens * pitch(columns))


def partials_bytes(value_dim: int) -> int:
    """Bytes for what the parts of a split attention leave."""
    return rounded(2 * SPLIT_BLOCKS * SHARED_HEADS * (value_dim + 2) * 4)


def _matrices(bounds: KernelBounds) -> list[tuple[str, tuple[int, ...]]]:
    return [(format, shape) for format, shape in bounds.weights if len(shape) >= 2]


def _rows(x: TensorType, bounds: KernelBounds) -> int:
    return dim(x.shape[0], bounds.tokens, bounds.rows)


def _linear(bounds: KernelBounds) -> int:
    return _products(bounds, _rows(bounds.inputs[0], bounds))


def _products(bounds: KernelBounds, tokens: int) -> int:
    """Activations in 16 bits and cuBLAS's own, where steps can have more tokens than the kernel for few takes."""
    columns = max(shape[-1] for _, shape in _matrices(bounds))
    formats = {format for format, _ in _matrices(bounds)}
    plain = {"f16", "bf16"} & formats
    if not plain or fits_few("bf16", tokens, columns):  # then fewer tokens do, too
        return 0
    return CUBLAS_BYTES + len(plain) * narrow_bytes(tokens, columns)


def _normed(bounds: KernelBounds) -> int:
    x = bounds.inputs[0]
    return rounded(4 * _rows(x, bounds) * int(x.shape[1])) + _linear(bounds)


def _norm_head(bounds: KernelBounds) -> int:
    """As ``_normed``, for the rows whose logits are wanted."""
    return rounded(4 * bounds.rows * int(bounds.inputs[0].shape[1])) + _products(bounds, bounds.rows)


def _norm_glu(bounds: KernelBounds) -> int:
    width = _matrices(bounds)[0][1][0]
    return _normed(bounds) + rounded(4 * _rows(bounds.inputs[0], bounds) * width)


def _attention(bounds: KernelBounds) -> int:
    attrs = bounds.attrs[0]
    return partials_bytes(attrs.v_head_dim or attrs.head_dim)


def _rope_attention(bounds: KernelBounds) -> int:
    """Turned queries, where a kernel of its own turns them; as ``_attention``."""
    q, attrs = bounds.inputs[0], bounds.attrs[-1]
    return rounded(4 * bounds.tokens * int(q.shape[1])) + partials_bytes(attrs.v_head_dim or attrs.head_dim)


def _norm_rope_attention(bounds: KernelBounds) -> int:
    """The same, and normed keys, where they are not normed head by head."""
    return rounded(4 * bounds.tokens * int(bounds.inputs[1].shape[1])) + _rope_attention(bounds)


def _router(bounds: KernelBounds) -> int:
    return rounded(4 * bounds.tokens * bounds.attrs[0].num_experts) + _linear(bounds)


def _moe(bounds: KernelBounds) -> int:
    attrs, columns = bounds.attrs[0], int(bounds.inputs[0].shape[1])
    pairs = bounds.tokens * int(bounds.inputs[1].shape[1])
    tables = rounded(4 * (attrs.num_experts + 1)) + 2 * rounded(4 * pairs)
    return tables + 2 * rounded(4 * pairs * attrs.expert_size) + rounded(4 * pairs * columns)


_SIZERS = {
    "linear": _linear,
    "linear_add": _linear,
    "norm_qkv": _normed,
    "norm_glu": _norm_glu,
    "norm_head": _norm_head,
    "attention": _attention,
    "rope_attention": _rope_attention,
    "norm_rope_attention": _norm_rope_attention,
    "router": _router,
    "moe": _moe,
}
