"""Sampling of the CPU backend against the runtime's sampler, random number by random number."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

pytest.importorskip("numba")

from ctypes import c_double, c_int64

from labinfer.backends.cpu import sampling as cpu
from labinfer.backends.cpu.machine_code import function
from labinfer.backends.cpu.workspace import sampling_scratch
from labinfer.runtime.sampling import SamplingParams, SamplingRules, SamplingState, sample

SAMPLE = function("sample", c_int64, c_int64, c_int64, c_double, c_int64, c_double, c_double, c_int64)


def logits_of(rng, n, spread=3.0):
    """Distinct numbers, so that the k-th greatest is one token."""
    x = np.unique((rng.standard_normal(2 * n) * spread).astype(np.float32))
    return rng.permutation(x)[:n].copy()


def chosen(logits, params, random):
    n = len(logits)
    workspace = np.full(sampling_scratch(n) + 8, 0xFF, np.uint8)
    before = logits.copy()
    args = (n, float(params.temperature), params.top_k, float(params.top_p), random, workspace.ctypes.data)
    token = SAMPLE(logits.ctypes.data, *args)
    assert (workspace[-8:] == 0xFF).all(), "wrote beyond its workspace"
    np.testing.assert_array_equal(logits, before)
    return token


def check(logits, seed, **params):
    params = SamplingParams(**params)
    state = SamplingState(SamplingRules(params, len(logits)), seed)
    wanted = sample(logits[np.newaxis], {0: state}).tokens[0]
    assert chosen(logits, params, state.random) == wanted


@pytest.mark.parametrize("n", [1, 2, 7, 16, 100, 49152])
@pytest.mark.parametrize("temperature", [0.0, 1e-4, 0.3, 1.0, 5.0, 1000.0])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"top_k": -1},
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {"top_k": 5, "top_p": 0.5},
        {"top_k": 10**6, "top_p": 0.999},
    ],
    ids=str,
)
def test_the_runtime_samplers_tokens(n, temperature, limits):
    rng = np.random.default_rng(n)
    logits = logits_of(rng, n)
    for seed in range(20 if n < 1000 else 5):
        check(logits, seed, temperature=temperature, **limits)


def test_equal_logits_come_in_the_order_of_their_ids():
    logits = np.repeat(np.float32([2, 5, 5, -1]), 30)
    for seed in range(50):
        check(logits, seed, temperature=1.0)
        check(logits, seed, temperature=2.0, top_p=0.7)
    tokens = {chosen(logits, SamplingParams(top_k=10), random) for random in np.linspace(0, 0.999, 60)}
    assert tokens == set(range(30, 40))


def test_masked_tokens_are_never_chosen():
    logits = np.full(500, -np.inf, np.float32)
    logits[[3, 77, 400]] = [1, 2, 1.5]
    tokens = {chosen(logits, SamplingParams(), random) for random in np.linspace(0, 1, 100, endpoint=False)}
    assert tokens == {3, 77, 400}
    for seed in range(50):
        check(logits, seed, temperature=1.0, top_p=0.95)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_named(bad, temperature):
    logits = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    logits[[41, 90]] = bad
    assert chosen(logits, SamplingParams(temperature=temperature), 0.5) == -1 - 41
    assert "token 41" in sample(logits[np.newaxis], {}).errors[0].message
    assert chosen(np.full(5, -np.inf, np.float32), SamplingParams(), 0.5) == -1


@pytest.mark.parametrize("n", [1, 15, 16, 33, 1000])
def test_argmax_takes_the_first(n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        x = rng.integers(-5, 5, n).astype(np.float32)
        assert cpu.argmax(x.ctypes.data, n) == np.argmax(x)
        x[rng.integers(0, n)] = np.nan
        assert cpu.argmax(x.ctypes.data, n) == np.argmax(x)


def test_weights_are_exact_to_float64():
    x = np.linspace(-600, 0, 1003, dtype=np.float32)
    given, weights = np.array([0.0, 1.0]), np.empty(len(x))

    workspace = np.zeros(sampling_scratch(len(x)), np.uint8)
    SAMPLE(x.ctypes.data, len(x), given[1], 0, 1.0, 0.5, workspace.ctypes.data)
    start = 16 + 16 * cpu.BUCKETS
    weights = workspace[start : start + 8 * len(x)].view(np.float64)
    assert_allclose(weights, np.exp(x.astype(np.float64)), rtol=2e-15)
