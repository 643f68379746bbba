"""Every op on the GPU against its numpy reference, on random shapes and in every weight format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from labinfer.backends.cuda.layout import EIGHT_BLOCKS, FORMATS
from labinfer.ops.base import OPS, Call, Step
from labinfer.ops.dequantization import dequantize
from tests.cpu.weights import lively, stored_weight
from tests.test_ops import paged_step

TOLERANCE = {"f32": 1e-5, "bf16": 1e-2}
"""Of the norm of the result, by weight format; the others meet activations in f16: 2e-3."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def weight(gpu: Any, format: str, shape: tuple[int, ...], seed: int = 0) -> tuple[Any, np.ndarray]:
    """A random weight on the device, and what it means."""
    from labinfer.backends.cuda.layout import weight_bytes

    raw = lively(format, stored_weight(format, int(np.prod(shape[:-1])), shape[-1], seed), shape)
    buffer = gpu.allocate(weight_bytes(format, shape), "weight")
    parameter = gpu.parameter(buffer, 0, format, shape)
    gpu.store(parameter, raw, format, shape, None)
    return parameter, dequantize(raw, format, shape)


def put(gpu: Any, array: np.ndarray) -> Any:
    import cupy

    return cupy.asarray(array)


def put_step(gpu: Any, step: Step) -> Step:
    names = ("token_ids", "positions", "query_start", "context_len", "total_len", "block_table", "slot_mapping")
    arrays = {name: put(gpu, getattr(step, name)) for name in (*names, "logits_rows")}
    return Step(**arrays, block_size=step.block_size, max_num_seqs=step.max_num_seqs)


def check(
    gpu: Any, kind: str, attrs: dict[str, Any], *inputs: np.ndarray, weights: Any = None, cache: Any = None,
    step: Step | None = None, tolerance: float = 1e-5,
) -> None:  # fmt: skip
    """The op's results, and the cache after it, are those of the reference; ``weights``: (on the device, meaning)."""
    weights, cache = weights or {}, cache or {}
    parsed = OPS[kind].Attrs(**attrs)
    meaning = {name: value[1] for name, value in weights.items()}
    expected = OPS[kind].reference(Call(parsed, inputs, weights=meaning, cache=cache, step=step))
    on_device = {name: put(gpu, array) for name, array in cache.items()}
    named = {name: value[0] for name, value in weights.items()}
    made = gpu.F.call(
        kind, *(put(gpu, x) for x in inputs), cache=on_device, step=None if step is None else put_step(gpu, step),
        **named, **attrs,
    )  # fmt: skip
    for actual, wanted in zip(made if isinstance(made, tuple) else (made,), expected, strict=True):
        host = gpu.move_out(actual)
        assert host.shape == wanted.shape
        error = np.linalg.norm(host.astype(np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-30)
        assert error <= tolerance, f"{kind}: off by {error:.1e}"
    for name, array in cache.items():
        np.testing.assert_allclose(gpu.move_out(on_device[name]), array, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        (1, 5),
        (1, 304),
        (2, 48),
        (3, 77),
        (4, 32),
        (8, 130),
        (8, 64),
        (9, 64),
        (17, 100),
        (33, 77),
        (64, 200),
        (64, 66),
        (70, 200),
        (300, 66),
    ],
)
def test_linear(gpu: Any, rng: np.random.Generator, format: str, tokens: int, rows: int) -> None:
    for columns in (256, 1280, 6144) if format in EIGHT_BLOCKS else (33, 576, 4160):
        weights = {"weight": weight(gpu, format, (rows, columns)), "bias": vector(gpu, normal(rng, rows))}
        check(
            gpu, "linear", {"out_features": rows}, normal(rng, tokens, columns), weights=weights,
            tolerance=TOLERANCE.get(format, 2e-3),
        )  # fmt: skip


@pytest.mark.parametrize("format", ["f16", "bf16"])
def test_linear_without_cublas(
    gpu: Any, rng: np.random.Generator, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "blas", None)
    for tokens, rows in ((70, 200), (300, 66)):
        test_linear(gpu, rng, format, tokens, rows)


def vector(gpu: Any, array: np.ndarray) -> tuple[Any, np.ndarray]:
    return put(gpu, array), array


@pytest.mark.parametrize("format", FORMATS)
def test_embedding(gpu: Any, rng: np.random.Generator, format: str) -> None:
    ids = rng.integers(0, 50, 9).astype(np.int32)
    attrs = {"num_embeddings": 50, "embedding_dim": 512}
    check(gpu, "embedding", attrs, ids, weights={"weight": weight(gpu, format, (50, 512))}, tolerance=1e-6)


@pytest.mark.parametrize("tokens", [1, 7])
def test_elementwise(gpu: Any, rng: np.random.Generator, tokens: int) -> None:
    from labinfer.ops.activations import FUNCTIONS

    x, z = normal(rng, tokens, 333), normal(rng, tokens, 333)
    check(gpu, "add", {}, x, z)
    check(gpu, "scale", {"by": 1.7}, x)
    check(gpu, "softcap", {"cap": 1.3}, x)
    for function in FUNCTIONS:
        check(gpu, "activation", {"function": function}, 3 * x)
        check(gpu, "glu", {"function": function}, 3 * x, z)


