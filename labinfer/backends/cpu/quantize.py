"""Activations as the linear kernels take them: float32 rows, signed digits with a scale for each 32 columns, or tiles.

With two digits a number is ``scale * (128 * high + low)``: 15 bits and a sign of the block's greatest (14 at the levels
without VNNI), which is within what float32 kernels differ by among themselves. With one digit it is int8, as in
llama.cpp; that changes tokens. In tiles a number is the sum of one, two or three bf16 parts: 8, 16 or all 24 bits.
"""

from __future__ import annotations

from llvmlite import ir

from labinfer.backends.cpu.features import DIGIT_MAX
from labinfer.backends.cpu.isa import F32, I8, I32, I32X16, Value, njit, vector
from labinfer.backends.cpu.layout import HEADER_BYTES
from labinfer.backends.cpu.simd import Emit, f32p, kernel

SMALLEST = 1e-30  # a block of zeros gets this as its greatest


def _quantize(e: Emit, x: Value, blocks: Value, out: Value, digits: int) -> None:
    """One row of float32 [32 * blocks] at ``x`` to records at ``out`` (see ``layout``)."""
    b, top = e.b, DIGIT_MAX * 128.0 ** (digits - 1)
    with e.loop(blocks) as k:
        record = e.add(out, e.mul(k, HEADER_BYTES + 32 * digits))
        halves = [e.load(e.add(x, e.mul(k, 128), 64 * half)) for half in (0, 1)]
        # The sizes are compared as integers, where a NaN is the greatest: it must reach the scale.
        sizes = [b.bitcast(e.abs(half), I32X16) for half in halves]
        greatest = b.bitcast(e.hmax(b.select(b.icmp_signed(">", *sizes), *sizes)), F32)
        tiny = b.fcmp_ordered("<", greatest, ir.Constant(F32, SMALLEST))
        greatest = b.select(tiny, ir.Constant(F32, SMALLEST), greatest)
        scale = b.fmul(greatest, ir.Constant(F32, 1.0 / top))
        inverse = e.splat(b.fdiv(ir.Constant(F32, top), greatest))
        whole = [b.fptosi(e.round(b.fmul(half, inverse)), I32X16) for half in halves]
        sums = [b.fmul(b.sitofp(e.sum(v), F32), scale) for v in (b.add(*whole), *whole)]
        for index, value in enumerate((scale, *sums)):
            e.store(value, e.add(record, 4 * index))
        for index, v in enumerate(whole):
            at = e.add(record, HEADER_BYTES + 16 * index)
            if digits == 2:  # balanced: the low digit is within -64 .. 63
                high = b.ashr(b.add(v, e.const(64, I32X16)), e.const(7, I32X16))
                low = b.sub(v, b.shl(high, e.const(7, I32X16)))
                e.store(b.trunc(low, vector(I8, 16)), e.add(at, 32))
                v = high
            e.store(b.trunc(v, vector(I8, 16)), at)


def _quantize_1(e: Emit, x: Value, blocks: Value, out: Value) -> None:
    _quantize(e, x, blocks, out, 1)


def _quantize_2(e: Emit, x: Value, blocks: Value, out: Value) -> None:
    _quantize(e, x, blocks, out, 2)


def _split(e: Emit, x: Value, tiles: Value, out: Value, parts: int) -> None:
    """One row of float32 [32 * tiles] at ``x`` to a line of each tile; the first line is at ``out``."""
    b, wide = e.b, vector(I32, 16)
    with e.loop(tiles) as k:
        for half in (0, 1):
            rest = e.load(e.add(x, e.mul(k, 128), 64 * half))
            for part in range(parts):
                bits = e.bf16_bits(rest)
                e.store(bits, e.add(out, e.mul(k, 1024 * parts), 1024 * part + 32 * half))
                rest = b.fsub(rest, b.bitcast(b.shl(b.zext(bits, wide), e.const(16, wide)), rest.type))


def _split_1(e: Emit, x: Value, tiles: Value, out: Value) -> None:
    _split(e, x, tiles, out, 1)


def _split_2(e: Emit, x: Value, tiles: Value, out: Value) -> None:
    _split(e, x, tiles, out, 2)


def _split_3(e: Emit, x: Value, tiles: Value, out: Value) -> None:
    _split(e, x, tiles, out, 3)


_one_digit, _two_digits = kernel(_quantize_1), kernel(_quantize_2)
_one_part, _two_parts, _three_parts = kernel(_split_1), kernel(_split_2), kernel(_split_3)


@njit
def quantize_row(form: int, x: int, columns: int, out: int, nbytes: int, t: int) -> None:
    """One float32 row [columns] at address ``x`` to row ``t`` of the activation rows at ``out``.

    ``form`` is that of ``layout.activation_form``, ``nbytes`` its ``layout.activation_bytes``.
    """
    if form == 1:
        _one_digit(x, columns // 32, out + t * nbytes)
    elif form == 2:
        _two_digits(x, columns // 32, out + t * nbytes)
    elif form < 0:
        line = out + t // 16 * 16 * nbytes + t % 16 * 64
        if form == -1:
            _one_part(x, columns // 32, line)
        elif form == -2:
            _two_parts(x, columns // 32, line)
        else:
            _three_parts(x, columns // 32, line)
    else:
        source, target = f32p(x), f32p(out + t * nbytes)
        for i in range(columns):
            target[i] = source[i]
        if columns % 2:
            target[columns] = 0.0
