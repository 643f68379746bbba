"""SmolLM2 from its GGUF file as a transformers model: the same dequantized weights, in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from labinfer.runtime.weights import Checkpoint, dequantize, open_checkpoint

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build_model(gguf: Path) -> LlamaForCausalLM:
    """A float32, eager LlamaForCausalLM holding exactly the dequantized tensors of a llama GGUF file."""
    with open_checkpoint(gguf) as checkpoint:
        config = _config(checkpoint)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        state = {}
        for name, info in checkpoint.tensors.items():
            values = dequantize(checkpoint.raw(name), info.format, info.shape)
            block, _, rest = name.removesuffix(".weight").rpartition(".")
            if rest in heads:
                values = _half_split(values, heads[rest])
            prefix = f"model.layers.{block.removeprefix('blk.')}." if block else ""
            state[f"{prefix}{_NAMES[rest]}.weight"] = torch.from_numpy(values)
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model


def _config(checkpoint: Checkpoint) -> LlamaConfig:
    stored = {key.removeprefix("llama."): value for key, value in checkpoint.config.items()}
    return LlamaConfig(
        vocab_size=stored["vocab_size"],
        hidden_size=stored["embedding_length"],
        intermediate_size=stored["feed_forward_length"],
        num_hidden_layers=stored["block_count"],
        num_attention_heads=stored["attention.head_count"],
        num_key_value_heads=stored["attention.head_count_kv"],
        max_position_embeddings=stored["context_length"],
        rms_norm_eps=stored["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": stored["rope.freq_base"]},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order of llama GGUF files: each head's rotary pairs are neighbours there, halves in transformers."""
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape))


def build_tokenizer(gguf: Path) -> Tokenizer:
    """SmolLM's tokenizer as its tokenizer.json describes it: each digit a word of its own, then byte-level BPE."""
    with open_checkpoint(gguf) as checkpoint:
        stored = {key.removeprefix("tokenizer.ggml."): value for key, value in checkpoint.config.items()}
    vocabulary = {token: index for index, token in enumerate(stored["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in stored["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    kinds = zip(stored["tokens"], stored["token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == control])
    return tokenizer


@torch.no_grad()
def greedy(model: LlamaForCausalLM, prompt: list[int], steps: int) -> tuple[list[int], float]:
    """The greedy continuation, never stopping, and the smallest gap between the best two logits on the way."""
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(output.logits).topk(2).values
    return output.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


@torch.no_grad()
def negative_log_likelihood(model: LlamaForCausalLM, tokens: list[int]) -> np.ndarray:
    """Of each token after the first, given those before it; float64 [len(tokens) - 1]."""
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none").double().numpy()
