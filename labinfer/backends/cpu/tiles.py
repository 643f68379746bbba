"""The micro-kernels of ``linear``: a tile is the product of one panel (16 rows of a weight) with a few tokens.

Quantized weights meet activation digits in byte dot products, plain numbers meet float32 activations in multiply-adds.
In both, the panel's numbers are loaded and unpacked once for all tokens of the tile, an activation is broadcast to all
lanes from memory, and the 16 sums of a token are the 16 lanes of one accumulator: nothing is ever summed across lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from labinfer.backends.cpu import isa
from labinfer.backends.cpu.features import WORDS
from labinfer.backends.cpu.isa import I8, I16X32, I32, I32X16, Value, const, vector
from labinfer.backends.cpu.layout import HEADER_BYTES, PANEL_FORMATS, PanelFormat
from labinfer.backends.cpu.simd import Emit, Var, kernel
from labinfer.backends.cpu.tape import ACCUMULATE

PREFETCH = 16384
"""How far ahead of the block being multiplied memory is asked for, in bytes.

By itself the CPU looks too few cache lines ahead, at least where a block of quants is much work or memory is far away:
without this, one core streams a third of what it can, or two thirds with plain numbers. Requests that come in bunches
cost a tenth to a third again, so they are spread over the products.
"""


# ---- quants of a block of 32 columns: vector ``j`` of eight, unsigned bytes (as int32 x 16); ``at`` is where the first
# begins


def _bytes(e: Emit, at: Value, j: int) -> Value:
    return e.load(e.add(at, 64 * j), I32X16, 64)


def _bits(e: Emit, at: Value, j: int, shift: int, mask: int) -> Value:
    """Vector ``j`` moved up by ``shift`` (down if negative), cut to ``mask`` in every byte."""
    bits = e.b.bitcast(_bytes(e, at, j), I16X32)
    if shift:
        bits = (e.b.shl if shift > 0 else e.b.lshr)(bits, const(abs(shift), I16X32))
    return e.b.bitcast(e.b.and_(bits, const(mask * 0x0101, I16X32)), I32X16)


def _nibbles(e: Emit, at: Value, j: int) -> Value:
    return _bits(e, at, j % 4, -(j // 4 * 4), 15)


def _nibbles_and_bit(e: Emit, at: Value, j: int) -> Value:
    return e.b.or_(_nibbles(e, at, j), _bits(e, at, 4, 4 - j, 16))


def _nibbles_and_pair(e: Emit, at: Value, j: int) -> Value:
    return e.b.or_(_nibbles(e, at, j), _bits(e, at, 4 + j // 4, 4 - 2 * (j % 4), 48))


# ---- scales of block ``k``: pairs (scale, minimum) with weight = scale * quant + minimum, one pair for the whole block
# or one for each half of its columns. ``at`` is the address behind the panel's quants.

Scales = list[tuple[Value, Value]]


def _scale_and_zero(zero: int) -> Callable[[Emit, Value, Value, Value], Scales]:
    def scales(e: Emit, at: Value, blocks: Value, k: Value) -> Scales:
        scale = e.load_f16(e.add(at, e.mul(k, 32)))
        return [(scale, e.b.fmul(scale, const(-float(zero))))]

    return scales


def _scale_and_minimum(e: Emit, at: Value, blocks: Value, k: Value) -> Scales:
    at = e.add(at, e.mul(k, 32))
    return [(e.load_f16(at), e.load_f16(e.add(at, e.mul(blocks, 32))))]


def _byte_scales(e: Emit, at: Value, extend: Callable[[Value, Value], Value]) -> Value:
    return e.b.sitofp(extend(e.load(at, vector(I8, 16)), I32X16), isa.F32X16)


def _k_scale_and_minimum(e: Emit, at: Value, blocks: Value, k: Value) -> Scales:
    """d and dmin of all groups of 8 blocks, then a byte for each block: its scale (times d) and its minimum (dmin)."""
    b, group = e.b, e.mul(e.b.lshr(k, e.i(3)), 32)
    halves = e.mul(blocks, 4)  # bytes of all d
    bytes_at = e.add(at, halves, halves, e.mul(k, 16))
    scale = b.fmul(e.load_f16(e.add(at, group)), _byte_scales(e, bytes_at, b.zext))
    minimum = b.fmul(e.load_f16(e.add(at, halves, group)), _byte_scales(e, e.add(bytes_at, e.mul(blocks, 16)), b.zext))
    return [(scale, b.fneg(minimum))]


def _k_scales_of_16(e: Emit, at: Value, blocks: Value, k: Value) -> Scales:
    """d of all groups of 8 blocks, then two signed bytes for each block, the scales of its halves; zero point 32."""
    b = e.b
    d = e.load_f16(e.add(at, e.mul(b.lshr(k, e.i(3)), 32)))
    bytes_at = e.add(at, e.mul(blocks, 4), e.mul(k, 32))
    scales = [b.fmul(d, _byte_scales(e, e.add(bytes_at, 16 * half), b.sext)) for half in (0, 1)]
    return [(scale, b.fmul(scale, const(-32.0))) for scale in scales]


QUANTIZED: dict[str, tuple[Callable[[Emit, Value, int], Value], Callable[[Emit, Value, Value, Value], Scales]]] = {
    "q8_0": (_bytes, _scale_and_zero(128)),
    "q4_0": (_nibbles, _scale_and_zero(8)),
    "q4_1": (_nibbles, _scale_and_minimum),
    "q5_0": (_nibbles_and_bit, _scale_and_zero(16)),
    "q5_1": (_nibbles_and_bit, _scale_and_minimum),
    "q4_k": (_nibbles, _k_scale_and_minimum),
    "q5_k": (_nibbles_and_bit, _k_scale_and_minimum),
    "q6_k": (_nibbles_and_pair, _k_scales_of_16),
}
"""How a format's quants and scales are read."""

