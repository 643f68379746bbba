"""Drawings of plans: what every format must hold, without the programs that show them (see test_render_browser.py)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
import xml.etree.ElementTree as ET
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import labinfer
from labinfer.backends.base import BACKENDS
from labinfer.cli.graph import default_name
from labinfer.cli.main import COMMANDS, main
from labinfer.compiler.fold import unfold_ops
from labinfer.compiler.plan import Plan
from labinfer.errors import UsageError
from labinfer.home import graphs_dir
from labinfer.render import FORMATS, render
from labinfer.render.arena_map import arena_map
from labinfer.render.drawing import draw, layers_text
from labinfer.render.layout import layered

FAMILIES = sorted(file.stem for file in graphs_dir().glob("*.yaml"))
TWO = "reference:0=0-13,reference:1=14-27"


@pytest.fixture(scope="module")
def qwen3() -> Plan:
    return labinfer.compile("qwen3.yaml")


@pytest.fixture(scope="module")
def fused() -> Plan:
    return labinfer.compile("qwen3.yaml", devices=TWO, fuse="all")


# ---- the drawing


def test_alike_layers_are_drawn_once(qwen3: Plan) -> None:
    drawing = draw(qwen3)
    assert [section.layers for section in drawing.sections] == [[], list(range(28)), []]
    ops = [op.name for stage in qwen3.stages for op, _ in unfold_ops(stage)]
    assert [op.name for instance in drawing.instances for op in instance.ops] == ops


def test_layers_that_alternate_are_one_pattern() -> None:
    drawing = draw(labinfer.compile("gemma3_text.yaml"))
    inside = [section for section in drawing.sections if section.group == 0]
    assert [section.layers[:6] for section in inside] == [[0, 1, 2, 3, 4, 6], [5, 11, 17, 23]]
    assert drawing.repeats == [4]
    assert sorted(layer for section in drawing.sections for layer in section.layers) == list(range(26))


def test_layers_that_only_lie_elsewhere_are_alike() -> None:
    plan = labinfer.compile("qwen3.yaml", devices=TWO)
    assert len({section.block for section in draw(plan).sections if section.layers}) == 1


@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_draws_plans_of_every_device(format_: str, device: str) -> None:
    if device == "cpu":
        pytest.importorskip("numba")
    assert render(labinfer.compile("llama.yaml", devices=device), format_)


def test_bytes_of_weights_are_those_stored_whatever_the_device_makes_of_them(qwen3: Plan) -> None:
    plan = qwen3.model_copy(deep=True)
    for device in plan.devices.values():
        device.parameters = "a layout of its own"
    drawing = draw(plan)
    assert all(drawing.weight_bytes(name) == 2 * prod(weight.shape) for name, weight in drawing.weights.items())
    embed = next(node for block in drawing.blocks for node in block.nodes if node.op.kind == "embedding")
    assert embed.cost.weights == 2 * prod(drawing.weights[embed.op.weights["weight"]].shape)


def test_layer_ranges_in_words() -> None:
    assert layers_text([3]) == "3"
    assert layers_text([0, 1, 2, 5, 6]) == "0–2, 5–6"
    assert layers_text([0, 2, 4, 6]) == "0, 2, 4 …"


@pytest.mark.parametrize("family", FAMILIES)
def test_arena_map_holds_what_the_plan_says(family: str) -> None:
    plan = labinfer.compile(f"{family}.yaml")
    drawing = draw(plan)
    for number, stage in enumerate(plan.stages):
        found = arena_map(drawing, number)
        assert max(found.live) == stage.arena.lower_bound == found.live[found.peak]
        assert max(each.at + each.size for each in found.sets) == stage.arena.size
        edge = sorted(found.sets, key=lambda each: each.lower)
        for i, one in enumerate(edge):
            for other in edge[i + 1 : i + 40]:
                apart = one.upper <= other.lower or one.at + one.size <= other.at or other.at + other.size <= one.at
                assert apart, (one, other)
        made = [name for each in found.sets for name in each.values]
        assert sorted(made) == sorted(name for op in found.ops for name in op.outputs)


@st.composite
def graphs(draw_from: st.DrawFn) -> tuple[list[tuple[float, float]], list[tuple[int, int]]]:
    count = draw_from(st.integers(1, 24))
    sizes = [
        (draw_from(st.sampled_from([64.0, 180.0, 206.0])), draw_from(st.sampled_from([26.0, 39.0])))
        for _ in range(count)
    ]
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda pair: pair[0] < pair[1])
    edges = draw_from(st.lists(pairs, max_size=40, unique=True)) if count > 1 else []
    return sizes, edges


@given(graphs())
def test_layout_keeps_nodes_apart_and_edges_downward(
    graph: tuple[list[tuple[float, float]], list[tuple[int, int]]],
) -> None:
    sizes, edges = graph
    layout = layered(sizes, edges)
    areas = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in zip(layout.centres, sizes, strict=True)]
    for i, one in enumerate(areas):
        assert min(one[:2]) >= -0.01
        assert one[2] <= layout.width + 0.01
        assert one[3] <= layout.height + 0.01
        for other in areas[i + 1 :]:
            beside = one[2] <= other[0] + 0.01 or other[2] <= one[0] + 0.01
            assert beside or one[3] <= other[1] + 0.01 or other[3] <= one[1] + 0.01
    for (source, target), route in zip(edges, layout.routes, strict=True):
        heights = [y for _, y in route]
        assert heights == sorted(heights)
        assert heights[0] == pytest.approx(areas[source][3])
        assert heights[-1] == pytest.approx(areas[target][1])
        assert areas[target][0] <= route[-1][0] <= areas[target][2]


# ---- the page and the picture


def policy_of(text: str) -> dict[str, str]:
    content = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert content is not None
    return dict(part.strip().split(" ", 1) for part in content[1].split(";"))


def test_page_admits_only_its_own_script_and_style(qwen3: Plan) -> None:
    text = render(qwen3, "html")
    policy = policy_of(text)
    assert policy["default-src"] == "'none'"
    for element, rule in (("script", "script-src"), ("style", "style-src")):
        bodies = re.findall(rf"<{element}>(.*?)</{element}>", text, re.S)
        assert len(bodies) == 1
        digest = base64.b64encode(hashlib.sha256(bodies[0].encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"
    assert not re.search(r"""(src|href)=["']?(?!#)""", text.split('<script type="application/json"')[0])
    script = text.rsplit("<script>", 1)[1]
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        "import(",
    ):
        assert forbidden not in script
    assert not re.search(r"\son\w+=", text.split("<body>")[1].split("<script")[0])


