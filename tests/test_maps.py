"""The shipped model maps: parameter counts, facts of single layers, every spelling of a config, GGUF names."""

from __future__ import annotations

import time
from functools import cache
from math import prod
from typing import Any, Literal

import numpy as np
import pytest

from labinfer.compiler.blueprint import Blueprint, read_map
from labinfer.compiler.graph import OpGraph
from labinfer.compiler.lower import lower
from labinfer.compiler.settings import ModelSource, TensorEntry, as_list, model_scope
from labinfer.errors import InvalidFile, LabinferError
from labinfer.home import graphs_dir

PARAMETERS = {
    "llama": 1_235_814_400,
    "qwen2": 494_032_768,
    "qwen3": 596_049_920,
    "qwen3_moe": 30_532_122_624,
    "mixtral": 46_702_792_704,
    "phi3": 3_821_079_552,
    "gemma2": 2_614_341_888,
    "gemma3_text": 999_885_952,
    "gemma3": 3_880_263_168,  # of 4,300,079,472 with its vision tower and projector
    "olmo2": 1_484_916_736,
    "starcoder2": 3_030_371_328,
    "gpt2": 124_439_808,
    "gpt_neox": 162_322_944,
    "deepseek_v2": 15_706_484_224,
    "deepseek_v3": 671_026_419_200,
}
"""Parameters of each map's example model, as its publisher counts them; a tied head counts once."""

CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6},
    "qwen2": {"num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, "use_sliding_window": False},
    "qwen3_moe": {
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "mixtral": {
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "sliding_window": None, "head_dim": None,
    },
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "sliding_window": None},
    "gemma2": {
        "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096,
        "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096,
        "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "final_logit_softcapping": None,
    },
    "gemma3": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208},
    "olmo2": {"rms_norm_eps": 1e-5, "attention_bias": False, "rope_theta": 1e4},
    "starcoder2": {
        "num_key_value_heads": 2, "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True,
        "sliding_window": None, "hidden_act": "gelu_pytorch_tanh",
    },
    "gpt2": {
        "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True, "n_positions": 1024,
    },
    "gpt_neox": {
        "rotary_pct": 0.25, "rotary_emb_base": 10000, "attention_bias": True, "use_parallel_residual": True,
        "tie_word_embeddings": False, "layer_norm_eps": 1e-5,
    },
    "deepseek_v2": {
        "q_lora_rank": 1536, "kv_lora_rank": 512, "n_routed_experts": 64, "n_shared_experts": 2,
        "moe_intermediate_size": 1407, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "topk_method": "greedy",
    },
    "deepseek_v3": {
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "n_shared_experts": 1, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    },
}  # fmt: skip
"""What transformers' config classes assume for a key that a config.json leaves out."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@cache
def family(name: str) -> Blueprint:
    return read_map(graphs_dir() / f"{name}.yaml")


def example(name: str, **changes: Any) -> dict[str, Any]:
    found = family(name).example
    assert found is not None
    return {**found.config, **changes}


def lowered(name: str, config: dict[str, Any], tensors: dict[str, TensorEntry] | None = None) -> OpGraph:
    kind: Literal["hf", "gguf"] = "gguf" if "general.architecture" in config else "hf"
    return lower(family(name), ModelSource(kind, config, "a test", tensors))


def ops(graph: OpGraph, kind: str | None = None, layer: int | None = None) -> list[Any]:
    return [op for op in graph.ops if kind in (None, op.kind) and layer in (None, op.layer)]


def windows(graph: OpGraph) -> list[int | None]:
    return [op.attrs.window for op in ops(graph, "attention")]


def tensor_table(graph: OpGraph) -> dict[str, TensorEntry]:
    """The checkpoint that has exactly the tensors the graph wants."""
    table = {}
    for weight in graph.weights.values():
        shape = weight.shape if weight.stack is None else weight.shape[1:]
        table.update(
            dict.fromkeys(weight.tensors(), TensorEntry(shape[:: -1 if weight.transform.transpose else 1], "f32"))
        )
    return table


def meaning(graph: OpGraph) -> list[Any]:
    """Everything that decides what the graph computes; rope as its frequencies in a short and in a long sequence."""
    found: list[Any] = [graph.weights, graph.states, graph.inputs, graph.outputs]
    for op in ops(graph):
        attrs = op.attrs.model_dump()
        if op.kind == "rope":
            for name in ("theta", "scaling", "max_position", "original_max_position"):
                del attrs[name]
            for length in (16, 1 << 20):
                frequencies, factor = op.attrs.frequencies(length)
                attrs[f"at {length}"] = (frequencies.tobytes(), factor)
        found.append((op.name, op.kind, op.inputs, op.outputs, op.weights, op.state, attrs))
    return found


def as_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with the keys that transformers 5 writes."""
    new = dict(config)
    if "torch_dtype" in new:
        new["dtype"] = new.pop("torch_dtype")
    if "text_config" in new:
        return {**new, "text_config": as_transformers_5(new["text_config"])}
    if config["model_type"] == "gpt2":
        return new
    rope = {"rope_type": "default", **(new.pop("rope_scaling", None) or {})}
    if "type" in rope:
        rope["rope_type"] = rope.pop("type")
    for old in ("rope_theta", "rotary_emb_base"):
        if old in new:
            rope["rope_theta"] = new.pop(old)
    for old in ("partial_rotary_factor", "rotary_pct"):
        if old in new:
            rope["partial_rotary_factor"] = new.pop(old)
    if config["model_type"] == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": new.pop("rope_local_base_freq", 10000.0)}
        rope = {"full_attention": rope, "sliding_attention": local}
    if "sliding_window_pattern" in new:
        new["_sliding_window_pattern"] = new.pop("sliding_window_pattern")
    if config["model_type"] == "qwen3_moe":
        new["num_local_experts"] = new.pop("num_experts")
    return {**new, "rope_parameters": rope}


