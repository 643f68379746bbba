"""Whole models on the CPU device against transformers' logits (tests/golden) and against the reference device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import labinfer
from labinfer.errors import DoesNotFit, UsageError
from labinfer.llm import LLM
from labinfer.runtime.batch import Part
from tests.cpu.weights import lively, stored_weight
from tests.hf.agreement import assert_agree
from tests.tiny import FOLDERS, GOLDEN
from tests.weights.files import ARRAY, F32, STRING, U32, GgufTensor, gguf, pair

GGML = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q4_k": 12, "q5_k": 13, "q6_k": 14}
GGML |= {"bf16": 30}
OTHERS = ([5], [9, 2, 7, 1, 8, 3, 33], list(range(60, 83)))
"""Three more sequences of unequal lengths."""


def load(path: Path, devices: str = "cpu", **options: Any) -> LLM:
    """The model in a small cache, planned quickly."""
    options = {"max_model_len": 64, "arena_effort_seconds": 0.05} | options
    return labinfer.load(path, devices=devices, **options)


def next_part(model: LLM, rows: np.ndarray) -> Part:
    """As much of every row as one step holds, each token with a row of logits."""
    limits, batch = model.plan.limits, model.batch
    remaining = batch.num_tokens[rows] - batch.num_computed[rows]
    rows, remaining = rows[remaining > 0], remaining[remaining > 0]
    share = max(1, min(limits.max_num_batched_tokens, limits.max_logits_rows) // len(rows))
    counts = np.minimum(remaining, share)
    return Part(rows, counts, counts, 0 * counts)


def batched(model: LLM, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits of every position of several sequences that are computed together: prompts, then token by token."""
    batch = model.batch
    rows = np.array([batch.add(prompt) for prompt in prompts])
    result: dict[int, list[np.ndarray]] = {row: [] for row in rows.tolist()}
    for step in range(-1, max(map(len, continuations))):
        for row, tokens in zip(result, continuations, strict=True):
            if 0 <= step < len(tokens):
                batch.extend(row, [tokens[step]])
        while (batch.num_computed[rows] < batch.num_tokens[rows]).any():
            part, at = next_part(model, rows), 0
            starts, logits = batch.num_computed[part.rows], model.compute(part).copy()
            for row, start, count in zip(part.rows.tolist(), starts, part.counts, strict=True):
                found = result[row]
                found += list(logits[at + max(0, len(found) - start) : at + count])  # not those computed again
                at += count
    for row in result:
        batch.remove(row)
    return [np.stack(found) for found in result.values()]


