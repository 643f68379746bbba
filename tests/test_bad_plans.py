"""Edited plans: every fault is a coded error before anything is allocated, and never a traceback."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import labinfer
from labinfer.compiler.plan import load_plan
from labinfer.errors import Errors, LabinferError

from .mutation import damaged
from .tiny import GOLDEN, tensors, tiny_plan

Data = dict[str, Any]


def op(data: Data, name: str, stage: int = 0) -> Data:
    """The op of a stage that is called ``name``."""
    found: list[Data] = [each for block in data["stages"][stage]["blocks"].values() for each in block]
    return next(each for each in found if each["name"] == name)


def place(data: Data, name: str, stage: int = 0) -> Data:
    """The place of value ``name``."""
    for block in data["stages"][stage]["blocks"].values():
        for each in block:
            for part in (each, *each.get("body", ())):
                if name in part.get("out", {}):
                    found: Data = part["out"][name]
                    return found
    raise KeyError(name)


def codes(path: Path, data: Data) -> list[str]:
    """The error codes of ``data`` as a plan; exit code 3 for all."""
    path.write_text(json.dumps(data))
    with pytest.raises(LabinferError) as caught:
        load_plan(path)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    return [error.code for error in caught.value.errors] if isinstance(caught.value, Errors) else [caught.value.code]


def put(*keys: Any) -> Callable[[Data], None]:
    """An edit: the last of ``keys`` at the path of those before it."""

    def edit(data: Data) -> None:
        for key in keys[:-2]:
            data = data[key]
        data[keys[-2]] = keys[-1]

    return edit


def at(name: str, **changes: Any) -> Callable[[Data], None]:
    """An edit of a value's place."""
    return lambda data: place(data, name).update(changes)


def onto(data: Data, name: str, distance: int) -> None:
    """Move a value onto ``h``, which is needed throughout the layer."""
    place(data, name)["at"] = place(data, "h")["at"] + distance


def reach(data: Data, *names: str) -> None:
    """Stretch the lower of two values so that its second row lies on the upper one."""
    low, high = sorted((place(data, name) for name in names), key=lambda value: int(value["at"]))
    low["row"] = high["at"] - low["at"]


def line(name: str, **changes: Any) -> Callable[[Data], None]:
    """An edit of an op."""
    return lambda data: op(data, name).update(changes)


def weight(index: int, **changes: Any) -> Callable[[Data], None]:
    """An edit of a weight's line."""
    return lambda data: data["weights"][index].update(changes)


