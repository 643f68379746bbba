"""Scratch memory of the CPU's kernels, so that a plan can place it; imports nothing that compiles.

Every piece is rounded up to a cache line. The kernels take the same pieces in ``emit``.
"""

from __future__ import annotations

from labinfer.backends.cpu.layout import activation_form, activations_bytes, scattered_form
from labinfer.ops.base import KernelBounds, TensorType, dim

BLOCK_MULTIPLE = 16
"""Keys lie in panels of so many neighbouring positions; a block of the cache holds whole panels."""

TILE = 64
"""Positions of an attention tile."""

TILE_ROWS = 48
"""Query rows (tokens times the heads that share keys) of an attention item, or one token's where they are more."""

MLA_GROUP_HEADS = 8
"""Heads of a latent attention item at most."""

MAX_SPLITS = 8
"""Parts that the context of a decoding sequence is cut into at most."""


def lines(nbytes: int) -> int:
    """``nbytes`` rounded up to whole cache lines."""
    return -(-nbytes // 64) * 64


def scratch_bytes(bounds: KernelBounds) -> int:
    """Bytes of scratch memory for a kernel at its bounds."""
    sizer = _SIZERS.get(bounds.kind)
    return sizer(bounds) if sizer else 0


def _activations(x: TensorType, formats: list[str], bounds: KernelBounds) -> int:
    """Activation rows of ``x``, a set for each form that weights want them in; float32 ones are ``x`` itself.

    Fewer tokens may want other forms: what counts is the most that any number of them needs.
    """
    tokens, columns = dim(x.shape[0], bounds.tokens, bounds.rows), int(x.shape[1])

    def needed(tokens: int) -> int:
        forms = {activation_form(format, columns, tokens, bounds.options) for format in formats}
        return sum(lines(activations_bytes(form, tokens, columns)) for form in forms if form or columns % 2)

    fewer = {fewest - 1 for fewest in bounds.options.matrix_unit.values() if 0 < fewest <= tokens}
    return max(needed(count) for count in {tokens, *fewer})


def _linear(bounds: KernelBounds) -> int:
    return _activations(bounds.inputs[0], [format for format, shape in bounds.weights if len(shape) == 2], bounds)


def _normed(bounds: KernelBounds) -> int:
    x = bounds.inputs[0]
    rows = lines(4 * dim(x.shape[0], bounds.tokens, bounds.rows) * int(x.shape[1]))
    return rows + _linear(bounds)


def _norm_glu(bounds: KernelBounds) -> int:
    """As ``_normed``; and what up gives, where gate and up meet different activations."""
    matrices = [(format, shape) for format, shape in bounds.weights if len(shape) == 2]
    tokens = dim(bounds.inputs[0].shape[0], bounds.tokens, bounds.rows)
    mixed = len({format for format, _ in matrices}) > 1
    return _normed(bounds) + mixed * lines(4 * tokens * matrices[0][1][0])


def _rope(bounds: KernelBounds) -> int:
    """Each token's row of the tables where that is not its position, and dynamic scaling's own table of the step."""
    turns = [attrs for attrs in bounds.attrs if getattr(attrs, "length_dependent", False)]
    tables = sum(lines(8 * bounds.tokens * (attrs.turned // 2)) for attrs in turns if not attrs.recompute_after)
    return len(turns) * lines(4 * bounds.tokens) + tables


def _rope_kv_write(bounds: KernelBounds) -> int:
    k_width = int(bounds.inputs[2].shape[1])
    return _rope(bounds) + lines(4 * k_width) * bounds.threads


def _attention(bounds: KernelBounds) -> int:
    attrs = bounds.attrs[0]
    value_dim = attrs.v_head_dim or attrs.head_dim
    partials = attention_partials_bytes(attrs.num_heads, value_dim, bounds.sequences)
    each = attention_scratch(attrs.num_heads // attrs.num_kv_heads, attrs.head_dim, value_dim)
    return lines(partials) + each * bounds.threads


def _router(bounds: KernelBounds) -> int:
    attrs = bounds.attrs[0]
    scores = lines(4 * bounds.tokens * attrs.num_experts)
    return _linear(bounds) + scores + route_scratch(attrs.num_experts, attrs.num_groups or 1) * bounds.threads


def _moe(bounds: KernelBounds) -> int:
    """Expert bounds, tokens, places; gathered rows, gate and up, results; activations of gathered rows and gates."""
    attrs, columns = bounds.attrs[0], int(bounds.inputs[0].shape[1])
    pairs = bounds.tokens * int(bounds.inputs[1].shape[1])
    formats = {format for format, _ in bounds.weights}
    forms = {scattered_form(format, bounds.options) for format in formats}
    sizes = columns, attrs.expert_size
    activations = sum(lines(activations_bytes(form, pairs, n)) for form in forms for n in sizes if form or n % 2)
    tables = lines(4 * (attrs.num_experts + 1)) + 2 * lines(4 * pairs)
    return tables + 2 * lines(4 * pairs * columns) + 2 * lines(4 * pairs * attrs.expert_size) + activations


def _mla(bounds: KernelBounds) -> int:
    attrs = bounds.attrs[0]
    kv_b = lines(4 * attrs.num_heads * (attrs.nope_dim + attrs.v_dim) * attrs.kv_rank)
    return kv_b + mla_scratch(attrs.num_heads, attrs.rope_dim, attrs.kv_rank) * bounds.threads


def _lora_add(bounds: KernelBounds) -> int:
    """What the adapters' first matrices make of each token."""
    return lines(4 * bounds.tokens * out_stride(bounds.attrs[0].rank))


def route_scratch(num_experts: int, num_groups: int) -> int:
    """Bytes that each thread needs to choose experts."""
    return lines(4 * (2 * num_experts + num_groups))


def mla_scratch(num_heads: int, rope_dim: int, kv_rank: int) -> int:
    """Bytes that each thread needs for latent attention, whatever the context."""
    heads = min(MLA_GROUP_HEADS, num_heads)
    tokens = TILE_ROWS // heads
    rows = padded_rows(tokens * heads)
    lanes, width = (rows + 15) // 16 * 16, out_stride(kv_rank + rope_dim)
    states = 64 + 8 * TILE + 8 * lanes + 64 * lanes + 8 * TILE * lanes
    return lines(states + 4 * width * (lanes + tokens + TILE) + 4 * rows * out_stride(kv_rank))


def padded_rows(rows: int) -> int:
    """``rows`` made a sum of groups of 6, 3 and 1 with at most one group of 1."""
    return rows + 1 if rows % 3 == 2 else rows


def out_stride(v_head_dim: int) -> int:
    """Floats from row to row of sums of values: whole vectors."""
    return (v_head_dim + 15) // 16 * 16


def attention_scratch(group: int, head_dim: int, v_head_dim: int) -> int:
    """Bytes that each thread needs for attention of ``group`` query heads to a key head, whatever the context."""
    rows = padded_rows(max(1, TILE_ROWS // group) * group)
    states = 64 + 2 * 8 * TILE + 2 * lines(4 * rows) + 64 * rows
    return lines(states + 4 * TILE * rows + lines(4 * rows * head_dim) + 4 * rows * out_stride(v_head_dim))


def attention_partials_bytes(num_heads: int, v_head_dim: int, max_sequences: int) -> int:
    """Bytes for the partial results of split contexts, shared by all threads."""
    return max_sequences * MAX_SPLITS * num_heads * 4 * (out_stride(v_head_dim) + 16)


_SIZERS = {
    "linear": _linear,
    "linear_add": _linear,
    "lora_add": _lora_add,
    "norm_qkv": _normed,
    "norm_glu": _norm_glu,
    "rope": _rope,
    "rope_kv_write": _rope_kv_write,
    "attention": _attention,
    "router": _router,
    "moe": _moe,
    "mla_attention": _mla,
}