def test_every_map_is_listed() -> None:
    assert {file.stem for file in graphs_dir().glob("*.yaml")} == set(PARAMETERS)


def test_no_two_maps_claim_one_model() -> None:
    claims: list[Any] = []
    for match in (family(name).match for name in PARAMETERS):
        claims += [("hf", each) for each in as_list(match.model_type)]
        claims += [(each, match.gguf_has) for each in as_list(match.gguf)]
    assert len(claims) == len(set(claims))


@pytest.mark.parametrize("name", PARAMETERS)
def test_example_has_the_published_parameter_count(name: str) -> None:
    graph = lowered(name, example(name))
    assert sum(prod(weight.shape) for weight in graph.weights.values()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_reading_and_lowering_take_well_under_a_second(name: str) -> None:
    start = time.process_time()
    found = read_map(graphs_dir() / f"{name}.yaml")
    lower(found, ModelSource("hf", example(name), "a test"))
    assert time.process_time() - start < 0.8


@pytest.mark.parametrize("name", PARAMETERS)
def test_example_matches_its_own_tensor_table_and_nothing_else(name: str) -> None:
    config = example(name)
    graph = lowered(name, config)
    table = tensor_table(graph)
    assert lowered(name, config, table).weights == graph.weights
    first, *others = table
    with pytest.raises(LabinferError, match="has no tensor"):
        lowered(name, config, {other: table[other] for other in others})
    with pytest.raises(LabinferError, match="does not use 'surplus'"):
        lowered(name, config, {**table, "surplus": TensorEntry((1,), "f32")})
    with pytest.raises(LabinferError, match="needs"):
        lowered(name, config, {**table, first: TensorEntry((*table[first].shape[:-1], 7), "f32")})


@pytest.mark.parametrize("name", PARAMETERS)
def test_transformers_4_and_5_spell_one_graph(name: str) -> None:
    config = example(name)
    assert meaning(lowered(name, as_transformers_5(config))) == meaning(lowered(name, config))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}),
        ("qwen2", {"rope_scaling": {**YARN, "rope_theta": 5.0}}),
        ("phi3", {"partial_rotary_factor": 0.75}),
        ("phi3", {
            "rope_scaling": {"type": "su", "short_factor": [1.5] * 48, "long_factor": [4.0] * 48},
            "max_position_embeddings": 131072,
        }),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_pct": 0.5}),
    ],
)  # fmt: skip
def test_rope_scaling_of_either_spelling(name: str, changes: dict[str, Any]) -> None:
    config = example(name, **changes)
    scaled = meaning(lowered(name, config))
    assert meaning(lowered(name, as_transformers_5(config))) == scaled != meaning(lowered(name, example(name)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_keys_left_out_have_the_class_default(name: str) -> None:
    heads = {"num_attention_heads": 32} if name in ("qwen2", "qwen3") else {}  # as many as key-value heads by default
    stated = example(name, **heads) | CLASS_DEFAULTS[name]
    left_out = {key: value for key, value in stated.items() if key not in CLASS_DEFAULTS[name]}
    assert meaning(lowered(name, left_out)) == meaning(lowered(name, stated))


def test_null_is_an_answer_where_the_default_is_another() -> None:
    mistral = example("llama", model_type="mistral", rope_scaling=None)
    assert set(windows(lowered("llama", mistral))) == {4096}
    assert set(windows(lowered("llama", mistral | {"sliding_window": None}))) == {None}
    assert set(windows(lowered("llama", example("llama", sliding_window=8)))) == {None}, "Llama has no window"
    capless = lowered("gemma2", example("gemma2", final_logit_softcapping=None, attn_logit_softcapping=None))
    assert not ops(capless, "softcap")
    assert {op.attrs.softcap for op in ops(capless, "attention")} == {None}
    config = example("deepseek_v2")
    assert "layers.0.q_proj" in lowered("deepseek_v2", config).weights
    del config["q_lora_rank"]
    assert lowered("deepseek_v2", config).weights["layers.0.q_a_proj"].shape == (1536, 2048)
    heads = {"num_key_value_heads": None, "head_dim": None}
    assert lowered("mixtral", example("mixtral", **heads)).states["layers.0.kv"].widths == {"k": 4096, "v": 4096}


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_dynamic_scaling_stretches_the_context(name: str) -> None:
    for scaling, factor in ((None, 1), ({"type": "linear", "factor": 3.0}, 1), ({"type": "dynamic", "factor": 3.0}, 3)):
        config = example(name, rope_scaling=scaling)
        scope = model_scope(family(name), ModelSource("hf", config, "a test"))
        assert scope["max_context"] == config["max_position_embeddings"] * factor


def test_gemma2_slides_on_even_layers_unless_layer_types_say_otherwise() -> None:
    assert windows(lowered("gemma2", example("gemma2")))[:3] == [4096, None, 4096]
    types = ["full_attention", "full_attention", "sliding_attention"]
    stated = lowered("gemma2", example("gemma2", num_hidden_layers=3, layer_types=types))
    assert windows(stated) == [None, None, 4096]


def test_gemma3_has_five_local_layers_to_each_global_one() -> None:
    graph = lowered("gemma3_text", example("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}))
    is_global = [(i + 1) % 6 == 0 for i in range(26)]
    assert windows(graph) == [None if each else 512 for each in is_global]
    for i, each in enumerate(is_global):
        for rope in ops(graph, "rope", i):
            assert rope.attrs.theta == (1e6 if each else 1e4)
            assert (rope.attrs.scaling is not None and rope.attrs.scaling.factor == 8.0) is each


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_qwen_slides_only_if_asked_and_only_in_upper_layers(name: str) -> None:
    config = example(name, num_hidden_layers=4, sliding_window=8, max_window_layers=3)
    assert windows(lowered(name, config)) == [None] * 4
    assert windows(lowered(name, config | {"use_sliding_window": True})) == [None, None, None, 8]
    types = ["sliding_attention", *["full_attention"] * 3]
    assert windows(lowered(name, config | {"use_sliding_window": True, "layer_types": types})) == [8, None, None, None]


def test_qwen3_moe_mixes_dense_and_sparse_layers() -> None:
    config = example("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    graph = lowered("qwen3_moe", config)
    assert [op.layer for op in ops(graph, "moe")] == [1, 5]
    assert [op.layer for op in ops(graph, "glu")] == [0, 2, 3, 4]
    assert all(op.attrs.normalize for op in ops(graph, "router"))


def test_deepseek_starts_dense_and_caches_only_the_latent() -> None:
    graph = lowered("deepseek_v2", example("deepseek_v2"))
    assert [op.layer for op in ops(graph, "moe")] == list(range(1, 27))
    assert {tuple(state.widths.items()) for state in graph.states.values()} == {(("k", 512), ("v", 64))}
    (attention,) = ops(graph, "mla_attention", 5)
    assert attention.attrs.scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * np.log(40) + 1) ** 2)
    limited = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
    (router,) = ops(lowered("deepseek_v2", example("deepseek_v2", **limited)), "router", 1)
    assert (router.attrs.num_groups, router.attrs.top_groups, router.attrs.scale) == (8, 3, 16.0)
    (router,) = ops(lowered("deepseek_v3", example("deepseek_v3")), "router", 3)
    assert (router.attrs.score, router.attrs.group_score) == ("sigmoid", "top2")
    assert router.weights["bias"] == "layers.3.router_bias"


def test_gpt2_scale_by_layer_and_both_prefixes() -> None:
    config = example("gpt2", scale_attn_by_inverse_layer_idx=True)
    graph = lowered("gpt2", config)
    assert [op.attrs.scale for op in ops(graph, "attention")] == pytest.approx([0.125 / (i + 1) for i in range(12)])
    table = {name.removeprefix("transformer."): entry for name, entry in tensor_table(graph).items()}
    table |= {f"h.{i}.attn.bias": TensorEntry((1, 1, 1024, 1024), "f32") for i in range(12)}
    assert lowered("gpt2", config, table).weights["layers.3.qkv_proj"].tensor == "h.3.attn.c_attn.weight"


def test_unknown_sizes_are_named_with_the_missing_key() -> None:
    config = example("qwen3")
    del config["hidden_size"]
    with pytest.raises(InvalidFile, match="'hidden_size'"):
        lowered("qwen3", config)


def gguf(architecture: str, **keys: Any) -> dict[str, Any]:
    """GGUF metadata; an underscore stands for a dot after each of these words."""
    metadata: dict[str, Any] = {"general.architecture": architecture, "tokenizer.ggml.tokens": ["a"] * 96}
    for key, value in keys.items():
        for word in ("attention", "rope", "scaling"):
            key = key.replace(f"{word}_", f"{word}.")
        metadata[f"{architecture}.{key}"] = value
    return metadata


TINY = {
    "block_count": 2, "context_length": 256, "embedding_length": 32, "feed_forward_length": 48,
    "attention_head_count": 4, "attention_head_count_kv": 2, "attention_layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def test_gguf_llama() -> None:
    metadata = gguf("llama", **TINY, rope_freq_base=5e5, rope_dimension_count=8)
    graph = lowered("llama", metadata)
    assert graph.weights["layers.1.q_proj"].tensor == "blk.1.attn_q.weight"
    assert graph.weights["layers.1.q_proj"].transform.rows == (4, 4, 2)
    assert graph.weights["layers.1.k_proj"].transform.rows == (2, 4, 2)
    assert graph.weights["embed"].shape == (96, 32)
    assert {(op.attrs.theta, op.attrs.scaling, op.attrs.style) for op in ops(graph, "rope")} == {(5e5, None, "half")}
    assert {op.attrs.eps for op in ops(graph, "rms_norm")} == {1e-5}
    assert windows(graph) == [None, None]
    table = tensor_table(graph)
    del table["output.weight"]
    table["rope_freqs.weight"] = TensorEntry((4,), "f32")
    tied = lowered("llama", metadata, table)
    (head,) = [op for op in ops(tied, "linear") if op.outputs == tied.outputs]
    assert head.weights["weight"] == "embed", "a file without output.weight is tied"
    assert {op.weights["freq_factors"] for op in ops(tied, "rope")} == {"rope_freqs"}
    stretched = lowered("llama", metadata | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    assert ops(stretched, "rope", 0)[0].attrs.scaling.factor == 2.0


def test_gguf_mixtral_of_both_ages() -> None:
    metadata = gguf("llama", **TINY, expert_count=4, expert_used_count=2)
    graph = lowered("mixtral", metadata)
    stacked = graph.weights["layers.0.expert_gate"]
    assert (stacked.tensor, stacked.stack, stacked.shape) == ("blk.0.ffn_gate_exps.weight", None, (4, 48, 32))
    assert graph.weights["layers.0.q_proj"].transform, "llama.cpp permutes Mixtral as it does Llama"
    table = tensor_table(graph)
    for name in [name for name in table if "_exps" in name]:
        entry = table.pop(name)
        for e in range(4):
            table[name.replace("_exps", f".{e}")] = TensorEntry(entry.shape[1:], "f32")
    assert lowered("mixtral", metadata, table).weights["layers.0.expert_gate"].tensors()[3] == "blk.0.ffn_gate.3.weight"


def test_gguf_qwen2() -> None:
    graph = lowered("qwen2", gguf("qwen2", **TINY, rope_freq_base=1e6))
    assert not any(weight.transform for weight in graph.weights.values()), "only Llama's rows are permuted"
    assert graph.weights["layers.0.q_bias"].tensor == "blk.0.attn_q.bias"
    assert graph.weights["layers.0.v_bias"].shape == (16,)
    assert "layers.0.o_bias" not in graph.weights
    assert ops(graph, "rope", 0)[0].attrs.theta == 1e6


def test_gguf_gemma2() -> None:
    keys = {
        "attention_key_length": 16, "attention_value_length": 16, "attention_sliding_window": 8,
        "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0,
    }  # fmt: skip
    graph = lowered("gemma2", gguf("gemma2", **TINY, **keys))
    assert {op.attrs.offset for op in ops(graph, "rms_norm")} == {0.0}, "the converter has added one to every norm"
    assert {op.attrs.offset for op in ops(lowered("gemma2", example("gemma2")), "rms_norm")} == {1.0}
    assert windows(graph) == [8, None]
    assert {(op.attrs.softcap, op.attrs.scale) for op in ops(graph, "attention")} == {(40.0, 0.25)}
    assert [op.attrs.cap for op in ops(graph, "softcap")] == [20.0]
    assert graph.weights["layers.1.attn_post_norm"].tensor == "blk.1.post_attention_norm.weight"
    assert graph.weights["layers.1.mlp_norm"].tensor == "blk.1.ffn_norm.weight"
    large = lowered("gemma2", gguf("gemma2", **{**TINY, "block_count": 46}, **keys))
    assert ops(large, "attention", 0)[0].attrs.scale == pytest.approx((32 / 4) ** -0.5), "27B scales by another width"


def test_gguf_phi3_takes_longrope_from_tensors() -> None:
    metadata = gguf("phi3", **TINY, rope_dimension_count=6, rope_freq_base=1e4, attention_sliding_window=8)
    graph = lowered("phi3", metadata)
    assert graph.weights["layers.0.qkv_proj"].shape == (64, 32)
    assert graph.weights["layers.0.gate_up_proj"].tensor == "blk.0.ffn_up.weight"
    assert windows(graph) == [8, 8]
    assert {(op.attrs.rotary_dim, op.attrs.scaling) for op in ops(graph, "rope")} == {(6, None)}
    table = tensor_table(graph)
    table |= {f"rope_factors_{kind}.weight": TensorEntry((3,), "f32") for kind in ("short", "long")}
    stretched = {"phi3.rope.scaling.attn_factor": 1.19, "phi3.rope.scaling.original_context_length": 64}
    rope = ops(lowered("phi3", metadata | stretched, table), "rope", 0)[0]
    assert rope.weights == {"freq_factors": "short_factors", "long_freq_factors": "long_factors"}
    assert rope.attrs.recompute_after == 64
    plain = ops(graph, "rope", 0)[0].attrs.frequencies(16)[0]
    for length in (16, 65):
        frequencies, factor = rope.attrs.frequencies(length)
        assert factor == 1.19
        np.testing.assert_array_equal(frequencies, plain)  # the tensors divide them


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "starcoder2", "llama"])
def test_gguf_head_is_tied_exactly_when_output_weight_is_absent(name: str) -> None:
    metadata = gguf(str(family(name).match.gguf), **TINY, attention_layer_norm_epsilon=1e-5, attention_key_length=8)
    graph = lowered(name, metadata)
    table = tensor_table(graph)
    assert "output.weight" in table
    assert "lm_head" in lowered(name, metadata, table).weights
    del table["output.weight"]
    assert "lm_head" not in lowered(name, metadata, table).weights


@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - {"deepseek_v3", "gemma3"}))
def test_every_weight_has_a_gguf_name(name: str) -> None:
    common = TINY | {"attention_layer_norm_epsilon": 1e-5, "rope_dimension_count": 4}
    if name == "deepseek_v2":
        common |= {
            "attention_kv_lora_rank": 12, "attention_key_length": 12, "attention_value_length": 8, "expert_count": 4,
            "expert_used_count": 2, "expert_shared_count": 1, "expert_feed_forward_length": 24,
            "leading_dense_block_count": 1,
        }  # fmt: skip
    if name in ("mixtral", "qwen3_moe"):
        common |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24}
    architectures = family(name).match.gguf
    assert isinstance(architectures, str)
    graph = lowered(name, gguf(architectures, **common))
    assert all(weight.tensor.endswith((".weight", ".bias")) for weight in graph.weights.values())
    assert all(f"blk.{op.layer}." in graph.weights[used].tensor or used in ("embed", "lm_head")
               for op in graph.ops if op.layer is not None for used in op.weights.values())  # fmt: skip