STAGE = ("stages", 0)
LAYER = ("stages", 0, "blocks", "layer")
EDITS: dict[str, tuple[Callable[[Data], Any], str]] = {
    "negative offset": (at("h", at=-256), "plan.schema"),
    "negative size": (put(*STAGE, "arena", "size", -1), "plan.schema"),
    "moved onto a live value": (lambda d: onto(d, "layers.{i}.qkv", 0), "plan.arena-overlap"),
    "moved half onto a live value": (lambda d: onto(d, "layers.{i}.context", 64), "plan.arena-overlap"),
    "moved beyond the arena": (at("layers.{i}.context", at=1 << 20), "plan.arena-bounds"),
    "arena shrunk": (put(*STAGE, "arena", "size", 256), "plan.arena-bounds"),
    "off the grid": (at("layers.{i}.context", at=770), "plan.arena-bounds"),
    "no place": (lambda d: place(d, "layers.{i}.context").pop("at"), "plan.value"),
    "no place for the logits": (lambda d: place(d, "logits").pop("at"), "plan.value"),
    "pitch below the row": (at("layers.{i}.context", row=4), "plan.arena-bounds"),
    "pitch so large that the end is outside": (at("layers.{i}.context", row=512), "plan.arena-bounds"),
    "pitch that reaches a live value": (lambda d: reach(d, "h", "layers.{i}.qkv"), "plan.arena-overlap"),
    "window of another pitch": (at("layers.{i}.k", row=192), "plan.window"),
    "window at another column": (at("layers.{i}.k", at=36), "plan.window"),
    "in place over what is still needed": (lambda d: onto(d, "layers.{i}.out", 0), "plan.arena-overlap"),
    "bound below what the arena was planned for": (put("limits", "max_num_batched_tokens", 64), "plan.arena-bounds"),
    "unknown device": (put(*STAGE, "device", "reference:7"), "plan.unknown-device"),
    "wrong arena bytes": (put(*STAGE, "bytes", "arena", 12), "plan.bytes"),
    "wrong cache bytes": (put(*STAGE, "bytes", "kv_cache", 12), "plan.bytes"),
    "wrong swap bytes": (put(*STAGE, "bytes", "swap", 12), "plan.bytes"),
    "swap blocks without their bytes": (put("limits", "groups", 0, "swap_blocks", 2), "plan.bytes"),
    "no cache group": (put("limits", "groups", []), "plan.schema"),
    "state of a group that is not there": (put("states", 0, "group", 1), "plan.state"),
    "group that keeps less than attention sees": (put("limits", "groups", 0, "window", 8), "plan.groups"),
    "groups out of order": (
        put("limits", "groups", [{"window": 4, "num_blocks": 4}, {"window": 8, "num_blocks": 4}]), "plan.groups"),
    "group that nothing is in": (
        put("limits", "groups", [{"num_blocks": 2048}, {"window": 8, "num_blocks": 4}]), "plan.groups"),
    "two groups that see all": (put("limits", "groups", [{"num_blocks": 4}, {"num_blocks": 4}]), "plan.groups"),
    "more slots than int32 can number": (put("limits", "groups", 0, "num_blocks", 1 << 27), "plan.groups"),
    "wrong step bytes": (put(*STAGE, "bytes", "step", 12), "plan.bytes"),
    "more than the device has": (put("devices", "reference", "memory", 100), "plan.memory"),
    "unknown op": (line("layers.{i}.h", op="addd"), "map.unknown-op"),
    "wrong attribute": (line("layers.{i}.qkv", attrs={"out_features": -3}), "plan.attribute"),
    "unknown attribute": (line("layers.{i}.qkv", attrs={"out_feature": 24}), "plan.attribute"),
    "another size": (line("layers.{i}.qkv", attrs={"out_features": 25}), "plan.type"),
    "wrong type text": (at("layers.{i}.context", type="f33[T, 8]"), "plan.type"),
    "wrong type": (at("layers.{i}.context", type="f32[R, 8]"), "plan.type"),
    "input missing": (line("layers.{i}.h", **{"in": ["$h"]}), "plan.value"),
    "input too many": (line("layers.{i}.h", **{"in": ["$h", "$h", "$h"]}), "plan.value"),
    "input unknown": (line("layers.{i}.h", **{"in": ["$h", "layers.{i}.aut"]}), "plan.value"),
    "inputs of different sizes": (line("layers.{i}.h", **{"in": ["$h", "layers.{i}.qkv"]}), "plan.type"),
    "output renamed onto another": (lambda d: d["stages"][0]["blocks"]["end"][0].update(
        out={"h": {"type": "f32[R, 8]", "at": 768}}), "plan.value"),
    "weight renamed in the list": (weight(1, name="layers.{i}.kvq"), "plan.weight"),
    "weight renamed in the op": (line("layers.{i}.qkv", weights={"weight": "layers.{i}.kvq"}), "plan.weight"),
    "weight missing": (line("layers.{i}.qkv", weights={}), "plan.weight"),
    "weight in an unknown slot": (line("layers.{i}.h", weights={"weight": "embed"}), "plan.weight"),
    "weight of another shape": (weight(1, shape=[8, 24]), "plan.weight"),
    "weight of one axis": (weight(1, shape=[192]), "plan.weight"),
    "stack that is none": (weight(1, stack=2**60), "plan.weight"),
    "rows that are not there": (weight(1, rows=[5, 5], order=[0, 1]), "plan.weight"),
    "order that is none": (weight(1, rows=[24], order=[7]), "plan.weight"),
    "order alone": (weight(1, order=[0]), "plan.weight"),
    "weights of too few layers": (weight(1, layers=[0, 1]), "plan.weight"),
    "weights of too many layers": (weight(1, layers=[0, 10**9]), "plan.layers"),
    "weights of layers backwards": (weight(1, layers=[2, 0]), "plan.layers"),
    "state unknown": (line("layers.{i}.kv_write", state="layers.{i}.vk"), "plan.state"),
    "state missing": (lambda d: op(d, "layers.{i}.context").pop("state"), "plan.state"),
    "state of an op that has none": (line("layers.{i}.h", state="layers.{i}.kv"), "plan.state"),
    "state too narrow": (put("states", 0, "widths", {"k": 8, "v": 4}), "plan.state"),
    "attention of fewer key heads": (
        lambda d: op(d, "layers.{i}.context")["attrs"].update(num_kv_heads=1), "plan.state",
    ),
    "state of other parts": (put("states", 0, "widths", {"key": 8, "value": 8}), "plan.state"),
    "states of too few layers": (put("states", 0, "layers", [0, 1]), "plan.state"),
    "schedule backwards": (lambda d: d["stages"][0]["schedule"].reverse(), "plan.value"),
    "schedule twice": (lambda d: d["stages"][0]["schedule"].extend(d["stages"][0]["schedule"]), "plan.value"),
    "schedule empty": (put(*STAGE, "schedule", []), "plan.value"),
    "a layer left out": (put(*STAGE, "schedule", 1, "layers", [0, 1]), "plan.value"),
    "layers backwards": (put(*STAGE, "schedule", 1, "layers", [2, 0]), "plan.layers"),
    "layers without end": (put(*STAGE, "schedule", 1, "layers", [0, 10**9]), "plan.layers"),
    "layers without end in many lines": (
        put(*STAGE, "schedule", [{"block": "layer", "layers": [0, 4000]}] * 1000), "plan.too-large"),
    "block unknown": (put(*STAGE, "schedule", 1, "block", "leyer"), "plan.unknown-block"),
    "ops in another order": (lambda d: d["stages"][0]["blocks"]["layer"].reverse(), "plan.value"),
    "no stages": (put("stages", []), "plan.outputs"),
    "no outputs": (put(*STAGE, "outputs", []), "plan.outputs"),
    "output of another name": (put(*STAGE, "outputs", ["logit"]), "plan.value"),
    "output that came in": (put(*STAGE, "outputs", ["token_ids"]), "plan.value"),
    "another output": (put(*STAGE, "outputs", ["h"]), "plan.outputs"),
    "another vocabulary": (put("vocab_size", 32), "plan.outputs"),
    "received from nobody": (put(*STAGE, "inputs", {"x": {"type": "f32[T, 8]", "at": 0}}), "plan.value"),
    "unknown key": (put("stage", []), "plan.schema"),
    "number as text": (put("vocab_size", "many"), "plan.schema"),
    "another version": (put("schema_version", 2), "plan.version"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Data]:
    return tiny_plan(tmp_path_factory.mktemp("tiny"), max_num_batched_tokens=4, max_model_len=64, max_num_seqs=2)


@pytest.mark.parametrize("name", EDITS)
def test_one_edit(tiny: tuple[Path, Data], name: str) -> None:
    path, data = tiny[0], json.loads(json.dumps(tiny[1]))
    edit, code = EDITS[name]
    edit(data)
    started = time.process_time()
    assert code in codes(path, data)
    assert time.process_time() - started < 1


def test_the_unedited_plan_is_right(tiny: tuple[Path, Data]) -> None:
    path, data = tiny
    path.write_text(json.dumps(data))
    with labinfer.load(path) as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()


def test_all_faults_of_a_plan_are_told_together(tiny: tuple[Path, Data]) -> None:
    path, data = tiny[0], json.loads(json.dumps(tiny[1]))
    for name in ("moved half onto a live value", "wrong cache bytes", "more than the device has", "order alone"):
        EDITS[name][0](data)
    assert set(codes(path, data)) == {"plan.arena-overlap", "plan.bytes", "plan.memory", "plan.weight"}


FUSED: dict[str, tuple[Callable[[Data], Any], str]] = {
    "another kind": (line("layers.{i}.h", op="norm_glu"), "plan.fused"),
    "an unknown kind": (line("layers.{i}.h", op="nonsense"), "plan.fused"),
    "other operands": (line("layers.{i}.h", **{"in": ["$h"]}), "plan.fused"),
    "operands in another order": (lambda d: op(d, "layers.{i}.h")["in"].reverse(), "plan.fused"),
    "a part left out": (lambda d: op(d, "layers.{i}.h")["body"].pop(), "plan.fused"),
    "no place inside, no kernel": (lambda d: op(d, "layers.{i}.h")["body"][0]["out"]["layers.{i}.out"].pop("at"),
                                   "plan.fused"),
    "a body in a body": (lambda d: op(d, "layers.{i}.h")["body"][0].update(body=[op(d, "layers.{i}.h")["body"][1]]),
                         "plan.fused"),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_one_edit_of_a_fused_op(tmp_path: Path, name: str) -> None:
    path, data = tiny_plan(tmp_path, max_num_batched_tokens=4, fuse="all")
    assert op(data, "layers.{i}.h")["op"] == "linear_add"
    edit, code = FUSED[name]
    edit(data)
    assert code in codes(path, data)


TWO_STAGES: dict[str, tuple[Callable[[Data], Any], str]] = {
    "first stage gone": (lambda d: d["stages"].pop(0), "plan.value"),
    "last stage gone": (lambda d: d["stages"].pop(), "plan.outputs"),
    "stages swapped": (lambda d: d["stages"].reverse(), "plan.value"),
    "a stage twice": (lambda d: d["stages"].append(d["stages"][0]), "plan.outputs"),
    "received as another type": (
        lambda d: next(iter(d["stages"][1]["inputs"].values())).update(type="f32[T, 4]"), "plan.type"),
    "received without a place": (lambda d: next(iter(d["stages"][1]["inputs"].values())).pop("at"), "plan.value"),
    "received under a live value": (
        lambda d: next(iter(d["stages"][1]["inputs"].values())).update(at=place(d, "layers.{i}.qkv", 1)["at"]),
        "plan.arena-overlap"),
    "sent too early to live": (lambda d: d["stages"][0].update(outputs=["h"]), "plan.value"),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO_STAGES)
def test_one_edit_of_two_stages(tmp_path: Path, name: str) -> None:
    path, data = tiny_plan(tmp_path, max_num_batched_tokens=4, devices="reference,reference:1")
    assert len(data["stages"]) == 2
    edit, code = TWO_STAGES[name]
    edit(data)
    assert code in codes(path, data)


def test_a_stage_receives_what_was_sent(tmp_path: Path) -> None:
    path, data = tiny_plan(tmp_path, max_num_batched_tokens=4, devices="reference,reference:1")
    next(iter(data["stages"][1]["inputs"].values()))["type"] = "i32[T, 8]"
    path.write_text(json.dumps(data))
    with pytest.raises(LabinferError, match=r"receives 'layers\.0\.h' as i32"):
        load_plan(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{}", '{"schema_version": 1, "schema_version": 1}', "[" * 100_000, "9" * 10_000,
     "\ud800", '{"schema_version": 1, "x": ' + "[" * 1_000_000, '{"schema_version": 1}' + " " * 4_000_000],
)  # fmt: skip
def test_files_that_are_no_plans(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(LabinferError) as caught:
        labinfer.load(path)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)


def test_paths_that_are_no_plans(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for name in ("nothing.json", "folder.json", "nothing.json/plan.json"):
        with pytest.raises(LabinferError) as caught:
            labinfer.load(tmp_path / name)
        assert caught.value.exit_code == 3


def failing_load(path: Path) -> LabinferError:
    with pytest.raises(LabinferError) as caught:
        labinfer.load(path)
    return caught.value


def test_a_plan_is_stale_after_its_sources_change(tmp_path: Path) -> None:
    path, _ = tiny_plan(tmp_path)
    labinfer.load(path).close()
    for file, change, word in (
        (tmp_path / "tiny.yaml", lambda old: old + b"# changed\n", "map"),
        (tmp_path / "model" / "config.json", lambda old: old.replace(b"{", b'{"x": 1, ', 1), "config"),
    ):
        old = file.read_bytes()
        file.write_bytes(change(old))
        error = failing_load(path)
        assert (error.code, error.exit_code) == ("plan.stale", 6)
        assert word in error.message
        assert error.remedy
        file.write_bytes(old)
    labinfer.load(path).close()
    more = tensors() | {"extra": np.zeros(3, np.float32)}
    save_file(more, tmp_path / "model" / "model.safetensors")
    assert failing_load(path).exit_code == 6


def test_a_stale_digest(tiny: tuple[Path, Data]) -> None:
    path, data = tiny[0], json.loads(json.dumps(tiny[1]))
    data["source"]["sha256"]["weights"] = "0" * 64
    path.write_text(json.dumps(data))
    assert failing_load(path).exit_code == 6


def test_weights_that_went_away(tmp_path: Path) -> None:
    path, data = tiny_plan(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert failing_load(path).exit_code == 5
    data["source"]["checkpoint"] = None
    path.write_text(json.dumps(data))
    assert failing_load(path).code == "weights.none"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"tensor": "layers.{i}.out"}, "weights.changed"),
        ({"tensor": "../../etc/passwd"}, "weights.changed"),
        ({"format": "bf16"}, "weights.changed"),
        ({"format": "q9_9"}, "weights.unsupported-format"),
        ({"transpose": True}, "weights.changed"),
    ],
)
def test_weights_other_than_the_plan_says(tmp_path: Path, change: Data, code: str) -> None:
    path, data = tiny_plan(tmp_path)
    data["weights"][1].update(change)
    path.write_text(json.dumps(data))
    error = failing_load(path)
    assert (error.code, error.exit_code) == (code, 5)


