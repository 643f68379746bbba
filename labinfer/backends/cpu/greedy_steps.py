"""The step functions that end a step of greedy decoding: choose the likeliest tokens and move the step on to them."""

from __future__ import annotations

from llvmlite import ir

from labinfer.backends.cpu.driver import share
from labinfer.backends.cpu.elementwise import pieces
from labinfer.backends.cpu.isa import I32, I32X16, Value, njit
from labinfer.backends.cpu.simd import Emit, i32p, i64p, kernel, ldf, stf
from labinfer.backends.sampling import NOT_A_NUMBER


def _best_lanes(e: Emit, x: Value, n: Value, first: Value, out: Value) -> None:
    best, tokens = e.var(e.const(float("-inf"))), e.var(ir.Constant(I32X16, [0] * 16))
    for piece in pieces(e, n):
        v = piece.load(x)
        if piece.mask is not None:
            v = e.b.select(piece.mask, v, e.const(float("-inf")))
        known, number = best.get(), e.b.trunc(e.add(first, e.b.ashr(piece.at, e.i(2))), I32)
        better = e.b.and_(e.b.fcmp_unordered(">", v, known), e.b.fcmp_ordered("==", known, known))
        best.set(e.b.select(better, v, known))
        numbers = e.b.add(e.splat(number), ir.Constant(I32X16, list(range(16))))
        tokens.set(e.b.select(better, numbers, tokens.get()))
    e.store(best.get(), out)
    e.store(tokens.get(), e.add(out, 64))


best_lanes = kernel(_best_lanes)
"""For each of 16 lanes the first greatest of the floats ``x`` there, or a NaN, and its number, counted from ``first``:
written to ``out``."""


@njit
def first_greatest(values: int, tokens: int, count: int) -> tuple[float, int]:
    """The first greatest of ``count`` floats, or a NaN, and the token of it."""
    best, token = ldf(values, 0), i32p(tokens)[0]
    for i in range(1, count):
        value, other = ldf(values, i), i32p(tokens)[i]
        if value != value or value > best or (value == best and other < token):
            best, token = value, other
    return best, token


def best_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """logits, stride, vocab, lanes (128 bytes for each worker), values, tokens: of each row the best of each worker."""
    p = i64p(a)
    start, stop = share((p[2] + 15) // 16, worker, workers)
    lanes = p[3] + 128 * worker
    for s in range(sequences):
        x = p[0] + 4 * s * p[1] + 64 * start
        best_lanes(x, min(16 * stop, p[2]) - 16 * start, 16 * start, lanes)
        best, token = first_greatest(lanes, lanes + 64, 16)
        stf(p[4], s * workers + worker, best)
        i32p(p[5])[s * workers + worker] = token


def advance_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """values, tokens, where: what is at ``where`` is the address of the tokens made, which moves on, then token_ids,
    positions, context_len, total_len, block_size, groups, what describes them (3 each): block_table, its stride,
    slot_mapping."""
    if worker != 0:
        return
    p = i64p(a)
    where, token_ids, positions, context_len, total_len = i64p(p[2]), i32p(p[3]), i32p(p[4]), i32p(p[5]), i32p(p[6])
    made = i32p(where[0])
    for s in range(sequences):
        best, token = first_greatest(p[0] + 4 * s * workers, p[1] + 4 * s * workers, workers)
        if best - best != 0:
            token = NOT_A_NUMBER
        made[s] = token_ids[s] = token
        positions[s] += 1
        context_len[s] += 1
        total_len[s] += 1
        block, offset = positions[s] // p[7], positions[s] % p[7]
        for g in range(p[8]):  # behind the last step the table may list no block: that slot is never used
            group = i64p(p[9] + 24 * g)
            i32p(group[2])[s] = i32p(group[0])[s * group[1] + block] * p[7] + offset
    where[0] += 4 * sequences
