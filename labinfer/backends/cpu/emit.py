"""From ops to rows of the tape: what each op, with its arrays, makes the step functions do.

``EMITTERS`` has one function per op kind, primitive or fused. It gets the op's call and an ``Emitter`` that knows the
device: its weights' layout, rope tables, threads and scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from labinfer.backends.cpu.layout import PANEL_ROWS, activation_bytes, activation_digits
from labinfer.backends.cpu.packed_weight import PackedWeight
from labinfer.backends.cpu.tape import ACCUMULATE, ACTIVATION_CODES, Argument, Row
from labinfer.backends.cpu.workspace import (
    BLOCK_MULTIPLE,
    attention_partials_bytes,
    attention_scratch,
    mla_scratch,
    out_stride,
    route_scratch,
)
from labinfer.errors import LabinferError, UsageError
from labinfer.ops.base import Call, Step

if TYPE_CHECKING:
    from labinfer.backends.cpu.device import CpuDevice


def address(array: Any) -> int:
    """The address of an array's first element; 0 for None."""
    return 0 if array is None else int(array.__array_interface__["data"][0])


def stride(array: Any) -> int:
    """Floats from row to row."""
    return int(array.strides[0]) // 4


def cache_dtype(call: Call) -> int:
    """The cache's dtype, as ``paged_cache.CACHE_DTYPES`` numbers it; a block of it must be whole key panels."""
    if call.step is not None and call.step.block_size % BLOCK_MULTIPLE:
        message = f"the block size {call.step.block_size} is not a multiple of {BLOCK_MULTIPLE}"
        raise UsageError("limits.block-size", message, remedy="compile the plan again")
    return {4: 0, 2: 1}[call.cache["k"].itemsize] + int(call.cache["k"].dtype == np.float16)


