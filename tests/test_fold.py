"""Folding: what is written once for many layers is read back as every layer was."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import labinfer
from labinfer.compiler.blueprint import read_map
from labinfer.compiler.fold import (
    fold_ops,
    fold_states,
    fold_weights,
    unfold_ops,
    unfold_states,
    unfold_weights,
)
from labinfer.compiler.graph import OpGraph, State, Transform, Weight, fold_name, layer_of, unfold_name
from labinfer.compiler.lower import lower
from labinfer.compiler.passes import Tracer, run_passes
from labinfer.compiler.plan import Arena, Plan, Stage, StageBytes
from labinfer.compiler.settings import ModelSource
from labinfer.home import graphs_dir
from labinfer.ops.fusions import FUSIONS

from .tiny import FOLDERS, tiny_map


def graph_of(folder: Path) -> OpGraph:
    """The fused op graph of a golden checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    family = folder.name.partition("-")[0].replace("mistral", "llama")
    graph = lower(read_map(graphs_dir() / f"{family}.yaml"), ModelSource("hf", config, str(folder)))
    run_passes(graph, FUSIONS, Tracer())
    return graph


def stage_of(graph: OpGraph) -> Stage:
    """All ops of ``graph`` as one stage, each value at the place 0."""
    schedule, blocks = fold_ops(graph.ops, lambda name: {"type": str(graph.values[name]), "at": 0})
    arena = Arena(size=0, lower_bound=0, optimal=True, algorithm="", peak_op="", live_at_peak=[])
    bytes_ = StageBytes(weights=0, kv_cache=0, arena=0, step=0)
    return Stage(device="reference", outputs=[], schedule=schedule, blocks=blocks, arena=arena, bytes=bytes_)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_ops_come_back_as_they_were(folder: Path) -> None:
    graph = graph_of(folder)
    stage = stage_of(graph)
    again = [op for op, _ in unfold_ops(Stage.model_validate(json.loads(stage.model_dump_json(by_alias=True))))]
    assert [op.name for op in again] == [op.name for op in graph.ops]
    for was, now in zip(graph.ops, again, strict=True):
        for one, other in ((was, now), *zip(was.body, now.body, strict=True)):
            assert (other.name, other.kind, other.inputs) == (one.name, one.kind, one.inputs)
            assert (other.attrs, dict(other.weights)) == (one.attrs, dict(one.weights))
            assert (other.state, other.layer) == (one.state, one.layer)
        assert set(now.outputs) == set(was.outputs)
        assert now.origin == was.origin


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_weights_and_states_come_back_as_they_were(folder: Path) -> None:
    graph = graph_of(folder)
    plan = labinfer.compile(folder, fuse="all")
    folded = plan.model_copy(update={"weights": fold_weights(graph.weights), "states": fold_states(graph.states)})
    assert unfold_weights(folded) == graph.weights
    assert unfold_states(folded) == graph.states
    assert len(folded.weights) < len(graph.weights)


def test_alike_layers_are_one_line_of_the_schedule(tmp_path: Path) -> None:
    [stage] = labinfer.compile(tiny_map(tmp_path)).stages
    assert [(entry.block, entry.layers) for entry in stage.schedule] == [
        ("start", None),
        ("layer", (0, 2)),
        ("end", None),
    ]
    assert stage.schedule[1].receives == {"$h": "h"}
    assert stage.schedule[1].next == {"$h": "layers.{i}.h"}


def test_layers_of_two_kinds_are_two_blocks(tmp_path: Path) -> None:
    def change(text: str) -> str:
        scaled = text.replace("config:\n", "config:\n  scale: {value: 0.25, only: i == 1, else: 2.0}\n")
        return scaled.replace("scale: 0.5", "scale: scale")

    [stage] = labinfer.compile(tiny_map(tmp_path, change)).stages
    assert [(entry.block, entry.layers) for entry in stage.schedule] == [
        ("start", None), ("layer", (0, 0)), ("layer.2", (1, 1)), ("layer", (2, 2)), ("end", None)
    ]  # fmt: skip


