"""Each op's numpy reference against loops in float64 written from the formula, and its shape rule against both."""

import math
import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose
from pydantic import ValidationError

from labinfer.errors import InvalidFile
from labinfer.ops import OPS, Call, ShapeMismatch, Step, TensorType, spec_of
from labinfer.ops.activations import ALIASES, FUNCTIONS


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def type_of(array):
    return TensorType(("T", *array.shape[1:]), {"float32": "f32", "int32": "i32"}[str(array.dtype)])


def run(kind, attrs, *inputs, weights=None, cache=None, step=None):
    """The reference's outputs, after checking them and the weights against the op's shape rules."""
    spec = OPS[kind]
    parsed, types = spec.Attrs(**attrs), [type_of(x) for x in inputs]
    shapes = spec.weight_shapes(parsed, types)
    for name, weight in (weights or {}).items():
        assert np.shape(weight) == shapes[name]
    copies = [x.copy() for x in inputs]
    outputs = spec.reference(Call(parsed, inputs, weights=weights or {}, cache=cache or {}, step=step))
    for before, after in zip(copies, inputs, strict=True):
        assert np.array_equal(before, after), "a reference must not change its inputs"
    expected = spec.infer(parsed, types)
    assert len(outputs) == len(expected)
    for array, kind_of in zip(outputs, expected, strict=True):
        assert array.shape[1:] == kind_of.shape[1:]
        assert type_of(array).dtype == kind_of.dtype
    return outputs


