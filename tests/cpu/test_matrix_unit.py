"""``linear`` on the matrix unit: bf16 weights against float64 products, quantized ones against the vector kernels.

Three parts of an activation are all of it, and bf16 weights are exact. One part: ``2**-9`` each, of other weights
too. Two digits give the same bits as on vectors. A lone token with bf16 weights does not use the unit and has its bits.
"""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

pytest.importorskip("numba")

from labinfer.backends.cpu.features import has_matrix_unit
from labinfer.backends.cpu.layout import (
    CHUNK_TOKENS,
    DIGIT_TILES,
    PANEL_FORMATS,
    PANEL_ROWS,
    STRETCH_COLUMNS,
    SUMS_TOKENS,
)
from labinfer.backends.cpu.tape import ACCUMULATE
from tests.cpu.products import SENTINEL, Activations, Weight, check_gated_unit, product, quantize_rows

pytestmark = pytest.mark.skipif(not has_matrix_unit(), reason="this CPU has no matrix unit")

QUANTIZED = [format for format, layout in PANEL_FORMATS.items() if layout.quantized]
FEW = ["q4_1", "q6_k", "q8_0", "bf16"]


def exact_and_bound(w: Weight, a: Activations) -> tuple[np.ndarray, np.ndarray]:
    """The product and what each number may be off by."""
    exact = a.x.astype(np.float64) @ w.meaning.T
    if a.form == DIGIT_TILES:
        return exact, a.bound(w)
    worst = {-1: 2.0**-7.9, -3: 0.0}[a.form] + 2e-6
    return exact, worst * (np.abs(a.x) @ np.abs(w.meaning).T)


def exact_form(format: str) -> int:
    return DIGIT_TILES if PANEL_FORMATS[format].quantized else -3


@pytest.mark.parametrize(("format", "parts"), [("bf16", 3), *((each, 1) for each in [*QUANTIZED, "bf16", "f16"])])
def test_every_number_of_tokens(format, parts):
    w = Weight(format, 50, 256)
    for tokens in (*range(1, 35), 47, 48, 64, 65):
        a = Activations(w, tokens, -parts)
        exact, bound = exact_and_bound(w, a)
        assert (np.abs(product(w, a, tokens) - exact) <= bound).all()


@pytest.mark.parametrize("format", QUANTIZED)
def test_digits_give_the_bits_of_the_vector_kernels(format):
    few, sums = (*range(1, 35), 47, 48, 65, 2 * CHUNK_TOKENS + 20), 2 * SUMS_TOKENS // 160  # panels with room for sums
    for rows, columns, counts in (
        (50, 256, few),
        (33, STRETCH_COLUMNS + 512, (1, 70)),
        (2 * PANEL_ROWS * sums + 3, STRETCH_COLUMNS + 512, (160,)),
    ):
        w, bias = Weight(format, rows, columns), np.random.default_rng(rows).standard_normal(rows, np.float32)
        for tokens in counts:
            on_vectors = product(w, Activations(w, tokens, 2), tokens, bias, ACCUMULATE)
            on_tiles = product(w, Activations(w, tokens, DIGIT_TILES), tokens, bias, ACCUMULATE, parts=2)
            assert_array_equal(on_tiles, on_vectors)


@pytest.mark.parametrize("format", FEW)
def test_odd_sizes_bias_accumulation_and_shares(format):
    for rows in (1, 16, 33, 80, 112):
        w, bias = Weight(format, rows, 256), np.random.default_rng(rows).standard_normal(rows, np.float32)
        for tokens in (1, 5, 40):
            a = Activations(w, tokens, exact_form(format))
            exact, bound = exact_and_bound(w, a)
            assert (np.abs(product(w, a, tokens, bias, parts=3) - (exact + bias)) <= bound + 1e-5).all()
            added = product(w, a, tokens, bias, ACCUMULATE, parts=2) - SENTINEL
            assert (np.abs(added - (exact + bias)) <= bound + 5e-3).all()  # 12345 has steps of 1e-3


@pytest.mark.parametrize("format", FEW)
def test_more_than_a_chunk_and_a_stretch(format):
    w = Weight(format, 48, STRETCH_COLUMNS + 512)
    a = Activations(w, 2 * CHUNK_TOKENS + 20, exact_form(format), spread=0.5)
    exact, bound = exact_and_bound(w, a)
    y = product(w, a, len(a.x))
    assert (np.abs(y - exact) <= bound).all()
    assert np.abs(y - exact).max() <= (2e-4 if a.form == DIGIT_TILES else 2e-6) * np.abs(exact).max()


@pytest.mark.parametrize(("format", "form"), [("q4_0", DIGIT_TILES), ("bf16", -3), ("bf16", -1)])
@pytest.mark.parametrize("columns", [576, STRETCH_COLUMNS + 512])
def test_a_row_does_not_depend_on_its_neighbours(format, form, columns):
    w = Weight(format, 80, columns)
    a = Activations(w, 300, form)
    together = product(w, a, 300)
    for first, count in ((0, 1), (16, 20), (288, 12), (288, 1)):
        alone = Activations(w, 300, form)
        alone.rows = alone.rows[first * alone.stride :]
        assert_array_equal(product(w, alone, count), together[first : first + count])


@pytest.mark.parametrize("format", FEW)
@pytest.mark.parametrize("tokens", [1, 70, 600])
def test_gated_unit(format, tokens):
    check_gated_unit(format, tokens, exact_form(format), cut=3)


@pytest.mark.parametrize("form", [-2, -1])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_reach_every_result(poison, form):
    w = Weight("q4_0", 20, 64)
    a = Activations(w, 2, form)
    a.x[1, 40] = poison
    quantize_rows(a.form, a.x.ctypes.data, 64, 2, a.rows.ctypes.data, a.stride)
    y = product(w, a, 2)
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()