def test_page_data_is_the_plan(qwen3: Plan) -> None:
    text = render(qwen3, "html")
    data = json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])
    assert [node["kind"] for node in data["nodes"]].count("linear") == 8
    stage = data["stages"][0]
    assert stage["arena"]["size"] == qwen3.stages[0].arena.size
    assert len(stage["steps"]) == len(list(unfold_ops(qwen3.stages[0])))
    assert all(upper <= len(stage["steps"]) + 1 for _, upper, *_ in stage["sets"])


def test_hostile_names_stay_text(qwen3: Plan) -> None:
    evil = "</script><b>{SCRIPT}]]>&\"'"
    plan = qwen3.model_copy(deep=True)
    plan.source.name = plan.source.maps[0] = evil
    for op in plan.stages[0].blocks["layer"]:
        op.origin = evil
    page = render(plan, "html")
    assert "<b>" not in page
    assert page.count("</script>") == 2
    assert evil in "".join(ET.fromstring(render(plan, "svg")).itertext())
    assert "</script>" not in render(plan, "mermaid")


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v2", "gemma3_text"])
def test_svg_shows_every_kind_of_op(family: str) -> None:
    plan = labinfer.compile(f"{family}.yaml")
    picture = ET.fromstring(render(plan, "svg"))
    texts = ["".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    kinds = {op.op for stage in plan.stages for block in stage.blocks.values() for op in block}
    assert kinds <= set(texts)
    assert any("×" in text and "layer" in text for text in texts)


@pytest.mark.alone
def test_405_billion_parameters_draw_fast_and_small(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = labinfer.compile(tmp_path / "config.json")
    assert sum(1 for _ in unfold_ops(plan.stages[0])) > 2000
    seconds = []
    for _ in range(3):
        start = time.process_time()
        page = render(plan, "html")
        seconds.append(time.process_time() - start)
    assert len(page.encode()) < 1_000_000
    assert min(seconds) < 1.5


# ---- text and data for other programs


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "deepseek_v2"])
def test_mermaid_and_dot_name_what_they_link(family: str) -> None:
    plan = labinfer.compile(f"{family}.yaml")
    ops = sum(len(ops) for ops in plan.stages[0].blocks.values())
    mermaid = render(plan, "mermaid")
    defined = set(re.findall(r"^\s+(\w+)(?:\(\[|\[)", mermaid, re.M)) - {"subgraph"}
    linked = {end for pair in re.findall(r"^  (\w+) -\.?-> (\w+)$", mermaid, re.M) for end in pair}
    assert linked == {name for name in defined if not name.startswith("section")}
    assert len(linked) >= ops
    assert mermaid.count("subgraph") == mermaid.count("\n  end\n") >= 1
    dot = render(plan, "dot")
    names = set(re.findall(r'^\s+("[^"]+") \[label', dot, re.M))
    assert {end for pair in re.findall(r'^  ("[^"]+") -> ("[^"]+")', dot, re.M) for end in pair} == names
    assert dot.count("{") == dot.count("}")


