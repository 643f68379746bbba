"""From ops to rows of the tape: rotary positions, the cache, and attention over it."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_uint, c_uint64
from typing import Any

from labinfer.backends.cuda.arguments import Turn, address, cache_define, format_defines, stride
from labinfer.backends.cuda.emitter import Emitter
from labinfer.backends.cuda.workspace import SHARED_HEADS, SPLIT_BLOCKS, partials_bytes
from labinfer.errors import LabinferError
from labinfer.ops.base import Call

MAX_CLUSTER = 8
"""Blocks of a cluster that every GPU with clusters can run."""

DECODE_KEYS = 4 * 2 * 16
"""Keys that are under way to a block of ``decode.cu``: WARPS times SLOTS times KEYS."""

HEADS_AT_ONCE = 8
"""Heads that a block of ``rope.cu`` turns: one for each warp."""

UNEVEN_BLOCKS = 1536
"""So many blocks, at least, keep all multiprocessors busy until the end, though contexts differ in length; measured."""

PLAIN_HEADS = 4
"""As ``SHARED_HEADS``, where products are not on tensor cores."""


class DecodeParameters(Structure):
    """``Parameters`` of ``attention.cuh``."""

    _fields_ = (
        *((name, c_uint64) for name in ("q", "y", "partials", "k", "v", "positions", "query_start", "block_table")),
        *((name, c_int) for name in ("q_row", "y_row", "table_row", "sequences", "group", "kv_heads", "block_size")),
        *((name, c_int) for name in ("window", "splits")),
        *((name, c_float) for name in ("scale", "softcap")),
        ("reciprocal", c_uint),
    )


class Fresh(Structure):
    """``Fresh`` of ``attention.cuh``: keys and values of the step."""

    _fields_ = (
        ("k", c_uint64),
        ("v", c_uint64),
        ("k_row", c_int),
        ("v_row", c_int),
        ("turn", Turn),
    )


class Norms(Structure):
    """``Norms`` of ``rope.cuh``."""

    _fields_ = (("q_gain", c_uint64), ("k_gain", c_uint64), ("eps", c_float), ("offset", c_float))


class PrefillParameters(Structure):
    """``Parameters`` of ``prefill.cu``."""

    _fields_ = (
        *((name, c_uint64) for name in ("q", "y", "k", "v", "positions", "query_start", "block_table")),
        *((name, c_int) for name in ("q_row", "y_row", "table_row", "sequences", "group", "kv_heads", "block_size")),
        ("window", c_int),
        *((name, c_float) for name in ("scale", "softcap")),
        ("reciprocal", c_uint),
    )


class LatentParameters(Structure):
    """``Latent`` of ``mla.cu``."""

    _fields_ = (
        *((name, c_uint64) for name in ("q", "y", "kv_b", "k", "v", "positions", "query_start", "block_table")),
        *((name, c_int) for name in ("q_row", "y_row", "table_row", "sequences", "block_size", "heads", "nope")),
        *((name, c_int) for name in ("rope", "value", "rank")),
        ("scale", c_float),
    )


def rope(e: Emitter, call: Call) -> None:
    """Each token's heads turned."""
    x, y = call.inputs[0], call.outputs[0]
    turn, code = e.turn(call)
    heads = y.shape[1] // turn.head_dim
    grid = -(-heads // HEADS_AT_ONCE), len(y), 1
    e.add("rope", "rope", grid, 256, x, stride(x), y, stride(y), heads, turn, defines=(f"TURN={code}", "CACHE=0"))


def kv_write(e: Emitter, call: Call) -> None:
    """Keys, and values where there are any, to their slots."""
    k, v = call.inputs[0], call.inputs[1] if len(call.inputs) > 1 else None
    v_cache, v_width = (None, 0) if v is None else (call.cache["v"], v.shape[1])
    arguments = (k, stride(k), call.cache["k"], k.shape[1], v, stride(v), v_cache, v_width, e.step.slot_mapping)
    e.each("rope", "kv_write", len(k), k.shape[1], *arguments, defines=("TURN=0", cache_define(call)))


class FreshHeads:
    """A step's queries and keys, still to be normed and turned, and its values: the first parts of a fused op.

    ``norms`` are those of queries and keys, or none.
    """

    def __init__(self, e: Emitter, norms: Sequence[Call], parts: Sequence[Call]) -> None:
        rope_q, rope_k, write = parts
        self.e, self.norms, self.v = e, norms, write.inputs[-1]
        self.q, self.k = ((norms or parts)[number].inputs[0] for number in (0, 1))
        (self.q_turn, code), (self.k_turn, k_code) = e.turn(rope_q), e.turn(rope_k)
        if code != k_code:
            message = "queries and keys turn by angles of different kinds"
            raise LabinferError("cuda.rope", message, remedy="compile with --fuse none")
        self.defines = (f"TURN={code}",)

    @property
    def alike(self) -> bool:
        """Whether queries and keys turn by the same angles."""
        return bytes(self.q_turn) == bytes(self.k_turn)

    @property
    def normed_by_head(self) -> bool:
        """Whether each head is normed by itself, if any is, and those of queries as those of keys."""
        attrs = [(each.attrs.group, each.attrs.eps, each.attrs.offset) for each in self.norms]
        return not attrs or (attrs[0] == attrs[1] and attrs[0][0] == self.q_turn.head_dim == self.k_turn.head_dim)

    def norm(self) -> tuple[tuple[Norms, ...], tuple[str, ...]]:
        """What a kernel that norms heads is told, and its macro; nothing where there is nothing to norm."""
        if not self.norms:
            return (), ()
        q_norm, k_norm = self.norms
        gains = (address(each.weights.get("weight")) for each in (q_norm, k_norm))
        return (Norms(*gains, q_norm.attrs.eps, q_norm.attrs.offset),), ("NORMS",)

    def turn_and_write(self, call: Call, y: Any) -> None:
        """Queries, normed and turned, to ``y``; keys likewise, and values, to the cache."""
        e, v, cache = self.e, self.v, call.cache
        if not self.normed_by_head:
            q_norm, k_norm = self.norms
            normed = e.array(self.k.shape)
            e.rms_norm(q_norm, self.q, y, stride(y))
            e.rms_norm(k_norm, self.k, normed, stride(normed))
            self.q, self.k, self.norms = y, normed, ()
        told, defines = self.norm()
        heads, k_heads = y.shape[1] // self.q_turn.head_dim, self.k.shape[1] // self.k_turn.head_dim
        warps = heads + k_heads + -(-v.shape[1] // 128)
        arguments = (
            self.q, stride(self.q), y, stride(y), heads, self.q_turn, self.k, stride(self.k), cache["k"], k_heads,
            self.k_turn, v, stride(v), cache["v"], v.shape[1], e.step.slot_mapping, *told,
        )  # fmt: skip
        defines += (*self.defines, cache_define(call))
        e.add("rope", "rope_kv_write", (-(-warps // HEADS_AT_ONCE), len(y), 1), 256, *arguments, defines=defines)


def rope_kv_write(e: Emitter, call: Call) -> None:
    """Queries turned, keys turned and written, values written."""
    FreshHeads(e, (), call.parts).turn_and_write(call, call.outputs[0])


def rope_attention(e: Emitter, call: Call) -> None:
    """Queries and keys turned, keys and values written, attention."""
    attend_fresh(e, call, FreshHeads(e, (), call.parts[:3]))


def norm_rope_attention(e: Emitter, call: Call) -> None:
    """The same of queries and keys that are normed first."""
    attend_fresh(e, call, FreshHeads(e, call.parts[:2], call.parts[2:5]))


def attend_fresh(e: Emitter, call: Call, heads: FreshHeads) -> None:
    """One kernel where each sequence has one token, so that no other block needs what is written to the cache."""
    attrs, y, q, k, v = call.parts[-1].attrs, call.outputs[0], heads.q, heads.k, heads.v
    fits = heads.alike and turns_in_eighths(heads.q_turn, attrs, q, k, v)
    if heads.norms:
        fits &= heads.normed_by_head and on_tensor_cores(call, attrs)
    if fits and len(q) == e.sequences:
        fresh, (told, defines) = Fresh(address(k), address(v), stride(k), stride(v), heads.q_turn), heads.norm()
        decode(e, call, attrs, q, y, len(q), (fresh, *told), (*heads.defines, *defines))
        return
    turned = e.array(q.shape)
    heads.turn_and_write(call, turned)
    attend_cached(e, call, attrs, turned, y)


def turns_in_eighths(turn: Turn, attrs: Any, *arrays: Any) -> bool:
    """Whether eight neighbouring features of a head always turn alike and can be loaded as ``attention.cu`` does."""
    sizes = turn.start, turn.half, attrs.head_dim, attrs.v_head_dim or attrs.head_dim
    aligned = not any(address(each) % 16 or stride(each) % 4 for each in arrays)
    return aligned and not turn.interleaved and not any(size % 8 for size in sizes)


def attention(e: Emitter, call: Call) -> None:
    """Attention over the cache, which has the step's own keys and values."""
    attend_cached(e, call, call.attrs, call.inputs[0], call.outputs[0])


def attend_cached(e: Emitter, call: Call, attrs: Any, q: Any, y: Any) -> None:
    """Tiles of tokens on tensor cores, where sequences have several and the cache is 16 bits wide; else token by token.

    Any of several sequences may have one token only; which do is known on the device.
    """
    dims = attrs.head_dim, attrs.v_head_dim or attrs.head_dim
    wide = call.cache["k"].itemsize == 2 and max(dims) <= 256 and not any(dim % 16 for dim in dims)
    if not wide or len(q) == e.sequences:
        decode(e, call, attrs, q, y, len(q))
        return
    mixed = ("MIXED",) * (e.sequences > 1)
    prefill(e, call, attrs, q, y, mixed)
    if mixed:
        decode(e, call, attrs, q, y, e.sequences, defines=mixed)


def prefill(e: Emitter, call: Call, attrs: Any, q: Any, y: Any, mixed: Sequence[str]) -> None:
    """Tiles of a sequence's tokens at once, ``mixed`` if there may be sequences of one token."""
    step, value_dim = e.step, attrs.v_head_dim or attrs.head_dim
    parameters = PrefillParameters(
        address(q), address(y), address(call.cache["k"]), address(call.cache["v"]), address(step.positions),
        address(step.query_start), address(step.block_table), stride(q), e.row_of(y), stride(step.block_table),
        e.sequences, attrs.num_heads // attrs.num_kv_heads, attrs.num_kv_heads, step.block_size, attrs.window or 0,
        attrs.scale, attrs.softcap or 0.0, reciprocal(step.block_size),
    )  # fmt: skip
    rows, keys, blocks = prefill_tile(max(attrs.head_dim, value_dim), bool(attrs.softcap))
    dims = (f"HEAD_DIM={attrs.head_dim}", f"VALUE_DIM={value_dim}", f"ROWS={rows}", f"KEYS={keys}", f"BLOCKS={blocks}")
    defines = (*dims, *half(call), *softcap(attrs), *mixed, *e.result_defines())
    shared = 2 * ((rows + 2 * keys) * (attrs.head_dim + 8) + 2 * keys * (value_dim + 8))
    more = len(q) - e.sequences  # tokens but the first of each sequence
    tiles = more // rows + min(e.sequences, more)  # at most so many, of sequences of several
    e.add("prefill", "prefill", (attrs.num_heads, tiles, 1), 2 * rows, parameters, defines=defines, shared=shared)


def prefill_tile(dim: int, capped: bool = False) -> tuple[int, int, int]:
    """For heads of ``dim``: queries of a block of ``prefill.cu``, keys brought at once, blocks on a multiprocessor.

    Scores that are ``capped`` need registers that two blocks do not leave.
    """
    if dim > 128:
        return 64, 32, 1
    return 128, 64, 2 if dim <= 64 and not capped else 1


def reciprocal(block_size: int) -> int:
    """2^32 / block_size, rounded up: what kernels multiply by to divide."""
    return -(-(1 << 32) // block_size) & 0xFFFFFFFF


def decode(
    e: Emitter,
    call: Call,
    attrs: Any,
    q: Any,
    y: Any,
    rows: int,
    fresh: Sequence[Structure] = (),
    defines: Sequence[str] = (),
) -> None:
    """Each of ``rows`` tokens, or sequences of one token, by itself; with few of them, blocks share a context."""
    step, value_dim, group = e.step, attrs.v_head_dim or attrs.head_dim, attrs.num_heads // attrs.num_kv_heads
    source, heads, shape, shared = decode_kernel(call, attrs, group)
    items = rows * attrs.num_kv_heads * -(-group // heads)
    clusters = e.device.clusters
    wanted = max(-(-SPLIT_BLOCKS // items), 1 + (clusters and items < UNEVEN_BLOCKS))
    splits = min(MAX_CLUSTER, 1 << (wanted.bit_length() - 1)) if clusters else min(32, wanted)
    merged = splits > 1 and not clusters
    parameters = DecodeParameters(
        address(q), address(y), e.scratch(partials_bytes(value_dim)) if merged else 0, address(call.cache["k"]),
        address(call.cache["v"]), address(step.positions), address(step.query_start), address(step.block_table),
        stride(q), e.row_of(y), stride(step.block_table), e.sequences, group, attrs.num_kv_heads, step.block_size,
        attrs.window or 0, splits, attrs.scale, attrs.softcap or 0.0, reciprocal(step.block_size),
    )  # fmt: skip
    together = splits > 1 and clusters
    blocks = [f"CLUSTER={splits}"] * together
    if together and source == "attention":
        blocks.append(f"SPARSE={int(items * splits <= e.device.multiprocessors)}")
    defines = (cache_define(call), *shape, *defines, *blocks, *softcap(attrs), *e.result_defines())
    grid, cluster = (items // rows, rows, splits), (1, 1, splits) if together else (1, 1, 1)
    e.add(source, source, grid, 128, parameters, *fresh, defines=defines, shared=shared, cluster=cluster)
    if merged:
        e.add(source, "merge", (attrs.num_heads, rows, 1), 64, parameters, defines=defines)


def decode_kernel(call: Call, attrs: Any, group: int) -> tuple[str, int, tuple[str, ...], int]:
    """The kernel for such heads: its file, how many of a ``group`` share the reading of a key, macros, shared bytes."""
    head_dim, value_dim = attrs.head_dim, attrs.v_head_dim or attrs.head_dim
    dims, widest = (f"HEAD_DIM={head_dim}", f"VALUE_DIM={value_dim}"), max(head_dim, value_dim)
    if on_tensor_cores(call, attrs):
        heads = min(group, SHARED_HEADS)
        shared = 2 * DECODE_KEYS * (head_dim + value_dim)
        return "decode", heads, (*dims, f"HEADS={heads}", *half(call)), shared
    if widest > 256:
        raise LabinferError("cuda.head-dim", f"heads of {widest} numbers are wider than 256")
    heads, lanes = min(group, PLAIN_HEADS), 1 << (-(-widest // 8) - 1).bit_length()
    return "attention", heads, (*dims, f"HEADS={heads}", f"LANES={lanes}"), 0


def on_tensor_cores(call: Call, attrs: Any) -> bool:
    """Whether ``decode.cu`` takes such a cache and such heads."""
    return call.cache["k"].itemsize == 2 and {attrs.head_dim, attrs.v_head_dim or attrs.head_dim} <= {64, 128}


def half(call: Call) -> tuple[str, ...]:
    """The macro for products in f16, where the cache holds that."""
    return ("HALF",) if str(call.cache["k"].dtype) == "float16" else ()


def softcap(attrs: Any) -> tuple[str, ...]:
    """The macro for scores that are bounded."""
    return ("SOFTCAP",) if attrs.softcap else ()


def mla_attention(e: Emitter, call: Call) -> None:
    """Attention over cached latents."""
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