def paged_step(rng, sequences, block_size=4):
    """A step of ``sequences`` [(context_len, queries)] whose cache blocks are shuffled; unused entries are invalid."""
    counts = [-(-length // block_size) for length, _ in sequences]
    blocks = rng.permutation(sum(counts) + 3).astype(np.int32)
    table = np.full((len(sequences), max(counts) + 1), 10**6, np.int32)
    positions, slots, taken = [], [], 0
    for row, (count, (length, queries)) in enumerate(zip(counts, sequences, strict=True)):
        table[row, :count] = blocks[taken : taken + count]
        taken += count
        for position in range(length - queries, length):
            positions.append(position)
            slots.append(table[row, position // block_size] * block_size + position % block_size)
    lengths = np.array([length for length, _ in sequences], np.int32)
    step = Step(
        token_ids=np.zeros(len(positions), np.int32),
        positions=np.array(positions, np.int32),
        query_start=np.cumsum([0, *(queries for _, queries in sequences)]).astype(np.int32),
        context_len=lengths,
        total_len=lengths,
        block_table=table,
        slot_mapping=np.array(slots, np.int32),
        logits_rows=np.zeros(0, np.int32),
        block_size=block_size,
    )
    return step, len(blocks) * block_size


def slot_of(step, sequence, position):
    return step.block_table[sequence, position // step.block_size] * step.block_size + position % step.block_size


def naive_attention(step, query_of, key_of, value_of, scale, window=None, softcap=None):
    """Attention of one head, token by token; the three functions give float64 vectors."""
    rows = []
    for sequence in range(len(step.context_len)):
        for token in range(step.query_start[sequence], step.query_start[sequence + 1]):
            last = step.positions[token]
            seen = range(max(0, last - window + 1) if window else 0, last + 1)
            scores = [scale * float(query_of(token) @ key_of(slot_of(step, sequence, p))) for p in seen]
            if softcap:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            rows.append(sum(w * value_of(slot_of(step, sequence, p)) for w, p in zip(weights, seen, strict=True)))
    return np.array(rows)


# Products, norms, elementwise


def test_linear_and_embedding(rng):
    x, weight, bias = normal(rng, 3, 5), normal(rng, 4, 5), normal(rng, 4)
    (y,) = run("linear", {"out_features": 4}, x, weights={"weight": weight, "bias": bias})
    expected = [[sum(x[t, i] * weight[o, i] for i in range(5)) + bias[o] for o in range(4)] for t in range(3)]
    assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    ids = np.array([2, 0, 2], np.int32)
    (rows,) = run("embedding", {"num_embeddings": 4, "embedding_dim": 5}, ids, weights={"weight": weight})
    assert np.array_equal(rows, weight[[2, 0, 2]])


def test_lora_add(rng):
    y, x = normal(rng, 7, 4), normal(rng, 7, 5)
    a, b = normal(rng, 3, 2, 5), normal(rng, 3, 4, 2)
    step, _ = paged_step(rng, [(3, 3), (5, 1), (9, 2), (1, 1)])
    attrs = {"max_loras": 3, "rank": 2}
    assert np.array_equal(run("lora_add", attrs, y, x, weights={"a": a, "b": b}, step=step)[0], y)
    step.adapter = np.array([2, -1, 0, 2], np.int32)
    (z,) = run("lora_add", attrs, y, x, weights={"a": a, "b": b}, step=step)
    for t, slot in enumerate([2, 2, 2, -1, 0, 0, 2]):
        for o in range(4):
            added = sum(b[slot, o, r] * a[slot, r, i] * x[t, i] for r in range(2) for i in range(5))
            assert z[t, o] == pytest.approx(y[t, o] + (added if slot >= 0 else 0), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(rng, group, offset):
    x, weight = normal(rng, 3, 12), normal(rng, group or 12)
    attrs = {"eps": 1e-5, "offset": offset, "group": group}
    (y,) = run("rms_norm", attrs, x, weights={"weight": weight})
    (bare,) = run("rms_norm", attrs, x)
    width = group or 12
    for t in range(3):
        for i in range(12):
            run_of = x[t, i // width * width : (i // width + 1) * width].astype(np.float64)
            normed = x[t, i] / math.sqrt((run_of**2).mean() + 1e-5)
            assert y[t, i] == pytest.approx(normed * (weight[i % width] + offset), rel=1e-5, abs=1e-6)
            assert bare[t, i] == pytest.approx(normed, rel=1e-5, abs=1e-6)


def test_layer_norm(rng):
    x, weight, bias = normal(rng, 3, 6) + 5, normal(rng, 6), normal(rng, 6)
    exact = x.astype(np.float64)
    normed = np.array([(row - row.mean()) / math.sqrt(row.var() + 0.1) for row in exact])
    (y,) = run("layer_norm", {"eps": 0.1}, x, weights={"weight": weight, "bias": bias})
    assert_allclose(y, normed * weight + bias, rtol=1e-4, atol=1e-5)
    (unbiased,) = run("layer_norm", {"eps": 0.1}, x, weights={"weight": weight})
    assert_allclose(unbiased, normed * weight, rtol=1e-4, atol=1e-5)


EXACT = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_matches_its_formula(name):
    x = np.concatenate([np.linspace(-9, 9, 2001), [-80.0, 80.0, 0.0]]).astype(np.float32)
    (y,) = run("activation", {"function": name}, x[:, None])
    assert_allclose(y[:, 0], [EXACT[name](float(v)) for v in x], rtol=3e-7, atol=3e-7)


@pytest.mark.filterwarnings("error")
def test_activations_survive_huge_inputs():
    x = np.array([[-1e4, 1e4]], np.float32)
    for name in FUNCTIONS:
        assert np.isfinite(run("activation", {"function": name}, x)[0]).all()


def test_activation_names():
    assert set(EXACT) == set(FUNCTIONS)
    assert OPS["glu"].Attrs(function="gelu_pytorch_tanh").function == "gelu_tanh"
    assert set(ALIASES.values()) <= set(FUNCTIONS)
    with pytest.raises(ValidationError, match=r"no activation function 'sillu'.*quick_gelu.*did you mean 'silu'"):
        OPS["moe"].Attrs(num_experts=2, expert_size=3, function="sillu")


def test_elementwise(rng):
    a, b = normal(rng, 4, 6), normal(rng, 4, 6)
    assert np.array_equal(run("add", {}, a, b)[0], a + b)
    assert_allclose(run("scale", {"by": 2.5}, a)[0], 2.5 * a.astype(np.float64), rtol=1e-6)
    assert_allclose(run("softcap", {"cap": 0.5}, a)[0], 0.5 * np.tanh(a.astype(np.float64) / 0.5), rtol=1e-5)
    gated = [
        [EXACT["silu"](float(g)) * float(u) for g, u in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)
    ]
    assert_allclose(run("glu", {"function": "silu"}, a, b)[0], gated, rtol=1e-5, atol=1e-6)


def test_split_is_a_view(rng):
    x = normal(rng, 3, 9)
    parts = run("split", {"sizes": [2, 3, 4]}, x)
    assert np.array_equal(np.concatenate(parts, axis=1), x)
    assert all(np.shares_memory(part, x) for part in parts)


def test_select_rows(rng):
    x = normal(rng, 5, 3)
    step, _ = paged_step(rng, [(5, 5)])
    step.logits_rows = np.array([4, 1], np.int32)
    assert np.array_equal(run("select_rows", {}, x, step=step)[0], x[[4, 1]])


# Rope


def naive_rope(x, positions, head_dim, start, width, style, frequencies):
    y = x.astype(np.float64)
    half = width // 2
    for t, position in enumerate(positions):
        for head in range(0, x.shape[1], head_dim):
            for i, frequency in enumerate(frequencies):
                first, second = (i, i + half) if style == "half" else (2 * i, 2 * i + 1)
                first, second = head + start + first, head + start + second
                turned = complex(x[t, first], x[t, second]) * complex(
                    math.cos(position * frequency), math.sin(position * frequency)
                )
                y[t, first], y[t, second] = turned.real, turned.imag
    return y


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("start", "width"), [(0, None), (0, 4), (2, 6), (4, None)])
def test_rope(rng, style, start, width):
    x, positions = normal(rng, 5, 20), np.array([0, 1, 5, 2, 31], np.int32)
    turned = width or 10 - start
    factors = (1 + rng.random(turned // 2)).astype(np.float32)
    attrs = {"head_dim": 10, "rotary_dim": width, "rotary_start": start, "theta": 100.0, "style": style}
    (y,) = run("rope", attrs, x, positions, weights={"freq_factors": factors})
    frequencies = [100.0 ** (-2 * i / turned) / factors[i] for i in range(turned // 2)]
    assert_allclose(y, naive_rope(x, positions, 10, start, turned, style, frequencies), rtol=1e-4, atol=2e-5)
    heads = (5, 2, 10)
    assert_allclose(np.linalg.norm(y.reshape(heads), axis=2), np.linalg.norm(x.reshape(heads), axis=2), rtol=1e-5)
    assert np.array_equal(y[0], x[0])


def test_an_odd_rotary_dim_turns_one_feature_more_at_its_own_frequencies(rng):
    x, positions = normal(rng, 3, 10), np.array([1, 2, 7], np.int32)
    (y,) = run("rope", {"head_dim": 10, "rotary_dim": 5, "theta": 100.0}, x, positions)
    frequencies = [100.0 ** (-i / 5) for i in (0, 2, 4)]
    assert_allclose(y, naive_rope(x, positions, 10, 0, 6, "half", frequencies), rtol=1e-4, atol=1e-5)


def test_rope_scores_depend_on_distance_alone(rng):
    q, k = normal(rng, 1, 8), normal(rng, 1, 8)

    def turned(x, position):
        return run("rope", {"head_dim": 8, "theta": 1e4}, x, np.array([position], np.int32))[0]

    near, far = turned(q, 9) @ turned(k, 4).T, turned(q, 109) @ turned(k, 104).T
    assert_allclose(near, far, rtol=1e-4, atol=1e-5)


SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.5, 2.5, 4.5, 8.5]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 40.0, "truncate": False, "beta_fast": 16, "beta_slow": 2}

# From transformers 5.23 modeling_rope_utils with rotary_dim 8, theta 10000, max_position_embeddings 512.
TRANSFORMERS_FREQUENCIES = [
    ({"type": "linear", "factor": 4.0}, None, [0.25, 0.0250000004, 0.00249999994, 0.000250000012], 1.0),
    ({"type": "dynamic", "factor": 2.5}, 512, [1.0, 0.1, 0.01, 0.001], 1.0),
    ({"type": "dynamic", "factor": 2.5}, 900, [1.0, 0.0701682419, 0.00492358208, 0.000345479086], 1.0),
    (LLAMA3 | {"original_max_position_embeddings": 128}, None, [1.0, 0.0427511781, 0.00124999997, 0.000125000006], 1.0),
    (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        None,
        [1.0, 0.0625, 0.00249999994, 0.000250000012],
        1.138629436111989,
    ),
    (
        YARN | {"original_max_position_embeddings": 256, "mscale": 1.0, "mscale_all_dim": 0.5},
        None,
        [1.0, 0.0358637124, 0.000250000012, 2.49999994e-05],
        1.1557219901962608,
    ),
    (LONGROPE, 256, [1.0, 0.0909090936, 0.00833333284, 0.00076923077], 1.0606601717798212),
    (LONGROPE, 257, [0.666666687, 0.0399999991, 0.00222222228, 0.000117647061], 1.0606601717798212),
    ({"rope_theta": 5.0}, None, [1.0, 0.1, 0.01, 0.001], 1.0),
]


@pytest.mark.parametrize(("scaling", "total_len", "frequencies", "factor"), TRANSFORMERS_FREQUENCIES)
def test_rope_scaling_matches_transformers(scaling, total_len, frequencies, factor):
    attrs = OPS["rope"].Attrs(head_dim=8, theta=10000.0, scaling=scaling, max_position=512)
    inv_freq, attention_factor = attrs.frequencies(total_len)
    assert inv_freq.dtype == np.float32
    assert_allclose(inv_freq, frequencies, rtol=2e-7)
    assert attention_factor == pytest.approx(factor, rel=1e-12)


def test_rope_scaling_spellings_and_lengths():
    rope = OPS["rope"].Attrs
    bare = {key: value for key, value in LONGROPE.items() if key != "original_max_position_embeddings"}
    outside = rope(head_dim=8, theta=1e4, scaling=bare, max_position=512, original_max_position=256)
    for kind in ("longrope", "su", "yarn"):
        same = rope(head_dim=8, theta=1e4, scaling=LONGROPE | {"type": kind}, max_position=512)
        for length in (100, 300):
            assert np.array_equal(outside.frequencies(length)[0], same.frequencies(length)[0])
    hand = rope(head_dim=8, theta=1e4, scaling=LONGROPE | {"attention_factor": 1.25}, max_position=512)
    assert hand.frequencies()[1] == 1.25
    assert hand.recompute_after == outside.recompute_after == 256
    assert rope(head_dim=8, theta=1e4, scaling=YARN, max_position=512).recompute_after is None
    assert rope.model_validate(hand.model_dump()) == hand


def test_rope_looks_at_each_sequences_own_length(rng):
    step, _ = paged_step(rng, [(3, 3), (2, 1), (5, 5)])
    step.total_len = np.array([256, 300, 10], np.int32)
    x = normal(rng, 9, 8)
    attrs = {"head_dim": 8, "theta": 1e4, "scaling": LONGROPE, "max_position": 512}
    (y,) = run("rope", attrs, x, step.positions, step=step)
    for tokens, length in ((slice(0, 3), 256), (slice(3, 4), 300), (slice(4, 9), 10)):
        inv_freq, factor = OPS["rope"].Attrs(**attrs).frequencies(length)
        expected = naive_rope(x[tokens], step.positions[tokens], 8, 0, 8, "half", inv_freq)
        assert_allclose(y[tokens], expected * factor, rtol=1e-4, atol=1e-5)


# Attention


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("heads", "kv_heads", "v_dim"), [(4, 4, None), (6, 2, None), (3, 1, 5)])
def test_attention(rng, window, softcap, heads, kv_heads, v_dim):
    step, slots = paged_step(rng, [(7, 7), (13, 2), (9, 0), (4, 1)])
    k, v = normal(rng, slots, kv_heads * 6), normal(rng, slots, kv_heads * (v_dim or 6))
    q = normal(rng, 10, heads * 6)
    attrs = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 6, "v_head_dim": v_dim, "scale": 0.7}
    cache = {"k": k, "v": v}
    (y,) = run("attention", attrs | {"window": window, "softcap": softcap}, q, cache=cache, step=step)
    y = y.reshape(10, heads, -1)
    exact_q = q.astype(np.float64).reshape(10, heads, -1)
    exact_k, exact_v = (part.astype(np.float64).reshape(slots, kv_heads, -1) for part in (k, v))
    for head in range(heads):
        shared = head * kv_heads // heads
        expected = naive_attention(
            step,
            lambda token, head=head: exact_q[token, head],
            lambda slot, shared=shared: exact_k[slot, shared],
            lambda slot, shared=shared: exact_v[slot, shared],
            0.7,
            window,
            softcap,
        )
        assert_allclose(y[:, head], expected, rtol=1e-4, atol=1e-5)


def test_attention_does_not_look_up_blocks_before_the_window(rng):
    step, slots = paged_step(rng, [(30, 2)])
    cache = {"k": normal(rng, slots, 4), "v": normal(rng, slots, 4)}
    attrs = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 4, "scale": 0.5, "window": 6}
    q = normal(rng, 2, 4)
    (whole,) = run("attention", attrs, q, cache=cache, step=step)
    step.block_table[0, :5] = 10**6  # tokens 0..19 are gone; the first query sees 23..28
    assert np.array_equal(run("attention", attrs, q, cache=cache, step=step)[0], whole)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_what_one_step_gives(rng, chunk, window):
    length, attrs = 150, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "scale": 0.35, "window": window}
    q, k, v = normal(rng, length, 32), normal(rng, length, 16), normal(rng, length, 16)
    full, slots = paged_step(rng, [(length, length)])

    def prefill(size):
        cache = {"k": np.zeros((slots, 16), np.float32), "v": np.zeros((slots, 16), np.float32)}
        rows = []
        for start in range(0, length, size):
            part = slice(start, min(start + size, length))
            step, _ = paged_step(rng, [(part.stop, part.stop - part.start)])
            step.block_table, step.slot_mapping = full.block_table, full.slot_mapping[part]
            assert run("kv_write", {}, k[part], v[part], cache=cache, step=step) == []
            rows.append(run("attention", attrs, q[part], cache=cache, step=step)[0])
        return np.concatenate(rows)

    assert_allclose(prefill(chunk), prefill(length), rtol=1e-4, atol=1e-6)


def test_kv_write_of_a_single_part(rng):
    step, slots = paged_step(rng, [(3, 3), (6, 2)])
    cache, k = {"k": np.zeros((slots, 4), np.float32)}, normal(rng, 5, 4)
    run("kv_write", {}, k, cache=cache, step=step)
    assert np.array_equal(cache["k"][step.slot_mapping], k)
    assert np.count_nonzero(cache["k"].any(axis=1)) == 5


def test_mla_attention(rng):
    heads, nope, rope, v_dim, rank = 3, 4, 2, 5, 7
    step, slots = paged_step(rng, [(6, 6), (9, 1)])
    latent, shared = normal(rng, slots, rank), normal(rng, slots, rope)
    q, kv_b = normal(rng, 7, heads * (nope + rope)), normal(rng, heads * (nope + v_dim), rank)
    attrs = {"num_heads": heads, "nope_dim": nope, "rope_dim": rope, "v_dim": v_dim, "kv_rank": rank, "scale": 0.4}
    cache = {"k": latent, "v": shared}
    (y,) = run("mla_attention", attrs, q, weights={"kv_b": kv_b}, cache=cache, step=step)
    exact = kv_b.astype(np.float64).reshape(heads, nope + v_dim, rank)
    queries = q.astype(np.float64).reshape(7, heads, nope + rope)
    for head in range(heads):
        expected = naive_attention(
            step,
            lambda token, head=head: queries[token, head],
            lambda slot, head=head: np.concatenate([exact[head, :nope] @ latent[slot], shared[slot]]),
            lambda slot, head=head: exact[head, nope:] @ latent[slot],
            0.4,
        )
        assert_allclose(y.reshape(7, heads, v_dim)[:, head], expected, rtol=1e-4, atol=1e-5)


# Mixture of experts


def naive_route(scores, choice, attrs):
    """Ids and weights of one token, from plain Python lists."""
    experts = list(range(len(scores)))
    if attrs.get("num_groups"):
        size = len(experts) // attrs["num_groups"]
        groups = [experts[g * size : (g + 1) * size] for g in range(attrs["num_groups"])]
        counted = 2 if attrs.get("group_score") == "top2" else 1
        worth = [sum(sorted((choice[e] for e in group), reverse=True)[:counted]) for group in groups]
        kept = sorted(range(len(groups)), key=lambda g: -worth[g])[: attrs["top_groups"]]
        experts = sorted(e for g in kept for e in groups[g])
    ids = sorted(experts, key=lambda e: -choice[e])[: attrs["top_k"]]
    weights = [scores[e] for e in ids]
    if attrs["normalize"]:
        weights = [w / sum(weights) for w in weights]
    return ids, [w * attrs.get("scale", 1.0) for w in weights]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "choice",
    [
        {"score": "softmax"},
        {"score": "sigmoid", "scale": 2.5},
        {"score": "softmax", "num_groups": 4, "top_groups": 2, "scale": 16.0},
        {"score": "sigmoid", "num_groups": 3, "top_groups": 1, "group_score": "top2"},
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_router(rng, choice, normalize, biased):
    x, weight, bias = normal(rng, 40, 6), normal(rng, 12, 6), normal(rng, 12)
    attrs = {"num_experts": 12, "top_k": 3, "normalize": normalize, **choice}
    ids, weights = run("router", attrs, x, weights={"weight": weight} | ({"bias": bias} if biased else {}))
    for t in range(40):
        logits = weight.astype(np.float64) @ x[t]
        scores = np.exp(logits) / np.exp(logits).sum() if attrs["score"] == "softmax" else 1 / (1 + np.exp(-logits))
        expected = naive_route(scores, scores + bias if biased else scores, attrs)
        assert ids[t].tolist() == expected[0]
        assert_allclose(weights[t], expected[1], rtol=1e-5)


def test_router_gives_ties_to_the_lower_expert():
    weight = np.ones((5, 2), np.float32)
    ids, _ = run("router", {"num_experts": 5, "top_k": 3}, np.ones((1, 2), np.float32), weights={"weight": weight})
    assert ids.tolist() == [[0, 1, 2]]


def test_moe_reads_only_the_chosen_experts(rng):
    x, ids = normal(rng, 6, 5), np.array([[0, 3], [3, 1], [0, 1], [1, 0], [3, 0], [1, 3]], np.int32)
    gate, up, down = normal(rng, 5, 7, 5), normal(rng, 5, 7, 5), normal(rng, 5, 5, 7)
    for stacked in (gate, up, down):
        stacked[[2, 4]] = np.nan
    weights = rng.random((6, 2)).astype(np.float32)
    attrs = {"num_experts": 5, "expert_size": 7, "function": "silu"}
    (y,) = run("moe", attrs, x, ids, weights, weights={"gate": gate, "up": up, "down": down})
    for t in range(6):
        row = np.zeros(5)
        for e, w in zip(ids[t], weights[t], strict=True):
            hidden = [EXACT["silu"](float(g @ x[t])) * float(u @ x[t]) for g, u in zip(gate[e], up[e], strict=True)]
            row += float(w) * (down[e].astype(np.float64) @ hidden)
        assert_allclose(y[t], row, rtol=1e-4, atol=1e-5)


# The declarations


def rows(*shape, dtype="f32"):
    return TensorType(("T", *shape), dtype)


HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "scale": 1.0}
MLA = {"num_heads": 2, "nope_dim": 4, "rope_dim": 2, "v_dim": 4, "kv_rank": 8, "scale": 1.0}
MOE = {"num_experts": 4, "expert_size": 8, "function": "silu"}
MISMATCHES = [
    ("add", {}, [rows(4), rows(5)], (0, 1), r"\[T, 4\].*\[T, 5\]"),
    ("glu", {"function": "silu"}, [rows(4), rows(6)], (0, 1), r"\[T, 4\].*\[T, 6\]"),
    ("rms_norm", {"eps": 1e-6, "group": 5}, [rows(12)], (0,), "12 .* 5"),
    ("split", {"sizes": [2, 3]}, [rows(6)], (0,), "2 [+] 3 = 5.* 6"),
    ("select_rows", {}, [TensorType(("R", 4))], (0,), "R, 4"),
    ("embedding", {"num_embeddings": 3, "embedding_dim": 2}, [rows(4)], (0,), "i32"),
    ("rope", {"head_dim": 8, "theta": 1e4}, [rows(20), rows(dtype="i32")], (0,), "20 .* 8"),
    ("rope", {"head_dim": 8, "theta": 1e4}, [rows(16), rows()], (1,), "positions"),
    ("kv_write", {}, [rows(4), TensorType(("R", 4))], (0, 1), "same rows"),
    ("attention", HEADS, [rows(33)], (0,), "32 .* 33"),
    ("mla_attention", MLA, [rows(13)], (0,), "12 .* 13"),
    ("moe", MOE, [rows(6), rows(2), rows(2)], (1,), "i32"),
    ("moe", MOE, [rows(6), rows(2, dtype="i32"), rows(3)], (1, 2), r"\[T, 2\].*\[T, 3\]"),
    ("linear", {"out_features": 3}, [TensorType(("T",))], (0,), "features"),
]


@pytest.mark.parametrize(("kind", "attrs", "inputs", "operands", "message"), MISMATCHES)
def test_mismatch_names_the_operands_and_both_sizes(kind, attrs, inputs, operands, message):
    spec = OPS[kind]
    with pytest.raises(ShapeMismatch, match=message) as error:
        spec.infer(spec.Attrs(**attrs), inputs)
    assert error.value.inputs == operands


BAD_ATTRS = [
    ("attention", HEADS | {"num_kv_heads": 3}, "multiple of num_kv_heads 3"),
    ("attention", HEADS | {"head_dim": 0}, "head_dim"),
    ("attention", HEADS | {"scale": math.nan}, "finite"),
    ("softcap", {"cap": -1.0}, "greater than 0"),
    ("split", {"sizes": []}, "at least 1"),
    ("rope", {"head_dim": 7, "theta": 1e4}, "8 features from 0"),
    ("rope", {"head_dim": 8, "theta": 1e4, "rotary_dim": 6, "rotary_start": 4}, "not fit in head_dim 8"),
    ("rope", {"head_dim": 8, "theta": 1e4, "scaling": {"type": "magic"}}, "rope_type"),
    ("rope", {"head_dim": 8, "theta": 1e4, "scaling": {"type": "linear"}}, "needs factor"),
    ("rope", {"head_dim": 8, "theta": 1e4, "scaling": {"type": "linear", "factor": 0}}, "greater than 0"),
    ("rope", {"head_dim": 8, "theta": 1e4, "scaling": {"type": "dynamic", "factor": 2}}, "needs max_position"),
    ("rope", {"head_dim": 8, "theta": 1e4, "scaling": LLAMA3}, "needs original_max_position"),
    ("rope", {"head_dim": 8, "theta": 1e4, "scaling": {"full": {"rope_type": "default"}}}, "nested"),
    ("rope", {"head_dim": 8, "theta": 1e4, "scaling": LONGROPE | {"short_factor": [1.0]}}, "factor"),
    ("router", {"num_experts": 4, "top_k": 5}, "top_k 5 is more than the 4"),
    ("router", {"num_experts": 8, "top_k": 3, "num_groups": 4, "top_groups": 1}, "more than the 2"),
    ("router", {"num_experts": 8, "top_k": 1, "num_groups": 3, "top_groups": 1}, "divide"),
    ("linear", {"out_features": 4, "bias": True}, "bias"),
]


@pytest.mark.parametrize(("kind", "attrs", "message"), BAD_ATTRS)
def test_bad_attributes_are_refused(kind, attrs, message):
    with pytest.raises(ValidationError, match=message):
        OPS[kind].Attrs(**attrs)


def test_flops():
    def flops(kind, attrs, *inputs, context=100):
        spec = OPS[kind]
        return spec.flops(spec.Attrs(**attrs), inputs, 10, 2, context)

    assert flops("linear", {"out_features": 5}, rows(7)) == 2 * 10 * 7 * 5
    assert flops("linear", {"out_features": 5}, TensorType(("R", 7))) == 2 * 2 * 7 * 5
    assert flops("attention", HEADS, rows(32)) == 2 * 10 * 100 * 4 * (8 + 8)
    assert flops("attention", HEADS | {"window": 16}, rows(32)) == 2 * 10 * 16 * 4 * (8 + 8)
    assert flops("moe", MOE, rows(6), rows(2, dtype="i32"), rows(2)) == 10 * 2 * 3 * 2 * 6 * 8
    assert flops("split", {"sizes": [3, 4]}, rows(7)) == 0
    assert flops("lora_add", {"max_loras": 9, "rank": 2}, rows(7), rows(5)) == 2 * 10 * 2 * (7 + 5)


def test_every_declaration_is_consistent():
    for kind, spec in OPS.items():
        assert spec_of(kind) is spec
        assert spec.kind == kind
        assert spec.__doc__
        assert spec.Attrs.__doc__
        assert 0 <= spec.optional_inputs < len(spec.inputs)
        for output, inputs in spec.inplace.items():
            assert output < len(spec.outputs)
            assert all(index < len(spec.inputs) for index in inputs)


def test_unknown_op_suggests_a_known_one():
    with pytest.raises(InvalidFile) as error:
        spec_of("rmsnorm")
    assert error.value.code == "map.unknown-op"
    assert "rms_norm" in str(error.value)


def test_importing_the_ops_does_not_import_numpy():
    code = "import sys, labinfer.ops; assert labinfer.ops.OPS; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
