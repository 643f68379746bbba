"""The table of tiny configs: per family, the config arguments every case shares and what each case changes.

A case's values are the arguments of the transformers config class, so this table needs no torch to be read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PROMPT_LENGTH = 40
DECODE_STEPS = 12


@dataclass(frozen=True)
class Case:
    """One tiny model: a transformers model type and the arguments of its config."""

    model_type: str
    name: str
    config: dict[str, Any] = field(hash=False)

    @property
    def id(self) -> str:
        return f"{self.model_type}-{self.name}"


_TINY = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def _theta(base: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base, **more}


def _longrope(rotary_dim: int, **more: Any) -> dict[str, Any]:
    half = rotary_dim // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(half)],
        "long_factor": [1.5 + 0.75 * i for i in range(half)],
        **more,
    }


_BASE: dict[str, dict[str, Any]] = {
    "llama": _TINY,
    "mistral": _TINY,
    "qwen2": _TINY,
    "qwen3": _TINY | {"head_dim": 16},
    "qwen3_moe": _TINY | {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "mixtral": _TINY | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40},
    "phi3": _TINY | {"original_max_position_embeddings": 256},
    "gemma2": _TINY | {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": _TINY | {"head_dim": 16, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "olmo2": _TINY,
    "starcoder2": _TINY,
    "gpt2": {
        "vocab_size": 128,
        "n_positions": 64,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {key: value for key, value in _TINY.items() if key != "num_key_value_heads"} | {"hidden_size": 64},
    "deepseek_v2": _TINY
    | {
        "num_key_value_heads": 4,
        "kv_lora_rank": 24,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
    },
    "deepseek_v3": _TINY
    | {
        "num_key_value_heads": 4,
        "kv_lora_rank": 24,
        "q_lora_rank": 20,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_mtp_layers": 0,
    },
}

_CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": {},
        "odd_heads_tied": {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-2,
        },
        "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "hidden_act": "gelu"},
        "wide_heads": {"head_dim": 20, "num_key_value_heads": 1, "rope_parameters": _theta(500000.0)},
        "five_heads": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "rms_norm_eps": 1e-3},
        "llama3": {"rope_parameters": _LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
        "linear": {"rope_parameters": _LINEAR},
        "dynamic_unused": {"rope_parameters": _DYNAMIC},
        "dynamic": {"rope_parameters": _DYNAMIC, "max_position_embeddings": 32},
        "dynamic_crossed": {"rope_parameters": _DYNAMIC, "max_position_embeddings": 45},
        "yarn": {"rope_parameters": _YARN, "head_dim": 16},
        "yarn_tuned": {
            "head_dim": 16,
            "rope_parameters": _YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.25},
        },
        "yarn_untruncated": {"head_dim": 16, "rope_parameters": _YARN | {"truncate": False}},
    },
    "mistral": {
        "window": {"sliding_window": 8},
        "no_window": {"sliding_window": None, "head_dim": 16, "tie_word_embeddings": True},
        "window_odd_heads": {
            "sliding_window": 5,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-2,
        },
        "wide_window": {"sliding_window": 4096, "rope_parameters": _theta(1e6), "hidden_act": "gelu_pytorch_tanh"},
        "window_yarn": {"sliding_window": 8, "head_dim": 16, "rope_parameters": _YARN},
    },
    "qwen2": {
        "plain": {},
        "odd_heads_tied": {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "window_all": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        "window_off": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        "yarn": {"rope_parameters": _YARN | {"rope_theta": 1e6}, "rms_norm_eps": 1e-2},
    },
    "qwen3": {
        "plain": {},
        "odd_heads_tied": {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "bias": {"attention_bias": True, "head_dim": 24, "rope_parameters": _theta(1e6)},
        "window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        "yarn": {"rope_parameters": _YARN, "rms_norm_eps": 1e-2},
    },
    "qwen3_moe": {
        "plain": {},
        "norm_topk": {"norm_topk_prob": True, "num_experts_per_tok": 3, "attention_bias": True, "rms_norm_eps": 1e-2},
        "sparse_step": {"decoder_sparse_step": 2, "num_hidden_layers": 4, "norm_topk_prob": True},
        "mlp_only": {"mlp_only_layers": [1], "num_attention_heads": 3, "num_key_value_heads": 1},
        "window_tied": {"use_sliding_window": True, "sliding_window": 8, "tie_word_embeddings": True},
        "sparse_step_and_mlp_only": {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 4},
    },
    "mixtral": {
        "plain": {},
        "window": {"sliding_window": 8, "num_attention_heads": 3, "num_key_value_heads": 1},
        "top1_tied": {"num_experts_per_tok": 1, "tie_word_embeddings": True, "rms_norm_eps": 3e-3},
        "top3_wide_heads": {"num_experts_per_tok": 3, "num_local_experts": 5, "head_dim": 16},
    },
    "phi3": {
        "plain": {},
        "window_odd_heads": {
            "sliding_window": 8,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-2,
        },
        "partial_tied": {
            "num_key_value_heads": 4,
            "hidden_size": 64,
            "rope_parameters": _theta(10000.0, partial_rotary_factor=0.75),
            "tie_word_embeddings": True,
        },
        "longrope_short": {"rope_parameters": _longrope(12), "original_max_position_embeddings": 64},
        "longrope_long": {"rope_parameters": _longrope(12), "original_max_position_embeddings": 16},
        "longrope_crossed": {"rope_parameters": _longrope(12), "original_max_position_embeddings": 45},
        "longrope_crossed_window": {
            "rope_parameters": _longrope(12),
            "original_max_position_embeddings": 45,
            "sliding_window": 8,
        },
        "longrope_partial": {
            "hidden_size": 64,
            "rope_parameters": _longrope(12, partial_rotary_factor=0.75),
            "original_max_position_embeddings": 32,
        },
        "longrope_attention_factor": {
            "rope_parameters": _longrope(12, attention_factor=1.4),
            "original_max_position_embeddings": 32,
        },
    },
    "gemma2": {
        "plain": {},
        "no_softcaps": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
        "odd_heads": {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 8.0,
            "rms_norm_eps": 3e-3,
        },
        "attn_cap_only": {"final_logit_softcapping": None, "attn_logit_softcapping": 5.0, "num_hidden_layers": 3},
        "untied_bias": {"tie_word_embeddings": False, "attention_bias": True, "rms_norm_eps": 1e-2},
        "layer_types": {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    },
    "gemma3_text": {
        "plain": {},
        "odd_heads": {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 24,
            "rms_norm_eps": 1e-2,
        },
        "linear_global": {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
        "pattern_two": {"num_hidden_layers": 4, "sliding_window_pattern": 2, "head_dim": 24},
        "softcaps_untied": {
            "num_hidden_layers": 6,
            "final_logit_softcapping": 12.0,
            "attn_logit_softcapping": 6.0,
            "tie_word_embeddings": False,
        },
        "layer_types": {
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": _theta(1e5), "sliding_attention": _theta(500.0)},
        },
    },
    "olmo2": {
        "plain": {},
        "odd_heads": {"num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 3e-3},
        "bias_tied": {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
        "theta": {"rope_parameters": _theta(500000.0), "hidden_act": "gelu"},
        "yarn": {"rope_parameters": _YARN},
    },
    "starcoder2": {
        "plain": {},
        "window": {"sliding_window": 8, "num_attention_heads": 3, "num_key_value_heads": 1},
        "untied": {"tie_word_embeddings": False, "norm_epsilon": 1e-3, "hidden_act": "gelu"},
        "no_bias": {"use_bias": False, "rope_parameters": _theta(1e5)},
    },
    "gpt2": {
        "plain": {},
        "inverse_layer_scale": {"scale_attn_by_inverse_layer_idx": True, "n_head": 3},
        "untied_inner": {"n_inner": 72, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
        "unscaled": {"scale_attn_weights": False},
        "relu_upcast": {"activation_function": "relu", "reorder_and_upcast_attn": True},
    },
    "gpt_neox": {
        "plain": {},
        "serial": {
            "use_parallel_residual": False,
            "num_attention_heads": 3,
            "hidden_size": 48,
            "layer_norm_eps": 1e-2,
        },
        "full_rotary_tied": {
            "rope_parameters": _theta(10000.0, partial_rotary_factor=1.0),
            "tie_word_embeddings": True,
        },
        "half_rotary": {
            "rope_parameters": _theta(500.0, partial_rotary_factor=0.5),
            "hidden_act": "gelu_new",
        },
        "no_bias": {"attention_bias": False, "layer_norm_eps": 1e-3},
        "linear": {"rope_parameters": _LINEAR | {"partial_rotary_factor": 0.5}},
    },
    "deepseek_v2": {
        "plain": {},
        "q_lora": {"q_lora_rank": 20, "num_attention_heads": 3, "num_key_value_heads": 3},
        "group_limited": {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
        "one_shared_all_sparse": {"n_shared_experts": 1, "first_k_dense_replace": 0, "num_experts_per_tok": 1},
        "all_dense_bias": {
            "first_k_dense_replace": 3,
            "attention_bias": True,
            "mlp_bias": True,
            "q_lora_rank": 20,
            "rms_norm_eps": 1e-2,
        },
        "yarn": {
            "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
        },
        "yarn_two_mscales": {
            "q_lora_rank": 16,
            "rms_norm_eps": 3e-3,
            "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 8, "beta_slow": 1},
        },
        "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    },
    "deepseek_v3": {
        "plain": {},
        "no_q_lora_unnormalised": {"q_lora_rank": None, "norm_topk_prob": False, "n_shared_experts": 2},
        "yarn_bias": {"attention_bias": True, "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        "one_group": {
            "n_group": 1,
            "topk_group": 1,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-2,
        },
    },
}

CASES: list[Case] = [
    Case(model_type, name, _BASE[model_type] | changes)
    for model_type, cases in _CASES.items()
    for name, changes in cases.items()
]

_SMALLER: dict[str, Any] = {"vocab_size": 96, "hidden_size": 24, "intermediate_size": 40}
_GOLDEN: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "odd_heads_tied": {},
        "biases": {},
        "llama3": {"head_dim": 8},
        "dynamic_crossed": {"head_dim": 8},
        "yarn": {"head_dim": 8},
    },
    "mistral": {"window": {}},
    "qwen2": {"window": {}},
    "qwen3": {"bias": {"head_dim": 8}},
    "qwen3_moe": {"sparse_step_and_mlp_only": {"head_dim": 8, "moe_intermediate_size": 12}},
    "mixtral": {"window": {"intermediate_size": 16}},
    "phi3": {
        "longrope_crossed": {"num_attention_heads": 2, "num_key_value_heads": 1},
        "longrope_attention_factor": {"num_attention_heads": 2, "num_key_value_heads": 1},
        "window_odd_heads": {"num_key_value_heads": 3},
    },
    "gemma2": {"odd_heads": {"head_dim": 8}},
    "gemma3_text": {"linear_global": {"head_dim": 8}},
    "olmo2": {"odd_heads": {}},
    "starcoder2": {"window": {}, "no_bias": {}},
    "gpt2": {"inverse_layer_scale": {"n_embd": 24}, "untied_inner": {"n_embd": 24, "n_inner": 40}},
    "gpt_neox": {"serial": {}, "half_rotary": {}},
    "deepseek_v2": {
        "group_limited": {"q_lora_rank": 12, "kv_lora_rank": 12, "moe_intermediate_size": 12},
        "yarn_two_mscales": {"n_routed_experts": 4, "kv_lora_rank": 12, "moe_intermediate_size": 12},
    },
}


def _smaller(model_type: str) -> dict[str, Any]:
    return {"vocab_size": 96} if model_type == "gpt2" else _SMALLER


GOLDEN_CASES: list[Case] = [
    Case(model_type, name, _BASE[model_type] | _CASES[model_type][name] | _smaller(model_type) | changes)
    for model_type, cases in _GOLDEN.items()
    for name, changes in cases.items()
]
