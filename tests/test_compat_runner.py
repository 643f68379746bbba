"""The runner of other people's clients: what is a failure of a client, and what is none."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "compat"))

import run


def npm_that_fails(folder: Path, code: str) -> None:
    """An npm in ``folder`` that ends as the real one does."""
    npm = folder / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\necho 'npm error code {code}' >&2\necho 'npm error more' >&2\nexit 1\n")
    npm.chmod(0o755)


@pytest.mark.parametrize("code", ["ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ERR_SOCKET_TIMEOUT", "E503"])
def test_registry_that_cannot_be_reached_is_told_apart(tmp_path: Path, code: str) -> None:
    npm_that_fails(tmp_path, code)
    with pytest.raises(run.RegistryUnreachable, match=code):
        run.install_node(tmp_path, ["axe-core@4.14.1"])


@pytest.mark.parametrize("code", ["ETARGET", "E404", "ERESOLVE", "EACCES"])
def test_packages_that_do_not_install_are_a_failure(tmp_path: Path, code: str) -> None:
    npm_that_fails(tmp_path, code)
    with pytest.raises(subprocess.CalledProcessError):
        run.install_node(tmp_path, ["axe-core@4.14.1"])


def test_registry_out_of_reach_skips_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm_that_fails(tmp_path, "ENOTFOUND")
    monkeypatch.setattr(run, "environment", lambda name: run.install_node(tmp_path, run.CLIENTS[name]["node"]))
    assert run.outcome("page", {}) is run.Outcome.SKIPPED


@pytest.mark.parametrize(("text", "ended"), [("pass", run.Outcome.PASSED), ("assert False", run.Outcome.FAILED)])
def test_program_decides_how_a_client_ended(tmp_path: Path, text: str, ended: run.Outcome) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "client.py").write_text(text)
    assert run.run_program(tmp_path, tmp_path / "client.py", {})[0] is ended
