"""Adapters that PEFT makes and saves, against PEFT on transformers, live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labinfer

pytest.importorskip("torch", reason="the live comparison needs torch")
pytest.importorskip("peft", reason="the live comparison needs peft")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from .agreement import assert_agree

GOLDEN = Path(__file__).parent.parent / "golden"
PROMPT = [5, 9, 2, 40, 17, 3, 3, 61]
CONFIGS: dict[str, dict[str, Any]] = {
    "all linear": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "attention, rank-stabilized": {"r": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 3, "v_proj": 9, "mlp.up_proj": 1.5},
    },
    "some layers": {"r": 3, "target_modules": ["down_proj"], "layers_to_transform": [0, 2]},
}  # fmt: skip


@pytest.mark.parametrize("devices", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("name", "config"),
    [(name, config) for name in ("llama-llama3", "qwen2-window") for config in CONFIGS]
    + [(name, "all linear") for name in ("phi3-window_odd_heads", "gpt2-untied_inner", "gpt_neox-serial")],
)
def test_saved_adapters(name: str, config: str, devices: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / name, **options).eval()
    adapted = get_peft_model(base, LoraConfig(**CONFIGS[config], init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(torch.tensor([PROMPT])).logits[0].numpy()
        with adapted.disable_adapter():
            plain = adapted(torch.tensor([PROMPT])).logits[0].numpy()
    assert np.abs(plain - expected).max() > 0.01 * np.abs(plain).max()
    with labinfer.LLM(GOLDEN / name, devices=devices, enable_lora=True) as llm:
        assert_agree(llm.logits(PROMPT, labinfer.LoRARequest("live", tmp_path)), expected, "adapted")
        assert_agree(llm.logits(PROMPT), plain, "plain")
