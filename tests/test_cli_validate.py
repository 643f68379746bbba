"""``labinfer validate``, ``schema`` and ``devices``: what they accept, and every error at once."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from labinfer.api import checkpoint_source
from labinfer.backends.base import BACKENDS
from labinfer.compiler.blueprint import Blueprint
from labinfer.compiler.map_schema import map_schema
from labinfer.compiler.plan import Plan
from labinfer.compiler.source import load_yaml
from labinfer.errors import DoesNotFit
from labinfer.home import graphs_dir
from labinfer.ops import OPS
from labinfer.runtime.devices import list_devices
from labinfer.runtime.manager import Manager
from labinfer.runtime.weights import open_checkpoint

from .weights.files import STRING, gguf, pair

Cli = Callable[..., subprocess.CompletedProcess[str]]
MAPS = sorted(file.name for file in graphs_dir().glob("*.yaml"))
LLAMA = (graphs_dir() / "llama.yaml").read_text()


@pytest.mark.parametrize("name", MAPS)
def test_every_shipped_map_is_valid(labinfer_cli: Cli, name: str):
    result = labinfer_cli("validate", name)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{name}: ok, ")


def test_the_ok_line_counts_weights_and_parameters(labinfer_cli: Cli, tiny_model: Path):
    assert labinfer_cli("validate", "llama").stdout == "llama.yaml: ok, 146 weights, 1,235,814,400 parameters\n"
    found = json.loads(labinfer_cli("validate", "llama.yaml", "--weights", tiny_model, "--json").stdout)
    assert (found["ok"], found["model"], found["weights"]) == (True, "tiny", 20)


def test_all_errors_of_a_map_come_at_once_with_their_places(tmp_path: Path, labinfer_cli: Cli):
    text = LLAMA.replace("num_heads % num_kv_heads == 0", "num_heads % num_kv_head == 0")
    text = text.replace("window: sliding_window", "window: sliding_windw")
    text = text.replace("- {use: mlp}", "- {use: mlp}\n    - {op: add, in: [h, mlp.outt], out: never, when: tiedd}")
    (tmp_path / "bad.yaml").write_text(text)
    result = labinfer_cli("validate", "bad.yaml")
    assert result.returncode == 3
    for name, hint in (("num_kv_head", "num_kv_heads"), ("sliding_windw", "sliding_window"), ("tiedd", "tied")):
        assert f"'{name}' is not defined" in result.stderr
        assert f"did you mean '{hint}'?" in result.stderr
    assert "'mlp.outt' is not defined here" in result.stderr
    assert result.stderr.count("^") == 4
    errors = json.loads(labinfer_cli("validate", "bad.yaml", "--json").stdout)["errors"]
    assert {error["code"] for error in errors} == {"map.undefined-name"}
    assert all(error["line"] and error["column"] for error in errors)
    assert len(errors) == 4


def test_a_map_is_named_as_it_was_typed(tmp_path: Path, labinfer_cli: Cli):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "base.yaml").write_text(LLAMA)
    child = "labmap: 1\nfamily: child\nextends: base\nmatch: {model_type: child}\n"
    (tmp_path / "maps" / "child.yaml").write_text(child)
    assert labinfer_cli("validate", "maps/child.yaml").stdout.startswith("maps/child.yaml: ok, ")
    assert labinfer_cli("compile", "maps/child.yaml").returncode == 0
    source = json.loads((tmp_path / "plan.json").read_text())["source"]  # to be found from every folder
    assert source["maps"] == [str(tmp_path / "maps" / name) for name in ("child.yaml", "base.yaml")]
    (tmp_path / "maps" / "base.yaml").write_text(LLAMA.replace("window: sliding_window", "window: sliding_windw"))
    assert labinfer_cli("validate", "maps/child.yaml").stderr.startswith("maps/base.yaml:")
    (tmp_path / "maps" / "child.yaml").write_text(child + "confg: {}\n")
    assert labinfer_cli("validate", "maps/child.yaml").stderr.startswith("maps/child.yaml:5:1: ")


def test_a_pulled_model_is_called_by_its_file_and_another_as_it_says(tmp_path: Path, home: Path):
    text = gguf([pair("general.architecture", STRING, "llama"), pair("general.name", STRING, "Mix 1 Ep 2")], [], b"")
    for folder, name in ((tmp_path, "Mix 1 Ep 2"), (home / "models" / "smollm2-135m", "SmolLM2-135M-Instruct.Q4_1")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(text)
        with open_checkpoint(folder / "SmolLM2-135M-Instruct.Q4_1.gguf") as checkpoint:
            assert checkpoint_source(checkpoint).name == name


def test_a_branch_not_taken_is_checked(tmp_path: Path, labinfer_cli: Cli):
    bad = "- {op: scale, in: h, out: h, by: embedding_scale, when: false}\n    - {use: mlp}"
    (tmp_path / "bad.yaml").write_text(LLAMA.replace("- {use: mlp}", bad))
    result = labinfer_cli("validate", "bad.yaml")
    assert result.returncode == 3
    assert "'embedding_scale' is not defined" in result.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "has no tensor 'model.norm.weight'"),
        (lambda tensors: tensors.update(extra=tensors["model.norm.weight"]), "does not use 'extra'"),
        (lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:8]}), "is [8], but"),
    ],
)
def test_tensors_that_do_not_fit_the_map(
    tmp_path: Path, labinfer_cli: Cli, tiny_model: Path, change: Callable[[dict[str, Any]], Any], said: str
):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tiny_model / "model.safetensors")
    change(tensors)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({name: tensor.copy() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    result = labinfer_cli("validate", folder)
    assert (result.returncode, result.stdout) == (5, "")
    assert said in result.stderr


@pytest.mark.parametrize("text", ["", " ", "[]", "{"])
def test_a_config_that_says_nothing_is_an_invalid_file(tmp_path: Path, labinfer_cli: Cli, text: str):
    (tmp_path / "config.json").write_text(text)
    for model in ("config.json", tmp_path):
        result = labinfer_cli("compile", model, "--dry-run")
        assert (result.returncode, "config.json" in result.stderr) == (3, True)


def test_a_config_that_lacks_keys_names_them_all(tmp_path: Path, labinfer_cli: Cli):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    result = labinfer_cli("validate", "llama", "--config", "config.json")
    assert result.returncode == 3
    for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        assert f"'{key}'" in result.stderr


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    """A validator of maps."""
    jsonschema.Draft202012Validator.check_schema(map_schema())
    return jsonschema.Draft202012Validator(map_schema())


@pytest.mark.parametrize("model", [Blueprint, Plan])
def test_schema_says_what_every_key_means(model: type[BaseModel]):
    schema = model.model_json_schema(by_alias=True)
    for name, part in {model.__name__: schema, **schema["$defs"]}.items():
        for key, field in part.get("properties", {}).items():
            assert field.get("description"), f"{name}.{key}"


@pytest.mark.parametrize("name", MAPS)
def test_schema_accepts_every_shipped_map(schema: jsonschema.Draft202012Validator, name: str):
    schema.validate(load_yaml(graphs_dir() / name).plain())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("labmap: 1", "labmap: 2"),
        ("family: llama", "famly: llama"),
        ("{op: rms_norm, in: h, out: final", "{op: rms_nrm, in: h, out: final"),
        ("in: final, out: last}", "in: final, out: last, eps: 1}"),
        ("weight: embed, num_embeddings", "num_embeddings"),
        ("{op: kv_write, in: [k, qkv.v], state: kv}", "{op: kv_write, in: [k, qkv.v]}"),
        ("out_features: vocab_size", "out_features: -1"),
        ("index: i, carry: h", "index: i"),
    ],
)
def test_schema_refuses(schema: jsonschema.Draft202012Validator, tmp_path: Path, old: str, new: str):
    assert old in LLAMA
    (tmp_path / "m.yaml").write_text(LLAMA.replace(old, new))
    assert not schema.is_valid(load_yaml(tmp_path / "m.yaml").plain())


def test_schema_describes_every_op(tmp_path: Path, labinfer_cli: Cli):
    printed = json.loads(labinfer_cli("schema").stdout)
    assert printed["$schema"].endswith("2020-12/schema")
    written = {kind: spec for kind, spec in OPS.items() if not spec.inserted}
    assert set(OPS) - set(written) == {"all_gather", "all_reduce", "lora_add"}
    assert "op_lora_add" not in printed["$defs"]
    for kind, spec in written.items():
        line = printed["$defs"][f"op_{kind}"]
        assert line["description"]
        slots = {slot.name for slot in spec.weights}
        assert slots | set(spec.Attrs.model_fields) <= set(line["properties"])
    result = labinfer_cli("schema", "--out", "map.schema.json")
    assert (result.returncode, result.stdout) == (0, "")
    assert json.loads((tmp_path / "map.schema.json").read_text()) == printed


def test_devices_are_listed_with_their_memory(labinfer_cli: Cli):
    found = {each["name"]: each for each in json.loads(labinfer_cli("devices", "--json").stdout)}
    assert list(found) == list(BACKENDS)
    reference = found["reference"]
    assert reference["available"]
    assert 0 < reference["memory_free"] <= reference["memory_total"]
    assert "numpy" in labinfer_cli("devices").stdout


def test_a_device_that_cannot_be_had_says_what_would_help(monkeypatch: pytest.MonkeyPatch, labinfer_cli: Cli):
    def refuse(self: Manager, name: str) -> None:
        if name == "reference":
            raise ModuleNotFoundError("No module named 'numba'", name="numba.core")
        raise DoesNotFit("device.driver", "the driver is too old")

    monkeypatch.setattr(Manager, "device", refuse)
    assert not any(each.available for each in list_devices())
    assert "labinfer[cpu]" in labinfer_cli("devices").stdout