WAYS = [
    {"fuse": "auto", "threads": 1, "max_num_batched_tokens": 512},
    {"fuse": "none", "threads": 2, "max_num_batched_tokens": 7},
    {"fuse": "auto", "threads": 3, "max_num_batched_tokens": 7},
    {"fuse": "none", "threads": 2, "max_num_batched_tokens": 512, "devices": "cpu,reference"},
    {"fuse": "auto", "threads": 2, "max_num_batched_tokens": 24, "devices": "reference,cpu"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_golden(folder: Path, way: dict[str, Any]) -> None:
    """Prompt and each decode step beside three other sequences; the greedy choice is transformers' own."""
    with np.load(folder / "expected.npz") as expected:
        prompt, generated = expected["prompt"].tolist(), expected["generated"].tolist()
        prompt_logits, step_logits = expected["prompt_logits"], expected["step_logits"]
    with load(folder, **way) as model:
        prompts = [OTHERS[0], prompt, *OTHERS[1:]]
        logits = batched(model, prompts, [[1, 2, 3], generated[: len(step_logits)], [4] * 6, []])[1]
    assert_agree(logits[: len(prompt)], prompt_logits, "prompt")
    assert_agree(logits[len(prompt) :], step_logits, "decode")
    assert logits[len(prompt) - 1 : -1].argmax(1).tolist() == generated[: len(step_logits)]


def test_steps_of_new_sizes_bind_nothing() -> None:
    """One tape serves all steps that are multiplied by the same kernels, with the logits of the reference."""
    folder, prompt = GOLDEN / "mixtral-window", list(range(3, 33))
    with load(folder, "reference") as model:
        expected = model.logits(prompt)
    with load(folder, max_num_batched_tokens=30, max_logits_rows=30) as model:
        [interpreter] = model.interpreters
        tapes = []
        for size in (30, 1, 7, 29, 2):
            assert_agree(model.logits(prompt[:size]), expected[:size], f"{size} tokens")
            tapes.append(len(interpreter.tapes))
        assert tapes[1:] == [tapes[1]] * 4


@pytest.mark.parametrize("name", ["phi3-longrope_crossed", "llama-dynamic_crossed", "deepseek_v2-group_limited"])
def test_crossing_a_length_token_by_token(name: str) -> None:
    """Angles that change with the length of a sequence: prompt, single steps and the whole at once."""
    with np.load(GOLDEN / name / "expected.npz") as expected:
        prompt, generated = expected["prompt"].tolist(), expected["generated"].tolist()[:12]
        prompt_logits, step_logits = expected["prompt_logits"], expected["step_logits"]
    with load(GOLDEN / name, max_num_batched_tokens=16) as model, model.session() as session:
        assert_agree(session.append(prompt), prompt_logits, "prompt")
        for token, wanted in zip(generated, step_logits, strict=True):
            assert_agree(session.append([token]), wanted[np.newaxis], "decode")


def test_greedy_tokens_are_the_references() -> None:
    sampling = labinfer.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [list(range(3, 3 + length)) for length in (1, 5, 17, 30)]
    for name in ("llama-llama3", "mixtral-window", "gemma2-odd_heads", "deepseek_v2-group_limited"):
        answers = []
        for devices in ("reference", "cpu"):
            with load(GOLDEN / name, devices) as model:
                answers.append([each.token_ids for each in model.generate(prompts, sampling)])
        assert answers[0] == answers[1], name


Formats = dict[str, str]


def write_llama(path: Path, formats: Formats, sizes: dict[str, int], default: str = "f32") -> Path:
    """A random llama (or qwen3moe, with ``experts``) as a GGUF file; ``formats`` by the tensor's short name."""
    hidden, heads, kv_heads, dim = (sizes[name] for name in ("hidden", "heads", "kv_heads", "head_dim"))
    width, vocab, layers, experts = sizes["width"], sizes["vocab"], 2, sizes.get("experts", 0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    shapes["output"] = (vocab, hidden)
    for i in range(layers):
        inner: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,), "attn_q": (heads * dim, hidden), "attn_k": (kv_heads * dim, hidden),
            "attn_v": (kv_heads * dim, hidden), "attn_output": (hidden, heads * dim), "ffn_norm": (hidden,),
        }  # fmt: skip
        if experts:
            inner |= {"ffn_gate_inp": (experts, hidden), "attn_q_norm": (dim,), "attn_k_norm": (dim,)}
            inner |= {f"ffn_{name}_exps": (experts, width, hidden) for name in ("gate", "up")}
            inner["ffn_down_exps"] = (experts, hidden, width)
        else:
            inner |= {"ffn_gate": (width, hidden), "ffn_up": (width, hidden), "ffn_down": (hidden, width)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in inner.items()}
    tensors, data = [], bytearray()
    for seed, (name, shape) in enumerate(shapes.items()):
        short = name.rpartition(".")[2]
        plain = len(shape) == 1 or short == "ffn_gate_inp"
        format = "f32" if plain else formats.get(short, default)
        raw = lively(format, stored_weight(format, prod(shape[:-1]), shape[-1], seed), shape)
        tensors.append(GgufTensor(f"{name}.weight", GGML[format], shape[::-1], len(data)))
        data += raw.tobytes() + bytes(-len(raw) % 32)
    kind = "qwen3moe" if experts else "llama"
    numbers = {
        "block_count": layers, "embedding_length": hidden, "attention.head_count": heads,
        "attention.head_count_kv": kv_heads, "attention.key_length": dim, "feed_forward_length": width,
        "context_length": 128, "vocab_size": vocab,
    }  # fmt: skip
    if experts:
        numbers |= {"expert_count": experts, "expert_used_count": sizes["top_k"], "expert_feed_forward_length": width}
    pairs = [pair("general.architecture", STRING, kind)]
    pairs += [pair(f"{kind}.{key}", U32, value) for key, value in numbers.items()]
    pairs += [pair(f"{kind}.attention.layer_norm_rms_epsilon", F32, 1e-5)]
    pairs += [pair("tokenizer.ggml.tokens", ARRAY, [f"t{i}" for i in range(vocab)], STRING)]
    pairs += [pair("tokenizer.ggml.model", STRING, "none")]
    path.write_bytes(gguf(pairs, tensors, bytes(data)))
    return path


LARGE = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "width": 512, "vocab": 300}
ODD = {"hidden": 48, "heads": 5, "kv_heads": 1, "head_dim": 20, "width": 50, "vocab": 97}
BLOCKS = {"hidden": 96, "heads": 8, "kv_heads": 2, "head_dim": 20, "width": 160, "vocab": 97}
EXPERTS = {"hidden": 96, "heads": 8, "kv_heads": 4, "head_dim": 20, "width": 64, "vocab": 97, "experts": 7, "top_k": 3}
TOLERANCE = 3e-4
"""Of the largest logit: two digits of an activation, through two layers."""


def error(path: Path, **options: Any) -> float:
    """The largest difference between the CPU and the reference device, of the largest logit."""
    prompt, found = [int(token) for token in np.random.default_rng(1).integers(0, 90, 40)], []
    for device, chosen in (("reference", {}), ("cpu", options)):
        with load(path, device, **chosen) as model:
            found.append(batched(model, [OTHERS[1], prompt], [[], [3, 5]])[1])
    assert all(np.isfinite(logits).all() for logits in found)
    return float(np.abs(found[0] - found[1]).max() / np.abs(found[0]).max())


@pytest.mark.parametrize("format", sorted(set(GGML) - {"f32"}))
def test_formats(tmp_path: Path, format: str) -> None:
    assert error(write_llama(tmp_path / "m.gguf", {}, LARGE, format)) < TOLERANCE


