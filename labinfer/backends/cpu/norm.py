"""``rms_norm`` and ``layer_norm`` of float32 rows, sums in float32. The result may be written over the input."""

from __future__ import annotations

import math

from numba import float32

from labinfer.backends.cpu.elementwise import add_row, pieces, scale_row, sum_row
from labinfer.backends.cpu.isa import Value, njit
from labinfer.backends.cpu.simd import Emit, kernel


def _sum_squares(e: Emit, x: Value, n: Value, centre: Value) -> Value:
    total, middle = e.var(e.const(0.0)), e.splat(centre)
    for piece in pieces(e, n):
        v = piece.zero_unused(e.b.fsub(piece.load(x), middle))
        total.set(e.fma(v, v, total.get()))
    return e.sum(total.get())


def _rms_scale(e: Emit, x: Value, weight: Value, y: Value, n: Value, factor: Value, offset: Value) -> None:
    by, more = e.splat(factor), e.splat(offset)
    for piece in pieces(e, n):
        piece.store(e.b.fmul(e.b.fmul(piece.load(x), by), e.b.fadd(piece.load(weight), more)), y)


def _centre_scale(e: Emit, x: Value, weight: Value, y: Value, n: Value, centre: Value, factor: Value) -> None:
    middle, by = e.splat(centre), e.splat(factor)
    for piece in pieces(e, n):
        piece.store(e.b.fmul(e.b.fmul(e.b.fsub(piece.load(x), middle), by), piece.load(weight)), y)


sum_squares_row = kernel(_sum_squares, float32, floats=("centre",))
rms_scale_row = kernel(_rms_scale, floats=("factor", "offset"))
centre_scale_row = kernel(_centre_scale, floats=("centre", "factor"))


@njit
def rms_norm_row(x: int, weight: int, y: int, n: int, group: int, eps: float, offset: float) -> None:
    """Normalise each run of ``group`` of the ``n`` features; ``weight`` [group] is an address, 0 for none."""
    for at in range(0, 4 * n, 4 * group):
        factor = 1.0 / math.sqrt(sum_squares_row(x + at, group, 0.0) / group + eps)
        if weight:
            rms_scale_row(x + at, weight, y + at, group, factor, offset)
        else:
            scale_row(x + at, y + at, group, factor)


@njit
def rms_norm(
    x: int,
    x_stride: int,
    weight: int,
    y: int,
    y_stride: int,
    n: int,
    group: int,
    eps: float,
    offset: float,
    start: int,
    stop: int,
) -> None:
    """``y = x / sqrt(mean(x * x) + eps) * (weight + offset)`` of rows [start, stop), by groups (n: one)."""
    for t in range(start, stop):
        rms_norm_row(x + 4 * t * x_stride, weight, y + 4 * t * y_stride, n, group, eps, offset)


@njit
def layer_norm(
    x: int,
    x_stride: int,
    weight: int,
    bias: int,
    y: int,
    y_stride: int,
    n: int,
    eps: float,
    start: int,
    stop: int,
) -> None:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias`` of rows [start, stop); ``bias`` 0 for none."""
    for t in range(start, stop):
        source, result = x + 4 * t * x_stride, y + 4 * t * y_stride
        mean = sum_row(source, n) / n
        factor = 1.0 / math.sqrt(sum_squares_row(source, n, mean) / n + eps)
        centre_scale_row(source, weight, result, n, mean, factor)
        if bias:
            add_row(result, bias, result, n)
