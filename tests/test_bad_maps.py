"""Wrong maps and configs: coded errors with place and remedy, all at once, quickly, and never a traceback."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import labinfer
from labinfer.compiler.source import load_yaml
from labinfer.errors import Errors, InvalidFile, LabinferError, WeightsError
from labinfer.home import graphs_dir

from .mutation import damaged
from .tiny import GOLDEN, MAP, tensors, tiny_checkpoint, tiny_map

SHIPPED = {
    "llama": "llama-llama3", "phi3": "phi3-longrope_crossed", "gemma2": "gemma2-odd_heads", "gpt2": "gpt2-untied_inner",
    "deepseek_v2": "deepseek_v2-group_limited", "qwen3_moe": "qwen3_moe-sparse_step_and_mlp_only",
    "mixtral": "mixtral-window", "gpt_neox": "gpt_neox-serial",
}  # fmt: skip


def failures(folder: Path, *changes: tuple[str, str], **options: Any) -> list[LabinferError]:
    """The errors of the tiny map after each ``(old, new)`` text change."""

    def change(text: str) -> str:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        return text

    with pytest.raises(LabinferError) as caught:
        labinfer.compile(tiny_map(folder, change), **options)
    return list(caught.value.errors) if isinstance(caught.value, Errors) else [caught.value]


CASES = {
    # code: old text, new text, line of the error, what the error says
    "yaml.duplicate-key": ("outputs: [logits]", "outputs: [logits]\noutputs: [logits]", 10, "line 9"),
    "map.unknown-key": ("outputs:", "output: [logits]\noutputs:", 9, "outputs"),
    "map.unknown-op": ("op: add,", "op: addd,", 24, "did you mean 'add'"),
    "map.unknown-attribute": ("embedding_dim:", "embeding_dim: 3, embedding_dim:", 12, "did you mean 'embedding_dim'"),
    "map.unknown-weight": ("weight: head", "weight: haed", 15, "did you mean 'head'"),
    "map.unknown-state": ("out: context, state: kv", "out: context, state: vk", 21, "vk"),
    "map.unknown-block": ("repeat: layer,", "repeat: leyer,", 13, "did you mean 'layer'"),
    "map.unknown-family": ("family: tiny", "family: tiny\nextends: lama", 3, "did you mean 'llama'"),
    "map.undefined-name": ("in: h, out: last", "in: hh, out: last", 14, "'hh'"),
    "map.missing-attribute": (", num_heads: 2", "", 21, "num_heads"),
    "map.attribute": ("num_heads: 2,", "num_heads: -2,", 21, "greater than 0"),
    "map.shape-mismatch": ("out_features: 3 * hidden_size", "out_features: 5 * hidden_size", 19, "made by 'linear' at"),
    "map.outputs": ("out: [q, k, v]", "out: [q, k]", 19, "makes 3 values"),
    "map.inputs": ("in: [h, out], out: h", "in: [h, out, h], out: h", 24, "'in' names 3"),
    "map.repeat": ("times: num_layers", "times: 10**9", 13, "1024"),
    "map.expression": ("3 * hidden_size", "3 * (hidden_size", 18, "out_features: 3 * (hidden_size"),
    "graph.states-fit": ("v: hidden_size}", "v: 2 * hidden_size}", 20, "state 'layers.0.kv'"),
    "map.state": ("v: hidden_size}", "v: -hidden_size}", 20, "kv"),
    "map.device": ("op: add,", "op: add, device: '[1]',", 24, "device"),
    "yaml.tag": ("family: tiny", "family: !!python/object/apply:os.system [id]", 2, "python"),
    "yaml.anchor": ("inputs: [token_ids, positions]", "inputs: &a [*a, *a, *a]", 8, "anchor"),
    "map.schema": ("labmap: 1", "labmap: 2", 1, "labmap"),
}  # fmt: skip


@pytest.mark.parametrize("code", CASES)
def test_one_mistake(tmp_path: Path, code: str) -> None:
    old, new, line, says = CASES[code]
    errors = failures(tmp_path, (old, new))
    matching = [error for error in errors if error.code == code]
    assert matching, [error.code for error in errors]
    error = matching[0]
    assert isinstance(error, InvalidFile)
    assert error.exit_code == 3
    assert error.place is not None
    assert (error.place.file, error.place.line) == (str(tmp_path / "tiny.yaml"), line)
    assert says in str(error)
    assert "^" in str(error) or code == "graph.states-fit"


def test_attention_must_read_the_cache_as_wide_as_it_is(tmp_path: Path) -> None:
    errors = failures(tmp_path, ("num_kv_heads: 2", "num_kv_heads: 1"))
    assert {(error.code, error.place.line) for error in errors if error.place} == {("graph.states-fit", 21)}
    assert "{'k': 4, 'v': 4}, it has {'k': 8, 'v': 8}" in errors[0].message


def test_the_valid_map_compiles(tmp_path: Path) -> None:
    assert labinfer.compile(tiny_map(tmp_path)).vocab_size == 16


def test_a_shape_mismatch_names_both_producers(tmp_path: Path) -> None:
    [error] = failures(tmp_path, ("in: context, out: out, weight: out, bias: out_bias, out_features: hidden_size",
                                  "in: context, out: out, weight: out, out_features: 4"))  # fmt: skip
    assert error.code == "map.shape-mismatch"
    file = tmp_path / "tiny.yaml"
    assert f"'h' is f32[T, 8], made by 'embedding' at {file}:12:5" in error.message
    assert f"'layers.0.out' is f32[T, 4], made by 'linear' at {file}:23:7" in error.message


def test_reading_what_is_made_later_is_told_as_a_cycle(tmp_path: Path) -> None:
    [error] = failures(tmp_path, ("in: h, out: qkv", "in: context, out: qkv"))
    assert error.code == "map.undefined-name"
    assert error.remedy is not None
    assert "cycle" in error.remedy
    assert "tiny.yaml:21" in error.remedy


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("family: tiny", "family: tiny\nextends: tiny"), "map.extends-cycle"),
        (("  layer:\n", "  layer:\n    - {use: layer}\n"), "map.block-cycle"),
        (("{hf: hidden_size}", "{value: num_layers}"), None),
    ],
)
def test_cycles(tmp_path: Path, change: tuple[str, str], code: str | None) -> None:
    if code is None:
        errors = failures(tmp_path, change, ("{hf: num_layers}", "{value: hidden_size}"))
        assert {error.code for error in errors} == {"map.cycle"}
    else:
        assert [error.code for error in failures(tmp_path, change)] == [code]


def test_nested_repeats_are_refused(tmp_path: Path) -> None:
    inner = "blocks:\n  inner:\n    - {op: add, in: [h, h], out: h}\n"
    [error] = failures(
        tmp_path, ("blocks:\n", inner), ("    - {op: add, in: [h, out], out: h}\n",
        "    - {op: add, in: [h, out], out: h}\n    - {repeat: inner, as: sub, times: 2, carry: h}\n"),
    )  # fmt: skip
    assert error.code == "map.repeat"
    assert "nest" in error.message


def test_all_errors_of_a_map_in_one_run(tmp_path: Path) -> None:
    errors = failures(
        tmp_path, ("op: add,", "op: addd,"), ("weight: head", "weight: haed"), ("state: kv, num", "state: vk, num"),
        ("sizes:", "size:"),
    )  # fmt: skip
    codes = sorted(error.code for error in errors)
    assert codes == sorted(
        ["map.unknown-op", "map.unknown-weight", "map.unknown-state", "map.unknown-attribute", "map.missing-attribute"]
    )
    assert len({error.place.line for error in errors if error.place}) == 4


def test_an_unknown_name_in_an_expression(tmp_path: Path) -> None:
    [error] = failures(tmp_path, ("3 * hidden_size", "3 * hidden_sizes"))
    assert error.code == "map.undefined-name"
    assert error.remedy == "did you mean 'hidden_size'?"
    assert error.place is not None
    assert error.place.line == 18


def test_errors_in_and_after_the_layers_are_told_together(tmp_path: Path) -> None:
    errors = failures(tmp_path, ("num_heads: 2,", "num_heads: -2,"), ("in: h, out: last", "in: hh, out: last"))
    assert [error.code for error in errors] == ["map.attribute", "map.undefined-name"]


def test_missing_and_unused_tensors_are_told_together(tmp_path: Path) -> None:
    errors = failures(tmp_path, ("{hf: qkv}", "{hf: kvq}"), weights=tiny_checkpoint(tmp_path / "model"))
    assert [error.code for error in errors] == ["weights.missing-tensor"] * 3 + ["weights.unused-tensor"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("3 * hidden_size", "3 * hidden_sizes"),
        ("3 * hidden_size", "3 * (hidden_size"),
        ("num_embeddings: vocab_size", "num_embeddings: vocab_sizes"),
        ("scale: 0.5", "scale: hidden_size // 0"),
        ("in: context, out: out,", "in: context, out: out, when: hidden_sizes,"),
        ("times: num_layers", "times: num_layer"),
        ("    - {op: add, in: [h, out], out: h}",
         "    - {use: sum, as: s, when: hidden_sizes}\n    - {op: add, in: [h, s.y], out: h}\n"
         "  sum:\n    - {op: add, in: [h, out], out: y}"),
    ],
)  # fmt: skip
def test_one_wrong_expression_is_one_error(tmp_path: Path, old: str, new: str) -> None:
    assert len(failures(tmp_path, (old, new))) == 1


def test_a_wrong_layer_is_told_once(tmp_path: Path) -> None:
    assert len(failures(tmp_path, ("num_heads: 2,", "num_heads: -2,"))) == 1


@pytest.mark.parametrize(
    ("outputs", "says"), [("[]", "none"), ("[h]", "f32[T, 8]"), ("[logits, last]", "'last'"), ("[logit]", "logits")]
)
def test_outputs_are_the_logits_alone(tmp_path: Path, outputs: str, says: str) -> None:
    [error] = failures(tmp_path, ("outputs: [logits]", f"outputs: {outputs}"))
    assert error.code in ("map.outputs", "map.undefined-name")
    assert says in str(error)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("{hf: qkv}", "{hf: kvq}"), "weights.missing-tensor"),
        (("qkv: {hf: qkv}", "qkv: {hf: out}"), "weights.shape"),
        (("{hf: bias, optional: true}", "{hf: bias}"), "weights.missing-tensor"),
    ],
)
def test_weights_that_do_not_match(tmp_path: Path, change: tuple[str, str], code: str) -> None:
    errors = failures(tmp_path, change, weights=tiny_checkpoint(tmp_path / "model"))
    assert {error.code for error in errors} >= {code}
    assert all(isinstance(error, WeightsError) and error.exit_code == 5 for error in errors)
    assert sum(error.code == code for error in errors) == 3  # one for each layer


def test_unused_tensors_are_told(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    from safetensors.numpy import save_file

    save_file(tensors() | {"stray": tensors()["embed"]}, checkpoint / "model.safetensors")
    [error] = failures(tmp_path, weights=checkpoint)
    assert error.code == "weights.unused-tensor"
    assert "'stray'" in error.message
    assert error.exit_code == 5


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "{", "null", '"x"', "[" * 100_000, '{"a": ' * 100_000, "\x00", '{"hidden_size": 1e999}', "9" * 10_000],
)
def test_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    errors = failures(tmp_path, config=config)
    assert all(error.exit_code == 3 for error in errors)


@pytest.mark.parametrize("value", ["8", 8.5, [8], {"a": 8}, None, 2**70, -8, 0, float("nan"), "", True])
@pytest.mark.parametrize("key", ["hidden_size", "num_layers"])
def test_config_values_of_wrong_types(tmp_path: Path, key: str, value: object) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "tiny", "hidden_size": 8, "num_layers": 3} | {key: value}))
    if value is True and key == "num_layers":
        assert labinfer.compile(tiny_map(tmp_path), config=config).vocab_size == 16  # true is 1, as in Python
        return
    errors = failures(tmp_path, config=config)
    assert all(error.exit_code == 3 for error in errors)
    assert any(error.place for error in errors)


CHAIN = "".join(f"  c{i}: {{value: c{i + 1} + c{i + 1}}}\n" for i in range(9_000))

HOSTILE = {
    "100 MB": MAP + "#" * 100_000_000,
    "deep": "a: " + "[" * 200_000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(5_000)),
    "alias bomb": "a: &a [x,x]\n" + "\n".join(f"b{i}: &b{i} [*a,*a]" for i in range(50_000)),
    "many keys": "\n".join(f"key{i}: {i}" for i in range(80_000)),
    "many errors": MAP.replace("graph:\n", "graph:\n" + "  - {op: nonsense, in: h, out: h}\n" * 8_000),
    "power": MAP.replace("3 * hidden_size", "9**9**9**9"),
    "long list": MAP.replace('"[hidden_size, hidden_size, hidden_size]"', '"[1] * 10**9"'),
    "many layers": MAP.replace("times: num_layers", "times: 10**9"),
    "wide": MAP.replace("vocab_size, default: 16", "vocab_size, default: 10**18"),
    "chain": MAP.replace("{hf: hidden_size}", "{value: c0}").replace("config:\n", "config:\n" + CHAIN),
    "big state": MAP.replace("v: hidden_size}", "v: 10**18}"),
}  # fmt: skip

SCRIPT = """
import itertools, pathlib, sys
import labinfer, labinfer.errors
labinfer.compile(sys.argv[1])
events = itertools.count()
sys.setprofile(lambda frame, event, what: next(events))
try:
    labinfer.compile(sys.argv[2])
