"""Rotary embedding of the CPU backend, from tables and fused with the cache write, against the op's reference."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("numba")

from labinfer.backends.cpu import rope as cpu
from labinfer.backends.cpu.paged_cache import CACHE_DTYPES, kv_write
from labinfer.backends.rope_tables import rope_tables
from labinfer.ops import OPS, Call, Step

MAX_LEN = 200
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 4.0, 8.0, 9.0]}
CASES = {
    "half": {"head_dim": 64},
    "interleaved": {"head_dim": 64, "style": "interleaved"},
    "partial": {"head_dim": 80, "rotary_dim": 32},
    "small": {"head_dim": 6, "style": "interleaved"},
    "start": {"head_dim": 48, "rotary_start": 32, "style": "interleaved"},
    "odd": {"head_dim": 10, "rotary_dim": 5},
    "llama3": {"head_dim": 32, "scaling": LLAMA3, "max_position": 512, "original_max_position": 64},
    "yarn": {"head_dim": 32, "scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position": 64},
    "longrope": {"head_dim": 8, "scaling": LONGROPE, "max_position": 128, "original_max_position": 64},
    "dynamic": {"head_dim": 32, "scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position": 64},
}


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def step_of(rng):
    """Three sequences: short ones, and two that are longer than 64 of which one has only begun."""
    spans = [(0, 7, 7), (60, 71, 71), (10, 14, 90), (199, 200, 200)]
    positions = np.concatenate([np.arange(first, last) for first, last, _ in spans]).astype(np.int32)
    start = np.cumsum([0] + [last - first for first, last, _ in spans]).astype(np.int32)
    context = np.array([last for _, last, _ in spans], np.int32)
    total = np.array([total for _, _, total in spans], np.int32)
    slots = rng.permutation(96)[: len(positions)].astype(np.int32)
    return Step(positions, positions, start, context, total, np.zeros((4, 1), np.int32), slots, start[1:] - 1, 16)


def turn_of(attrs, step, weights):
    """The tables of a rope and what the kernels need of it; the arrays must outlive the calls."""
    tables = rope_tables(attrs, MAX_LEN, **weights)
    rows, half = step.positions.copy(), attrs.turned // 2
    spans = (step.query_start.ctypes.data, step.total_len.ctypes.data, len(step.total_len), step.positions.ctypes.data)
    if attrs.recompute_after:
        cpu.longrope_rows(*spans, attrs.recompute_after, MAX_LEN, rows.ctypes.data)
    elif attrs.length_dependent:
        tables = np.full((len(rows), 2, half), np.nan, np.float32)
        factors = weights["freq_factors"].ctypes.data if weights else 0
        sizes = (attrs.rotary_dim or attrs.turned, half, attrs.theta, attrs.scaling.factor, attrs.max_position)
        cpu.dynamic_table(*spans, factors, *sizes, tables.ctypes.data, rows.ctypes.data)
    geometry = (attrs.head_dim, attrs.rotary_start, half, int(attrs.style == "interleaved"))
    return cpu.Turn(tables.ctypes.data, rows.ctypes.data, *geometry), (tables, rows)


def case(name, rng, divided):
    attrs = OPS["rope"].Attrs(theta=10000.0, **CASES[name])
    weights = {}
    if divided:
        weights["freq_factors"] = rng.uniform(1, 4, attrs.turned // 2).astype(np.float32)
        if name == "longrope":
            weights["long_freq_factors"] = rng.uniform(1, 4, attrs.turned // 2).astype(np.float32)
    return attrs, weights


def reference(attrs, x, step, weights):
    return OPS["rope"].reference(Call(attrs, (x, step.positions), weights=weights, step=step))[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("divided", [False, True])
def test_rope(rng, name, heads, divided):
    attrs, weights = case(name, rng, divided)
    step, n = step_of(rng), heads * attrs.head_dim
    turn, _alive = turn_of(attrs, step, weights)
    tokens = len(step.positions)
    x, y = normal(rng, tokens, n + 4)[:, 1:-3], normal(rng, tokens, n)
    expected, before = reference(attrs, x, step, weights), y.copy()
    x_stride = x.strides[0] // 4
    cpu.rope(x.ctypes.data, x_stride, y.ctypes.data, n, heads, turn, 3, tokens)
    assert_allclose(y[3:], expected[3:], rtol=1e-5, atol=2e-6)
    assert_array_equal(y[:3], before[:3])
    cpu.rope(x.ctypes.data, x_stride, x.ctypes.data, x_stride, heads, turn, 0, tokens)
    assert_allclose(x, expected, rtol=1e-5, atol=2e-6)


def test_tables_agree_with_the_reference_bit_for_bit(rng):
    """Half of the pairs' angles times one: what the reference multiplies is what stands in the table."""
    attrs, weights = case("llama3", rng, True)
    step = step_of(rng)
    x = np.zeros((len(step.positions), attrs.head_dim), np.float32)
    x[:, : attrs.turned // 2] = 1
    tables = rope_tables(attrs, MAX_LEN, **weights)
    assert_array_equal(tables[step.positions].reshape(x.shape), reference(attrs, x, step, weights))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["half", "interleaved", "partial", "longrope"])
def test_rope_kv_write_is_its_parts(rng, dtype, in_place, name):
    attrs, weights = case(name, rng, False)
    step, tokens, block_size, code = step_of(rng), 23, 16, CACHE_DTYPES[dtype]
    turn, _alive = turn_of(attrs, step, weights)
    q, k = (normal(rng, tokens, heads * attrs.head_dim) for heads in (4, 2))
    v, size = normal(rng, tokens, 20), 4 if dtype == "f32" else 2
    widths, slots = (k.shape[1], v.shape[1]), step.slot_mapping.ctypes.data
    wanted, made = ([np.full(96 * width * size, 0xFF, np.uint8) for width in widths] for _ in range(2))

    turned_q, turned_k = np.empty_like(q), np.empty_like(k)
    for x, y, heads in ((q, turned_q, 4), (k, turned_k, 2)):
        cpu.rope(x.ctypes.data, x.shape[1], y.ctypes.data, x.shape[1], heads, turn, 0, tokens)
    for x, part, panels in ((turned_k, wanted[0], 1), (v, wanted[1], 0)):
        width = x.shape[1]
        kv_write(x.ctypes.data, width, part.ctypes.data, width, panels, code, block_size, slots, 0, tokens)

    before, y = k.copy(), q if in_place else np.empty_like(q)
    caches = (made[0].ctypes.data, made[1].ctypes.data)
    new = cpu.KeyValues(k.ctypes.data, widths[0], v.ctypes.data, widths[1], *caches, *widths, code, block_size, slots)
    scratch = np.empty(widths[0], np.float32)
    for start, stop in ((0, 9), (9, tokens)):
        q_args = (q.ctypes.data, q.shape[1], y.ctypes.data, q.shape[1], 4)
        cpu.rope_kv_write(*q_args, turn, turn, new, scratch.ctypes.data, start, stop)
    assert_array_equal(y, turned_q)
    assert_array_equal(k, before)
    for a, b in zip(made, wanted, strict=True):
        assert_array_equal(a, b)
