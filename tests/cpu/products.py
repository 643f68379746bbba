"""Random products of ``linear`` and what they should give, for the tests of its kernels."""

from __future__ import annotations

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from labinfer.backends.cpu import features, isa
from labinfer.backends.cpu.layout import (
    DIGIT_TILES,
    activation_bytes,
    activations_bytes,
    glu_chunk,
    packed_bytes,
    product_kernel,
    scattered_form,
)
from labinfer.backends.cpu.linear import linear, linear_glu
from labinfer.backends.cpu.machine_code import address
from labinfer.backends.cpu.packed_weight import pack
from labinfer.backends.cpu.quantize import quantize_row
from labinfer.backends.cpu.tape import ACTIVATION_CODES
from labinfer.ops.activations import FUNCTIONS
from labinfer.ops.base import KernelOptions
from labinfer.ops.dequantization import dequantize
from labinfer.ops.formats import FORMATS
from tests.cpu.weights import aligned, stored_weight

SENTINEL = np.float32(12345.0)


@isa.njit
def quantize_rows(form: int, x: int, columns: int, tokens: int, out: int, nbytes: int) -> None:
    for t in range(tokens):
        quantize_row(form, x + t * columns * 4, columns, out, nbytes, t)


@isa.njit
def run(
    code: int, w: int, columns: int, x: int, x_stride: int, y: int, y_stride: int, tokens: int, g0: int, g1: int,
    rows: int, bias: int, mode: int,
) -> None:  # fmt: skip
    linear(code, w, columns, x, x_stride, y, y_stride, tokens, g0, g1, rows, bias, mode)


def vector_form(format: str) -> int:
    return scattered_form(format, KernelOptions())


class Weight:
    """A random weight, packed, and what it means in float64."""

    def __init__(self, format: str, rows: int, columns: int, seed: int = 0) -> None:
        self.format, self.rows, self.columns = format, rows, columns
        raw = stored_weight(format, rows, columns, seed)
        self.meaning = dequantize(raw, format, (rows, columns)).astype(np.float64)
        self.packed = aligned(packed_bytes(format, rows, columns))
        pack(format, raw, rows, columns, self.packed)


class Activations:
    """Random rows whose numbers differ much in size, as the kernels of ``weight`` take them."""

    def __init__(self, weight: Weight, tokens: int, form: int | None = None, spread: float = 1.0) -> None:
        rng = np.random.default_rng([tokens, weight.columns])
        sizes = np.exp(spread * rng.standard_normal((tokens, weight.columns)))
        self.x = (rng.standard_normal((tokens, weight.columns)) * sizes).astype(np.float32)
        self.form = vector_form(weight.format) if form is None else form
        self.digits = 2 if self.form == DIGIT_TILES else max(self.form, 0)
        self.stride = activation_bytes(self.form, weight.columns)
        self.rows = aligned(activations_bytes(self.form, tokens, weight.columns), fill=0xFF)
        quantize_rows(
            self.form, self.x.ctypes.data, weight.columns, tokens, self.rows.ctypes.data, self.stride
        )  # fmt: skip

    def bound(self, weight: Weight) -> np.ndarray:
        """The greatest error of each result: half a step for each number, and the rounding of a float32 sum."""
        sizes, x = np.abs(weight.meaning), np.abs(self.x.astype(np.float64))
        steps = np.zeros_like(x)
        if self.digits:
            greatest = x.reshape(len(x), -1, 32).max(axis=2)
            top = features.DIGIT_MAX[self.digits] * 128.0 ** (self.digits - 1)
            steps = np.repeat(greatest * 0.5 / top, 32, axis=1)
        # A zero point or minimum is taken off at the end, so that the sums are of larger numbers than the weights.
        larger = np.maximum(sizes, sizes.reshape(len(sizes), -1).max()) if self.digits else sizes
        return 1.001 * steps @ sizes.T + 2e-6 * (x @ larger.T)


def product(w: Weight, a: Activations, tokens: int, bias: np.ndarray | None = None, mode: int = 0, parts: int = 1
            ) -> np.ndarray:  # fmt: skip
    """What ``linear`` writes, in an array with room on both sides that must stay as it is."""
    y = np.full((tokens + 1, w.rows + 5), SENTINEL)
    panels = -(-w.rows // 16)
    for part in range(parts):
        g0, g1 = panels * part // parts, panels * (part + 1) // parts
        run(
            address(product_kernel(w.format, a.form)), w.packed.ctypes.data, w.columns, a.rows.ctypes.data, a.stride,
            y.ctypes.data, y.shape[1], tokens, g0, g1, w.rows, 0 if bias is None else bias.ctypes.data, mode,
        )  # fmt: skip
    assert_array_equal(y[:, w.rows :], SENTINEL)
    assert_array_equal(y[tokens:], SENTINEL)
    return y[:tokens, : w.rows]


def columns_of(format: str) -> list[int]:
    size = FORMATS[format].block_size
    return {1: [1, 33, 77], 32: [32, 96], 256: [256, 768]}[size]


def check_gated_unit(format: str, tokens: int, form: int | None, cut: int) -> None:
    """``linear_glu`` in two parts, cut at panel ``cut``, gives what two products and the activation give."""
    rows, columns = 90, 256
    gate, up = Weight(format, rows, columns, seed=1), Weight(format, rows, columns, seed=2)
    bias = np.random.default_rng(0).standard_normal(rows, np.float32)
    a = Activations(gate, tokens, form, spread=0.1)
    expected = FUNCTIONS["silu"](product(gate, a, tokens) + bias) * product(up, a, tokens)
    y = np.full((tokens, rows + 3), SENTINEL)
    code, panels = address(product_kernel(format, a.form)), -(-rows // 16)
    for g0, g1 in ((0, cut), (cut, panels)):
        linear_glu(
            code, gate.packed.ctypes.data, bias.ctypes.data, code, up.packed.ctypes.data, 0, columns,
            a.rows.ctypes.data, a.stride, y.ctypes.data, rows + 3, tokens, g0, g1, rows, ACTIVATION_CODES["silu"],
            glu_chunk(a.form, columns),
        )  # fmt: skip
    assert_array_equal(y[:, rows:], SENTINEL)
    assert_allclose(y[:, :rows], expected, rtol=1e-5, atol=1e-5)