def test_json_is_a_networkx_graph(qwen3: Plan) -> None:
    graph = networkx.node_link_graph(json.loads(render(qwen3, "json")), edges="edges")
    assert networkx.is_directed_acyclic_graph(graph)
    assert graph.number_of_nodes() == sum(1 for _ in unfold_ops(qwen3.stages[0])) + 2
    assert (
        graph.nodes["layers.27.attn.qkv.q"]["weights"]["weight"]["tensor"] == "model.layers.27.self_attn.q_proj.weight"
    )
    assert graph.edges["layers.3.attn.kv_write", "layers.3.attn.context", "layers.3.kv"]["cache"]
    assert networkx.has_path(graph, "token_ids", "logits")
    assert networkx.number_weakly_connected_components(graph) == 1


def check_graph(nodes: list[dict[str, Any]], known: set[str], functions: dict[str, Any]) -> set[str]:
    """Every value is known before it is read and made once; a called function gets as many values as it names."""
    for node in nodes:
        assert set(node["input"]) <= known, node["name"]
        assert not known & set(node["output"]), node["name"]
        known |= set(node["output"])
        if node["opType"] in functions:
            called = functions[node["opType"]]
            assert len(called["input"]) == len(node["input"])
            assert len(called["output"]) == len(node["output"])
    return known


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_is_a_graph_of_functions(family: str) -> None:
    check_onnx(labinfer.compile(f"{family}.yaml"))


def test_onnx_of_fused_ops_on_two_devices(fused: Plan) -> None:
    model = check_onnx(fused)
    devices = [
        entry["value"] for node in model["graph"]["node"] for entry in node["metadataProps"] if entry["key"] == "device"
    ]
    assert devices == ["reference:0"] * 15 + ["reference:1"] * 15


def check_onnx(plan: Plan) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(render(plan, "onnx"))
    functions = {function["name"]: function for function in model["functions"]}
    assert len(functions) == len(model["functions"])
    graph = model["graph"]
    known = {value["name"] for value in (*graph["input"], *graph["initializer"])}
    made = check_graph(graph["node"], known, functions)
    assert {value["name"] for value in graph["output"]} <= made
    for function in functions.values():
        inside = check_graph(function["node"], set(function["input"]), functions)
        assert set(function["output"]) <= inside
    layers = sum(s.layers[1] - s.layers[0] + 1 for stage in plan.stages for s in stage.schedule if s.layers)
    assert sum(node["opType"] in functions and node["name"].startswith("layer ") for node in graph["node"]) == layers
    return model


def test_onnx_json_is_protobuf_json(fused: Plan) -> None:
    onnx = pytest.importorskip("onnx", reason="no onnx here: pip install onnx")
    from google.protobuf import json_format

    model = json_format.Parse(render(fused, "onnx"), onnx.ModelProto())
    for weight in model.graph.initializer:  # the checker would look for the files of external data
        kind = onnx.helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims))
        model.graph.input.append(kind)
    del model.graph.initializer[:]
    onnx.checker.check_model(model)


