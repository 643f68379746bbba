"""``linear`` of every format against float64 products with the dequantized weight, at every feature level.

The bound for quantized formats is the one that the size of an activation's last digit gives, number by number; nothing
is averaged. It is checked with float32's own rounding on top.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_array_equal

pytest.importorskip("numba")

from labinfer.backends.cpu import features, isa
from labinfer.backends.cpu.layout import PANEL_FORMATS, activation_bytes, activation_digits, packed_bytes
from labinfer.backends.cpu.linear import linear, linear_glu
from labinfer.backends.cpu.machine_code import address
from labinfer.backends.cpu.packed_weight import pack
from labinfer.backends.cpu.quantize import quantize_row
from labinfer.backends.cpu.tape import ACCUMULATE, ACTIVATION_CODES
from labinfer.ops.activations import FUNCTIONS
from labinfer.ops.dequantization import dequantize
from labinfer.ops.formats import FORMATS
from tests.cpu.weights import aligned, stored_weight

FEW = ["q4_1", "q6_k", "bf16"]
SENTINEL = np.float32(12345.0)


@isa.njit
def quantize_rows(digits: int, x: int, columns: int, tokens: int, out: int, stride: int) -> None:
    for t in range(tokens):
        quantize_row(digits, x + t * columns * 4, columns, out + t * stride)


@isa.njit
def run(
    code: int, w: int, columns: int, x: int, x_stride: int, y: int, y_stride: int, tokens: int, g0: int, g1: int,
    rows: int, bias: int, mode: int,
) -> None:  # fmt: skip
    linear(code, w, columns, x, x_stride, y, y_stride, tokens, g0, g1, rows, bias, mode)


def code_of(format: str, digits: int = 2) -> int:
    return address(f"linear/{format}/{activation_digits(format, digits)}")


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

    def __init__(self, weight: Weight, tokens: int, digits: int = 2, spread: float = 1.0) -> None:
        rng = np.random.default_rng([tokens, weight.columns])
        sizes = np.exp(spread * rng.standard_normal((tokens, weight.columns)))
        self.x = (rng.standard_normal((tokens, weight.columns)) * sizes).astype(np.float32)
        self.stride = activation_bytes(weight.format, weight.columns, digits)
        self.digits = activation_digits(weight.format, digits)
        self.rows = aligned(tokens * self.stride, fill=0xFF)
        quantize_rows(
            self.digits, self.x.ctypes.data, weight.columns, tokens, self.rows.ctypes.data, self.stride
        )  # fmt: skip

    def bound(self, weight: Weight) -> np.ndarray:
        """The greatest error of each result: half a step for each number, and the rounding of a float32 sum."""
        sizes, x = np.abs(weight.meaning), np.abs(self.x.astype(np.float64))
        steps = np.zeros_like(x)
        if self.digits:
            greatest = x.reshape(len(x), -1, 32).max(axis=2)
            steps = np.repeat(greatest * 0.5 / (features.DIGIT_MAX * 128.0 ** (self.digits - 1)), 32, axis=1)
        # A zero point or minimum is taken off at the end, so that the sums are of larger numbers than the weights.
        larger = np.maximum(sizes, sizes.reshape(len(sizes), -1).max()) if self.digits else sizes
        return 1.001 * steps @ sizes.T + 2e-6 * (x @ larger.T)


def product(w: Weight, a: Activations, tokens: int, bias: np.ndarray | None = None, mode: int = 0, parts: int = 1,
            digits: int = 2) -> np.ndarray:  # fmt: skip
    """What ``linear`` writes, in an array with room on both sides that must stay as it is."""
    y = np.full((tokens + 1, w.rows + 5), SENTINEL)
    panels = -(-w.rows // 16)
    for part in range(parts):
        g0, g1 = panels * part // parts, panels * (part + 1) // parts
        run(
            code_of(w.format, digits), w.packed.ctypes.data, w.columns, a.rows.ctypes.data, a.stride, y.ctypes.data,
            y.shape[1], tokens, g0, g1, w.rows, 0 if bias is None else bias.ctypes.data, mode,
        )  # fmt: skip
    assert_array_equal(y[:, w.rows :], SENTINEL)
    assert_array_equal(y[tokens:], SENTINEL)
    return y[:tokens, : w.rows]


def columns_of(format: str) -> list[int]:
    size = FORMATS[format].block_size
    return {1: [1, 33, 77], 32: [32, 96], 256: [256, 768]}[size]


@pytest.mark.parametrize("format", PANEL_FORMATS)
def test_every_number_of_tokens(format):
    w = Weight(format, 50, columns_of(format)[-1])
    a = Activations(w, 64)
    exact, bound = a.x.astype(np.float64) @ w.meaning.T, a.bound(w)
    for tokens in range(1, 65):
        assert (np.abs(product(w, a, tokens) - exact[:tokens]) <= bound[:tokens]).all()


@pytest.mark.parametrize("format", PANEL_FORMATS)
def test_odd_sizes_bias_accumulation_and_shares(format):
    for rows in (1, 16, 33, 80):
        for columns in columns_of(format):
            w, bias = Weight(format, rows, columns), np.random.default_rng(rows).standard_normal(rows, np.float32)
            for tokens in (1, 5, 40):
                a = Activations(w, tokens)
                exact, bound = a.x.astype(np.float64) @ w.meaning.T, a.bound(w) + 1e-5
                assert (np.abs(product(w, a, tokens, bias, parts=3) - (exact + bias)) <= bound).all()
                added = product(w, a, tokens, bias, ACCUMULATE, parts=2) - SENTINEL
                assert (np.abs(added - (exact + bias)) <= bound + 4e-3).all()  # 12345 has steps of 1e-3


@pytest.mark.parametrize("format", PANEL_FORMATS)
def test_a_large_product_is_within_the_stated_error(format):
    w = Weight(format, 96, 1536)
    a = Activations(w, 3, spread=0.5)
    exact = a.x.astype(np.float64) @ w.meaning.T
    error = np.abs(product(w, a, 3) - exact).max() / np.abs(exact).max()
    assert error <= (2e-6 if not a.digits else 2e-4 if features.DIGIT_MAX == 127 else 4e-4)


@pytest.mark.parametrize("format", [name for name, layout in PANEL_FORMATS.items() if layout.quantized])
def test_one_digit(format):
    w = Weight(format, 40, columns_of(format)[-1])
    for tokens in (1, 4, 13):
        a = Activations(w, tokens, digits=1)
        error = np.abs(product(w, a, tokens, digits=1) - a.x.astype(np.float64) @ w.meaning.T)
        assert (error <= a.bound(w)).all()
        assert error.max() > 0  # it is the lossy one


@pytest.mark.parametrize("format", FEW)
def test_more_tokens_than_a_chunk(format):
    w = Weight(format, 48, 256)
    a = Activations(w, 150)
    together = product(w, a, 150)
    assert (np.abs(together - a.x.astype(np.float64) @ w.meaning.T) <= a.bound(w)).all()
    alone = Activations(w, 150)
    alone.rows = alone.rows[149 * alone.stride :]
    np.testing.assert_allclose(product(w, alone, 1)[0], together[149], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FEW)
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_gated_unit(format, tokens):
    rows, columns = 90, 256
    gate, up = Weight(format, rows, columns, seed=1), Weight(format, rows, columns, seed=2)
    bias = np.random.default_rng(0).standard_normal(rows, np.float32)
    a = Activations(gate, tokens, spread=0.1)
    expected = FUNCTIONS["silu"](product(gate, a, tokens) + bias) * product(up, a, tokens)
    y = np.full((tokens, rows + 3), SENTINEL)
    code, panels = code_of(format), -(-rows // 16)
    for g0, g1 in ((0, 2), (2, panels)):
        linear_glu(
            code, gate.packed.ctypes.data, bias.ctypes.data, code, up.packed.ctypes.data, 0, columns,
            a.rows.ctypes.data, a.stride, y.ctypes.data, rows + 3, tokens, g0, g1, rows, ACTIVATION_CODES["silu"],
        )  # fmt: skip
    assert_array_equal(y[:, rows:], SENTINEL)
    np.testing.assert_allclose(y[:, :rows], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["q4_0", "q8_0", "f32"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_reach_every_result(format, poison):
    w = Weight(format, 20, 64)
    a = Activations(w, 2)
    a.x[1, 40] = poison
    quantize_rows(a.digits, a.x.ctypes.data, 64, 2, a.rows.ctypes.data, a.stride)
    y = product(w, a, 2)
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


def test_zero_and_tiny_activations():
    w = Weight("q4_1", 20, 64)
    a = Activations(w, 2)
    a.x[0], a.x[1] = 0.0, 1e-38
    quantize_rows(2, a.x.ctypes.data, 64, 2, a.rows.ctypes.data, a.stride)
    y = product(w, a, 2)
    assert not y[0].any()
    assert np.abs(y[1]).max() < 1e-30


@pytest.mark.skipif("LABINFER_CPU_ISA" in os.environ, reason="this is the run at a forced level")
@pytest.mark.parametrize("level", features.LEVELS[features.LEVELS.index(features.LEVEL) + 1 :])
def test_lower_feature_levels(level):
    """This file and that of the panels once more, but for what compiles or runs long, where less of the CPU is used."""
    files = [__file__, __file__.replace("test_linear", "test_panels")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", "not every_number and not one_digit"]
    result = subprocess.run(command, env={**os.environ, "LABINFER_CPU_ISA": level}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_a_level_the_cpu_has_not_is_refused():
    env = {**os.environ, "LABINFER_CPU_ISA": "avx1024"}
    result = subprocess.run(
        [sys.executable, "-c", "import labinfer.backends.cpu.features"], env=env, capture_output=True
    )
    assert b"LABINFER_CPU_ISA is 'avx1024', this CPU has" in result.stderr
