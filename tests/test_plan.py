"""Plans: what is written is read back the same, and every plan that is made passes the check of plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import labinfer
from labinfer.compiler.plan import MAX_PLAN_BYTES, Plan, load_plan, parse_type
from labinfer.compiler.plan_json import compact_json
from labinfer.compiler.verify_plan import verify_plan
from labinfer.errors import UsageError
from labinfer.home import graphs_dir
from labinfer.ops.base import TensorType

from .tiny import FOLDERS, GOLDEN, tiny_plan

SHIPPED = sorted(file.name for file in graphs_dir().glob("*.yaml"))


def read_back(plan: Plan, folder: Path) -> Plan:
    path = folder / "plan.json"
    path.write_text(plan.dump(), encoding="utf-8")
    return load_plan(path)


@pytest.mark.parametrize(
    ("devices", "fuse", "tokens"),
    [("reference", "none", 8), ("reference", "all", 512), ("reference,reference:1", "none", 1),
     ("reference,reference:1", "all", 8)],
)  # fmt: skip
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_plan_is_right_and_reads_back_the_same(
    folder: Path, devices: str, fuse: str, tokens: int, tmp_path: Path
) -> None:
    plan = labinfer.compile(folder, devices=devices, fuse=fuse, max_num_batched_tokens=tokens)
    again = read_back(plan, tmp_path)
    assert again.dump() == plan.dump()
    assert again == plan
    assert [stage.device for stage in plan.stages] == devices.split(",")


@pytest.mark.parametrize(
    "options",
    [{"max_num_batched_tokens": 1}, {"max_num_batched_tokens": 8}, {"max_num_batched_tokens": 512}, {"fuse": "all"},
     {"devices": "reference,reference:1"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", SHIPPED)
def test_the_arena_of_every_shipped_example_is_as_small_as_can_be(name: str, options: dict[str, Any]) -> None:
    plan = labinfer.compile(name, **options)
    for stage in plan.stages:
        assert stage.arena.optimal
        assert stage.arena.size == stage.arena.lower_bound > 0
    verify_plan(plan, name)


def test_compiling_twice_gives_the_same_text() -> None:
    texts = {labinfer.compile(GOLDEN / "gemma2-odd_heads").dump() for _ in range(2)}
    assert len(texts) == 1


def test_layers_that_are_alike_are_written_once(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "llama-llama3" / "config.json").read_text())
    sizes = []
    for layers in (4, 64):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        sizes.append(len(labinfer.compile(tmp_path / "config.json").dump()))
    assert sizes[1] - sizes[0] < 100
    assert sizes[1] < MAX_PLAN_BYTES / 100


def test_a_plan_is_json_with_one_op_a_line(tmp_path: Path) -> None:
    path, data = tiny_plan(tmp_path)
    text = path.read_text()
    assert text.endswith("}\n")
    ops = [op for block in data["stages"][0]["blocks"].values() for op in block]
    assert sum(line.lstrip().startswith('{"name": ') and '"op": ' in line for line in text.splitlines()) == len(ops)


def test_a_plan_decides_its_options(tmp_path: Path) -> None:
    path, _ = tiny_plan(tmp_path)
    for options in ({"max_num_seqs": 2}, {"devices": "reference"}):
        with pytest.raises(UsageError) as caught:
            labinfer.load(path, **options)
        assert caught.value.code == "run.plan-decides"


@pytest.mark.parametrize(
    "options",
    [{"max_num_seqs": 0}, {"max_model_len": -1}, {"block_size": 2**31}, {"num_blocks": "8"},
     {"max_num_batched_tokens": 1.5}, {"fuse": "some"}, {"max_num_sequences": 3}, {"max_model_len": 10**6}],
    ids=str,
)  # fmt: skip
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        labinfer.compile(GOLDEN / "llama-llama3", **options)
    assert caught.value.exit_code == 2
    assert next(iter(options)) in caught.value.message


def test_verification_is_of_the_text_alone() -> None:
    plan = labinfer.compile(GOLDEN / "llama-llama3")
    verify_plan(Plan.model_validate(json.loads(plan.dump())), "plan.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_compact_json_is_json(value: Any) -> None:
    assert json.loads(compact_json(value)) == value


@given(st.lists(st.one_of(st.sampled_from(["T", "R"]), st.integers(1, 1 << 39)), min_size=1, max_size=4))
def test_types_read_back(shape: list[Any]) -> None:
    for dtype in ("f32", "i32", "bf16", "f16"):
        kind = TensorType(tuple(shape), dtype)
        assert parse_type(str(kind)) == kind


@given(st.text(max_size=30))
def test_other_texts_are_no_types(text: str) -> None:
    try:
        kind = parse_type(text)
    except ValueError:
        return
    assert parse_type(str(kind)) == kind


@pytest.mark.parametrize(
    "text", ["f32", "f32[]", "f32[0]", "f32[-1]", "f32[T,]", "f99[T]", "f32[X]", "f32[T", "f32[²]"]
)
def test_texts_that_are_no_types(text: str) -> None:
    with pytest.raises(ValueError, match="f"):
        parse_type(text)
