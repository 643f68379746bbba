"""Element-wise kernels, copies and norms of the CPU backend against the ops' own references."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("numba")

from labinfer.backends.cpu import elementwise, norm
from labinfer.ops import OPS, Call
from labinfer.ops.activations import FUNCTIONS

SIZES = [1, 15, 16, 33, 576]


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def window(rng, rows, n, spread=3.0):
    """A [rows, n] window of a wider array, and its address and row stride in floats."""
    wide = (rng.standard_normal((rows, n + 7)) * spread).astype(np.float32)
    return wide[:, 3 : n + 3]


def row_args(x):
    return x.ctypes.data, x.strides[0] // 4


def reference(kind, attrs, *inputs, **weights):
    spec = OPS[kind]
    return spec.reference(Call(spec.Attrs(**attrs), inputs, weights=weights))[0]


def check(y, expected, untouched=None, atol=1e-6):
    assert_allclose(y, expected, rtol=1e-5, atol=atol)
    if untouched is not None:
        assert_array_equal(y.base[:, :3], untouched[:, :3])
        assert_array_equal(y.base[:, 3 + y.shape[1] :], untouched[:, 3 + y.shape[1] :])


@pytest.mark.parametrize("n", SIZES)
def test_add_scale_softcap(rng, n):
    a, b, y = (window(rng, 5, n) for _ in range(3))
    before = y.base.copy()
    elementwise.add(*row_args(a), *row_args(b), *row_args(y), n, 0, 5)
    check(y, reference("add", {}, a, b), before)
    elementwise.scale(*row_args(a), *row_args(y), n, 0.3, 0, 5)
    check(y, reference("scale", {"by": 0.3}, a), before)
    elementwise.softcap(*row_args(a), *row_args(y), n, 2.5, 0, 5)
    check(y, reference("softcap", {"cap": 2.5}, a), before)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("n", SIZES)
def test_activation_and_glu(rng, function, n):
    x, up, y = window(rng, 4, n, 5.0), window(rng, 4, n), window(rng, 4, n)
    code, before = elementwise.ACTIVATION_CODES[function], y.base.copy()
    # Left of zero gelu is a small difference: the kernel's error there, and the reference's, is that of 1 in float32.
    atol = 1e-5 if "gelu" in function else 1e-6
    elementwise.activation(code, *row_args(x), *row_args(y), n, 0, 4)
    check(y, reference("activation", {"function": function}, x), before, atol)
    elementwise.glu(code, *row_args(x), *row_args(up), *row_args(y), n, 0, 4)
    expected = reference("glu", {"function": function}, x, up)
    check(y, expected, before, atol)
    elementwise.glu(code, *row_args(x), *row_args(up), *row_args(x), n, 0, 4)
    check(x, expected, atol=atol)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activation_of_great_numbers_and_of_no_number(function):
    x = np.array([-1e30, -200, -50, -0.0, 1e-30, 50, 200, 1e9, np.nan], np.float32)
    y = np.empty_like(x)
    elementwise.activation(elementwise.ACTIVATION_CODES[function], x.ctypes.data, 0, y.ctypes.data, 0, len(x), 0, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = reference("activation", {"function": function}, x[None, :])[0]
    finite = np.isfinite(expected)
    assert_allclose(y[finite], expected[finite], rtol=1e-5, atol=1e-6)
    assert np.isnan(y[-1])


def test_only_the_rows_asked_for(rng):
    x, y = window(rng, 6, 20), window(rng, 6, 20)
    before = y.copy()
    elementwise.copy_rows(*row_args(x), *row_args(y), 20, 2, 4)
    assert_array_equal(y[2:4], x[2:4])
    assert_array_equal(np.delete(y, [2, 3], 0), np.delete(before, [2, 3], 0))


@pytest.mark.parametrize("n", SIZES)
def test_select_rows(rng, n):
    x, index = window(rng, 9, n), rng.integers(0, 9, 12).astype(np.int32)
    y = window(rng, 12, n)
    before = y.base.copy()
    elementwise.select_rows(*row_args(x), index.ctypes.data, *row_args(y), n, 0, 12)
    check(y, x[index], before)


@pytest.mark.parametrize("group", [1, 16, 24, 33, 64])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(rng, group, groups, offset, weighted):
    n = group * groups
    x, y = window(rng, 3, n), window(rng, 3, n)
    before, weight = y.base.copy(), rng.standard_normal(group).astype(np.float32)
    address, weights = (weight.ctypes.data, {"weight": weight}) if weighted else (0, {})
    attrs = {"eps": 1e-5, "offset": offset, "group": group if groups > 1 else None}
    norm.rms_norm(*row_args(x), address, *row_args(y), n, group, 1e-5, offset, 0, 3)
    expected = reference("rms_norm", attrs, x, **weights)
    check(y, expected, before)
    norm.rms_norm(*row_args(x), address, *row_args(x), n, group, 1e-5, offset, 0, 3)
    check(x, expected)


@pytest.mark.parametrize("n", SIZES[1:])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm(rng, n, biased):
    x, y = window(rng, 3, n) + 4, window(rng, 3, n)
    before = y.base.copy()
    weights = {"weight": rng.standard_normal(n).astype(np.float32)}
    if biased:
        weights["bias"] = rng.standard_normal(n).astype(np.float32)
    bias = weights["bias"].ctypes.data if biased else 0
    norm.layer_norm(*row_args(x), weights["weight"].ctypes.data, bias, *row_args(y), n, 1e-5, 0, 3)
    check(y, reference("layer_norm", {"eps": 1e-5}, x, **weights), before)
