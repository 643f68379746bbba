"""LoRA adapters: equal to a merged checkpoint, each request its own in one batch, slots, memory, what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import labinfer
from labinfer import LoRARequest, SamplingParams
from labinfer.compiler.plan import load_plan
from labinfer.errors import Errors, LabinferError, UsageError
from labinfer.llm import LLM
from labinfer.runtime.lora import adapter_rank
from labinfer.runtime.manager import Manager
from labinfer.runtime.peft import PeftAdapter

from .adapters import merge, save_adapter, weights_of
from .hf.agreement import assert_agree
from .mutation import damaged
from .tiny import GOLDEN, tiny_map
from .weights import files

FAMILIES = (
    "llama-biases",
    "qwen2-window",
    "phi3-window_odd_heads",
    "gpt2-untied_inner",
    "gpt_neox-serial",
    "gemma3_text-linear_global",
    "deepseek_v2-yarn_two_mscales",
    "qwen3_moe-sparse_step_and_mlp_only",
    "starcoder2-no_bias",
)
LLAMA = GOLDEN / "llama-llama3"
PROMPT = [5, 9, 2, 40, 17, 3, 3, 61]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("devices", ["reference", "cpu", "reference,reference:1"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_equals_the_merged_checkpoint(name: str, devices: str, tmp_path: Path) -> None:
    base = GOLDEN / name
    adapter = save_adapter(tmp_path / "adapter", base)
    with labinfer.LLM(merge(tmp_path / "merged", base, adapter), devices="reference") as merged:
        expected = merged.logits(PROMPT)
    with labinfer.LLM(base, devices=devices, max_loras=1, max_lora_rank=4) as llm:
        assert_agree(llm.logits(PROMPT, LoRARequest("a", adapter)), expected, "adapted")
        plain = llm.logits(PROMPT)
    with labinfer.LLM(base, devices=devices) as llm:
        assert_agree(plain, llm.logits(PROMPT), "none")
    assert np.abs(plain - expected).max() > 0.01 * np.abs(expected).max()


def adapters(folder: Path, count: int, **options: Any) -> list[LoRARequest]:
    """So many adapters of the llama."""
    return [LoRARequest(f"a{seed}", save_adapter(folder / f"a{seed}", LLAMA, seed, **options)) for seed in range(count)]


def tokens(llm: LLM, prompts: list[list[int]], lora: list[LoRARequest | None]) -> list[list[int]]:
    return [answer.token_ids for answer in llm.generate(prompts, GREEDY, lora_request=lora)]


@pytest.mark.parametrize(
    "limits", [{}, {"max_num_batched_tokens": 5}, {"max_loras": 1}, {"max_num_seqs": 2, "max_loras": 2}], ids=str
)
@pytest.mark.parametrize("devices", ["reference", "cpu"])
def test_each_request_of_a_batch_has_its_own_adapter(devices: str, limits: dict[str, int], tmp_path: Path) -> None:
    first, second, third = adapters(tmp_path, 3)
    wanted = [first, None, second, second, None, third, first, third]
    prompts = [list(range(3 + 4 * index)) for index in range(len(wanted))]
    alone = []
    for prompt, request in zip(prompts, wanted, strict=True):
        with labinfer.LLM(LLAMA, devices=devices, max_loras=1, max_lora_rank=4) as llm:
            alone += tokens(llm, [prompt], [request])
    with labinfer.LLM(LLAMA, devices=devices, **{"max_loras": 3, "max_lora_rank": 7, **limits}) as llm:
        assert tokens(llm, prompts, wanted) == alone
        assert not any(slot.users for slot in llm.adapters.slots)
    with labinfer.LLM(LLAMA, devices=devices) as llm:
        assert tokens(llm, prompts, [None] * len(prompts)) != alone


def test_the_least_recently_used_adapter_nobody_uses_leaves_its_slot(tmp_path: Path) -> None:
    first, second, third = adapters(tmp_path, 3)
    with labinfer.LLM(LLAMA, enable_lora=True, max_loras=2) as llm:
        slots = llm.adapters
        assert (slots.acquire(first), slots.acquire(second)) == (0, 1)
        assert slots.acquire(third) is None
        with pytest.raises(UsageError, match="no slot is free for adapter 'a2'"):
            llm.session(third)
        slots.release(0)
        slots.release(1)
        assert slots.acquire(first) == 0
        slots.release(0)
        assert slots.acquire(third) == 1  # the second was not used for longer
        assert slots.acquire(first) == 0
        assert slots.acquire(second) is None


def test_cached_prefixes_are_of_one_adapter(tmp_path: Path) -> None:
    first, second = adapters(tmp_path, 2)
    prompt = [(7 * i) % 96 for i in range(50)]
    with labinfer.LLM(LLAMA, max_loras=2, enable_prefix_caching=False) as llm:
        expected = {each: tokens(llm, [prompt], [each])[0] for each in (None, first, second)}
    assert len({tuple(made) for made in expected.values()}) == 3
    with labinfer.LLM(LLAMA, max_loras=1) as llm:
        hits = []
        for each in (None, first, second, first, None, second):
            before = llm.blocks.counters.hits
            assert tokens(llm, [prompt], [each])[0] == expected[each]
            hits.append(llm.blocks.counters.hits - before)
        assert hits == [0, 0, 0, 48, 48, 48]
        llm.blocks.check_integrity()


def test_an_adapter_of_few_modules_finds_nothing_of_the_one_before(tmp_path: Path) -> None:
    [whole] = adapters(tmp_path, 1)
    part = LoRARequest("part", save_adapter(tmp_path / "part", LLAMA, 5, rank=2, only="layers.1.mlp"))
    with labinfer.LLM(LLAMA, max_loras=1, max_lora_rank=4) as llm:
        expected = llm.logits(PROMPT, part)
        assert np.abs(llm.logits(PROMPT, whole) - expected).max() > 0.1
        np.testing.assert_array_equal(llm.logits(PROMPT, part), expected)


def test_an_adapter_that_changed_on_disk_is_read_again(tmp_path: Path) -> None:
    [request] = adapters(tmp_path, 1)
    file = Path(request.path) / "adapter_model.safetensors"
    with labinfer.LLM(LLAMA, max_loras=2) as llm:
        before, plain = llm.logits(PROMPT, request), llm.logits(PROMPT)
        save_file({name: 0 * array for name, array in load_file(file).items()}, file)
        os.utime(file, ns=(1, 1))
        np.testing.assert_array_equal(llm.logits(PROMPT, request), plain)
        assert np.abs(before - plain).max() > 0.1


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"lora_alpha": 2.5, "alpha_pattern": {"q_proj": 1, "layers.1.mlp.up_proj": 9}},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}},
        {"rank_pattern": {"v_proj": 3}, "use_rslora": True, "alpha_pattern": {"layers.0.self_attn.v_proj": 12}},
    ],
    ids=str,
)
def test_scales_and_ranks_of_their_own(config: dict[str, Any], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", LLAMA, **config)
    assert adapter_rank(adapter) == max([4, *config.get("rank_pattern", {}).values()])
    with labinfer.LLM(merge(tmp_path / "merged", LLAMA, adapter)) as merged:
        expected = merged.logits(PROMPT)
    with labinfer.LLM(LLAMA, enable_lora=True) as llm:
        assert_agree(llm.logits(PROMPT, LoRARequest("a", adapter)), expected, "adapted")


def test_patterns_fit_whole_parts_of_a_name_and_the_first_one_counts(tmp_path: Path) -> None:
    alphas = {"proj": 1, "^layers.0.mlp.up_proj": 2, "^model.layers.0.mlp.up_proj": 3, "up_proj": 4, "mlp.up_proj": 5}
    adapter = save_adapter(tmp_path / "adapter", LLAMA, rank=1, lora_alpha=7, alpha_pattern=alphas)
    with PeftAdapter(adapter) as read:
        assert read.scale("model.layers.0.mlp.up_proj") == 3
        assert read.scale("model.layers.1.mlp.up_proj") == 4
        assert read.scale("model.layers.1.mlp.gate_proj") == 7


def test_the_bytes_of_the_pools_are_the_plans(tmp_path: Path) -> None:
    [request] = adapters(tmp_path, 1)
    for devices in ("reference", "cpu", "reference,reference:1"):
        manager = Manager()
        with labinfer.LLM(LLAMA, devices=devices, manager=manager, max_loras=3, max_lora_rank=5) as llm:
            llm.logits(PROMPT, request)
            for stage in llm.plan.stages:
                taken = {each.label: each.nbytes for each in manager.devices[stage.device].allocator.buffers}
                assert taken["adapters"] == stage.bytes.adapters > 0
                assert taken["step"] == stage.bytes.step
                assert sum(taken.values()) == stage.bytes.total
        assert not any(device.allocator.allocated for device in manager.devices.values())
    [stage] = labinfer.compile(LLAMA, devices="reference", max_loras=3, max_lora_rank=5).stages
    linear = [array.shape for name, array in weights_of(LLAMA).items() if "_proj" in name]
    assert stage.bytes.adapters == sum(4 * 3 * 5 * (rows + columns) for rows, columns in linear)


def test_without_adapters_the_plan_is_as_it_was() -> None:
    plan = labinfer.compile(LLAMA, enable_lora=False, max_loras=3)
    assert plan == labinfer.compile(LLAMA)
    assert not {"max_loras", "lora_add", "adapter"} & set(re.findall(r"\w+", plan.dump()))
    assert "adapter" not in plan.limits.step_shapes
    limits = labinfer.compile(LLAMA, enable_lora=True).limits
    assert (limits.max_loras, limits.max_lora_rank) == (4, 16)
    for options in ({"max_loras": 0}, {"max_lora_rank": -1}, {"max_loras": "two"}):
        with pytest.raises(UsageError, match="must be a positive whole number"):
            labinfer.compile(LLAMA, **options)


def test_names_of_the_map_see_the_adapted_value(tmp_path: Path) -> None:
    [request] = adapters(tmp_path, 1, only="layers.1.self_attn.o_proj")
    seen: dict[str, np.ndarray] = {}
    with labinfer.LLM(LLAMA, max_loras=1, fuse="all") as llm:
        for name in ("out", "out.base", "context"):
            with llm.listen(f"layers.1.attn.{name}", lambda array, name=name: seen.update({name: array})):
                llm.logits(PROMPT, request)
        a, b = (llm.variable(f"layers.1.o_proj.lora_{part}").array[0] for part in "ab")
    expected = seen["out.base"] + seen["context"] @ a.T @ b.T
    np.testing.assert_allclose(seen["out"], expected, rtol=0, atol=1e-4)


def test_dead_memory_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [request] = adapters(tmp_path, 1)
    with labinfer.LLM(LLAMA, max_loras=1) as llm:
        expected = llm.logits(PROMPT, request)
    monkeypatch.setenv("LABINFER_POISON", "1")
    with labinfer.LLM(LLAMA, max_loras=1) as llm:
        np.testing.assert_array_equal(llm.logits(PROMPT, request), expected)


def save_gguf(path: Path, checkpoint: Path) -> Path:
    """A llama checkpoint as llama.cpp converts it: other names, and rows of q and k in pairs."""
    config = json.loads((checkpoint / "config.json").read_text())
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {
        f"self_attn.{part}_proj": f"attn_{to}" for part, to in zip("qkvo", ("q", "k", "v", "output"), strict=True)
    }
    names |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    table, data = [], b""
    for name, array in weights_of(checkpoint).items():
        for part, count in (("q_proj", heads), ("k_proj", groups)):
            if part in name:
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for one, other in names.items():
            name = name.replace(f"{one}.weight", f"{other}.weight")
        table.append(files.GgufTensor(name.replace("model.layers", "blk"), "f32", array.shape[::-1], len(data)))
        data += array.tobytes() + b"\0" * (-array.nbytes % 32)
    stated = {
        "embedding_length": config["hidden_size"], "block_count": config["num_hidden_layers"],
        "attention.head_count": heads, "attention.head_count_kv": groups, "vocab_size": config["vocab_size"],
        "feed_forward_length": config["intermediate_size"], "context_length": 128,
    }  # fmt: skip
    pairs = [files.pair("general.architecture", files.STRING, "llama")]
    pairs += [files.pair(f"llama.{key}", files.U32, value) for key, value in stated.items()]
    pairs += [files.pair("llama.attention.layer_norm_rms_epsilon", files.F32, config["rms_norm_eps"])]
    path.write_bytes(files.gguf(pairs, table, data))
    return path


def test_an_adapter_of_the_original_fits_a_gguf_file(tiny_model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_model)
    with labinfer.LLM(merge(tmp_path / "merged", tiny_model, adapter)) as merged:
        expected = merged.logits(PROMPT)
    with labinfer.LLM(save_gguf(tmp_path / "tiny.gguf", tiny_model), max_loras=1, max_lora_rank=4) as llm:
        assert_agree(llm.logits(PROMPT, LoRARequest("a", adapter)), expected, "adapted")


# What is refused


def codes_of(llm: LLM, adapter: Path) -> list[str]:
    """Codes of the errors of an adapter; each has a place and a remedy, and the exit code of weights."""
    with pytest.raises(LabinferError) as caught:
        llm.generate([PROMPT], GREEDY, lora_request=LoRARequest("bad", adapter))
    errors = caught.value.errors if isinstance(caught.value, Errors) else (caught.value,)
    assert all(each.place and each.remedy for each in errors)
    assert caught.value.exit_code == 5
    return [each.code for each in errors]


@pytest.fixture(scope="module")
def llm() -> Any:
    with labinfer.LLM(LLAMA, max_loras=2, max_lora_rank=4) as opened:
        yield opened


@pytest.mark.parametrize(
    ("config", "codes"),
    [
        ({"peft_type": "IA3"}, ["lora.unsupported"]),
        ({"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]}, ["lora.unsupported"] * 3),
        ({"use_dora": 0}, ["lora.unsupported"]),
        ({"init_lora_weights": "pissa"}, ["lora.unsupported"]),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, ["lora.unsupported"]),
        ({"r": 0}, ["lora.config"]),
        ({"r": True}, ["lora.config"]),
        ({"r": 5}, ["lora.tensor"] * 21),
        ({"lora_alpha": "16"}, ["lora.config"]),
        ({"lora_alpha": float("nan")}, ["lora.config"]),
        ({"use_rslora": "yes"}, ["lora.config"]),
        ({"rank_pattern": {"layers.1.mlp.up_proj": 3.5}}, ["lora.config"]),
        ({"alpha_pattern": ["q_proj"]}, ["lora.config"]),
        ({"alpha_pattern": {"(a+)+b": 2}}, ["lora.unsupported"]),
    ],
    ids=str,
)
def test_configs_that_are_refused(llm: LLM, config: dict[str, Any], codes: list[str], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", LLAMA)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    assert codes_of(llm, adapter) == codes


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({f"{Q}A.weight": None}, ["lora.tensor"]),
        ({f"{Q}B.weight": (32, 3)}, ["lora.tensor"]),
        ({f"{Q}A.weight": (4, 25)}, ["lora.shape"]),
        ({f"{Q}B.weight": (16, 4)}, ["lora.shape"]),
        ({f"{Q}A.weight": (4,)}, ["lora.tensor"] * 2),
        ({f"{Q}magnitude_vector": (32,)}, ["lora.unsupported"]),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (4, 96)}, ["lora.unsupported"]),
        ({"base_model.model.lm_head.weight": (96, 24)}, ["lora.unsupported"]),
        ({"lm_head.lora_A.weight": (4, 24), "lm_head.lora_B.weight": (96, 4)}, ["lora.unknown-module"]),
        ({f"{Q}A.weight".replace(".1.", ".9."): (4, 24), f"{Q}B.weight".replace(".1.", ".9."): (32, 4)},
         ["lora.unknown-module"]),
        ({"q_proj.lora_A.weight": (4, 24), "q_proj.lora_B.weight": (32, 4)}, ["lora.unknown-module"]),
        ({f"x.{Q}A.weight": (4, 24), f"x.{Q}B.weight": (32, 4)}, ["lora.tensor"]),
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_are_refused(llm: LLM, change: dict[str, Any], codes: list[str], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", LLAMA)
    file = adapter / "adapter_model.safetensors"
    changed = {name: shape and np.ones(shape, np.float32) for name, shape in change.items()}
    save_file({name: array for name, array in (load_file(file) | changed).items() if array is not None}, file)
    assert codes_of(llm, adapter) == codes


def test_folders_that_are_refused(llm: LLM, tmp_path: Path) -> None:
    assert codes_of(llm, tmp_path / "nothing") == ["lora.missing-file"]
    assert codes_of(llm, Path("a\0b")) == ["lora.missing-file"]
    adapter = save_adapter(tmp_path / "high", LLAMA, rank=5)
    assert set(codes_of(llm, adapter)) == {"lora.rank"}
    (adapter / "adapter_model.safetensors").write_bytes(files.safetensors({}))
    assert codes_of(llm, adapter) == ["lora.tensor"]
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert codes_of(llm, adapter) == ["lora.missing-file"]


def test_requests_that_cannot_be_meant(llm: LLM, tmp_path: Path) -> None:
    [request] = adapters(tmp_path, 1)
    for wrong in ("a0", [request, request], [1], {"a": request}):
        with pytest.raises(UsageError, match="lora_request"):
            llm.generate([PROMPT], GREEDY, lora_request=wrong)  # type: ignore[arg-type]
    for name, path in (("", "x"), (3, "x"), ("a", ""), ("a", 3)):
        with pytest.raises(UsageError, match="needs"):
            LoRARequest(name, path)  # type: ignore[arg-type]
    with labinfer.LLM(LLAMA) as plain, pytest.raises(UsageError, match="no room for adapters") as caught:
        plain.generate([PROMPT], GREEDY, lora_request=request)
    assert "enable_lora" in str(caught.value.remedy)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numbers of a damaged adapter may be huge
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), part=st.sampled_from(["config", "header", "bytes"]))
def test_damaged_adapters_never_end_in_a_traceback(
    llm: LLM, tmp_path_factory: pytest.TempPathFactory, seed: int, part: str
) -> None:
    rng = random.Random(seed)
    adapter = save_adapter(tmp_path_factory.mktemp("damaged") / "adapter", LLAMA, only="layers.0.mlp", rank=2)
    config, tensors = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    raw = bytearray(tensors.read_bytes())
    if part == "config":
        stated = json.loads(config.read_text()) | {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"gate_proj": 3}}
        config.write_text(json.dumps(damaged(stated, rng)))
    elif part == "header":
        (length,) = struct.unpack_from("<Q", raw)
        tensors.write_bytes(files.safetensors(damaged(json.loads(raw[8 : 8 + length]), rng), bytes(raw[8 + length :])))
    else:
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        tensors.write_bytes(bytes(raw[: rng.choice([len(raw), rng.randrange(len(raw))])]))
    failure: LabinferError | None = None
    try:
        assert llm.logits(PROMPT, LoRARequest("damaged", adapter)).shape == (len(PROMPT), 96)
    except LabinferError as error:
        failure = error
    assert failure is None or failure.exit_code == 5
    assert not any(slot.users for slot in llm.adapters.slots)


def test_a_map_cannot_write_the_op(tmp_path: Path) -> None:
    line = "    - {op: add, in: [h, out], out: h}\n"
    added = line + "    - {op: lora_add, in: [h, h], out: h, a: out, b: out, max_loras: 1, rank: 1}\n"
    with pytest.raises(LabinferError) as caught:
        labinfer.compile(tiny_map(tmp_path, lambda text: text.replace(line, added)))
    assert caught.value.code == "map.inserted-op"


def edit_limits(data: Any) -> None:
    data["limits"]["max_loras"] = 9


def edit_rank(data: Any) -> None:
    data["limits"]["max_lora_rank"] = 5


def edit_flag(data: Any) -> None:
    for line in data["weights"]:
        line.pop("adapter", None)


def edit_linear(data: Any) -> None:
    next(line for line in data["weights"] if line["name"] == "layers.{i}.q_proj")["adapter"] = True


def edit_shape(data: Any) -> None:
    next(line for line in data["weights"] if line["name"].endswith("q_proj.lora_a"))["shape"][0] = 9


def edit_names(data: Any) -> None:
    next(line for line in data["weights"] if line["name"].endswith("q_proj.lora_b"))["tensor"] = "x.lora_B.weight"


def edit_format(data: Any) -> None:
    next(line for line in data["weights"] if line["name"].endswith("q_proj.lora_a"))["format"] = "f16"


EDITS = [edit_limits, edit_rank, edit_flag, edit_linear, edit_shape, edit_names, edit_format]


@pytest.mark.parametrize("edit", EDITS)
def test_edited_plans_are_refused(edit: Callable[[Any], None], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(labinfer.compile(LLAMA, max_loras=2).dump())
    assert load_plan(path).limits.max_loras == 2
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(LabinferError) as caught:
        load_plan(path)
    assert caught.value.exit_code == 3


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_damaged_plans_never_end_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    request = LoRARequest("a", tmp_path_factory.getbasetemp() / "for-damaged-plans")
    if not Path(request.path).exists():
        save_adapter(Path(request.path), LLAMA)
    data = json.loads(labinfer.compile(LLAMA, max_loras=1, max_lora_rank=4).dump())
    path.write_text(json.dumps(damaged(data, random.Random(seed))))
    with contextlib.suppress(LabinferError), labinfer.LLM(path) as llm:
        assert llm.logits([1, 2, 3], request).shape == (3, llm.vocab_size)


def test_wrong_bytes_of_the_pools_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(labinfer.compile(LLAMA, max_loras=2).dump())
    data = json.loads(path.read_text())
    data["stages"][0]["bytes"]["adapters"] -= 4
    path.write_text(json.dumps(data))
    with pytest.raises(LabinferError) as caught:
        labinfer.LLM(path)
    assert caught.value.code == "plan.bytes"


def test_run_takes_an_adapter(tmp_path: Path, labinfer_cli: Callable[..., CompletedProcess[str]]) -> None:
    [request] = adapters(tmp_path, 1)
    with labinfer.LLM(LLAMA, max_loras=1) as llm:
        expected = tokens(llm, [PROMPT], [request])[0]
    words = ["run", LLAMA, "--token-ids", ",".join(map(str, PROMPT)), "--max-new-tokens", 8, "--ignore-eos", "--json"]
    result = labinfer_cli(*words, "--lora", f"a={request.path}")
    assert json.loads(result.stdout)["token_ids"] == expected
    (tmp_path / "plan.json").write_text(labinfer.compile(LLAMA, max_loras=2, max_lora_rank=4).dump())
    result = labinfer_cli(
        *(tmp_path / "plan.json" if word is LLAMA else word for word in words), "--lora", f"a={request.path}"
    )
    assert json.loads(result.stdout)["token_ids"] == expected
    assert labinfer_cli(*words, "--lora", "a").returncode == 2
    assert labinfer_cli(*words, "--lora", "a=nowhere").returncode == 5
    assert "; 2 adapters of rank 4" in " ".join(labinfer_cli("explain", "plan.json").stdout.split())
    assert "adapters" in labinfer_cli("compile", LLAMA, "--max-loras", 2, "--dry-run").stderr
