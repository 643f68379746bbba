"""``labinfer diff``: what two plans say differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import labinfer
from labinfer.compiler.plan import Plan
from labinfer.render.diff import differences

_MODEL = Path(__file__).parent / "golden" / "llama-llama3"
Cli = Callable[..., CompletedProcess[str]]


def _plan(devices: str = "reference", **options: object) -> Plan:
    return labinfer.compile(_MODEL, devices=devices, **options)


def test_equal_plans_differ_in_nothing() -> None:
    assert differences(_plan(), _plan()) == []


def test_limits_bytes_and_devices_are_told() -> None:
    found = {each.what: (each.before, each.after) for each in differences(_plan(), _plan(max_num_seqs=2))}
    assert found["limits.max_num_seqs"] == (8, 2)
    assert found["stage 0: bytes of kv_cache"][0] > found["stage 0: bytes of kv_cache"][1]
    found = {each.what: (each.before, each.after) for each in differences(_plan(), _plan("reference,reference:1"))}
    assert found["stage 0: layers"] == ("0-2", "0")
    assert found["stage 1: device"] == (None, "reference:1")


def test_the_command_prints_a_table_and_json(labinfer_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(_plan().dump())
    (tmp_path / "b.json").write_text(_plan(max_num_seqs=2).dump())
    shown = labinfer_cli("diff", "a.json", "b.json")
    assert shown.returncode == 0
    assert "limits.max_num_seqs" in shown.stdout
    assert "the plans do the same" in labinfer_cli("diff", "a.json", "a.json").stderr
    told = json.loads(labinfer_cli("diff", "a.json", "b.json", "--json").stdout)
    assert {"what", "before", "after"} == set(told[0])
    assert labinfer_cli("diff", "a.json", "none.json").returncode == 3