def test_repeats_one_after_another(tmp_path: Path) -> None:
    def change(text: str) -> str:
        again = "{repeat: layer, as: more, times: 2, carry: h}\n"
        head, line, tail = text.partition("  - {op: select_rows")
        more = "more: {prefix: {hf: 'more.{i}.'}, qkv: {hf: qkv}, out: {hf: out}, out_bias: {hf: b, optional: true}}"
        groups = f"weights:\n  {more}\n"
        return (head + "  - " + again + line + tail).replace("weights:\n", groups)

    plan = labinfer.compile(tiny_map(tmp_path, change))
    names = [op.name for op, _ in unfold_ops(plan.stages[0])]
    assert [name for name in names if name.endswith(".h")] == [
        "layers.0.h", "layers.1.h", "layers.2.h", "more.0.h", "more.1.h"
    ]  # fmt: skip
    assert set(unfold_states(plan)) == {f"layers.{i}.kv" for i in range(3)} | {f"more.{i}.kv" for i in range(2)}
    assert unfold_weights(plan)["more.1.qkv"].tensor == "more.1.qkv"


NAMES = st.sampled_from(["layers", "more", "h"]).flatmap(
    lambda group: st.integers(0, 30).map(lambda layer: f"{group}.{layer}.w" if group != "h" else "h")
)


@given(
    st.dictionaries(NAMES, st.tuples(st.integers(1, 3), st.booleans(), st.sampled_from(["f32", "bf16"])), max_size=40)
)
def test_any_weights_come_back(tiny_plan_text: str, found: dict[str, tuple[int, bool, str]]) -> None:
    plan = Plan.model_validate(json.loads(tiny_plan_text))
    weights = {
        name: Weight(name, (size,), format_, f"model.{name}" if plain else "tensor.7.x", None, Transform((size,), (0,)))
        for name, (size, plain, format_) in found.items()
    }
    plan.weights = fold_weights(weights)
    assert unfold_weights(plan) == weights


@given(st.dictionaries(NAMES, st.integers(1, 3), max_size=40))
def test_any_states_come_back(tiny_plan_text: str, found: dict[str, int]) -> None:
    plan = Plan.model_validate(json.loads(tiny_plan_text))
    states = {name: State(name, {"k": size}) for name, size in found.items()}
    plan.states = fold_states(states)
    assert unfold_states(plan) == states


@pytest.fixture(scope="module")
def tiny_plan_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return labinfer.compile(tiny_map(tmp_path_factory.mktemp("tiny"))).dump()


@given(st.sampled_from(["layers", "a_b"]), st.integers(0, 10**6), st.text("abc.", min_size=1, max_size=9))
def test_names_fold_and_unfold(group: str, layer: int, rest: str) -> None:
    name = f"{group}.{layer}.{rest}"
    assert layer_of(name) == (group, layer)
    assert unfold_name(fold_name(name), layer) == name


@pytest.mark.parametrize("name", ["h", "attn.out", "layers.x.y", "layers.3", "3.4.5", "body.layers.3.y"])
def test_names_outside_of_layers_stay(name: str) -> None:
    assert layer_of(name) is None
    assert fold_name(name) == name


def test_names_that_end_in_digits(tmp_path: Path) -> None:
    text = (graphs_dir() / "llama.yaml").read_text()
    renamed = re.sub(r"\bh\b(?=[,\]}])", "h2", text)
    (tmp_path / "digits.yaml").write_text(renamed)
    plan = labinfer.compile(tmp_path / "digits.yaml")
    names = [op.name for op, _ in unfold_ops(plan.stages[0])]
    assert len(names) == len(set(names)) == 260
    assert plan.stages[0].schedule[1].receives == {"$h2": "h2"}
