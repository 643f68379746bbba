"""Lowering: maps and configs to op graphs; names, layers, weights, states, per-layer values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labinfer.compiler.blueprint import read_map
from labinfer.compiler.graph import OpGraph
from labinfer.compiler.lower import lower
from labinfer.compiler.rules import verify_graph
from labinfer.compiler.settings import ModelSource, TensorEntry
from labinfer.errors import InvalidFile
from labinfer.home import graphs_dir

from .tiny import CONFIG, GOLDEN, tensors, tiny_map


def graph_of(folder: Path, change: Callable[[str], str] = lambda text: text, **source: Any) -> OpGraph:
    """The op graph of the tiny map, its text changed."""
    return lower(
        read_map(tiny_map(folder, change)), ModelSource("hf", CONFIG | source.pop("config", {}), "here", **source)
    )


def test_a_small_graph(tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    assert [op.name for op in graph.ops[:8]] == [
        "h", "layers.0.qkv", "layers.0.q", "layers.0.kv_write", "layers.0.context", "layers.0.out", "layers.0.h",
        "layers.1.qkv",
    ]  # fmt: skip
    assert graph.outputs == ("logits",)
    assert [op.layer for op in graph.ops] == [None] + [0] * 6 + [1] * 6 + [2] * 6 + [None, None]
    assert {name: str(kind) for name, kind in graph.values.items() if name in ("h", "layers.1.qkv", "logits")} == {
        "h": "f32[T, 8]", "layers.1.qkv": "f32[T, 24]", "logits": "f32[R, 16]"
    }  # fmt: skip
    assert graph.ops[7].inputs == ("layers.0.h",)
    assert graph.weights["layers.2.qkv"].tensor == "layers.2.qkv"
    assert graph.weights["layers.2.qkv"].shape == (24, 8)
    assert {name: dict(state.widths) for name, state in graph.states.items()} == {
        f"layers.{i}.kv": {"k": 8, "v": 8} for i in range(3)
    }
    assert str(graph.ops[1].origin) == f"{tmp_path}/tiny.yaml:18:7"
    verify_graph(graph, "lower")


def test_layers_that_are_alike_share_their_attributes(tmp_path: Path) -> None:
    graph = graph_of(tmp_path)
    assert len({id(op.attrs) for op in graph.ops if op.kind == "attention"}) == 1


def test_lines_are_left_out_when_not_wanted(tmp_path: Path) -> None:
    def change(text: str) -> str:
        head, blocks, tail = text.partition("  layer:\n")
        lines, weights, rest = tail.partition("weights:\n")
        return head + blocks + lines.replace("in: ", "when: i != 1, in: ") + weights + rest

    graph = graph_of(tmp_path, change)
    assert {op.layer for op in graph.ops} == {None, 0, 2}
    assert next(op for op in graph.ops if op.name == "layers.2.qkv").inputs == ("layers.0.h",)
    assert set(graph.states) == {"layers.0.kv", "layers.2.kv"}


def test_optional_weights_follow_the_checkpoint(tmp_path: Path) -> None:
    table = {name: TensorEntry(array.shape, "bf16") for name, array in tensors().items()}
    assert "bias" not in graph_of(tmp_path, tensors=table).ops[5].weights
    table |= {f"layers.{i}.bias": TensorEntry((8,), "f32") for i in range(3)}
    graph = graph_of(tmp_path, tensors=table)
    assert graph.ops[5].weights == {"weight": "layers.0.out", "bias": "layers.0.out_bias"}
    assert (graph.weights["layers.0.out"].format, graph.weights["layers.0.out_bias"].format) == ("bf16", "f32")


def test_ops_without_values_have_names_of_their_own(tmp_path: Path) -> None:
    write = "    - {op: kv_write, in: [k, v], state: kv}\n"
    graph = graph_of(tmp_path, lambda text: text.replace(write, 2 * write))
    names = [op.name for op in graph.ops]
    assert len(set(names)) == len(names)
    assert {"layers.0.kv_write", "layers.0.kv_write.2"} <= set(names)


def test_per_layer_values(tmp_path: Path) -> None:
    def change(text: str) -> str:
        return text.replace("config:\n", "config:\n  scale: {value: 0.25, only: i % 2 == 0, else: 2.0}\n").replace(
            "scale: 0.5", "scale: scale"
        )

    graph = graph_of(tmp_path, change)
    assert [op.attrs.scale for op in graph.ops if op.kind == "attention"] == [0.25, 2.0, 0.25]  # type: ignore[attr-defined]


@pytest.mark.parametrize("times", [0, -1, 1025, 2.0, "none", "true and 'x'"])
def test_times_must_be_a_number_of_layers(tmp_path: Path, times: object) -> None:
    with pytest.raises(InvalidFile) as caught:
        graph_of(tmp_path, lambda text: text.replace("times: num_layers", f"times: {times}"))
    assert caught.value.code == "map.repeat"


USES = "{use: projection, as: p}\n    - {op: add, in: [h, p.out], out: h}"
BLOCK = """\
  projection:
    - {op: linear, in: context, out: h, weight: out, out_features: hidden_size}
    - {op: add, in: [h, h], out: out}
weights:
"""


def test_names_inside_a_block_are_its_own(tmp_path: Path) -> None:
    def change(text: str) -> str:
        text = text.replace("{op: add, in: [h, out], out: h}", USES)
        return text.replace("weights:\n", BLOCK, 1)

    graph = graph_of(tmp_path, change)
    names = [op.name for op in graph.ops]
    end = names.index("layers.0.h")
    assert names[end - 2 : end] == ["layers.0.p.h", "layers.0.p.out"]
    assert graph.ops[end].inputs == ("h", "layers.0.p.out")


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_the_graph_of_every_family_obeys_the_rules(path: Path) -> None:
    config = json.loads(path.read_text())
    family = path.parent.name.partition("-")[0].replace("mistral", "llama")
    graph = lower(read_map(graphs_dir() / f"{family}.yaml"), ModelSource("hf", config, str(path)))
    verify_graph(graph, "lower")
    assert len({op.name for op in graph.ops}) == len(graph.ops)
    networkx = graph.networkx()
    assert list(networkx.nodes) == [op.name for op in graph.ops]
    order = {name: index for index, name in enumerate(networkx.nodes)}
    assert all(order[before] < order[after] for before, after in networkx.edges())
