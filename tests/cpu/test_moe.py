"""Routing and grouping of the CPU backend's mixture of experts against the ops' references."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("numba")

from labinfer.backends.cpu import elementwise
from labinfer.backends.cpu import moe as cpu
from labinfer.backends.cpu.workspace import route_scratch
from labinfer.ops import OPS, Call
from labinfer.ops.activations import FUNCTIONS


@pytest.fixture
def rng():
    return np.random.default_rng(17)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def route(attrs, logits, bias=None, cuts=()):
    """The kernel's choice; ``logits`` may be a window."""
    tokens = len(logits)
    groups = (attrs.num_groups or 1, attrs.top_groups or attrs.num_groups or 1)
    flags = (int(attrs.score == "sigmoid"), int(attrs.normalize), attrs.scale)
    address = 0 if bias is None else bias.ctypes.data
    routing = cpu.Routing(attrs.num_experts, attrs.top_k, *flags, *groups, int(attrs.group_score == "top2"), address)
    ids, weights = np.full((tokens, attrs.top_k), -1, np.int32), np.zeros((tokens, attrs.top_k), np.float32)
    for start, stop in zip((0, *cuts), (*cuts, tokens), strict=True):
        scratch = np.full(route_scratch(attrs.num_experts, groups[0]) + 4, 0xFF, np.uint8)
        stride = logits.strides[0] // 4
        args = (logits.ctypes.data, stride, routing, ids.ctypes.data, weights.ctypes.data, scratch.ctypes.data)
        cpu.route(*args, start, stop)
        assert (scratch[-4:] == 0xFF).all(), "wrote beyond its workspace"
    return ids, weights


def reference_route(attrs, logits, bias=None):
    """The op's reference with an identity for its weight, so that the logits are exactly these."""
    weights = {"weight": np.eye(attrs.num_experts, dtype=np.float32)}
    if bias is not None:
        weights["bias"] = bias
    return OPS["router"].reference(Call(attrs, (logits,), weights=weights))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_experts": 8, "top_k": 2},
        {"num_experts": 7, "top_k": 7},
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 64, "top_k": 6, "num_groups": 8, "top_groups": 3},
        {"num_experts": 32, "top_k": 8, "num_groups": 8, "top_groups": 4, "group_score": "top2"},
        {"num_experts": 128, "top_k": 8, "num_groups": 1, "top_groups": 1},
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_route(rng, score, normalize, shape, biased):
    attrs = OPS["router"].Attrs(score=score, normalize=normalize, scale=2.5, **shape)
    logits = normal(rng, 37, attrs.num_experts + 3)[:, 1:-2]
    bias = normal(rng, attrs.num_experts) if biased else None
    ids, weights = route(attrs, logits, bias, (5, 30))
    expected_ids, expected_weights = reference_route(attrs, logits, bias)
    assert_array_equal(ids, expected_ids)
    assert_allclose(weights, expected_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "top_groups": 2, "group_score": "top2"}])
def test_ties_go_to_the_lower_expert(groups):
    attrs = OPS["router"].Attrs(num_experts=8, top_k=3, **groups)
    logits = np.zeros((2, 8), np.float32)
    logits[1, [3, 6]] = 1
    ids, _ = route(attrs, logits)
    assert_array_equal(ids, reference_route(attrs, logits)[0])
    assert_array_equal(ids[0], [0, 1, 2])


def test_logits_that_are_no_numbers_still_name_experts():
    ids, _ = route(OPS["router"].Attrs(num_experts=8, top_k=3), np.full((1, 8), np.nan, np.float32))
    assert ((ids >= 0) & (ids < 8)).all()


@pytest.mark.parametrize("tokens", [1, 2, 70])
@pytest.mark.parametrize("function", ["silu", "gelu_tanh"])
def test_the_steps_of_a_moe(rng, tokens, function):
    """The tape of the module's docstring, with numpy for the products."""
    experts, k, d, size = 11, 3, 20, 12
    ids = np.stack([rng.permutation(experts - 2)[:k] for _ in range(tokens)]).astype(np.int32)
    weights, x = rng.uniform(0, 1, (tokens, k)).astype(np.float32), normal(rng, tokens, d)
    gate, up, down = normal(rng, experts, size, d), normal(rng, experts, size, d), normal(rng, experts, d, size)

    bounds, rows, places = (np.full(n, -1, np.int32) for n in (experts + 1, tokens * k, tokens * k))
    addresses = (bounds.ctypes.data, rows.ctypes.data, places.ctypes.data)
    cpu.group_by_expert(ids.ctypes.data, tokens * k, k, 0, experts, *addresses)
    gathered, results = np.empty((tokens * k, d), np.float32), np.empty((tokens * k, d), np.float32)
    elementwise.select_rows(x.ctypes.data, d, rows.ctypes.data, gathered.ctypes.data, d, d, 0, tokens * k)
    for e in range(experts):
        part = slice(bounds[e], bounds[e + 1])
        assert_array_equal(rows[part], np.nonzero((ids == e).any(axis=1))[0])
        hidden = FUNCTIONS[function](gathered[part] @ gate[e].T) * (gathered[part] @ up[e].T)
        results[part] = hidden @ down[e].T
    y = np.full((tokens, d + 2), np.nan, np.float32)
    for start, stop in ((0, tokens // 2), (tokens // 2, tokens)):
        sums = (weights.ctypes.data, places.ctypes.data, k, y.ctypes.data, d + 2, d)
        cpu.combine(results.ctypes.data, d, *sums, start, stop)

    attrs = OPS["moe"].Attrs(num_experts=experts, expert_size=size, function=function)
    call = Call(attrs, (x, ids, weights), weights={"gate": gate, "up": up, "down": down})
    assert_allclose(y[:, :d], OPS["moe"].reference(call)[0], rtol=1e-5, atol=1e-4)
    assert np.isnan(y[:, d:]).all()
