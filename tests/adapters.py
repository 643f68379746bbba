"""PEFT adapters of random numbers for a checkpoint, and the checkpoint with an adapter merged into its weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from labinfer.runtime.weights import dequantize, open_checkpoint

NOT_LINEAR = ("embed", "lm_head", "wte", "wpe", "experts", "mlp.gate.weight", "kv_b_proj", "gpt_neox.embed")
"""Matrices of a checkpoint that no adapter can target."""


def weights_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint as float32."""
    with open_checkpoint(checkpoint) as opened:
        infos = opened.tensors.values()
        return {info.name: dequantize(opened.raw(info.name), info.format, info.shape) for info in infos}


def turned(checkpoint: Path) -> bool:
    """Whether the matrices of a checkpoint are [in_features, out_features]."""
    return json.loads((checkpoint / "config.json").read_text())["model_type"] == "gpt2"


def targets(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear module in the layers of a checkpoint, by its name."""
    return {
        name.removesuffix(".weight"): array.shape[::-1] if turned(checkpoint) else array.shape
        for name, array in weights_of(checkpoint).items()
        if array.ndim == 2 and not any(part in name for part in NOT_LINEAR)
    }


def save_adapter(folder: Path, checkpoint: Path, seed: int = 0, rank: int = 4, only: str = "", **config: Any) -> Path:
    """An adapter for all modules of ``checkpoint`` whose names contain ``only``, as PEFT writes it."""
    folder.mkdir(parents=True)
    rng, tensors = np.random.default_rng(seed), {}
    ranks = config.get("rank_pattern", {})
    for module, (out_features, in_features) in targets(checkpoint).items():
        if only in module:
            own = next((ranks[end] for end in ranks if module.endswith(end)), rank)
            tensors[f"base_model.model.{module}.lora_A.weight"] = rng.normal(0, 0.3, (own, in_features))
            tensors[f"base_model.model.{module}.lora_B.weight"] = rng.normal(0, 0.3, (out_features, own))
    assert tensors
    save_file({name: array.astype(np.float32) for name, array in tensors.items()}, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none", "use_dora": False, "target_modules": None}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def merge(folder: Path, checkpoint: Path, adapter: Path) -> Path:
    """``checkpoint`` in float32 with ``adapter`` added to its weights: W + scale B A."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = weights_of(checkpoint)
    parts = load_file(adapter / "adapter_model.safetensors")
    for name, a in parts.items():
        if name.endswith(".lora_A.weight"):
            b = parts[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alphas = config.get("alpha_pattern", {})
            alpha = next((alphas[end] for end in alphas if module.endswith(end)), config["lora_alpha"])
            scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
            delta = (scale * b.astype(np.float64) @ a).astype(np.float32)
            tensors[f"{module}.weight"] += delta.T if turned(checkpoint) else delta
    save_file(tensors, folder / "model.safetensors")
    return folder