class Emitter:
    """Writes the rows of one op; ``take`` hands out its scratch memory."""

    def __init__(self, device: CpuDevice, call: Call) -> None:
        self.device, self.call, self.rows = device, call, list[Row]()
        self.kept: list[np.ndarray] = []
        self.scratch = address(call.workspace)
        self.left = 0 if call.workspace is None else call.workspace.nbytes

    @property
    def step(self) -> Step:
        """The step batch."""
        if self.call.step is None:
            raise LabinferError("run.no-step", "this op needs a step batch")
        return self.call.step

    def take(self, nbytes: int) -> int:
        """The address of so many bytes of the op's planned scratch memory."""
        size = -(-nbytes // 64) * 64
        if size > self.left:
            raise LabinferError("run.workspace", f"a kernel needs {size} bytes of scratch, {self.left} were planned")
        self.scratch, self.left = self.scratch + size, self.left - size
        return self.scratch - size

    def take_array(self, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array over the op's scratch memory."""
        count, start = prod(shape), self.take(4 * prod(shape)) - address(self.call.workspace)
        array: np.ndarray = self.call.workspace.view(np.float32)[start // 4 : start // 4 + count].reshape(shape)
        return array

    def add(self, step: str, *arguments: Argument, then_wait: bool = True) -> None:
        """Append a row."""
        self.rows.append(Row(step, arguments, then_wait))

    def kernel(self, format: str) -> str:
        """The kernel that multiplies with weights in ``format``."""
        return f"linear/{format}/{activation_digits(format, self.device.digits)}"

    def activations(self, x: Any, formats: list[str], then_wait: bool = True) -> dict[int, tuple[int, int]]:
        """Rows of ``x`` as weights in ``formats`` want them: (address, bytes from row to row) by number of digits."""
        found: dict[int, tuple[int, int]] = {}
        tokens, columns = x.shape
        for format in formats:
            digits = activation_digits(format, self.device.digits)
            if digits in found:
                continue
            if digits == 0 and columns % 2 == 0:
                found[0] = address(x), x.strides[0]
                continue
            size = activation_bytes(format, columns, self.device.digits)
            found[digits] = self.take(tokens * size), size
            self.add(
                "quantize_step", tokens, digits, address(x), stride(x), columns, *found[digits], then_wait=then_wait
            )
        return found

    def product(
        self, x: tuple[int, int], w: PackedWeight, y: Any, bias: Any, mode: int, then_wait: bool = True
    ) -> None:
        """``y (+)= x @ w.T + bias`` for activation rows ``x``."""
        panels = -(-w.rows // PANEL_ROWS)
        self.add(
            "linear_step", self.kernel(w.format), w.address, w.columns, *x,
            address(y), stride(y), len(y), panels, w.rows, address(bias), mode, then_wait=then_wait,
        )  # fmt: skip

    def experts(
        self, found: dict[int, tuple[int, int]], w: PackedWeight, y: Any, bounds: int, experts: int, then_wait: bool
    ) -> None:
        """Each expert's rows of the activations by its own matrix of the stack ``w``."""
        x = found[activation_digits(w.format, self.device.digits)]
        self.add(
            "experts_step", self.kernel(w.format), w.address, w.nbytes, w.columns, *x,
            address(y), stride(y), bounds, experts, -(-w.rows // PANEL_ROWS), w.rows, then_wait=then_wait,
        )  # fmt: skip

    def linear(self, call: Call, x: Any, y: Any, mode: int = 0) -> None:
        """One linear op on float32 rows."""
        w = call.weights["weight"]
        found = self.activations(x, [w.format])
        digits = activation_digits(w.format, self.device.digits)
        self.product(found[digits], w, y, call.weights.get("bias"), mode)

    def normed(self, call: Call, x: Any, formats: list[str]) -> dict[int, tuple[int, int]]:
        """``rms_norm`` of ``x`` straight into activation rows."""
        tokens, columns = x.shape
        normed = self.take_array(x.shape)
        weight, eps, offset = address(call.weights.get("weight")), float(call.attrs.eps), float(call.attrs.offset)
        digits = max(activation_digits(format, self.device.digits) for format in formats)
        if digits == 0:
            self.add(
                "rms_norm_step", tokens, address(x), stride(x), weight, address(normed), columns, columns, columns,
                eps, offset,
            )  # fmt: skip
            return self.activations(normed, formats)
        format = next(each for each in formats if activation_digits(each, self.device.digits) == digits)
        size = activation_bytes(format, columns, self.device.digits)
        found = {digits: (self.take(tokens * size), size)}
        self.add(
            "norm_quantize_step", tokens, digits, address(x), stride(x), columns, *found[digits], weight,
            address(normed), columns, eps, offset,
        )  # fmt: skip
        plain = [each for each in formats if activation_digits(each, self.device.digits) == 0]
        return found | self.activations(normed, plain)

    def turn(self, call: Call, positions: Any) -> tuple[int, int, int, int, int, int]:
        """What a rope op does: table, rows, head_dim, rotary_start, half, interleaved."""
        attrs = call.attrs
        geometry = attrs.head_dim, attrs.rotary_start, attrs.turned // 2, int(attrs.style == "interleaved")
        if attrs.length_dependent and not attrs.recompute_after:
            return *self.dynamic_table(call, positions), *geometry
        step = self.call.step
        length = int(positions.max()) + 1 if step is None else step.block_table.shape[1] * step.block_size
        tables = self.device.rope_table(attrs, length, call.weights)
        self.kept.append(tables)
        rows = address(positions)
        if attrs.recompute_after:
            rows = self.take(4 * len(positions))
            self.add(
                "longrope_rows_step", address(self.step.query_start), address(self.step.total_len),
                address(positions), attrs.recompute_after, length, rows,
            )  # fmt: skip
        return address(tables), rows, *geometry

    def dynamic_table(self, call: Call, positions: Any) -> tuple[int, int]:
        """Table and rows of a rope whose angles depend on the length of each sequence, filled in every step."""
        attrs, count = call.attrs, len(positions)
        table, rows = self.take(8 * count * (attrs.turned // 2)), self.take(4 * count)
        self.add(
            "dynamic_table_step", address(self.step.query_start), address(self.step.total_len), address(positions),
            address(call.weights.get("freq_factors")), attrs.rotary_dim or attrs.turned, attrs.turned // 2, table, rows,
            attrs.max_position, float(attrs.theta), float(attrs.scaling.factor),
        )  # fmt: skip
        return table, rows


def _embedding(e: Emitter, call: Call) -> None:
    w, y, ids = call.weights["weight"], call.outputs[0], call.inputs[0]
    e.add("embedding_step", len(y), address(ids), f"unpack/{w.format}", w.address, w.columns, address(y), stride(y))


def _linear(e: Emitter, call: Call) -> None:
    e.linear(call, call.inputs[0], call.outputs[0])


def _linear_add(e: Emitter, call: Call) -> None:
    x, residual, y = call.parts[0].inputs[0], call.inputs[-1], call.outputs[0]
    if len(call.inputs) == 1:
        residual = x
    if address(residual) != address(y):
        e.add("copy_step", *y.shape[:1], address(residual), stride(residual), address(y), stride(y), y.shape[1])
    e.linear(call.parts[0], x, y, ACCUMULATE)


def _lora_add(e: Emitter, call: Call) -> None:
    (base, x), y, step, rank = call.inputs, call.outputs[0], e.step, call.attrs.rank
    a, b = call.weights["a"], call.weights["b"]
    if address(base) != address(y):
        e.add("copy_step", len(y), address(base), stride(base), address(y), stride(y), y.shape[1])
    if step.adapter is None:
        return
    kernel, width = e.kernel("f32"), out_stride(rank)
    low, sequences = e.take(4 * len(y) * width), (address(step.query_start), address(step.adapter))
    e.add(
        "lora_down_step", kernel, a.address, a.nbytes, a.columns, address(x), x.strides[0], low, width, len(y),
        -(-rank // PANEL_ROWS), rank, *sequences,
    )  # fmt: skip
    e.add(
        "lora_up_step", kernel, b.address, b.nbytes, rank, low, width, address(y), stride(y), -(-b.rows // PANEL_ROWS),
        b.rows, *sequences,
    )  # fmt: skip


def _norm_qkv(e: Emitter, call: Call) -> None:
    norm, *products = call.parts
    found = e.normed(norm, call.inputs[0], [part.weights["weight"].format for part in products])
    for part, y in zip(products, call.outputs, strict=True):
        w = part.weights["weight"]
        digits = activation_digits(w.format, e.device.digits)
        e.product(found[digits], w, y, part.weights.get("bias"), 0, then_wait=part is products[-1])


def _norm_glu(e: Emitter, call: Call) -> None:
    norm, gate, up, glu = call.parts
    y = call.outputs[0]
    g, u = gate.weights["weight"], up.weights["weight"]
    found = e.normed(norm, call.inputs[0], [g.format, u.format])
    digits = [activation_digits(w.format, e.device.digits) for w in (g, u)]
    if digits[0] != digits[1]:  # one kernel reads one kind of activations
        made = e.take_array(y.shape)
        e.product(found[digits[0]], g, y, gate.weights.get("bias"), 0, then_wait=False)
        e.product(found[digits[1]], u, made, up.weights.get("bias"), 0)
        _emit_glu(e, glu.attrs.function, y, made, y)
        return
    e.add(
        "linear_glu_step", e.kernel(g.format), g.address,
        address(gate.weights.get("bias")), e.kernel(u.format), u.address,
        address(up.weights.get("bias")), g.columns, *found[digits[0]], address(y), stride(y), len(y),
        -(-g.rows // PANEL_ROWS), g.rows, ACTIVATION_CODES[glu.attrs.function],
    )  # fmt: skip


def _emit_glu(e: Emitter, function: str, gate: Any, up: Any, y: Any) -> None:
    e.add(
        "glu_step", len(y), ACTIVATION_CODES[function], address(gate), stride(gate), address(up), stride(up),
        address(y), stride(y), y.shape[1],
    )  # fmt: skip


def _glu(e: Emitter, call: Call) -> None:
    _emit_glu(e, call.attrs.function, call.inputs[0], call.inputs[1], call.outputs[0])


def _activation(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.add(
        "activation_step", len(y), ACTIVATION_CODES[call.attrs.function], address(x), stride(x), address(y),
        stride(y), y.shape[1],
    )  # fmt: skip


def _rms_norm(e: Emitter, call: Call) -> None:
    x, y, attrs = call.inputs[0], call.outputs[0], call.attrs
    e.add(
        "rms_norm_step", len(y), address(x), stride(x), address(call.weights.get("weight")), address(y), stride(y),
        y.shape[1], attrs.group or y.shape[1], float(attrs.eps), float(attrs.offset),
    )  # fmt: skip


def _layer_norm(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.add(
        "layer_norm_step", len(y), address(x), stride(x), address(call.weights["weight"]),
        address(call.weights.get("bias")), address(y), stride(y), y.shape[1], float(call.attrs.eps),
    )  # fmt: skip


def _add(e: Emitter, call: Call) -> None:
    x, other, y = call.inputs[0], call.inputs[1], call.outputs[0]
    e.add("add_step", len(y), address(x), stride(x), address(other), stride(other), address(y), stride(y), y.shape[1])


def _scale(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.add("scale_step", len(y), address(x), stride(x), address(y), stride(y), y.shape[1], float(call.attrs.by))


def _softcap(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.add("softcap_step", len(y), address(x), stride(x), address(y), stride(y), y.shape[1], float(call.attrs.cap))


def _select_rows(e: Emitter, call: Call) -> None:
    x, y = call.inputs[0], call.outputs[0]
    e.add(
        "select_rows_step", len(y), address(x), stride(x), address(e.step.logits_rows), address(y), stride(y),
        y.shape[1],
    )  # fmt: skip


def _rope(e: Emitter, call: Call) -> None:
    x, y, attrs = call.inputs[0], call.outputs[0], call.attrs
    turn = e.turn(call, call.inputs[1])
    heads = y.shape[1] // attrs.head_dim
    e.add("rope_step", len(y), address(x), stride(x), address(y), stride(y), heads, *turn)


def _kv_write(e: Emitter, call: Call) -> None:
    names = list(call.cache)
    for name, x in zip(names, call.inputs, strict=True):
        panels = int(name == "k" and id(call.cache) not in e.device.latents)
        e.add(
            "kv_write_step", len(x), address(x), stride(x), address(call.cache[name]), x.shape[1], panels,
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
        "rope_kv_write_step", len(y), address(q), stride(q), address(y), stride(y),
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
    digits = activation_digits(w.format, e.device.digits)
    e.product(e.activations(x, [w.format])[digits], w, logits, None, 0)
    groups = attrs.num_groups or 1
    scratch_bytes = route_scratch(attrs.num_experts, groups)
    e.add(
        "route_step", len(x), address(logits), attrs.num_experts, address(ids), address(weights),
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
    e.add("group_step", address(ids), pairs, top_k, attrs.num_experts, bounds, order, places)
    gathered, results = e.take_array((pairs, x.shape[1])), e.take_array((pairs, y.shape[1]))
    g, u = e.take_array((pairs, attrs.expert_size)), e.take_array((pairs, attrs.expert_size))
    e.add("select_rows_step", pairs, address(x), stride(x), order, address(gathered), x.shape[1], x.shape[1])
    found = e.activations(gathered, [gate.format, up.format])
    for w, out in ((gate, g), (up, u)):
        e.experts(found, w, out, bounds, attrs.num_experts, then_wait=w is up)
    _emit_glu(e, attrs.function, g, u, g)
    e.experts(e.activations(g, [down.format]), down, results, bounds, attrs.num_experts, then_wait=True)
    e.add(
        "combine_step", tokens, address(results), y.shape[1], address(weights), places, top_k, address(y),
        stride(y), y.shape[1],
    )  # fmt: skip


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
}
"""Every op this backend runs, and how."""
