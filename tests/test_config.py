"""Options of ``labinfer serve`` from flags, environment and file, and what ``labinfer config show`` tells of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labinfer.cli.serve import serve
from labinfer.errors import Errors, LabinferError

Cli = Callable[..., CompletedProcess[str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: some.gguf\nport: 9000\nmax-model-len: 8k\nlora: [a=./x, b=./y]\nallowed-host: foo.example\n"
    )
    return path


def context(*arguments: object) -> click.Context:
    return serve.make_context("serve", [str(each) for each in arguments])


def test_a_flag_goes_before_the_environment_and_that_before_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = context("--config", file).params
    assert (found["model"], found["port"], found["max_model_len"]) == (("some.gguf",), 9000, 8192)
    assert (found["lora"], found["allowed_hosts"], found["host"]) == (("a=./x", "b=./y"), ("foo.example",), "127.0.0.1")
    monkeypatch.setenv("LABINFER_SERVE_PORT", "9001")
    assert context("--config", file).params["port"] == 9001
    assert context("--config", file, "--port", 9002).params["port"] == 9002


def test_every_value_is_shown_with_its_origin_and_no_key(
    file: Path, labinfer_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABINFER_API_KEY", "a-very-secret-key")
    result = labinfer_cli("config", "show", "--json", "--config", file, "--host", "::1")
    assert result.returncode == 0, result.stderr
    assert "a-very-secret-key" not in result.stdout
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["host"] == {"value": "::1", "origin": "command line", "environment": "LABINFER_SERVE_HOST"}
    assert found["port"]["origin"] == f"file: {file}:2:7"
    assert found["api-key"]["origin"] == "environment: LABINFER_API_KEY"
    assert found["drain"] == {"value": 30.0, "origin": "default", "environment": "LABINFER_SERVE_DRAIN"}
    table = labinfer_cli("config", "show", "--origin", "--config", file).stdout
    assert "a=./x b=./y" in table
    assert f"file: {file}:3:16" in table


def test_all_that_is_wrong_with_a_file_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("prot: 1\nport: x\nhost: [a]\nmax-queue: true\n")
    with pytest.raises(Errors) as raised:
        context("--config", file)
    assert [(error.code, error.place.line) for error in raised.value.errors if error.place] == [
        ("options.unknown-key", 1), ("options.value", 2), ("options.value", 3), ("options.value", 4),
    ]  # fmt: skip
    file.write_text("- port")
    with pytest.raises(LabinferError, match="port: 9000"):
        context("--config", file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["port", "host", "lora", "drain", "fuse", "kv-memory", "x"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
    )
)
def test_any_file_is_read_or_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    file = tmp_path / "any.yaml"
    file.write_text(json.dumps(values))
    try:
        found = context("--config", file).params
    except LabinferError:
        return
    assert "x" not in values
    assert str(found["port"]) == str(values.get("port", 8000)).strip()