SCALES = {format: 2 if format == "q6_k" else 1 for format in QUANTIZED}
"""Scales that a block of 32 columns has in a format: one for all of it, or one for each half."""


def _dots_of_words(e: Emit, quants: Iterable[Value], firsts: list[Value]) -> list[Value]:
    """``_dot`` of all tokens, with words: of four columns the quants of the even ones, then those of the odd ones.

    They are unpacked one after another: there are no registers for all of them.
    """
    b, sums = e.b, [const(0, I32X16)] * len(firsts)
    for j, quant in enumerate(quants):
        four = b.bitcast(quant, I16X32)
        for odd, words in enumerate((b.and_(four, const(255, I16X32)), b.lshr(four, const(8, I16X32)))):
            for t, first in enumerate(firsts):
                pair = e.bcast(e.add(first, 8 * j + 4 * odd), I32)
                sums[t] = isa.as_it_is(b, isa.dot_words(b, sums[t], b.bitcast(words, I32X16), pair))
    return [b.sitofp(total, isa.F32X16) for total in sums]


def _dot(e: Emit, quants: list[Value], first: Value, digits: int, ahead: list[Value]) -> Value:
    """The products of weight vectors with one token's digits, which begin at ``first``, as float32 [16 rows].

    Each digit has a sum of its own: a single one would be a chain of additions twice as long. The cache lines ``ahead``
    are asked for in between.
    """
    b, sums = e.b, [const(0, I32X16)] * digits
    for j, quant in enumerate(quants):
        for line in ahead[j :: len(quants)]:
            e.prefetch(line)
        for digit in range(digits):
            sums[digit] = e.dpbusd(sums[digit], quant, e.bcast(e.add(first, 32 * digit + 4 * j), I32))
    total = sums[0]
    for lower in sums[1:]:
        total = b.add(b.shl(total, const(7, I32X16)), lower)
    return b.sitofp(total, isa.F32X16)


def _lines_ahead(e: Emit, layout: PanelFormat, w: Value, blocks: Value, k: Value) -> list[Value]:
    """What to ask for at block ``k``: lines of the stream of panels, and the scales' place in the next panel.

    A panel's scales lie behind its quants and are needed from its first block on.
    """
    stream = e.add(w, e.mul(k, layout.bytes), PREFETCH)
    scale_bytes = layout.bytes - layout.quant_bytes
    scales = e.add(w, e.mul(blocks, layout.bytes + layout.quant_bytes), e.mul(k, scale_bytes))
    return [e.add(stream, line) for line in range(0, layout.bytes, 64)] + [scales]


