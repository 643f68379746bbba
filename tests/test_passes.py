"""Graph passes and the rules between them: pruning, fusing, and what a broken pass is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import labinfer
from labinfer.compiler.blueprint import read_map
from labinfer.compiler.graph import OpGraph
from labinfer.compiler.lower import lower
from labinfer.compiler.passes import Tracer, run_passes
from labinfer.compiler.passes.fuse import fuse
from labinfer.compiler.passes.prune import prune
from labinfer.compiler.rules import RULES, verify_graph
from labinfer.compiler.settings import ModelSource
from labinfer.errors import InvalidFile, LabinferError
from labinfer.ops.base import TensorType
from labinfer.ops.fusions import FUSIONS, declare

from .tiny import CONFIG, GOLDEN, tiny_map

LAST = "{op: add, in: [h, out], out: h}"


def tiny_graph(folder: Path, change: Callable[[str], str] = lambda text: text) -> OpGraph:
    return lower(read_map(tiny_map(folder, change)), ModelSource("hf", CONFIG, "here"))


def test_nothing_to_prune(tmp_path: Path) -> None:
    graph = tiny_graph(tmp_path)
    ops = list(graph.ops)
    assert prune(graph) == "nothing to remove"
    assert graph.ops == ops


def test_pruning_takes_what_nobody_reads_and_its_weights(tmp_path: Path) -> None:
    first = "{op: linear, in: h, out: spare, weight: spare, out_features: 4}"
    lines = [first, "{op: add, in: [spare, spare], out: more}", LAST]
    graph = tiny_graph(
        tmp_path,
        lambda text: text.replace(LAST, "\n    - ".join(lines))
        .replace("    qkv: {hf: qkv}", "    qkv: {hf: qkv}\n    spare: {hf: spare}"),
    )  # fmt: skip
    plain = tiny_graph(tmp_path)
    assert prune(graph) == "6 ops nobody reads"
    assert [op.name for op in graph.ops] == [op.name for op in plain.ops]
    assert graph.weights == plain.weights
    assert graph.values == plain.values
    assert sum(op.kind == "kv_write" for op in graph.ops) == 3  # they have no outputs and stay


def test_fusing_keeps_the_parts(tmp_path: Path) -> None:
    graph = tiny_graph(tmp_path)
    parts = [part for op in graph.ops for part in op.primitives()]
    assert fuse(graph, FUSIONS) == "3 x linear_add"
    assert [part for op in graph.ops for part in op.primitives()] == parts
    [fused] = [op for op in graph.ops if op.kind == "linear_add" and op.layer == 1]
    assert (fused.name, fused.outputs) == ("layers.1.h", ("layers.1.h",))
    assert fused.inputs == ("layers.1.context", "layers.0.h")
    assert fused.origin == fused.body[0].origin
    verify_graph(graph, "fuse")


def test_a_value_that_is_read_outside_is_not_fused_away(tmp_path: Path) -> None:
    graph = tiny_graph(
        tmp_path,
        lambda text: text.replace(
            "in: [h, out], out: h}", "in: [h, out], out: g}\n    - {op: add, in: [g, out], out: h}"
        ),
    )
    assert fuse(graph, FUSIONS) == "nothing to fuse"


def test_nothing_is_fused_over_the_end_of_a_layer(tmp_path: Path) -> None:
    graph = tiny_graph(tmp_path)
    across = declare("across", "y = add(a, b)", "z = linear(y)")
    assert fuse(graph, [across]) == "nothing to fuse"
    graph.ops = [replace(op, layer=None) for op in graph.ops]
    graph.outputs = ("logits",)
    assert fuse(graph, [declare("select", "y = select_rows(x)", "z = linear(y)")]) == "1 x select"


def test_nothing_is_fused_over_two_devices(tmp_path: Path) -> None:
    graph = tiny_graph(tmp_path)
    graph.ops = [replace(op, device="reference:1") if op.kind == "add" else op for op in graph.ops]
    assert fuse(graph, FUSIONS) == "nothing to fuse"


def test_operands_must_be_wired_as_declared(tmp_path: Path) -> None:
    graph = tiny_graph(tmp_path)
    assert fuse(graph, [declare("twice", "o = linear(x)", "y = add(o, o)")]) == "nothing to fuse"
    assert fuse(graph, [declare("either", "o = linear(x)", "y = add(o, r)")]) == "3 x either"


def broken(name: str, graph: OpGraph) -> None:
    """Break one rule of ``graph``."""
    if name == "read_after_made":
        graph.ops.reverse()
    elif name == "known_kinds":
        graph.ops[1] = replace(graph.ops[1], weights={})
    elif name == "types_follow":
        graph.values["layers.0.context"] = TensorType(("T", 9))
    elif name == "states_fit":
        graph.states["layers.0.kv"] = replace(graph.states["layers.0.kv"], widths={"k": 8, "v": 9})
    else:
        graph.ops.pop()


@pytest.mark.parametrize("name", [rule.__name__ for rule in RULES])
def test_every_rule_can_be_broken(tmp_path: Path, name: str) -> None:
    graph = tiny_graph(tmp_path)
    broken(name, graph)
    with pytest.raises(LabinferError) as caught:
        verify_graph(graph, "a bad pass")
    errors = getattr(caught.value, "errors", [caught.value])
    assert f"graph.{name.replace('_', '-')}" in {error.code for error in errors}
    assert all("after a bad pass" in error.message for error in errors)
    assert all(error.place.file.endswith("tiny.yaml") for error in errors)


def test_a_pass_that_breaks_a_rule_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(graph: OpGraph) -> str:
        graph.ops.pop()
        return "oops"

    monkeypatch.setattr("labinfer.compiler.passes.prune", bad)
    with pytest.raises(InvalidFile, match="after prune"):
        run_passes(tiny_graph(tmp_path), FUSIONS, Tracer())


def test_the_trace_tells_every_step() -> None:
    tracer = Tracer()
    labinfer.compile(GOLDEN / "llama-llama3", tracer=tracer, fuse="all")
    assert [trace.name for trace in tracer.traces] == [
        "lower", "verify lower", "prune", "fuse", "place", "arena", "write"
    ]  # fmt: skip
    fused = tracer.traces[3]
    assert fused.ops_after < fused.ops_before == tracer.traces[0].ops_after
    assert "3 x norm_qkv" in fused.effect
    assert all(trace.milliseconds >= 0 for trace in tracer.traces)