MIXED: dict[str, Formats] = {
    "k_m": {"attn_q": "q4_k", "attn_k": "q4_k", "attn_v": "q6_k", "ffn_gate": "q4_k", "ffn_up": "q5_k"},
    "plain_v": {"attn_q": "q4_0", "attn_k": "q8_0", "attn_v": "f16", "ffn_gate": "q4_0", "ffn_up": "q8_0"},
    "plain_q": {"attn_q": "bf16", "attn_k": "q5_1", "attn_v": "f32", "ffn_gate": "f16", "ffn_up": "bf16"},
    "plain_up": {"attn_q": "q4_1", "attn_k": "q5_0", "attn_v": "q4_1", "ffn_gate": "q4_0", "ffn_up": "f32"},
    "plain_gate": {"attn_q": "f16", "attn_k": "f16", "attn_v": "q5_k", "ffn_gate": "bf16", "ffn_up": "q6_k"},
}


@pytest.mark.parametrize("fuse", ["auto", "none"])
@pytest.mark.parametrize("name", MIXED)
def test_formats_mixed_inside_a_layer(tmp_path: Path, name: str, fuse: str) -> None:
    path = write_llama(tmp_path / "m.gguf", MIXED[name], LARGE, "q8_0")
    for tokens in (512, 7):
        assert error(path, fuse=fuse, max_num_batched_tokens=tokens) < TOLERANCE


@pytest.mark.parametrize(
    ("sizes", "format"),
    [(ODD, "f32"), (ODD, "f16"), (ODD, "bf16"), (BLOCKS, "q8_0"), (BLOCKS, "q4_1"), (BLOCKS, "q5_0")],
)
def test_odd_sizes(tmp_path: Path, sizes: dict[str, int], format: str) -> None:
    path = write_llama(tmp_path / "m.gguf", {}, sizes, format)
    for threads in (1, 3):
        assert error(path, threads=threads) < (2e-5 if sizes is ODD else TOLERANCE)


@pytest.mark.parametrize(
    ("formats", "default"),
    [({}, "f32"), ({}, "q8_0"), ({"ffn_gate_exps": "q4_0", "ffn_up_exps": "f16", "ffn_down_exps": "q5_1"}, "q8_0")],
)
@pytest.mark.parametrize("experts", [1, 7, 12])
def test_experts(tmp_path: Path, formats: Formats, default: str, experts: int) -> None:
    sizes = EXPERTS | {"experts": experts, "top_k": min(3, experts)}
    path = write_llama(tmp_path / "m.gguf", formats, sizes, default)
    assert error(path, threads=2) < (2e-5 if default == "f32" else TOLERANCE)


@pytest.mark.parametrize(("kv_dtype", "bound"), [("bf16", 2e-2), ("f16", 2.5e-3)])
@pytest.mark.parametrize("name", ["llama-llama3", "gemma2-odd_heads", "deepseek_v2-group_limited"])
def test_narrow_caches(name: str, kv_dtype: str, bound: float) -> None:
    prompt = list(range(3, 40))
    with load(GOLDEN / name) as model:
        exact, size = model.logits(prompt), model.plan.stages[0].bytes.kv_cache
    with load(GOLDEN / name, kv_dtype=kv_dtype) as model:
        narrow = model.logits(prompt)
        assert 2 * model.plan.stages[0].bytes.kv_cache == size
    assert 0 < np.abs(narrow - exact).max() / np.abs(exact).max() < bound


def test_the_reference_keeps_float32_only() -> None:
    with pytest.raises(DoesNotFit) as caught:
        load(GOLDEN / "llama-llama3", "cpu,reference", kv_dtype="bf16")
    assert caught.value.code == "device.kv-dtype"


@pytest.mark.parametrize("block_size", [1, 8, 20])
def test_blocks_are_whole_panels(block_size: int) -> None:
    with pytest.raises(UsageError) as caught:
        load(GOLDEN / "llama-llama3", block_size=block_size)
    assert caught.value.code == "limits.block-size"
    assert caught.value.remedy == f"--block-size {32 if block_size > 16 else 16}"


def test_larger_blocks() -> None:
    with load(GOLDEN / "llama-llama3") as model:
        expected = model.logits(list(range(50)))
    with load(GOLDEN / "llama-llama3", block_size=48) as model:
        np.testing.assert_allclose(model.logits(list(range(50))), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("level", ["avx2", "generic"])
def test_feature_levels(level: str, tmp_path: Path) -> None:
    """One family and one quantized model with less than this CPU can do, in a process of their own."""
    mixed = write_llama(tmp_path / "m.gguf", MIXED["plain_up"], LARGE, "q8_0")
    code = (
        "import sys; from pathlib import Path; from tests.cpu import test_models as t\n"
        "t.test_golden(t.GOLDEN / 'llama-llama3', t.WAYS[2])\n"
        "assert t.error(Path(sys.argv[1])) < t.TOLERANCE\n"
    )
    environment = os.environ | {"LABINFER_CPU_ISA": level}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(mixed)], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    if "device.isa" in done.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stderr[-2000:]
