"""The step functions of the tape: each reads its arguments from its row and does its worker's share.

``a`` is the address of the arguments, read as int64 (``i64p``) or float64 (``f64p``). What an argument means stands in
``emit``, which writes the rows.
"""

from __future__ import annotations

from labinfer.backends.cpu import elementwise, norm
from labinfer.backends.cpu.attention import (
    Batch,
    Heads,
    Pages,
    attention,
    attention_cost,
    attention_merge,
)
from labinfer.backends.cpu.driver import share, share_bytes
from labinfer.backends.cpu.linear import linear, linear_glu
from labinfer.backends.cpu.mla import Latent, mla_attention, mla_items
from labinfer.backends.cpu.moe import Routing, combine, group_by_expert, route
from labinfer.backends.cpu.paged_cache import kv_write
from labinfer.backends.cpu.panels import unpack_row
from labinfer.backends.cpu.quantize import quantize_row
from labinfer.backends.cpu.rope import KeyValues, Turn, dynamic_table, longrope_rows, rope, rope_kv_write
from labinfer.backends.cpu.simd import cycles, f64p, i32p, i64p


def clock_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """out: worker 0 notes the processor's cycle counter there, for profiles."""
    if worker == 0:
        i64p(i64p(a)[0])[0] = cycles()


def embedding_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """tokens, ids, format, table, columns, y, y_stride, first_id, rows of the table."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    ids = i32p(p[1])
    for t in range(start, stop):
        row = ids[t] - p[7]
        if 0 <= row < p[8]:
            unpack_row(p[2], p[3], p[4], row, p[5] + 4 * t * p[6])
        else:
            elementwise.zero_row(p[5] + 4 * t * p[6], p[4])


def quantize_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, form, x, x_stride, columns, out, out_bytes."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    for t in range(start, stop):
        quantize_row(p[1], p[2] + 4 * t * p[3], p[4], p[5], p[6], t)


def norm_quantize_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, form, x, x_stride, columns, out, out_bytes, weight, y, y_stride, eps, offset."""
    p, f = i64p(a), f64p(a)
    start, stop = share(p[0], worker, workers)
    for t in range(start, stop):
        y = p[8] + 4 * t * p[9]
        norm.rms_norm_row(p[2] + 4 * t * p[3], p[7], y, p[4], p[4], f[10], f[11])
        quantize_row(p[1], y, p[4], p[5], p[6], t)


def linear_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """code, w, columns, x, x_bytes, y, y_stride, tokens, panels, rows, bias, mode, then how it is shared out: bytes of
    a panel, of products that are shared out with this one and come before it, of all of them."""
    p = i64p(a)
    start, stop = share_bytes(p[8], p[12], p[13], p[14], worker, workers)
    if start < stop:
        linear(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], start, stop, p[9], p[10], p[11])


def linear_glu_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """gate: code, w, bias; up: code, w, bias; columns, x, x_bytes, y, y_stride, tokens, panels, rows, function,
    chunk."""
    p = i64p(a)
    start, stop = share(p[12], worker, workers)
    if start < stop:
        linear_glu(
            p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], start, stop, p[13], p[14],
            p[15],
        )  # fmt: skip


def rms_norm_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, x, x_stride, weight, y, y_stride, n, group, eps, offset."""
    p, f = i64p(a), f64p(a)
    start, stop = share(p[0], worker, workers)
    norm.rms_norm(p[1], p[2], p[3], p[4], p[5], p[6], p[7], f[8], f[9], start, stop)


def layer_norm_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, x, x_stride, weight, bias, y, y_stride, n, eps."""
    p, f = i64p(a), f64p(a)
    start, stop = share(p[0], worker, workers)
    norm.layer_norm(p[1], p[2], p[3], p[4], p[5], p[6], p[7], f[8], start, stop)


def add_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, x, x_stride, y, y_stride, z, z_stride, n."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    elementwise.add(p[1], p[2], p[3], p[4], p[5], p[6], p[7], start, stop)


def copy_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, x, x_stride, y, y_stride, n."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    elementwise.copy_rows(p[1], p[2], p[3], p[4], p[5], start, stop)


