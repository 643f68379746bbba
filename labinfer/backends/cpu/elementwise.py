"""Kernels that treat each number by itself (``add``, ``scale``, ``softcap``, ``activation``, ``glu``) or copy rows.

Rows are float32 windows: an address, and a stride from row to row in floats. Every kernel works on rows
[start, stop), so that threads share them. The result may be written over an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from numba import float32

from labinfer.backends.cpu.isa import Value, njit
from labinfer.backends.cpu.simd import Emit, i32p, kernel
from labinfer.backends.cpu.tape import ACTIVATION_CODES


@dataclass(frozen=True, slots=True)
class Piece:
    """Sixteen floats of a row, or what is left at its end: ``at`` is their offset in bytes, ``mask`` the lanes used."""

    e: Emit
    at: Value
    mask: Value | None

    def load(self, row: Value) -> Value:
        """The piece of the row at address ``row``; lanes beyond its end are zero."""
        address = self.e.add(row, self.at)
        return self.e.load(address) if self.mask is None else self.e.load_masked(address, self.mask)

    def store(self, value: Value, row: Value) -> None:
        """Write the piece of the row at address ``row``."""
        address = self.e.add(row, self.at)
        if self.mask is None:
            self.e.store(value, address)
        else:
            self.e.store_masked(value, address, self.mask)

    def zero_unused(self, value: Value) -> Value:
        """``value`` with zero in the lanes beyond the end of the row."""
        return value if self.mask is None else self.e.b.select(self.mask, value, self.e.const(0.0))


def pieces(e: Emit, n: Value) -> Iterator[Piece]:
    """Emit what the caller does with a piece twice: in a loop over whole pieces of ``n`` floats, and for the rest."""
    whole, rest = e.b.ashr(n, e.i(4)), e.b.and_(n, e.i(15))
    with e.loop(whole) as k:
        yield Piece(e, e.mul(k, 64), None)
    with e.when(e.b.icmp_signed("!=", rest, e.i(0))):
        yield Piece(e, e.mul(whole, 64), e.first_lanes(rest))


# ---- one row


def _add(e: Emit, x: Value, y: Value, z: Value, n: Value) -> None:
    for piece in pieces(e, n):
        piece.store(e.b.fadd(piece.load(x), piece.load(y)), z)


def _scale(e: Emit, x: Value, y: Value, n: Value, factor: Value) -> None:
    by = e.splat(factor)
    for piece in pieces(e, n):
        piece.store(e.b.fmul(piece.load(x), by), y)


def _softcap(e: Emit, x: Value, y: Value, n: Value, cap: Value) -> None:
    bound = e.splat(cap)
    for piece in pieces(e, n):
        piece.store(e.b.fmul(e.tanh(e.b.fdiv(piece.load(x), bound)), bound), y)


def _copy(e: Emit, x: Value, y: Value, n: Value) -> None:
    for piece in pieces(e, n):
        piece.store(piece.load(x), y)


def _zero(e: Emit, y: Value, n: Value) -> None:
    for piece in pieces(e, n):
        piece.store(e.const(0.0), y)


def _add_scaled(e: Emit, x: Value, y: Value, n: Value, factor: Value) -> None:
    by = e.splat(factor)
    for piece in pieces(e, n):
        piece.store(e.fma(piece.load(x), by, piece.load(y)), y)


def _sum(e: Emit, x: Value, n: Value) -> Value:
    total = e.var(e.const(0.0))
    for piece in pieces(e, n):
        total.set(e.b.fadd(total.get(), piece.load(x)))
    return e.sum(total.get())


add_row = kernel(_add)
"""``z = x + y`` of ``n`` floats."""
scale_row = kernel(_scale, floats=("factor",))
"""``y = x * factor``."""
softcap_row = kernel(_softcap, floats=("cap",))
"""``y = tanh(x / cap) * cap``."""
copy_row = kernel(_copy)
"""``y = x``."""
zero_row = kernel(_zero)
"""``y = 0``."""
add_scaled_row = kernel(_add_scaled, floats=("factor",))
"""``y += x * factor``."""
sum_row = kernel(_sum, float32)
"""The sum of ``n`` floats."""


def _gelu_tanh(e: Emit, x: Value) -> Value:
    """``0.5 * (1 + tanh(z))`` is ``sigmoid(2 * z)``, without the cancellation."""
    cubic = e.fma(e.b.fmul(x, x), e.const(0.044715), e.const(1.0))
    return e.b.fmul(x, e.sigmoid(e.b.fmul(e.b.fmul(x, e.const(1.5957691216057308)), cubic)))


def _relu(e: Emit, x: Value) -> Value:
    return e.max(e.const(0.0), x)


EMITTERS: dict[str, Callable[[Emit, Value], Value]] = {
    "silu": lambda e, x: e.b.fmul(x, e.sigmoid(x)),
    "gelu": lambda e, x: e.b.fmul(x, e.normal_cdf(x)),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda e, x: e.b.fmul(x, e.sigmoid(e.b.fmul(x, e.const(1.702)))),
    "relu": _relu,
    "relu2": lambda e, x: e.b.fmul(_relu(e, x), x),
    "tanh": lambda e, x: e.tanh(x),
    "sigmoid": lambda e, x: e.sigmoid(x),
}
"""Each activation as it is emitted: 16 floats in, 16 out."""


def _by_code(e: Emit, function: Value, emit: Callable[[Callable[[Emit, Value], Value]], None]) -> None:
    """Emit every activation behind a test of its code."""
    for name, code in ACTIVATION_CODES.items():
        with e.when(e.b.icmp_signed("==", function, e.i(code))):
            emit(EMITTERS[name])


def _activation(e: Emit, function: Value, x: Value, y: Value, n: Value) -> None:
    def emit(f: Callable[[Emit, Value], Value]) -> None:
        for piece in pieces(e, n):
            piece.store(f(e, piece.load(x)), y)

    _by_code(e, function, emit)


def _glu(e: Emit, function: Value, gate: Value, up: Value, y: Value, n: Value) -> None:
    def emit(f: Callable[[Emit, Value], Value]) -> None:
        for piece in pieces(e, n):
            piece.store(e.b.fmul(f(e, piece.load(gate)), piece.load(up)), y)

    _by_code(e, function, emit)


activation_row = kernel(_activation)
"""``y = function(x)``, ``function`` one of ``ACTIVATION_CODES``."""
glu_row = kernel(_glu)
"""``y = function(gate) * up``."""


# ---- rows [start, stop)


@njit
def add(x: int, x_stride: int, y: int, y_stride: int, z: int, z_stride: int, n: int, start: int, stop: int) -> None:
    """``z = x + y`` of ``n`` features."""
    for t in range(start, stop):
        add_row(x + 4 * t * x_stride, y + 4 * t * y_stride, z + 4 * t * z_stride, n)


@njit
def scale(x: int, x_stride: int, y: int, y_stride: int, n: int, by: float, start: int, stop: int) -> None:
    """``y = x * by``."""
    for t in range(start, stop):
        scale_row(x + 4 * t * x_stride, y + 4 * t * y_stride, n, by)


@njit
def softcap(x: int, x_stride: int, y: int, y_stride: int, n: int, cap: float, start: int, stop: int) -> None:
    """``y = tanh(x / cap) * cap``."""
    for t in range(start, stop):
        softcap_row(x + 4 * t * x_stride, y + 4 * t * y_stride, n, cap)


@njit
def activation(function: int, x: int, x_stride: int, y: int, y_stride: int, n: int, start: int, stop: int) -> None:
    """``y = function(x)``, ``function`` one of ``ACTIVATION_CODES``."""
    for t in range(start, stop):
        activation_row(function, x + 4 * t * x_stride, y + 4 * t * y_stride, n)


@njit
def glu(
    function: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    y: int,
    y_stride: int,
    n: int,
    start: int,
    stop: int,
) -> None:
    """``y = function(gate) * up``."""
    for t in range(start, stop):
        glu_row(function, gate + 4 * t * gate_stride, up + 4 * t * up_stride, y + 4 * t * y_stride, n)


@njit
def select_rows(x: int, x_stride: int, index: int, y: int, y_stride: int, n: int, start: int, stop: int) -> None:
    """``y[r] = x[index[r]]`` with ``index`` int32: also the embedding of a float32 table, and an expert's tokens."""
    rows = i32p(index)
    for r in range(start, stop):
        copy_row(x + 4 * rows[r] * x_stride, y + 4 * r * y_stride, n)


@njit
def copy_rows(x: int, x_stride: int, y: int, y_stride: int, n: int, start: int, stop: int) -> None:
    """``y = x``."""
    for t in range(start, stop):
        copy_row(x + 4 * t * x_stride, y + 4 * t * y_stride, n)