except labinfer.errors.LabinferError as error:
    text = str(error)
    sys.setprofile(None)
    peak = pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    print(error.exit_code, next(events), int(peak) // 1024, len(text))
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_maps_cost_little(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE[name])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_map(tmp_path)), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    code, events, megabytes, length = (int(field) for field in done.stdout.split())
    assert code == 3
    assert events < 5_000_000  # calls and returns: quadratic work is far more
    assert megabytes < 200
    assert length < 50_000


def check_told(error: LabinferError) -> None:
    """The error can be shown, to people and to scripts."""
    assert str(error)
    assert error.exit_code in (2, 3, 4, 5)
    assert json.dumps(error.to_json())


def compiles_or_says_why(map_text: str, config: Path, folder: Path, **options: Any) -> None:
    path = folder / "damaged.yaml"
    path.write_text(map_text, encoding="utf-8", errors="surrogatepass")
    try:
        assert labinfer.compile(path, config=config, max_num_batched_tokens=8, **options).dump()
    except LabinferError as error:
        check_told(error)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), family=st.sampled_from(sorted(SHIPPED)))
def test_damaged_map_trees(tmp_path_factory: pytest.TempPathFactory, seed: int, family: str) -> None:
    tree = damaged(load_yaml(graphs_dir() / f"{family}.yaml").plain(), random.Random(seed))
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    compiles_or_says_why(text, GOLDEN / SHIPPED[family] / "config.json", tmp_path_factory.getbasetemp())