def scale_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, x, x_stride, y, y_stride, n, by."""
    p, f = i64p(a), f64p(a)
    start, stop = share(p[0], worker, workers)
    elementwise.scale(p[1], p[2], p[3], p[4], p[5], f[6], start, stop)


def softcap_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, x, x_stride, y, y_stride, n, cap. A row is wide: the columns are shared."""
    p, f = i64p(a), f64p(a)
    start, stop = share((p[5] + 15) // 16, worker, workers)
    first, last = start * 16, min(stop * 16, p[5])
    if first < last:
        elementwise.softcap(p[1] + 4 * first, p[2], p[3] + 4 * first, p[4], last - first, f[6], 0, p[0])


def activation_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, function, x, x_stride, y, y_stride, n."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    elementwise.activation(p[1], p[2], p[3], p[4], p[5], p[6], start, stop)


def glu_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, function, gate, gate_stride, up, up_stride, y, y_stride, n."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    elementwise.glu(p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], start, stop)


def select_rows_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, x, x_stride, index, y, y_stride, n."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    elementwise.select_rows(p[1], p[2], p[3], p[4], p[5], p[6], start, stop)


def longrope_rows_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """query_start, total_len, positions, trained, max_len, rows."""
    p = i64p(a)
    if worker == 0:
        longrope_rows(p[0], p[1], sequences, p[2], p[3], p[4], p[5])


def dynamic_table_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """query_start, total_len, positions, freq_factors, rotary_dim, half, table, rows, max_position, theta, factor."""
    p, f = i64p(a), f64p(a)
    if worker == 0:
        dynamic_table(p[0], p[1], sequences, p[2], p[3], p[4], p[5], f[9], f[10], p[8], p[6], p[7])


def rope_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """tokens, x, x_stride, y, y_stride, heads, then a Turn: table, rows, head_dim, rotary_start, half, interleaved."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    rope(p[1], p[2], p[3], p[4], p[5], Turn(p[6], p[7], p[8], p[9], p[10], p[11]), start, stop)


def kv_write_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """tokens, x, x_stride, cache, width, panels, dtype, block_size, slots."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    kv_write(p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], start, stop)


def rope_kv_write_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """tokens, q, q_stride, y, y_stride, heads, scratch, scratch_bytes, two turns (6 each), KeyValues (11)."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    q_turn = Turn(p[8], p[9], p[10], p[11], p[12], p[13])
    k_turn = Turn(p[14], p[15], p[16], p[17], p[18], p[19])
    new = KeyValues(p[20], p[21], p[22], p[23], p[24], p[25], p[26], p[27], p[28], p[29], p[30])
    rope_kv_write(p[1], p[2], p[3], p[4], p[5], q_turn, k_turn, new, p[6] + worker * p[7], start, stop)


def unpack_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """rows, format, table, columns, y: a packed weight as float32 rows."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    for r in range(start, stop):
        unpack_row(p[1], p[2], p[3], r, p[4] + 4 * r * p[3])


def mla_attention_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """q, q_stride, y, y_stride, Latent (num_heads, nope, rope, v, rank; f[9] scale; p[10] kv_b), then as attention.

    p[11..14] the pages; p[15..18] query_start, context_len, block_table, table_stride; p[19] scratch, p[20] its bytes.
    """
    p, f = i64p(a), f64p(a)
    latent = Latent(p[4], p[5], p[6], p[7], p[8], f[9], p[10])
    pages = Pages(p[11], p[12], p[13], p[14])
    batch = Batch(sequences, p[15], p[16], p[17], p[18])
    start, stop = share(mla_items(latent, batch), worker, workers)
    mla_attention(p[0], p[1], p[2], p[3], latent, pages, batch, p[19] + worker * p[20], start, stop)


def route_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """tokens, logits, stride, ids, weights, scratch, its bytes; the Routing from p[7] on, its scale as f[11]."""
    p, f = i64p(a), f64p(a)
    start, stop = share(p[0], worker, workers)
    routing = Routing(p[7], p[8], p[9], p[10], f[11], p[12], p[13], p[14], p[15])
    route(p[1], p[2], routing, p[3], p[4], p[5] + worker * p[6], start, stop)


def group_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """ids, pairs, top_k, experts, bounds, tokens, places, first_expert."""
    p = i64p(a)
    if worker == 0:
        group_by_expert(p[0], p[1], p[2], p[7], p[3], p[4], p[5], p[6])


def experts_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """code, w, bytes, columns, x, x_bytes, y, y_stride, bounds, experts, panels, rows: every expert's own product."""
    p = i64p(a)
    bound = i32p(p[8])
    start, stop = share(p[10], worker, workers)
    for e in range(p[9]):
        first, count = bound[e], bound[e + 1] - bound[e]
        if count and start < stop:
            x, y = p[4] + first * p[5], p[6] + 4 * first * p[7]
            linear(p[0], p[1] + e * p[2], p[3], x, p[5], y, p[7], count, start, stop, p[11], 0, 0)


def combine_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """tokens, x, x_stride, weights, places, top_k, y, y_stride, n."""
    p = i64p(a)
    start, stop = share(p[0], worker, workers)
    combine(p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], start, stop)


def attention_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """q, q_stride, y, y_stride, then what makes Heads, Pages and Batch, and the memory.

    p[4..8] num_heads, num_kv_heads, head_dim, v_head_dim, window; f[9] scale, f[10] softcap; p[11..14] the pages;
    p[15..18] query_start, context_len, block_table, table_stride; p[19] partials; p[20] scratch, p[21] its bytes for
    each worker.
    """
    p, f = i64p(a), f64p(a)
    heads = Heads(p[4], p[5], p[6], p[7], f[9], p[8], f[10])
    pages = Pages(p[11], p[12], p[13], p[14])
    batch = Batch(sequences, p[15], p[16], p[17], p[18])
    start, stop = share(attention_cost(heads, batch), worker, workers)
    attention(p[0], p[1], p[2], p[3], heads, pages, batch, p[19], p[20] + worker * p[21], start, stop)


def attention_merge_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """As ``attention_step``: joins what it split."""
    p, f = i64p(a), f64p(a)
    heads = Heads(p[4], p[5], p[6], p[7], f[9], p[8], f[10])
    batch = Batch(sequences, p[15], p[16], p[17], p[18])
    start, stop = share(sequences * p[5], worker, workers)
    attention_merge(p[2], p[3], heads, batch, p[19], start, stop)
