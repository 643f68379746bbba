"""Make a tiny random model with transformers, save it, and evaluate it: the oracle every family is compared with."""

from __future__ import annotations

import copy
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .families import DECODE_STEPS, PROMPT_LENGTH, Case

torch.set_num_threads(1)  # tiny matrices: faster, and the same sums every time

_GAINS = {
    "q_proj": 2.0,
    "q_b_proj": 2.0,
    "k_proj": 1.5,
    "qkv_proj": 1.5,
    "c_attn": 1.5,
    "query_key_value": 1.5,
    "gate": 1.5,
    "lm_head": 4.0,
    "embed_out": 4.0,
}
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")
_CLEAR_MARGIN = 1e-3


@dataclass(frozen=True)
class Reference:
    """What transformers says about one checkpoint (logits float32, [positions, vocab])."""

    prompt: list[int]
    generated: list[int]
    prompt_logits: np.ndarray
    step_logits: np.ndarray
    full_logits: np.ndarray

    @property
    def margin(self) -> float:
        """Smallest gap between the best two logits of a greedy choice, relative to the largest logit."""
        chosen = np.sort(np.concatenate([self.prompt_logits[-1:], self.step_logits[:-1]]), axis=-1)
        return float((chosen[:, -1] - chosen[:, -2]).min() / np.abs(self.prompt_logits).max())


def make_model(case: Case, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with lively, seeded weights that `dtype` represents exactly; it computes in float32, eagerly."""
    config = AutoConfig.for_model(case.model_type, **copy.deepcopy(case.config))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with torch.no_grad():
        balancing = [pair for pair in model.named_buffers() if pair[0].endswith("e_score_correction_bias")]
        for name, parameter in [*model.named_parameters(), *balancing]:
            rng = np.random.default_rng(zlib.crc32(f"{case.id}/{name}".encode()))
            values = _lively(name, tuple(parameter.shape), rng, model)
            parameter.copy_(torch.from_numpy(values.astype(np.float32)).to(dtype).float())
    return model


def _lively(name: str, shape: tuple[int, ...], rng: np.random.Generator, model: PreTrainedModel) -> np.ndarray:
    """Random values that spread the logits, keep attention away from uniform and greedy decoding from one loop."""
    noise = rng.standard_normal(shape)
    module, _, leaf = name.rpartition(".")
    owner = module.rpartition(".")[2]
    tied = model.config.tie_word_embeddings
    if leaf in ("bias", "e_score_correction_bias"):
        return 0.2 * noise
    if len(shape) == 1:
        offset = 1.0 if model.config.model_type.startswith("gemma") else 0.0
        around = 4.0 if tied and owner in _FINAL_NORMS else 1.5 if owner in ("q_norm", "k_norm") else 1.0
        return around - offset + 0.2 * noise
    if owner in ("embed_tokens", "embed_in", "wte", "wpe"):
        return (0.12 if tied else 0.5) * noise
    fan_in = shape[0] if type(model.get_submodule(module)).__name__ == "Conv1D" else shape[-1]
    return _GAINS.get(owner, 1.0) * noise / np.sqrt(fan_in)


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, shard: str | None = None) -> None:
    """Write the checkpoint as save_pretrained does, in `dtype`; `shard` (for example "40KB") splits it."""
    stored = copy.deepcopy(model).to(dtype)
    stored.config.dtype = dtype
    stored.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))


def hub_copy(folder: Path, target: Path) -> Path:
    """The same checkpoint with config.json as transformers 4 wrote it: old rope keys, defaults left out."""
    for file in folder.glob("*.safetensors*"):
        (target / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    defaults = json.loads(AutoConfig.for_model(config["model_type"]).to_json_string(use_diff=False))
    hub = {key: value for key, value in config.items() if key == "model_type" or defaults.get(key, ...) != value}
    hub["torch_dtype"] = hub.pop("dtype")
    if _layer_types_are_implied(config):
        hub.pop("layer_types", None)
    if "_sliding_window_pattern" in hub:
        hub["sliding_window_pattern"] = hub.pop("_sliding_window_pattern")
    if config["model_type"] == "qwen3_moe" and "num_local_experts" in hub:
        hub["num_experts"] = hub.pop("num_local_experts")
    if "rope_parameters" in config:
        hub.pop("rope_parameters", None)
        usual = _old_rope(config["model_type"], defaults["rope_parameters"])
        stated = _old_rope(config["model_type"], config["rope_parameters"])
        hub |= {key: value for key, value in stated.items() if key == "rope_scaling" or usual.get(key) != value}
    (target / "config.json").write_text(json.dumps(hub, indent=2))
    return target


def _layer_types_are_implied(config: dict[str, Any]) -> bool:
    """Whether the config class derives the same layer_types from its other keys."""
    if "layer_types" not in config:
        return False
    others = {key: value for key, value in config.items() if key not in ("layer_types", "model_type")}
    return bool(AutoConfig.for_model(config["model_type"], **others).layer_types == config["layer_types"])


def _old_rope(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters in the keys transformers 4 used."""
    old: dict[str, Any] = {}
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    theta, partial = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    old["rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"] = theta
    if partial is not None:
        old["rotary_pct" if model_type == "gpt_neox" else "partial_rotary_factor"] = partial
    if model_type == "phi3":
        rope["type"] = rope.pop("rope_type")
        rope.pop("original_max_position_embeddings", None)
    old["rope_scaling"] = None if "default" in (rope.get("rope_type"), rope.get("type")) else rope
    return old


def evaluate(case: Case, model: PreTrainedModel) -> Reference:
    """The reference for the first seeded random prompt whose greedy choices are all clear of a tie."""
    for seed in range(20):
        rng = np.random.default_rng([zlib.crc32(case.id.encode()), seed])
        prompt = [int(token) for token in rng.integers(0, case.config["vocab_size"], PROMPT_LENGTH)]
        reference = evaluate_prompt(model, prompt)
        if reference.margin >= _CLEAR_MARGIN:
            return reference
    raise ValueError(f"{case.id}: every prompt tried has a near-tie in its greedy choices")


@torch.no_grad()
def evaluate_prompt(model: PreTrainedModel, prompt: list[int]) -> Reference:
    """Logits of all prompt positions, of greedy decode steps as `generate` computes them, and of the whole afresh.

    Each run starts from a copy: dynamic rope keeps the longest length a model has seen.
    """
    tokens = torch.tensor([prompt])
    afresh = copy.deepcopy(model)
    model = copy.deepcopy(model)
    prompt_logits = model(tokens, use_cache=False).logits[0]
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=DECODE_STEPS + 1,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    full_logits = afresh(output.sequences[:, :-1], use_cache=False).logits[0]
    return Reference(
        prompt=prompt,
        generated=output.sequences[0, len(prompt) :].tolist(),
        prompt_logits=prompt_logits.numpy(),
        step_logits=torch.cat(output.logits[1:]).float().numpy(),
        full_logits=full_logits.numpy(),
    )