def test_norms(gpu: Any, rng: np.random.Generator) -> None:
    for width in (20, 576, 4096):
        x, w = normal(rng, 5, width), vector(gpu, normal(rng, width))
        check(gpu, "rms_norm", {"eps": 1e-5, "offset": 1.0}, x, weights={"weight": w})
        check(gpu, "rms_norm", {"eps": 1e-5}, x)
        check(gpu, "layer_norm", {"eps": 1e-5}, x, weights={"weight": w, "bias": w})
    grouped = {"weight": vector(gpu, normal(rng, 64))}
    check(gpu, "rms_norm", {"eps": 1e-5, "group": 64}, normal(rng, 3, 256), weights=grouped)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rope(gpu: Any, rng: np.random.Generator, style: str) -> None:
    positions = rng.integers(0, 500, 6).astype(np.int32)
    for attrs in ({}, {"rotary_dim": 16}, {"rotary_dim": 12, "rotary_start": 8}):
        check(gpu, "rope", {"head_dim": 32, "theta": 1e4, "style": style, **attrs}, normal(rng, 6, 96), positions)


def cache_of(rng: np.random.Generator, step: Step, width: int, dtype: Any) -> np.ndarray:
    slots = (int(step.block_table[step.block_table < 10**6].max()) + 1) * step.block_size
    return normal(rng, slots, width).astype(dtype)


@pytest.mark.parametrize(
    "sequences",
    [
        [(1, 1)], [(300, 1)], [(9, 9)], [(17, 3), (5, 5), (130, 1)], [(200, 140)], [(9, 9), (20, 20)],
        [(7, 1), (40, 20), (70, 1), (150, 140), (9, 1)], [*((n, 1) for n in range(5, 45)), (200, 140), (3, 3)],
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "shape", [(4, 4, 16, None), (8, 2, 64, None), (6, 1, 20, None), (5, 5, 24, 12), (8, 1, 256, None)]
)
def test_attention(gpu: Any, rng: np.random.Generator, sequences: Any, shape: Any) -> None:
    heads, kv_heads, dim, v_dim = shape
    step, _ = paged_step(rng, sequences)
    tokens = len(step.positions)
    for dtype in (np.float32, np.float16):
        cache = {
            "k": cache_of(rng, step, kv_heads * dim, dtype), "v": cache_of(rng, step, kv_heads * (v_dim or dim), dtype)
        }  # fmt: skip
        attrs = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "v_head_dim": v_dim, "scale": 0.3}
        for more in ({}, {"window": 7}, {"softcap": 5.0}):
            tolerance = 1e-5 if dtype == np.float32 else 2e-3
            check(
                gpu, "attention", attrs | more, normal(rng, tokens, heads * dim), cache=cache, step=step,
                tolerance=tolerance,
            )  # fmt: skip


def test_kv_write(gpu: Any, rng: np.random.Generator) -> None:
    step, _ = paged_step(rng, [(9, 4), (3, 1)])
    cache = {"k": cache_of(rng, step, 24, np.float32), "v": cache_of(rng, step, 12, np.float32)}
    check(gpu, "kv_write", {}, normal(rng, 5, 24), normal(rng, 5, 12), cache=cache, step=step)


@pytest.mark.parametrize("format", ["f32", "bf16", "q4_k"])
def test_mla(gpu: Any, rng: np.random.Generator, format: str) -> None:
    step, _ = paged_step(rng, [(300, 1), (9, 9), (20, 3)])
    attrs = {"num_heads": 3, "nope_dim": 16, "rope_dim": 8, "v_dim": 12, "kv_rank": 256, "scale": 0.2}
    cache = {"k": cache_of(rng, step, 256, np.float32), "v": cache_of(rng, step, 8, np.float32)}
    weights = {"kv_b": weight(gpu, format, (3 * 28, 256))}
    check(gpu, "mla_attention", attrs, normal(rng, 13, 3 * 24), weights=weights, cache=cache, step=step)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "top_groups": 2, "group_score": "top2"}])
def test_router(gpu: Any, rng: np.random.Generator, score: str, groups: dict[str, Any]) -> None:
    weights = {"weight": weight(gpu, "f32", (16, 40)), "bias": vector(gpu, normal(rng, 16))}
    attrs = {"num_experts": 16, "top_k": 3, "score": score, "normalize": True, "scale": 2.5, **groups}
    check(gpu, "router", attrs, 20 * normal(rng, 37, 40), weights=weights)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_moe(gpu: Any, rng: np.random.Generator, format: str, tokens: int) -> None:
    experts, size, width, top_k = 11, 256, 512, 3
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    weights = {
        name: weight(gpu, format, (experts, *shape), seed)
        for seed, (name, shape) in enumerate(
            {"gate": (size, width), "up": (size, width), "down": (width, size)}.items()
        )
    }
    attrs = {"num_experts": experts, "expert_size": size, "function": "silu"}
    mix = rng.uniform(0, 1, (tokens, top_k)).astype(np.float32)
    tolerance = 1.5 * TOLERANCE.get(format, 2e-3)  # two products, one after another
    check(gpu, "moe", attrs, normal(rng, tokens, width), ids, mix, weights=weights, tolerance=tolerance)
