"""From ops to rows of the tape: what each op, with its arrays, makes the step functions do.

``EMITTERS`` has one function per op kind, primitive or fused. It gets the op's call and an ``Emitter`` that knows the
device: its weights' layout, rope tables, threads and scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from labinfer.backends.cpu.emitter import Emitter, address, cache_dtype, stride
from labinfer.backends.cpu.layout import PANEL_ROWS, glu_chunk, product_kernel, scattered_form
from labinfer.backends.cpu.tape import ACCUMULATE, ACTIVATION_CODES
from labinfer.backends.cpu.workspace import (
    attention_partials_bytes,
    attention_scratch,
    mla_scratch,
    out_stride,
    route_scratch,
)
from labinfer.ops.base import Call


def _embedding(e: Emitter, call: Call) -> None:
    w, y, ids = call.weights["weight"], call.outputs[0], call.inputs[0]
    e.add(
        "embedding_step", e.count(y), address(ids), f"unpack/{w.format}", w.address, w.columns, address(y), stride(y),
        call.attrs.first_id, w.rows,
    )  # fmt: skip


def _linear(e: Emitter, call: Call) -> None:
    e.linear(call, call.inputs[0], call.outputs[0])


def _linear_add(e: Emitter, call: Call) -> None:
    x, residual, y = call.parts[0].inputs[0], call.inputs[-1], call.outputs[0]
    if len(call.inputs) == 1:
        residual = x
    if address(residual) != address(y):
        e.add("copy_step", e.count(y), address(residual), stride(residual), address(y), stride(y), y.shape[1])
    e.linear(call.parts[0], x, y, ACCUMULATE)


def _lora_add(e: Emitter, call: Call) -> None:
    (base, x), y, step, rank = call.inputs, call.outputs[0], e.step, call.attrs.rank
    a, b = call.weights["a"], call.weights["b"]
    if address(base) != address(y):
        e.add("copy_step", e.count(y), address(base), stride(base), address(y), stride(y), y.shape[1])
    if step.adapter is None:
        return
    kernel, width = product_kernel("f32", 0), out_stride(rank)
    low, sequences = e.take(4 * len(y) * width), (address(step.query_start), address(step.adapter))
    e.add(
        "lora_down_step", kernel, a.address, a.nbytes, a.columns, address(x), x.strides[0], low, width, e.count(y),
        -(-rank // PANEL_ROWS), rank, *sequences,
    )  # fmt: skip
    e.add(
        "lora_up_step", kernel, b.address, b.nbytes, rank, low, width, address(y), stride(y), -(-b.rows // PANEL_ROWS),
        b.rows, *sequences,
    )  # fmt: skip


def _norm_qkv(e: Emitter, call: Call) -> None:
    norm, *products = call.parts
    x = call.inputs[0]
    forms = [e.form(part.weights["weight"].format, x) for part in products]
    found = e.normed(norm, x, forms)
    before, total = 0, sum(part.weights["weight"].nbytes for part in products)
    for part, form, y in zip(products, forms, call.outputs, strict=True):  # a worker reads one run of memory
        w = part.weights["weight"]
        e.product(found[form], w, y, part.weights.get("bias"), 0, part is products[-1], before, total)
        before += w.nbytes


def _norm_glu(e: Emitter, call: Call) -> None:
    norm, gate, up, glu = call.parts
    x, y = call.inputs[0], call.outputs[0]
    g, u = gate.weights["weight"], up.weights["weight"]
    forms = [e.form(w.format, x) for w in (g, u)]
    found = e.normed(norm, x, forms)
    rows = found[forms[0]]
    if forms[0] != forms[1]:  # one kernel reads one kind of activations
        made = e.take_array(y.shape)
        e.product(rows, g, y, gate.weights.get("bias"), 0, then_wait=False)
        e.product(found[forms[1]], u, made, up.weights.get("bias"), 0)
        _emit_glu(e, glu.attrs.function, y, made, y)
        return
    e.add(
        "linear_glu_step", product_kernel(g.format, rows.form), g.address, address(gate.weights.get("bias")),
        product_kernel(u.format, rows.form), u.address, address(up.weights.get("bias")), g.columns, rows.address,
        rows.nbytes, address(y), stride(y), e.count(y), g.panels, g.rows, ACTIVATION_CODES[glu.attrs.function],
        glu_chunk(rows.form, g.columns),
    )  # fmt: skip


def _emit_glu(e: Emitter, function: str, gate: Any, up: Any, y: Any) -> None:
    e.add(
        "glu_step", e.count(y), ACTIVATION_CODES[function], address(gate), stride(gate), address(up), stride(up),
        address(y), stride(y), y.shape[1],
    )  # fmt: skip


def _glu(e: Emitter, call: Call) -> None:
    _emit_glu(e, call.attrs.function, call.inputs[0], call.inputs[1], call.outputs[0])


def _activation(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.add(
        "activation_step", e.count(y), ACTIVATION_CODES[call.attrs.function], address(x), stride(x), address(y),
        stride(y), y.shape[1],
    )  # fmt: skip


def _rms_norm(e: Emitter, call: Call) -> None:
    x, y, attrs = call.inputs[0], call.outputs[0], call.attrs
    e.add(
        "rms_norm_step", e.count(y), address(x), stride(x), address(call.weights.get("weight")), address(y), stride(y),
        y.shape[1], attrs.group or y.shape[1], float(attrs.eps), float(attrs.offset),
    )  # fmt: skip


def _layer_norm(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.add(
        "layer_norm_step", e.count(y), address(x), stride(x), address(call.weights["weight"]),
        address(call.weights.get("bias")), address(y), stride(y), y.shape[1], float(call.attrs.eps),
    )  # fmt: skip


def _add(e: Emitter, call: Call) -> None:
    x, other, y = call.inputs[0], call.inputs[1], call.outputs[0]
    e.add(
        "add_step", e.count(y), address(x), stride(x), address(other), stride(other), address(y), stride(y), y.shape[1]
    )


def _scale(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.add("scale_step", e.count(y), address(x), stride(x), address(y), stride(y), y.shape[1], float(call.attrs.by))


def _softcap(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.add("softcap_step", e.count(y), address(x), stride(x), address(y), stride(y), y.shape[1], float(call.attrs.cap))


def _select_rows(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.add(
        "select_rows_step", e.count(y), address(x), stride(x), address(e.step.logits_rows), address(y), stride(y),
        y.shape[1],
    )  # fmt: skip


def _rope(e: Emitter, call: Call) -> None:
    x, y, attrs = call.inputs[0], call.outputs[0], call.attrs
    turn = e.turn(call, call.inputs[1])
    heads = y.shape[1] // attrs.head_dim
    e.add("rope_step", e.count(y), address(x), stride(x), address(y), stride(y), heads, *turn)


def _kv_write(e: Emitter, call: Call) -> None:
    names = list(call.cache)
    for name, x in zip(names, call.inputs, strict=True):
        panels = int(name == "k" and id(call.cache) not in e.device.latents)
        e.add(
            "kv_write_step", e.count(x), address(x), stride(x), address(call.cache[name]), x.shape[1], panels,
            cache_dtype(call), e.step.block_size, address(e.step.slot_mapping), then_wait=name == names[-1],
        )  # fmt: skip


def _rope_kv_write(e: Emitter, call: Call) -> None:
    rope_q, rope_k, _ = call.parts
    q, k, v = rope_q.inputs[0], rope_k.inputs[0], call.inputs[-1]
    y, cache, step = call.outputs[0], call.cache, e.step
    turns = (*e.turn(rope_q, rope_q.inputs[1]), *e.turn(rope_k, rope_k.inputs[1]))
    scratch_bytes = -(-4 * k.shape[1] // 64) * 64
    scratch = e.take(scratch_bytes * e.device.threads)
    e.add(
        "rope_kv_write_step", e.count(y), address(q), stride(q), address(y), stride(y),
        y.shape[1] // rope_q.attrs.head_dim, scratch, scratch_bytes, *turns,
        address(k), stride(k), address(v), stride(v), address(cache["k"]), address(cache["v"]), k.shape[1], v.shape[1],
        cache_dtype(call), step.block_size, address(step.slot_mapping),
    )  # fmt: skip


def _attention(e: Emitter, call: Call) -> None:
    q, y, attrs, step = call.inputs[0], call.outputs[0], call.attrs, e.step
    value_dim = attrs.v_head_dim or attrs.head_dim
    partials = e.take(
        attention_partials_bytes(attrs.num_heads, value_dim, max(step.max_num_seqs, len(step.context_len)))
    )
    scratch_bytes = attention_scratch(attrs.num_heads // attrs.num_kv_heads, attrs.head_dim, value_dim)
    scratch = e.take(scratch_bytes * e.device.threads)
    arguments = (
        address(q), stride(q), address(y), stride(y),
        attrs.num_heads, attrs.num_kv_heads, attrs.head_dim, value_dim, attrs.window or 0, float(attrs.scale),
        float(attrs.softcap or 0.0), address(call.cache["k"]), address(call.cache["v"]), cache_dtype(call),
        step.block_size, address(step.query_start), address(step.context_len), address(step.block_table),
        stride(step.block_table), partials, scratch, scratch_bytes,
    )  # fmt: skip
    e.add("attention_step", *arguments)
    e.add("attention_merge_step", *arguments)


def _mla_attention(e: Emitter, call: Call) -> None:
    q, y, attrs, step, w = call.inputs[0], call.outputs[0], call.attrs, e.step, call.weights["kv_b"]
    kv_b = e.take(4 * w.rows * w.columns)
    e.add("unpack_step", w.rows, f"unpack/{w.format}", w.address, w.columns, kv_b)
    scratch_bytes = mla_scratch(attrs.num_heads, attrs.rope_dim, attrs.kv_rank)
    scratch = e.take(scratch_bytes * e.device.threads)
    e.add(
        "mla_attention_step", address(q), stride(q), address(y), stride(y),
        attrs.num_heads, attrs.nope_dim, attrs.rope_dim, attrs.v_dim, attrs.kv_rank, float(attrs.scale), kv_b,
        address(call.cache["k"]), address(call.cache["v"]), cache_dtype(call), step.block_size,
        address(step.query_start), address(step.context_len), address(step.block_table), stride(step.block_table),
        scratch, scratch_bytes,
    )  # fmt: skip


def _router(e: Emitter, call: Call) -> None:
    x, (ids, weights), attrs = call.inputs[0], call.outputs, call.attrs
    logits = e.take_array((len(x), attrs.num_experts))
    w = call.weights["weight"]
    [rows] = e.activations(x, [e.form(w.format, x)]).values()
    e.product(rows, w, logits, None, 0)
    groups = attrs.num_groups or 1
    scratch_bytes = route_scratch(attrs.num_experts, groups)
    e.add(
        "route_step", e.count(x), address(logits), attrs.num_experts, address(ids), address(weights),
        e.take(scratch_bytes * e.device.threads), scratch_bytes, attrs.num_experts, attrs.top_k,
        attrs.score == "sigmoid", attrs.normalize, float(attrs.scale), groups, attrs.top_groups or groups,
        attrs.group_score == "top2", address(call.weights.get("bias")),
    )  # fmt: skip


def _moe(e: Emitter, call: Call) -> None:
    """As ``moe`` lays out: group the tokens by expert, gather, gate and up, down, combine."""
    (x, ids, weights), y, attrs = call.inputs, call.outputs[0], call.attrs
    gate, up, down = (call.weights[name] for name in ("gate", "up", "down"))
    tokens, top_k = ids.shape
    pairs = tokens * top_k
    bounds, order, places = (e.take(4 * n) for n in (attrs.num_experts + 1, pairs, pairs))
    gathered, results = e.take_array((pairs, x.shape[1])), e.take_array((pairs, y.shape[1]))
    count = e.count(gathered)
    e.add("group_step", address(ids), count, top_k, attrs.num_experts, bounds, order, places, attrs.first_expert)
    g, u = e.take_array((pairs, attrs.expert_size)), e.take_array((pairs, attrs.expert_size))
    e.add("select_rows_step", count, address(x), stride(x), order, address(gathered), x.shape[1], x.shape[1])
    gate_form, up_form, down_form = (scattered_form(w.format, e.options) for w in (gate, up, down))
    found = e.activations(gathered, [gate_form, up_form])
    e.experts(found[gate_form], gate, g, bounds, attrs.num_experts, then_wait=False)
    e.experts(found[up_form], up, u, bounds, attrs.num_experts, then_wait=True)
    _emit_glu(e, attrs.function, g, u, g)
    [rows] = e.activations(g, [down_form]).values()
    e.experts(rows, down, results, bounds, attrs.num_experts, then_wait=True)
    e.add(
        "combine_step", e.count(y), address(results), y.shape[1], address(weights), places, top_k, address(y),
        stride(y), y.shape[1],
    )  # fmt: skip


def _all_reduce(e: Emitter, call: Call) -> None:
    y, group = call.outputs[0], e.offer(call)
    e.add("all_reduce_step", e.count(y), address(y), stride(y), y.shape[1], *group)


def _all_gather(e: Emitter, call: Call) -> None:
    y, group, sizes = call.outputs[0], e.offer(call), np.array(call.attrs.sizes, np.int64)
    e.kept.append(sizes)
    e.add("all_gather_step", e.count(y), address(y), stride(y), address(sizes), *group)


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
    "lora_add": _lora_add,
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
}
"""Every op this backend runs, and how."""