def test_wrong_weight_bytes(tmp_path: Path) -> None:
    path, data = tiny_plan(tmp_path)
    data["stages"][0]["bytes"]["weights"] += 4
    path.write_text(json.dumps(data))
    assert failing_load(path).code == "plan.bytes"


@pytest.mark.parametrize("blocks", [2**26, 2**27 - 1])
def test_caches_beyond_all_memory_do_not_fit(tmp_path: Path, blocks: int) -> None:
    path, data = tiny_plan(tmp_path)
    data["limits"]["groups"][0]["num_blocks"] = blocks
    data["stages"][0]["bytes"]["kv_cache"] = blocks * 16 * 16 * 4 * 3
    path.write_text(json.dumps(data))
    started = time.process_time()
    error = failing_load(path)
    assert (error.code, error.exit_code) == ("device.memory", 4)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("blocks", [2**34, 2**50, 2**62, 2**70])
def test_host_memory_beyond_the_machine_does_not_fit(tmp_path: Path, blocks: int) -> None:
    path, data = tiny_plan(tmp_path)
    data["limits"]["groups"][0]["swap_blocks"] = blocks
    data["stages"][0]["bytes"]["swap"] = blocks * 16 * 16 * 4 * 3
    path.write_text(json.dumps(data))
    error = failing_load(path)
    assert (error.code, error.exit_code) == ("host.memory", 4)


