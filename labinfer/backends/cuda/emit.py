"""From ops to rows of the tape: ``EMITTERS`` has one function per op kind, primitive or fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Structure, c_float, c_int
from typing import TYPE_CHECKING, Any

from labinfer.backends.cuda import emit_attention, emit_exchange
from labinfer.backends.cuda.arguments import Linear, address, format_defines, stride
from labinfer.backends.cuda.emitter import Emitter
from labinfer.backends.cuda.layout import ACTIVATION_CODES
from labinfer.backends.cuda.tape import Row, Runnable
from labinfer.ops.base import Call

if TYPE_CHECKING:
    from labinfer.backends.cuda.device import CudaDevice


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
    arguments = (ids, w.memory, call.attrs.first_id, w.rows, w.columns, y, stride(y))
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
    products = [_product(gate, y), _product(up, None)]
    if products[0].weight.format == products[1].weight.format and e.is_few(products, x, 8):
        e.few(x, products, norm, None, glu.attrs.function)
        return
    plain = all(each.bias is None and e.is_large(each.weight.format) for each in products)
    if plain and products[0].weight.format == products[1].weight.format:
        e.large_glu(x, products[0].weight, products[1].weight, norm, glu.attrs.function, y)
        return
    made = e.array(y.shape)
    e.linear(x, [_product(gate, y), _product(up, made)], norm=norm)
    e.glu(glu.attrs.function, y, made, y)


def _norm_head(e: Emitter, call: Call) -> None:
    norm, _, head = call.parts
    x, y = call.inputs[0], call.outputs[0]
    e.linear(x[: len(y)], [_product(head, y)], norm=norm, rows=e.step.logits_rows)


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
    e.add("norm", "layer_norm", (len(y), 1, 1), min(512, -(-n // 128) * 32), *arguments)


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
    grouped = (ids, stride(ids), tokens, top_k, a.first_expert, a.num_experts, bounds, order, places)
    e.add("moe", "group", (1, 1, 1), 1024, *grouped, shared=4 * (a.num_experts + 1))
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
    "rope": emit_attention.rope,
    "kv_write": emit_attention.kv_write,
    "attention": emit_attention.attention,
    "mla_attention": emit_attention.mla_attention,
    "router": _router,
    "moe": _moe,
    "norm_qkv": _norm_qkv,
    "norm_glu": _norm_glu,
    "norm_head": _norm_head,
    "rope_kv_write": emit_attention.rope_kv_write,
    "rope_attention": emit_attention.rope_attention,
    "norm_rope_attention": emit_attention.norm_rope_attention,
    "linear_add": _linear_add,
    "all_reduce": emit_exchange.all_reduce,
    "all_gather": emit_exchange.all_gather,
    "all_reduce_add": emit_exchange.all_reduce_add,
}
"""Every op this backend runs, and how."""


Emitted = tuple[Sequence[Row | Runnable], Sequence[Any]]
"""Rows of a tape, and what they point to that nothing else keeps."""


def emit_calls(device: CudaDevice, calls: Sequence[tuple[str, Call]], sequences: int) -> list[Emitted]:
    """What each call, with the kind of its op, is in a tape of them all."""
    made, narrow = list[Emitted](), False
    for number, (kind, call) in enumerate(calls):
        e = Emitter(device, call, sequences, narrow, narrow_output(device, calls[number:], sequences))
        EMITTERS[kind](e, call)
        made.append((e.rows, [call, *e.kept]))
        narrow = e.leaves_narrow
    return made


def narrow_output(device: CudaDevice, calls: Sequence[tuple[str, Call]], sequences: int) -> str | None:
    """The format of 16 bits in which the first call can leave its result: only the next one reads it, a product, so."""
    (_, call), *later = calls
    if not later or len(call.outputs) != 1 or later[0][0] not in ("linear", "linear_add"):
        return None
    y, readers = call.outputs[0], 0
    for _, each in later:
        readers += sum(address(x) == address(y) for x in each.inputs)
        if any(address(made) == address(y) for made in each.outputs):
            break
    following = later[0][1]
    next_reads = any(address(x) == address(y) for x in following.inputs)
    if readers != 1 or not next_reads or y.ndim != 2 or y.shape[1] % 32:
        return None
    return Emitter(device, following, sequences).takes_narrow()
