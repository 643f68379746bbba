"""``labinfer explain``: the report and its figures."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import labinfer
from labinfer.render.report import ranges, report
from labinfer.render.report_text import op_lines, report_lines, summary_lines, value_lines

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_figures_are_those_of_the_plan_and_the_checkpoint(tiny_model: Path):
    plan = labinfer.compile(tiny_model, devices="reference:0=0,reference:1=1", max_num_seqs=2)
    found = report(plan)
    assert found.num_parameters == 64 * 16 + 16 + 2 * (2 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 32)
    assert [(each.format, each.bytes) for each in found.formats] == [("f32", 4 * found.num_parameters)]
    assert [stage.layers for stage in found.stages] == ["0", "1"]
    assert found.stages[0].kv_cache_per_token == (4 * (8 + 8),)
    assert found.stages[0].kv_cache == 4 * 16 * plan.limits.groups[0].num_blocks * plan.limits.block_size
    assert found.stages[1].receives == ("layers.0.h.2",)
    for stage in found.stages:
        assert stage.arena == stage.lower_bound == sum(value.bytes for value in stage.live_at_peak)


def test_decode_cost_counts_a_row_of_the_embedding_and_the_chosen_experts():
    cost = report(labinfer.compile("llama", max_num_seqs=1)).decode
    body = 1_235_814_400 - 128256 * 2048
    assert cost.weight_bytes == pytest.approx(
        4 * (body + 128256 * 2048 + 2048), rel=1e-6
    )  # head: all, embedding: a row
    assert cost.flops == pytest.approx(2 * (body + 128256 * 2048), rel=0.01)
    assert cost.context_bytes == 4096 * 65536
    mixture = report(labinfer.compile("mixtral", max_num_seqs=1)).decode
    assert mixture.weight_bytes == pytest.approx(4 * 12.75e9, rel=0.02)  # 2 of 8 experts


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("model", ["llama", "gemma3_text", "deepseek_v2"])
def test_report_fits_its_width(model: str, width: int):
    plan = labinfer.compile(model, fuse="all", devices="reference:0,reference:1")
    found = report(plan)
    lines = [*report_lines(plan, found, width), *op_lines(plan, width, detail=True), *op_lines(plan, width)]
    assert [line.text for line in lines if len(line.text) > width] == []
    assert len(list(summary_lines(plan, found, width))) < 20
    assert any("lower bound" in line.text for line in lines)


def test_every_op_and_value_is_told_once_per_block():
    plan = labinfer.compile("gemma3_text")
    lines = [line.text for line in op_lines(plan, 100)]
    assert "  layers 0-4, 6-10, 12-16, 18-22, 24-25 (× 22)" in lines
    assert "  layers 5, 11, 17, 23 (× 4)" in lines
    written = sum(len(ops) for ops in plan.stages[0].blocks.values())
    assert sum(".yaml:" in line for line in lines) == written
    values = [line.text for line in value_lines(plan, 100)]
    assert sum("layers.{i}.attn.out " in line for line in values) == 2


def test_explain_on_the_command_line(tmp_path: Path, labinfer_cli: Cli, tiny_model: Path):
    assert labinfer_cli("compile", tiny_model, "-q").returncode == 0
    whole = labinfer_cli("explain", "plan.json")
    assert (whole.returncode, whole.stderr) == (0, "")
    for told in ("tiny", "KV cache", "lower bound", "fused: nothing (reference runs the map op by op)", "llama.yaml:"):
        assert told in whole.stdout
    summary = labinfer_cli("explain", "plan.json", "--summary").stdout
    assert whole.stdout.startswith(summary)
    assert "layers.{i}.attn.out" in labinfer_cli("explain", "plan.json", "--values").stdout
    found = json.loads(labinfer_cli("explain", "plan.json", "--json").stdout)
    assert found["stages"][0]["total"] == sum(
        found["stages"][0][kind] for kind in ("weights", "kv_cache", "arena", "step")
    )
    assert "plan" not in found
    assert json.loads(labinfer_cli("explain", "plan.json", "--ops", "--json").stdout)["plan"]["schema_version"] == 1


def test_explain_of_a_model_is_of_the_plan_that_run_makes(labinfer_cli: Cli, tiny_model: Path):
    found = json.loads(labinfer_cli("explain", tiny_model, "--json").stdout)
    assert found["limits"]["max_num_seqs"] == 1


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["missing.json"], 3, "plan.missing"),
        (["broken.json"], 3, "broken.json:1:2"),
        (["other.json"], 3, "not a labinfer plan"),
        (["llama", "--summary", "--ops"], 2, "--summary"),
        (["plan.json", "--devices", "reference"], 2, "run.plan-decides"),
    ],
)
def test_failures(tmp_path: Path, labinfer_cli: Cli, arguments: list[str], exit_code: int, said: str):
    (tmp_path / "broken.json").write_text("{broken")
    (tmp_path / "other.json").write_text("{}")
    result = labinfer_cli("explain", *arguments)
    assert (result.returncode, result.stdout) == (exit_code, "")
    assert said in result.stderr


def test_ranges():
    assert ranges([]) == "-"
    assert ranges([3, 0, 1, 2, 7]) == "0-3, 7"


def test_a_terminal_that_lacks_characters_gets_the_report_all_the_same(tmp_path: Path, tiny_model: Path):
    words = [sys.executable, "-m", "labinfer", "explain", str(tiny_model)]
    environment = {**os.environ, "PYTHONIOENCODING": "koi8-r"}
    result = subprocess.run(words, capture_output=True, env=environment, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"(? 2)" in result.stdout
