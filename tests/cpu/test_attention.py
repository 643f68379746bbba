"""Paged attention of the CPU backend, plain and latent, and the cache's layout, against the ops' references."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("numba")

from labinfer.backends.cpu import attention as cpu
from labinfer.backends.cpu import mla, workspace
from labinfer.backends.cpu.attention_tiles import Rows, softmax_tile, start_softmax
from labinfer.backends.cpu.paged_cache import CACHE_DTYPES, kv_write
from labinfer.ops import OPS, Call, Step

NAN = np.float32(np.nan)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def aligned(nbytes):
    """Bytes on a 64-byte boundary, every float in them NaN."""
    raw = np.full(nbytes + 64, 0xFF, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + nbytes]


def narrowed(x, dtype):
    """``x`` rounded to the cache's dtype, float32."""
    if dtype == "f16":
        return x.astype(np.float16).astype(np.float32)
    if dtype == "bf16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return x


class Paged:
    """A step over sequences [(context, queries)] whose cache blocks are shuffled, and a cache of rows for each part."""

    def __init__(self, rng, sequences, block_size, **widths):
        counts = [-(-context // block_size) for context, _ in sequences]
        free = rng.permutation(sum(counts) + 2).astype(np.int32)
        table = np.full((len(sequences), max(counts) + 1), 10**6, np.int32)
        self.slots = []  # of every sequence's tokens
        for row, (context, _) in zip(table, sequences, strict=True):
            count = -(-context // block_size)
            row[:count], free = free[:count], free[count:]
            tokens = np.arange(context)
            self.slots.append(row[tokens // block_size] * block_size + tokens % block_size)
        contexts = np.array([context for context, _ in sequences], np.int32)
        start = np.cumsum([0] + [queries for _, queries in sequences]).astype(np.int32)
        positions = [np.arange(context - queries, context) for context, queries in sequences]
        mapping = [slots[len(slots) - queries :] for slots, (_, queries) in zip(self.slots, sequences, strict=True)]
        positions, mapping = (np.concatenate(x).astype(np.int32) for x in (positions, mapping))
        self.step = Step(positions, positions, start, contexts, contexts, table, mapping, start[1:] - 1, block_size)
        self.all_slots = np.concatenate(self.slots).astype(np.int32)
        rows = (sum(counts) + 2) * block_size
        self.cache = {part: np.full((rows, width), NAN) for part, width in widths.items()}
        for values in self.cache.values():
            values[self.all_slots] = normal(rng, len(self.all_slots), values.shape[1])

    def written(self, part, dtype, panels):
        """The cache as the backend's own bytes; slots of no token are NaN."""
        rows, width = self.cache[part].shape
        memory = aligned(rows * width * (4 if dtype == "f32" else 2))
        values = np.ascontiguousarray(self.cache[part][self.all_slots])
        address, block_size = memory.ctypes.data, self.step.block_size
        slots = self.all_slots.ctypes.data
        kv_write(
            values.ctypes.data, width, address, width, panels, CACHE_DTYPES[dtype], block_size, slots, 0, len(values)
        )
        return memory

    def batch(self):
        step = self.step
        addresses = (x.ctypes.data for x in (step.query_start, step.context_len, step.block_table))
        return cpu.Batch(len(step.context_len), *addresses, step.block_table.shape[1])


def reference(kind, attrs, q, paged, dtype, **weights):
    cache = {part: narrowed(values, dtype) for part, values in paged.cache.items()}
    return OPS[kind].reference(Call(attrs, (q,), weights=weights, cache=cache, step=paged.step))[0]


def attend(paged, attrs, q, dtype, cuts):
    """The kernel's result, its items shared out at ``cuts`` as among threads."""
    v_dim = attrs.v_head_dim or attrs.head_dim
    memory = [paged.written(part, dtype, panels) for part, panels in (("k", 1), ("v", 0))]
    heads = cpu.Heads(
        attrs.num_heads,
        attrs.num_kv_heads,
        attrs.head_dim,
        v_dim,
        attrs.scale,
        attrs.window or 0,
        attrs.softcap or 0.0,
    )
    pages = cpu.Pages(*(m.ctypes.data for m in memory), CACHE_DTYPES[dtype], paged.step.block_size)
    batch = paged.batch()
    wide = np.full((len(q), attrs.num_heads * v_dim + 5), NAN)
    y, stride = wide[:, 2:-3], wide.shape[1]
    partials = aligned(workspace.attention_partials_bytes(attrs.num_heads, v_dim, batch.sequences) + 64)
    cost = cpu.attention_cost(heads, batch)
    bounds = [0, *(round(cut * cost) for cut in cuts), cost]
    for start, stop in pairwise(bounds):
        scratch = aligned(
            workspace.attention_scratch(attrs.num_heads // attrs.num_kv_heads, attrs.head_dim, v_dim) + 64
        )
        address = scratch.ctypes.data
        args = (q.ctypes.data, q.strides[0] // 4, y.ctypes.data, stride, heads, pages, batch)
        cpu.attention(*args, partials.ctypes.data, address, start, stop)
        assert (scratch[-64:] == 0xFF).all(), "wrote beyond its workspace"
    assert (partials[-64:] == 0xFF).all(), "wrote beyond the partial results"
    merges = batch.sequences * attrs.num_kv_heads
    for start, stop in ((0, merges // 2), (merges // 2, merges)):
        cpu.attention_merge(y.ctypes.data, stride, heads, batch, partials.ctypes.data, start, stop)
    assert np.isnan(wide[:, :2]).all()
    assert np.isnan(wide[:, -3:]).all()
    return y


def check(rng, sequences, dtype="f32", block_size=16, cuts=(), atol=3e-6, **attrs):
    attrs = OPS["attention"].Attrs(**{"scale": attrs["head_dim"] ** -0.5} | attrs)
    v_width = attrs.num_kv_heads * (attrs.v_head_dim or attrs.head_dim)
    paged = Paged(rng, sequences, block_size, k=attrs.num_kv_heads * attrs.head_dim, v=v_width)
    tokens = int(paged.step.query_start[-1])
    q = normal(rng, tokens, attrs.num_heads * attrs.head_dim + 9)[:, 4:-5]
    y = attend(paged, attrs, q, dtype, cuts)
    assert_allclose(y, reference("attention", attrs, q, paged, dtype), rtol=1e-5, atol=atol)
    return paged, attrs, q, y


SMOLLM2 = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}


@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 31, 48, 49, 70])
@pytest.mark.parametrize("before", [0, 1, 63, 100])
def test_one_sequence(rng, tokens, before):
    check(rng, [(before + tokens, tokens)], **SMOLLM2)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_sequences_of_unequal_lengths(rng, dtype, block_size):
    check(rng, [(5, 5), (130, 1), (64, 64), (200, 17), (1, 1), (65, 1)], dtype, block_size, **SMOLLM2)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (4, 4), (8, 2), (5, 1), (14, 2), (12, 1), (71, 1), (64, 8)])
def test_heads_that_share_keys(rng, heads):
    check(rng, [(70, 9), (33, 1)], num_heads=heads[0], num_kv_heads=heads[1], head_dim=16)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"), [(2, 2), (6, 10), (32, 64), (80, 80), (96, 34), (128, 128), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_head_sizes(rng, head_dim, v_head_dim, dtype):
    sizes = {"head_dim": head_dim, "v_head_dim": v_head_dim}
    check(rng, [(40, 11), (19, 1)], dtype, num_heads=4, num_kv_heads=2, **sizes)


@pytest.mark.parametrize("window", [1, 5, 16, 17, 64, 100, 1000])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_window_and_softcap(rng, window, softcap):
    check(rng, [(150, 70), (90, 1), (64, 5), (3000, 1)], window=window, softcap=softcap, **SMOLLM2)


@pytest.mark.parametrize("context", [255, 256, 512, 777, 5000])
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_split_contexts(rng, context, dtype):
    check(rng, [(context, 1), (30, 3), (context + 64, 1)], dtype, **SMOLLM2)
    check(rng, [(context, 2), (context + 2, 3), (1, 1), (context + 64, 4), (context, 5)], dtype, **SMOLLM2)


def test_splits_begin_at_the_window(rng):
    check(rng, [(5001, 1), (999, 1), (5001, 2), (1025, 4)], window=600, **SMOLLM2)


@pytest.mark.parametrize("cuts", [(0.5,), (0.01, 0.3, 0.31, 0.9), (0.0, 1.0)])
def test_any_share_of_the_items_gives_the_same_numbers(rng, cuts):
    sequences = [(700, 1), (150, 70), (90, 1), (33, 33), (600, 4)]
    paged, attrs, q, whole = check(rng, sequences, **SMOLLM2)
    assert_array_equal(attend(paged, attrs, q, "f32", cuts), whole)


def test_great_scores_do_not_overflow(rng):
    # A score of a thousand is only known to 1e-4 in float32, and so is then the weight.
    check(rng, [(200, 20), (600, 1)], scale=40.0, atol=1e-3, **SMOLLM2)


def test_products_of_no_weight_are_subnormal():
    """Processors are many times as slow with those, so times would depend on the numbers."""
    scores, maxima, sums, factors = (aligned(4 * workspace.TILE).view(np.float32) for _ in range(4))
    scores[:], factors[:] = np.linspace(-1000, 1000, workspace.TILE), 0
    places = [each.ctypes.data for each in (maxima, sums, factors)]
    start_softmax(1, *places[:2])
    softmax_tile(Rows(1, 1, 1, workspace.TILE - 1, 0, 0, workspace.TILE), 0, scores.ctypes.data, *places)
    assert scores.max() == 1
    assert 1e-9 * min(scores.min(), factors[0]) > np.finfo(np.float32).tiny
    assert scores.min() < 1e-20


def test_a_query_that_is_no_number_gives_none(rng):
    attrs = OPS["attention"].Attrs(scale=1.0, **SMOLLM2)
    paged = Paged(rng, [(20, 2)], 16, k=192, v=192)
    q = normal(rng, 2, 576)
    q[1, 70] = NAN
    y = attend(paged, attrs, q, "f32", ())
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1, 64:128]).all()
    assert np.isfinite(y[1, :64]).all()


def attend_latents(paged, attrs, q, kv_b, dtype, cuts):
    """The kernel's result, its items shared out at ``cuts`` as among threads."""
    memory = [paged.written(part, dtype, 0) for part in ("k", "v")]
    latent = mla.Latent(
        attrs.num_heads, attrs.nope_dim, attrs.rope_dim, attrs.v_dim, attrs.kv_rank, attrs.scale, kv_b.ctypes.data
    )
    pages = cpu.Pages(*(m.ctypes.data for m in memory), CACHE_DTYPES[dtype], paged.step.block_size)
    batch = paged.batch()
    wide = np.full((len(q), attrs.num_heads * attrs.v_dim + 5), NAN)
    y, stride = wide[:, 2:-3], wide.shape[1]
    items = mla.mla_items(latent, batch)
    for start, stop in pairwise([0, *(round(cut * items) for cut in cuts), items]):
        scratch = aligned(workspace.mla_scratch(attrs.num_heads, attrs.rope_dim, attrs.kv_rank) + 64)
        args = (q.ctypes.data, q.strides[0] // 4, y.ctypes.data, stride, latent, pages, batch)
        mla.mla_attention(*args, scratch.ctypes.data, start, stop)
        assert (scratch[-64:] == 0xFF).all(), "wrote beyond its workspace"
    assert np.isnan(wide[:, :2]).all()
    assert np.isnan(wide[:, -3:]).all()
    return y


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("heads", [1, 4, 8, 11, 16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"nope_dim": 16, "rope_dim": 8, "v_dim": 12, "kv_rank": 24},
        {"nope_dim": 5, "rope_dim": 2, "v_dim": 7, "kv_rank": 9},
        {"nope_dim": 128, "rope_dim": 64, "v_dim": 128, "kv_rank": 512},
    ],
    ids=["small", "odd", "v2"],
)
def test_mla_attention(rng, dtype, heads, sizes):
    scale = (sizes["nope_dim"] + sizes["rope_dim"]) ** -0.5
    attrs = OPS["mla_attention"].Attrs(num_heads=heads, scale=scale, **sizes)
    paged = Paged(rng, [(70, 70), (100, 1), (9, 3), (200, 20)], 16, k=attrs.kv_rank, v=attrs.rope_dim)
    q = normal(rng, 94, heads * (attrs.nope_dim + attrs.rope_dim) + 9)[:, 4:-5]
    kv_b = normal(rng, heads * (attrs.nope_dim + attrs.v_dim), attrs.kv_rank) * attrs.kv_rank**-0.5
    y = attend_latents(paged, attrs, q, kv_b, dtype, (0.3, 0.6))
    expected = reference("mla_attention", attrs, q, paged, dtype, kv_b=kv_b)
    assert_allclose(y, expected, rtol=1e-5, atol=5e-6)
    assert_array_equal(attend_latents(paged, attrs, q, kv_b, dtype, ()), y)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("width", [1, 16, 37])
@pytest.mark.parametrize("block_size", [16, 48])
def test_the_cache_layout(rng, dtype, width, block_size):
    paged = Paged(rng, [(50, 1), (7, 7)], block_size, k=width)
    number = np.uint32 if dtype == "f32" else np.uint16
    rows = paged.written("k", dtype, 0).view(number).reshape(-1, width)
    panels = paged.written("k", dtype, 1).view(number).reshape(-1, width, block_size)
    expected = narrowed(paged.cache["k"], dtype)[paged.all_slots]
    if dtype == "f16":
        expected = expected.astype(np.float16).view(np.uint16)
    else:
        expected = (expected.view(np.uint32) >> (16 if dtype == "bf16" else 0)).astype(number)
    assert_array_equal(rows[paged.all_slots], expected)
    assert_array_equal(panels.transpose(0, 2, 1).reshape(-1, width)[paged.all_slots], expected)
    others = np.setdiff1d(np.arange(len(rows)), paged.all_slots)
    assert (rows[others] == np.iinfo(number).max).all(), "wrote to a slot that is not its own"
