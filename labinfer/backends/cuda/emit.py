"""From ops to rows of the tape: ``EMITTERS`` has one function per op kind, primitive or fused."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, c_float, c_int, c_uint64
from typing import Any

from labinfer.backends.cuda.emitter import Emitter, Linear, address, cache_define, format_defines, stride
from labinfer.backends.cuda.layout import ACTIVATION_CODES, fits_few
from labinfer.backends.cuda.workspace import SPLIT_BLOCKS, SPLIT_HEADS, partials_bytes
from labinfer.errors import LabinferError
from labinfer.ops.base import Call


class AttentionParameters(Structure):
    """``Parameters`` of ``attention.cu``."""

    _fields_ = (
        *((name, c_uint64) for name in ("q", "y", "partials", "k", "v", "positions", "query_start", "block_table")),
        *((name, c_int) for name in ("q_row", "y_row", "table_row", "sequences", "group", "kv_heads", "block_size")),
        *((name, c_int) for name in ("window", "splits")),
        *((name, c_float) for name in ("scale", "softcap")),
    )


class LatentParameters(Structure):
    """``Latent`` of ``mla.cu``."""

    _fields_ = (
        *((name, c_uint64) for name in ("q", "y", "kv_b", "k", "v", "positions", "query_start", "block_table")),
        *((name, c_int) for name in ("q_row", "y_row", "table_row", "sequences", "block_size", "heads", "nope")),
        *((name, c_int) for name in ("rope", "value", "rank")),
        ("scale", c_float),
    )


class Routing(Structure):
    """``Routing`` of ``moe.cu``."""

    _fields_ = (
        *((name, c_int) for name in ("experts", "top_k", "sigmoid", "normalize", "groups", "top_groups", "two")),
        ("scale", c_float),
    )


def _product(call: Call, y: Any) -> Linear:
    return Linear(call.weights["weight"], call.weights.get("bias"), y)


def _embedding(e: Emitter, call: Call) -> None:
    w, y, ids = call.weights["weight"], call.outputs[0], call.inputs[0]
    arguments = (ids, w.memory, w.rows, w.columns, y, stride(y))
    e.each("embedding", "embedding", len(y), w.columns, *arguments, defines=format_defines(w.format))


def _linear(e: Emitter, call: Call) -> None:
    e.linear(call.inputs[0], [_product(call, call.outputs[0])])


def _linear_add(e: Emitter, call: Call) -> None:
    x, residual = call.parts[0].inputs[0], call.inputs[-1]
    e.linear(x, [_product(call.parts[0], call.outputs[0])], residual=x if len(call.inputs) == 1 else residual)


def _norm_qkv(e: Emitter, call: Call) -> None:
    norm, *products = call.parts
    made = [_product(part, y) for part, y in zip(products, call.outputs, strict=True)]
    e.linear(call.inputs[0], made, norm=norm)


def _norm_glu(e: Emitter, call: Call) -> None:
    norm, gate, up, glu = call.parts
    x, y = call.inputs[0], call.outputs[0]
    formats = {part.weights["weight"].format for part in (gate, up)}
    if len(formats) == 1 and fits_few(*formats, *x.shape):
        e.few(x, [_product(gate, y), _product(up, None)], norm, None, glu.attrs.function)
        return
    made = e.array(y.shape)
    e.linear(x, [_product(gate, y), _product(up, made)], norm=norm)
    e.glu(glu.attrs.function, y, made, y)


def _glu(e: Emitter, call: Call) -> None:
    gate, up = call.inputs
    e.glu(call.attrs.function, gate, up, call.outputs[0])


def _activation(e: Emitter, call: Call) -> None:
    _each(e, call, "activation", ACTIVATION_CODES[call.attrs.function])


def _scale(e: Emitter, call: Call) -> None:
    _each(e, call, "scale", float(call.attrs.by))


def _softcap(e: Emitter, call: Call) -> None:
    _each(e, call, "softcap", float(call.attrs.cap))


def _each(e: Emitter, call: Call, kernel: str, argument: int | float) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.each("elementwise", kernel, len(y), y.shape[1], x, stride(x), y, stride(y), y.shape[1], argument)


def _add(e: Emitter, call: Call) -> None:
    (a, b), y = call.inputs, call.outputs[0]
    e.each("elementwise", "add", len(y), y.shape[1], a, stride(a), b, stride(b), y, stride(y), y.shape[1])


def _select_rows(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    arguments = (x, stride(x), e.step.logits_rows, y, stride(y), y.shape[1])
    e.each("elementwise", "select_rows", len(y), y.shape[1], *arguments)


def _rms_norm(e: Emitter, call: Call) -> None:
    e.rms_norm(call, call.inputs[0], call.outputs[0], stride(call.outputs[0]))


def _layer_norm(e: Emitter, call: Call) -> None:
    x, y, w = call.inputs[0], call.outputs[0], call.weights
    n = y.shape[1]
    arguments = (x, stride(x), w["weight"], w.get("bias"), y, stride(y), n, float(call.attrs.eps))
    e.add("norm", "layer_norm", (len(y), 1, 1), min(256, -(-n // 32) * 32), *arguments)


def _rope(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    turn, code = e.turn(call)
    arguments = (x, stride(x), y, stride(y), y.shape[1], turn)
    e.each("rope", "rope", len(y), y.shape[1], *arguments, defines=(f"TURN={code}", "CACHE=0"))


def _kv_write(e: Emitter, call: Call) -> None:
    k, v = call.inputs[0], call.inputs[1] if len(call.inputs) > 1 else None
    v_cache, v_width = (None, 0) if v is None else (call.cache["v"], v.shape[1])
    arguments = (
        k, stride(k), call.cache["k"], k.shape[1], v, stride(v), v_cache, v_width, e.step.slot_mapping,
    )  # fmt: skip
    e.each("rope", "kv_write", len(k), k.shape[1], *arguments, defines=("TURN=0", cache_define(call)))


def _rope_kv_write(e: Emitter, call: Call) -> None:
    rope_q, rope_k, _ = call.parts
    q, k, v, y = rope_q.inputs[0], rope_k.inputs[0], call.inputs[-1], call.outputs[0]
    (q_turn, code), (k_turn, k_code) = e.turn(rope_q), e.turn(rope_k)
    if code != k_code:
        raise LabinferError("cuda.rope", "queries and keys turn by angles of different kinds", remedy="--fuse none")
    arguments = (
        q, stride(q), y, stride(y), y.shape[1], q_turn, k, stride(k), call.cache["k"], k.shape[1], k_turn,
        v, stride(v), call.cache["v"], v.shape[1], e.step.slot_mapping,
    )  # fmt: skip
    e.each("rope", "rope_kv_write", len(y), y.shape[1], *arguments, defines=(f"TURN={code}", cache_define(call)))


def _attention(e: Emitter, call: Call) -> None:
    q, y, attrs, step = call.inputs[0], call.outputs[0], call.attrs, e.step
    value_dim = attrs.v_head_dim or attrs.head_dim
    lanes = 1 << (-(-max(attrs.head_dim, value_dim) // 8) - 1).bit_length()
    if lanes > 32:
        raise LabinferError("cuda.head-dim", f"heads of {max(attrs.head_dim, value_dim)} numbers are wider than 256")
    group = attrs.num_heads // attrs.num_kv_heads
    heads = min(group, SPLIT_HEADS)
    items = len(y) * attrs.num_kv_heads * -(-group // heads)
    splits = min(32, -(-SPLIT_BLOCKS // items)) if items < SPLIT_BLOCKS else 1
    partials = e.scratch(partials_bytes(value_dim)) if splits > 1 else 0
    parameters = AttentionParameters(
        address(q), address(y), partials, address(call.cache["k"]), address(call.cache["v"]), address(step.positions),
        address(step.query_start), address(step.block_table), stride(q), stride(y), stride(step.block_table),
        e.sequences, group, attrs.num_kv_heads, step.block_size, attrs.window or 0, splits, attrs.scale,
        attrs.softcap or 0.0,
    )  # fmt: skip
    shape = (f"HEADS={heads}", f"LANES={lanes}", f"HEAD_DIM={attrs.head_dim}", f"VALUE_DIM={value_dim}")
    defines = (cache_define(call), *shape)
    grid = (items // len(y), len(y), splits)
    e.add("attention", "attention", grid, 128, parameters, defines=defines)
    if splits > 1:
        e.add("attention", "merge", (attrs.num_heads, len(y), 1), 64, parameters, defines=defines)


def _mla_attention(e: Emitter, call: Call) -> None:
    q, y, a, step, w = call.inputs[0], call.outputs[0], call.attrs, e.step, call.weights["kv_b"]
    parameters = LatentParameters(
        address(q), address(y), w.address, address(call.cache["k"]), address(call.cache["v"]),
        address(step.positions), address(step.query_start), address(step.block_table), stride(q), stride(y),
        stride(step.block_table), e.sequences, step.block_size, a.num_heads, a.nope_dim, a.rope_dim, a.v_dim,
        a.kv_rank, a.scale,
    )  # fmt: skip
    defines = (*format_defines(w.format), cache_define(call))
    shared = 4 * (2 * a.kv_rank + a.rope_dim + 256)
    e.add("mla", "mla", (a.num_heads, len(y), 1), 256, parameters, defines=defines, shared=shared)


def _router(e: Emitter, call: Call) -> None:
    x, (ids, weights), a = call.inputs[0], call.outputs, call.attrs
    logits = e.array((len(x), a.num_experts))
    e.linear(x, [Linear(call.weights["weight"], None, logits)])
    groups = a.num_groups or 1
    routing = Routing(
        a.num_experts, a.top_k, a.score == "sigmoid", a.normalize, groups, a.top_groups or groups,
        a.group_score == "top2", a.scale,
    )  # fmt: skip
    arguments = (logits, routing, call.weights.get("bias"), ids, stride(ids), weights, stride(weights))
    e.add("moe", "route", (len(x), 1, 1), 32, *arguments, shared=4 * (2 * a.num_experts + groups))


def _moe(e: Emitter, call: Call) -> None:
    """Group the tokens by expert; gate and up of each group, down, combine."""
    (x, ids, weights), y, a = call.inputs, call.outputs[0], call.attrs
    gate, up, down = (call.weights[name] for name in ("gate", "up", "down"))
    tokens, top_k = ids.shape
    pairs = tokens * top_k
    bounds, order, places = (e.array((n,), "int32") for n in (a.num_experts + 1, pairs, pairs))
    g, u = e.array((pairs, a.expert_size)), e.array((pairs, a.expert_size))
    results = e.array((pairs, x.shape[1]))
    arguments = (ids, stride(ids), tokens, top_k, a.num_experts, bounds, order, places)
    e.add("moe", "group", (1, 1, 1), 1024, *arguments, shared=4 * (a.num_experts + 1))
    e.tiles(x, gate, None, g, experts=(bounds, order, a.num_experts))
    e.tiles(x, up, None, u, experts=(bounds, order, a.num_experts))
    e.glu(a.function, g, u, g)
    e.tiles(g, down, None, results, experts=(bounds, None, a.num_experts))
    arguments = (results, weights, stride(weights), places, top_k, y, stride(y), y.shape[1])
    e.each("moe", "combine", tokens, y.shape[1], *arguments)


EMITTERS: dict[str, Callable[[Emitter, Call], None]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add": _add,
    "scale": _scale,
    "softcap": _softcap,
    "activation": _activation,
    "glu": _glu,
    "select_rows": _select_rows,
    "rope": _rope,
    "kv_write": _kv_write,
    "attention": _attention,
    "mla_attention": _mla_attention,
    "router": _router,
    "moe": _moe,
    "norm_qkv": _norm_qkv,
    "norm_glu": _norm_glu,
    "rope_kv_write": _rope_kv_write,
    "linear_add": _linear_add,
}
"""Every op this backend runs, and how."""
