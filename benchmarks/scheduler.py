"""What the host does in a decode step beside the device and the sampler: schedule, build the step, keep the books.

    python benchmarks/scheduler.py

The device is null: it returns logits of 8 tokens at once. Bars: 150 microseconds a step with 256 sequences, 40 with
one, and growing no faster than linearly up to 4,096.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

import labinfer
from labinfer import SamplingParams
from labinfer.llm import LLM
from labinfer.runtime.engine import Engine
from labinfer.runtime.request import Request

BARS = {1: 40.0, 256: 150.0}
SIZES = (1, 4, 16, 64, 256, 1024, 4096)
PROMPT, LENGTH, BLOCK = 32, 600, 16
"""Tokens of the shortest prompt, of the longest sequence, and of a block; sequences begin blocks at different times."""


def null_device(model: LLM) -> None:
    """Have steps of ``model`` compute nothing."""
    logits = np.zeros((model.plan.limits.max_logits_rows, 8), np.float32)
    logits[:, 3] = 1
    model.run = lambda batch: logits[: len(batch.logits_rows)]  # type: ignore[method-assign]


def measure(model: LLM, sequences: int, steps: int) -> list[float]:
    """Microseconds of each decode step of so many sequences."""
    engine = Engine(model, eos_ids=[0])
    random = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=None)
    for _ in range(sequences):
        engine.add(Request(random.integers(8, size=PROMPT + random.integers(BLOCK)).tolist(), params))
    while engine.scheduler.waiting or any(
        len(each.token_ids) == len(each.request.prompt) for each in engine.scheduler.running
    ):
        engine.step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    engine.abort_all()
    engine.step()
    return [1e6 * each for each in seconds]


def small_model(folder: Path) -> Path:
    """A llama of one layer and a vocabulary of 8, without weights worth the name."""
    from safetensors.numpy import save_file

    config = {
        "model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "intermediate_size": 4, "vocab_size": 8, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }  # fmt: skip
    shapes = {"model.embed_tokens": (8, 4), "model.norm": (4,)}
    inner = {"input_layernorm": (4,), "post_attention_layernorm": (4,)}
    inner |= {f"self_attn.{name}_proj": (4, 4) for name in "qkvo"}
    inner |= {f"mlp.{name}_proj": (4, 4) for name in ("gate", "up", "down")}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in inner.items()}
    save_file(
        {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> int:
    """Measure, print, and exit 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = small_model(Path(folder))
        for size in SIZES:
            limits = {"max_num_seqs": size, "max_num_batched_tokens": max(512, size), "max_model_len": LENGTH}
            with labinfer.load(path, devices="reference", max_logits_rows=size, **limits) as model:
                null_device(model)
                times = measure(model, size, min(options.steps, LENGTH - PROMPT - 8 * BLOCK))
                found[size] = median(times)
                print(f"{size:5} sequences: {median(times):8.1f} us a step, p99 {np.percentile(times, 99):8.1f} us")
    kept = all(found[size] <= bar for size, bar in BARS.items())
    linear = all(found[size] / size <= found[256] / 256 * 1.1 for size in SIZES if size > 256)
    print(f"bars: {BARS[1]:.0f} us with 1, {BARS[256]:.0f} us with 256: {'kept' if kept else 'MISSED'}")
    print(f"beyond 256 no more than in proportion: {'kept' if linear else 'MISSED'}")
    if options.json:
        options.json.write_text(json.dumps({"microseconds": found, "passed": kept and linear}, indent=1) + "\n")
    return 0 if kept and linear else 1


if __name__ == "__main__":
    sys.exit(main())