def test_devices_that_do_not_exist(tmp_path: Path) -> None:
    path, data = tiny_plan(tmp_path)
    data["devices"] = {"quantum:0": data["devices"]["reference"]}
    data["stages"][0]["device"] = "quantum:0"
    path.write_text(json.dumps(data))
    error = failing_load(path)
    assert (error.code, error.exit_code) == ("device.unknown", 4)


@pytest.mark.parametrize("name", ["a" * 5000, "\0", "/dev/zero", "nowhere.yaml", "../.."])
def test_maps_that_are_not_here_cannot_be_stale(tmp_path: Path, name: str) -> None:
    path, data = tiny_plan(tmp_path)
    data["source"]["maps"] = [name]
    path.write_text(json.dumps(data))
    labinfer.load(path).close()


PLANS = ("llama-llama3", "phi3-window_odd_heads", "deepseek_v2-group_limited", "gpt2-inverse_layer_scale")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> list[Data]:
    made = []
    for name in PLANS:
        for fuse in ("none", "all"):
            for devices in ("reference", "reference,reference:1"):
                plan = labinfer.compile(GOLDEN / name, devices=devices, fuse=fuse, max_num_batched_tokens=8)
                made.append(json.loads(plan.dump()))
    return made


def check_told(error: LabinferError) -> None:
    assert error.exit_code in (1, 2, 3, 4, 5, 6)
    if error.code == "run.op-failed":  # only what no shape rule can tell: positions and cache rows
        assert any(word in str(error) for word in ("embedding", "attention"))


@settings(max_examples=600)
@given(seed=st.integers(0, 2**32), which=st.integers(0, 15))
def test_damaged_plans(valid: list[Data], tmp_path_factory: pytest.TempPathFactory, seed: int, which: int) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    data = damaged(valid[which], random.Random(seed))
    path.write_text(json.dumps(data))
    try:
        with labinfer.load(path) as model:
            assert model.logits([1, 2, 3]).shape == (3, model.vocab_size)
    except LabinferError as error:
        check_told(error)
