"""A tiny map, its checkpoints and plans, for tests that change one thing about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import labinfer

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(expected.parent for expected in GOLDEN.glob("*/expected.npz"))

MAP = """\
labmap: 1
family: tiny
match: {model_type: tiny}
config:
  hidden_size: {hf: hidden_size}
  num_layers:  {hf: num_layers}
  vocab_size:  {hf: vocab_size, default: 16}
inputs: [token_ids, positions]
outputs: [logits]
states: {kv: {k: hidden_size, v: hidden_size}}
graph:
  - {op: embedding, in: token_ids, out: h, weight: embed, num_embeddings: vocab_size, embedding_dim: hidden_size}
  - {repeat: layer, as: layers, times: num_layers, carry: h}
  - {op: select_rows, in: h, out: last}
  - {op: linear, in: last, out: logits, weight: head, out_features: vocab_size}
blocks:
  layer:
    - {op: linear, in: h, out: qkv, weight: qkv, out_features: 3 * hidden_size}
    - {op: split, in: qkv, out: [q, k, v], sizes: "[hidden_size, hidden_size, hidden_size]"}
    - {op: kv_write, in: [k, v], state: kv}
    - {op: attention, in: q, out: context, state: kv, num_heads: 2, num_kv_heads: 2,
       head_dim: hidden_size // 2, scale: 0.5}
    - {op: linear, in: context, out: out, weight: out, bias: out_bias, out_features: hidden_size}
    - {op: add, in: [h, out], out: h}
weights:
  model: {embed: {hf: embed}, head: {hf: head}}
  layers:
    prefix: {hf: "layers.{i}."}
    qkv: {hf: qkv}
    out: {hf: out}
    out_bias: {hf: bias, optional: true}
example: {name: tiny, config: {model_type: tiny, hidden_size: 8, num_layers: 3}}
"""
CONFIG = {"model_type": "tiny", "hidden_size": 8, "num_layers": 3}


def tiny_map(folder: Path, change: Callable[[str], str] = lambda text: text) -> Path:
    """The tiny map, its text changed, as a file of ``folder``."""
    path = folder / "tiny.yaml"
    path.write_text(change(MAP), encoding="utf-8")
    return path


def tensors(layers: int = 3, hidden: int = 8, vocab: int = 16) -> dict[str, np.ndarray]:
    """Random weights of the tiny map."""
    rng = np.random.default_rng(0)
    made = {"embed": (vocab, hidden), "head": (vocab, hidden)}
    for i in range(layers):
        made |= {f"layers.{i}.qkv": (3 * hidden, hidden), f"layers.{i}.out": (hidden, hidden)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in made.items()}


def tiny_checkpoint(folder: Path) -> Path:
    """A checkpoint directory of the tiny map."""
    folder.mkdir(exist_ok=True)
    save_file(tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def tiny_plan(folder: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    """A plan.json of the tiny checkpoint, and its content."""
    checkpoint = tiny_checkpoint(folder / "model")
    plan = labinfer.compile(tiny_map(folder), weights=checkpoint, **options)
    path = folder / "plan.json"
    path.write_text(plan.dump(), encoding="utf-8")
    return path, json.loads(plan.dump())