LINES = [
    "- a: b",
    "x: &a [*a]",
    "<<: {}",
    "? [a]",
    "!!python/object:os.system x",
    " " * 200 + "a:",
    "\t- a",
    "%TAG ! x",
]


@settings(max_examples=150)
@given(data=st.data(), family=st.sampled_from(sorted(SHIPPED)))
def test_damaged_map_texts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, family: str) -> None:
    lines = (graphs_dir() / f"{family}.yaml").read_text().split("\n")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        how = data.draw(st.sampled_from(["drop", "double", "swap", "character", "insert", "cut"]))
        if how == "drop":
            lines[at] = ""
        elif how == "double":
            lines.insert(at, lines[at])
        elif how == "swap":
            other = data.draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        elif how == "character" and lines[at]:
            column = data.draw(st.integers(0, len(lines[at]) - 1))
            lines[at] = lines[at][:column] + data.draw(st.characters()) + lines[at][column + 1 :]
        elif how == "insert":
            lines.insert(at, data.draw(st.sampled_from(LINES)))
        elif how == "cut":
            lines = [*lines[:at], ""]
    compiles_or_says_why("\n".join(lines), GOLDEN / SHIPPED[family] / "config.json", tmp_path_factory.getbasetemp())


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), folder=st.sampled_from(sorted(GOLDEN.glob("*/config.json"))))
def test_damaged_configs(tmp_path_factory: pytest.TempPathFactory, seed: int, folder: Path) -> None:
    config = tmp_path_factory.getbasetemp() / "config.json"
    config.write_text(json.dumps(damaged(json.loads(folder.read_text()), random.Random(seed))))
    try:
        assert labinfer.compile(config, max_num_batched_tokens=8).dump()
    except LabinferError as error:
        check_told(error)