def _quantized_sums(e: Emit, format: str, digits: int, w: Value, blocks: Value, tokens: list[Value]) -> list[Var]:
    """The sums of a tile; ``tokens`` are the addresses of their activation rows."""
    (unpack, scales_of), layout = QUANTIZED[format], PANEL_FORMATS[format]
    sums = [e.var(const(0.0)) for _ in tokens]
    with e.loop(blocks) as k:
        ahead, quants_at = _lines_ahead(e, layout, w, blocks, k), e.add(w, e.mul(k, layout.quant_bytes))
        quants = [unpack(e, quants_at, j) for j in range(8)]
        scales = scales_of(e, e.add(w, e.mul(blocks, layout.quant_bytes)), blocks, k)
        size = 8 // len(scales)  # vectors that share a scale
        asked = -(-len(ahead) // len(scales))  # lines that are asked for beside each product of the first token
        for token, total in zip(tokens, sums, strict=True):
            record = e.add(token, e.mul(k, HEADER_BYTES + 32 * digits))
            result, product = total.get(), const(0.0)
            for part, (scale, minimum) in enumerate(scales):
                share = quants[size * part : size * (part + 1)]
                dot = _dot(e, share, e.add(record, HEADER_BYTES + 16 * part), digits, ahead[:asked])
                ahead = ahead[asked:]
                product = e.fma(dot, scale, product) if part else e.b.fmul(dot, scale)
                sum_at = e.add(record, 4 if len(scales) == 1 else 8 + 4 * part)
                result = e.fma(minimum, e.bcast(sum_at), result)
            total.set(e.fma(product, e.bcast(record), result))
    return sums


def _sums_of_words(e: Emit, format: str, w: Value, blocks: Value, tokens: list[Value]) -> list[Var]:
    """``_quantized_sums`` of two digits that are words."""
    (unpack, scales_of), layout = QUANTIZED[format], PANEL_FORMATS[format]
    sums = [e.var(const(0.0)) for _ in tokens]
    with e.loop(blocks) as k:
        ahead, quants_at = _lines_ahead(e, layout, w, blocks, k), e.add(w, e.mul(k, layout.quant_bytes))

        def quant(j: int) -> Value:
            for line in ahead[j::8]:
                e.prefetch(line)
            return unpack(e, quants_at, j)

        records = [e.add(token, e.mul(k, HEADER_BYTES + 64)) for token in tokens]
        products = [const(0.0)] * len(sums)
        for part in range(SCALES[format]):
            size = 8 // SCALES[format]  # vectors that share a scale
            share = (quant(j) for j in range(size * part, size * (part + 1)))
            dots = _dots_of_words(e, share, [e.add(record, HEADER_BYTES + 32 * part) for record in records])
            scale, minimum = scales_of(e, e.add(w, e.mul(blocks, layout.quant_bytes)), blocks, k)[part]
            sum_at = 4 if SCALES[format] == 1 else 8 + 4 * part
            for t, (dot, record) in enumerate(zip(dots, records, strict=True)):
                products[t] = e.fma(dot, scale, products[t]) if part else e.b.fmul(dot, scale)
                sums[t].set(e.fma(minimum, e.bcast(e.add(record, sum_at)), sums[t].get()))
        for total, product, record in zip(sums, products, records, strict=True):
            total.set(e.fma(product, e.bcast(record), total.get()))
    return sums


# ---- plain numbers: the columns of one block as float32 vectors


def _f32(e: Emit, at: Value) -> list[Value]:
    return [e.load(at, align=64)]


def _f16(e: Emit, at: Value) -> list[Value]:
    return [e.load_f16(at)]


def _bf16(e: Emit, at: Value) -> list[Value]:
    pairs = e.load(at, I32X16, 64)
    return [isa.bf16_low(e.b, pairs), isa.bf16_high(e.b, pairs)]


_PLAIN = {"f32": _f32, "f16": _f16, "bf16": _bf16}


def _plain_sums(e: Emit, format: str, w: list[Value], blocks: Value, tokens: list[Value]) -> list[list[Var]]:
    """The sums of a tile of several panels. All tiles add in the same order: company changes no bit of a token.

    A lone token of 16-bit weights would wait for each addition to a single accumulator.
    A pass of the loop is no more than two cache lines: with four the memory gives a quarter less.
    """
    layout, columns_of = PANEL_FORMATS[format], _PLAIN[format]
    lanes = 1 if format == "f32" else 2  # accumulators of a token
    turns = max(1, lanes // layout.columns)
    sums = [[e.var(const(0.0)) for _ in range(len(tokens) * lanes)] for _ in w]

    def block(k: Value, turn: int) -> None:
        for panel in w:
            e.prefetch(e.add(panel, e.mul(k, layout.bytes), PREFETCH))
        columns = [columns_of(e, e.add(panel, e.mul(k, layout.bytes))) for panel in w]
        for c in range(layout.columns):
            for t, token in enumerate(tokens):
                x = e.bcast(e.add(token, e.mul(k, 4 * layout.columns), 4 * c))
                for panel, acc in zip(columns, sums, strict=True):
                    var = acc[t * lanes + (turn + c) % lanes]
                    var.set(e.fma(panel[c], x, var.get()))

    whole = e.b.udiv(blocks, e.i(turns))
    with e.loop(whole) as k:
        for turn in range(turns):
            block(e.add(e.mul(k, turns), turn), turn)
    if turns > 1:
        done = e.mul(whole, turns)
        with e.loop(e.b.sub(blocks, done)) as k:
            block(e.add(done, k), 0)
    if lanes > 1:
        for first, second in (acc[at : at + 2] for acc in sums for at in range(0, len(acc), 2)):
            first.set(e.b.fadd(first.get(), second.get()))
    return sums


# ---- the whole tile


def _finish(e: Emit, total: Var, y: Value, left: Value, bias: Value, mode: Value) -> None:
    """Add the bias and, in mode ACCUMULATE, what stands in ``y``; write at most ``left`` lanes."""
    b, mask = e.b, e.first_lanes(e.b.select(e.b.icmp_signed("<", left, e.i(16)), left, e.i(16)))
    with e.when(b.icmp_signed("!=", bias, e.i(0))):
        total.set(b.fadd(total.get(), e.load_masked(bias, mask)))
    with e.when(b.icmp_signed("!=", b.and_(mode, e.i(ACCUMULATE)), e.i(0))):
        total.set(b.fadd(total.get(), e.load_masked(y, mask)))
    with b.if_else(b.icmp_signed(">=", left, e.i(16))) as (full, partly):
        with full:
            e.store(total.get(), y)
        with partly:
            e.store_masked(total.get(), y, mask)


def tile(format: str, digits: int, tokens: int, panels: int = 1) -> Any:
    """The intrinsic ``(w, size, blocks, x, x_stride, y, y_stride, left, bias, mode)``.

    ``y[t, 16 * p + r] (+)= panel p row r . x[t] + bias`` for ``tokens`` activation rows ``x_stride`` bytes apart and
    panels ``size`` bytes apart, of ``blocks`` blocks. Rows of ``y`` are ``y_stride`` bytes apart, and ``left`` of their
    floats may be written; ``bias`` is an address or 0.
    """

    def emit(e: Emit, w: Value, size: Value, blocks: Value, x: Value, x_stride: Value, y: Value, y_stride: Value,
             left: Value, bias: Value, mode: Value) -> None:  # fmt: skip
        for t in range(tokens):  # a line that another worker has read since would keep all later writes waiting
            for p in range(panels):
                e.prefetch(e.add(y, e.mul(y_stride, t), 64 * p), to_write=True)
        rows = [e.add(x, e.mul(x_stride, t)) for t in range(tokens)]
        weights = [e.add(w, e.mul(size, p)) for p in range(panels)]
        if PANEL_FORMATS[format].quantized and WORDS and digits == 2:
            sums = [_sums_of_words(e, format, panel, blocks, rows) for panel in weights]
        elif PANEL_FORMATS[format].quantized:
            sums = [_quantized_sums(e, format, digits, panel, blocks, rows) for panel in weights]
        else:
            sums = _plain_sums(e, format, weights, blocks, rows)
        for p in range(panels):
            shifted = e.b.select(e.b.icmp_signed("!=", bias, e.i(0)), e.add(bias, 64 * p), e.i(0))
            for t in range(tokens):
                at = e.add(y, e.mul(y_stride, t), 64 * p)
                _finish(e, sums[p][t * (len(sums[p]) // tokens)], at, e.add(left, -16 * p), shifted, mode)

    return kernel(emit)