def test_model_explorer_edges_lead_to_nodes(fused: Plan) -> None:
    (graph,) = json.loads(render(fused, "model-explorer"))["graphs"]
    outputs = {node["id"]: {out["id"] for out in node["outputsMetadata"]} for node in graph["nodes"]}
    edges = [edge for node in graph["nodes"] for edge in node.get("incomingEdges", [])]
    assert edges
    made = [edge for edge in edges if outputs[edge["sourceNodeId"]]]
    assert all(edge["sourceNodeOutputId"] in outputs[edge["sourceNodeId"]] for edge in made)
    spaces = {node["namespace"] for node in graph["nodes"]}
    assert {"", "layers/0", "layers/27/attn"} <= spaces


def test_perfetto_slices_and_counters(fused: Plan) -> None:
    trace = json.loads(render(fused, "perfetto"))
    assert "not time" in trace["otherData"]["unit"]
    for stage, plan in enumerate(fused.stages):
        events = [event for event in trace["traceEvents"] if event["pid"] == stage]
        slices = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
        assert len(slices) == sum(1 for _ in unfold_ops(plan))
        for one, after in pairwise(slices):
            assert one["dur"] > 0
            assert one["ts"] + one["dur"] == pytest.approx(after["ts"], abs=0.01)
        live = [event["args"]["live bytes"] for event in events if event["ph"] == "C"]
        assert max(live) == plan.arena.lower_bound
        assert live[-1] == 0
    flows = [event["ph"] for event in trace["traceEvents"] if event["name"] == "transfer"]
    assert flows == ["s", "f"]


def test_every_format_is_the_same_twice(qwen3: Plan) -> None:
    for name in FORMATS:
        assert render(qwen3, name) == render(qwen3, name)


def test_unknown_format(qwen3: Plan) -> None:
    with pytest.raises(UsageError, match="did you mean 'mermaid'"):
        render(qwen3, "mermeid")


# ---- the command


def test_help_says_what_the_table_says() -> None:
    from labinfer.cli.graph import graph

    assert graph.get_short_help_str() == COMMANDS["graph"][1]


def test_command_names_files_after_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["graph", "llama.yaml"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["llama.html"]
    assert "wrote llama.html" in capsys.readouterr().err
    assert main(["graph", "llama.yaml", "-f", "dot", "-o", "x.dot"]) == 0
    assert (tmp_path / "x.dot").read_text("utf-8").startswith("digraph")


def test_command_writes_text_to_a_pipe(tmp_path: Path, capsys: Any) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(labinfer.compile("llama.yaml").dump(), "utf-8")
    assert main(["graph", str(plan), "-f", "svg"]) == 0
    assert capsys.readouterr().out.startswith("<svg")
    assert main(["graph", str(plan), "-o", "-"]) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")


def test_command_prints_one_json_document(capsys: Any) -> None:
    assert main(["graph", "llama", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["nodes"]) > 100
    assert main(["graph", "lama.yaml", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["errors"][0]["code"] == "map.missing"
    assert main(["graph", "llama", "--json", "-o", "x.json"]) == main(["graph", "llama", "--json", "-f", "svg"]) == 2


def test_command_refuses_what_it_cannot_draw(tmp_path: Path, capsys: Any) -> None:
    assert main(["graph", "llama.yaml", "-f", "pdf"]) == 2
    assert "is not one of" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text("{}")
    assert main(["graph", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out.html")]) == 3
    assert not (tmp_path / "out.html").exists()
    assert main(["graph", "llama.yaml", "-o", str(tmp_path / "no" / "out.html")]) == 1


def test_default_names() -> None:
    assert default_name("graphs/llama.yaml", "html") == "llama.html"
    assert default_name("../models/Qwen3-0.6B/", "onnx") == "Qwen3-0.6B.onnx.json"
    assert default_name("hf:org/repo", "svg") == "repo.svg"
    assert default_name("/", "svg") == "model.svg"
