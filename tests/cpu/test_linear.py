"""``linear`` of every format against float64 products with the dequantized weight, at every feature level.

The bound for quantized formats is the one that the size of an activation's last digit gives, number by number; nothing
is averaged. It is checked with float32's own rounding on top.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("numba")

from labinfer.backends.cpu import features
from labinfer.backends.cpu.layout import PANEL_FORMATS
from labinfer.backends.cpu.tape import ACCUMULATE
from tests.cpu.products import SENTINEL, Activations, Weight, check_gated_unit, columns_of, product, quantize_rows

FEW = ["q4_1", "q6_k", "bf16"]


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
    assert error <= (2e-4 if a.digits else 2e-6)


@pytest.mark.parametrize("format", [name for name, layout in PANEL_FORMATS.items() if layout.quantized])
def test_one_digit(format):
    w = Weight(format, 40, columns_of(format)[-1])
    for tokens in (1, 4, 13):
        a = Activations(w, tokens, form=1)
        error = np.abs(product(w, a, tokens) - a.x.astype(np.float64) @ w.meaning.T)
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
    check_gated_unit(format, tokens, None, cut=2)


@pytest.mark.parametrize("format", ["q4_0", "q8_0", "f32"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_reach_every_result(format, poison):
    w = Weight(format, 20, 64)
    a = Activations(w, 2)
    a.x[1, 40] = poison
    quantize_rows(a.form, a.x.ctypes.data, 64, 2, a.rows.ctypes.data, a.stride)
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
