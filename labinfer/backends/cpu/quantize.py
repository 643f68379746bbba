"""Activations as the linear kernels take them: float32, signed digits with a scale for each 32 columns, or bf16 parts.

With two digits a number is ``scale * (128 * high + low)``: 15 bits and a sign of the block's greatest, which is within
what float32 kernels differ by among themselves. With one digit it is int8, as in llama.cpp; that changes tokens. For
the matrix unit two digits lie in tiles, as bf16 numbers, the higher ones times 128. With plain weights a number is
there the sum of three bf16 parts, all 24 bits, and with int8 activations of one: 8 bits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from labinfer.backends.cpu.features import DIGIT_MAX, WORDS
from labinfer.backends.cpu.isa import F32, F32X16, I8, I16, I32, I32X16, Value, njit, vector
from labinfer.backends.cpu.layout import DIGIT_TILES, HEADER_BYTES
from labinfer.backends.cpu.simd import Emit, f32p, kernel

SMALLEST = 1e-30  # a block of zeros gets this as its greatest


def _rounded(e: Emit, x: Value, digits: int) -> tuple[list[Value], list[Value]]:
    """Of 32 float32 at ``x``: their scale, sums of all, of the first and of the last 16; each 16 as int32."""
    b, top = e.b, DIGIT_MAX[digits] * 128.0 ** (digits - 1)
    halves = [e.load(e.add(x, 64 * half)) for half in (0, 1)]
    # The sizes are compared as integers, where a NaN is the greatest: it must reach the scale.
    sizes = [b.bitcast(e.abs(half), I32X16) for half in halves]
    greatest = b.bitcast(e.hmax(b.select(b.icmp_signed(">", *sizes), *sizes)), F32)
    tiny = b.fcmp_ordered("<", greatest, ir.Constant(F32, SMALLEST))
    greatest = b.select(tiny, ir.Constant(F32, SMALLEST), greatest)
    scale = b.fmul(greatest, ir.Constant(F32, 1.0 / top))
    inverse = e.splat(b.fdiv(ir.Constant(F32, top), greatest))
    whole = [b.fptosi(e.round(b.fmul(half, inverse)), I32X16) for half in halves]
    return [scale, *(b.fmul(b.sitofp(e.sum(v), F32), scale) for v in (b.add(*whole), *whole))], whole


def _digits(e: Emit, v: Value) -> list[Value]:
    """The higher and the lower digit of int32 numbers. Balanced: the lower one is within -64 .. 63."""
    high = e.b.ashr(e.b.add(v, e.const(64, I32X16)), e.const(7, I32X16))
    return [high, e.b.sub(v, e.b.shl(high, e.const(7, I32X16)))]


def _even_first(e: Emit, v: Value) -> Value:
    """16 int32 as int16, of each four columns the even ones first."""
    order = [four + column for four in range(0, 16, 4) for column in (0, 2, 1, 3)]
    return e.b.trunc(e.b.shuffle_vector(v, v, ir.Constant(I32X16, order)), vector(I16, 16))


def _records(digits: int) -> Any:
    """One row of float32 [32 * blocks] at ``x`` to records at ``out`` (see ``layout``)."""

    def emit(e: Emit, x: Value, blocks: Value, out: Value) -> None:
        with e.loop(blocks) as k:
            record = e.add(out, e.mul(k, HEADER_BYTES + 32 * digits))
            header, halves = _rounded(e, e.add(x, e.mul(k, 128)), digits)
            for index, value in enumerate(header):
                e.store(value, e.add(record, 4 * index))
            for half, v in enumerate(halves):
                if digits == 2 and WORDS:
                    e.store(_even_first(e, v), e.add(record, HEADER_BYTES + 32 * half))
                    continue
                for index, digit in enumerate(_digits(e, v) if digits == 2 else [v]):
                    e.store(e.b.trunc(digit, vector(I8, 16)), e.add(record, HEADER_BYTES + 16 * half + 32 * index))

    return kernel(emit)


def _digit_tiles(e: Emit, x: Value, blocks: Value, out: Value, token: Value) -> None:
    """Two digits to lines of tiles; ``out`` is where the first tiles of the 16 tokens begin, ``token`` 0 to 15."""
    b = e.b
    with e.loop(blocks) as k:
        tiles = e.add(out, e.mul(k, 16 * (HEADER_BYTES + 2 * 64)))
        header, halves = _rounded(e, e.add(x, e.mul(k, 128)), 2)
        for index, value in enumerate(header):
            e.store(value, e.add(tiles, 2 * 1024 + 64 * index, e.mul(token, 4)))
        for half, whole in enumerate(halves):
            high, low = _digits(e, whole)
            for index, v in enumerate((b.shl(high, e.const(7, I32X16)), low)):
                bits = b.lshr(b.bitcast(b.sitofp(v, F32X16), I32X16), e.const(16, I32X16))
                e.store(_even_first(e, bits), e.add(tiles, 1024 * index + 32 * half, e.mul(token, 64)))


def _split(parts: int) -> Any:
    """One row of float32 [32 * tiles] at ``x`` to a line of each tile; the first line is at ``out``."""

    def emit(e: Emit, x: Value, tiles: Value, out: Value) -> None:
        b, wide = e.b, vector(I32, 16)
        with e.loop(tiles) as k:
            for half in (0, 1):
                rest = e.load(e.add(x, e.mul(k, 128), 64 * half))
                for part in range(parts):
                    bits = e.bf16_bits(rest)
                    e.store(bits, e.add(out, e.mul(k, 1024 * parts), 1024 * part + 32 * half))
                    rest = b.fsub(rest, b.bitcast(b.shl(b.zext(bits, wide), e.const(16, wide)), rest.type))

    return kernel(emit)


_one_digit, _two_digits = _records(1), _records(2)
_tiles_of_digits, _one_part, _three_parts = kernel(_digit_tiles), _split(1), _split(3)


@njit
def quantize_row(form: int, x: int, columns: int, out: int, nbytes: int, t: int) -> None:
    """One float32 row [columns] at address ``x`` to row ``t`` of the activation rows at ``out``.

    ``form`` is that of ``layout.activation_form``, ``nbytes`` its ``layout.activation_bytes``.
    """
    tiles, token = out + t // 16 * 16 * nbytes, t % 16
    if form == 1:
        _one_digit(x, columns // 32, out + t * nbytes)
    elif form == 2:
        _two_digits(x, columns // 32, out + t * nbytes)
    elif form == DIGIT_TILES:
        _tiles_of_digits(x, columns // 32, tiles, token)
    elif form == -1:
        _one_part(x, columns // 32, tiles + 64 * token)
    elif form == -3:
        _three_parts(x, columns // 32, tiles + 64 * token)
    else:
        source, target = f32p(x), f32p(out + t * nbytes)
        for i in range(columns):
            target[i] = source[i]
        if columns % 2:
            target[columns] = 0.0
