"""Quotas, shares of compute, and grants that other processes see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import labinfer
from labinfer.backends import reference
from labinfer.cli.devices import devices
from labinfer.errors import DoesNotFit, UsageError
from labinfer.placing import cluster_goal
from labinfer.profile import measure
from labinfer.profile.quiet import Patience
from labinfer.profile.session import profile_cluster
from labinfer.progress import silent
from labinfer.runtime.cores import available_cores
from labinfer.runtime.grants import all_grants
from labinfer.runtime.manager import Manager

from .tiny import GOLDEN

FOLDER = GOLDEN / "llama-llama3"
CORES = available_cores()


def test_two_models_share_a_quota() -> None:
    plan = labinfer.compile(FOLDER)
    size = plan.stages[0].bytes.total
    with closing(Manager(quotas={"reference": 2 * size})) as manager:
        one, two = labinfer.load(plan, manager=manager), labinfer.load(plan, manager=manager)
        with pytest.raises(DoesNotFit, match=r"0 B of its quota of .* are left"):
            labinfer.load(plan, manager=manager)
        one.close()
        labinfer.load(plan, manager=manager).close()
        two.close()
        assert not manager.grants.given


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_shares_are_sets_of_cores_of_their_own() -> None:
    manager = Manager(shares={"cpu:0": 0.5, "cpu:1": 0.5})
    assert not set(manager.cores["cpu:0"]) & set(manager.cores["cpu:1"])
    assert manager.cores["cpu:0"] + manager.cores["cpu:1"] == CORES[: 2 * round(len(CORES) / 2)]


@pytest.mark.parametrize(("shares", "kind"), [({"cpu": 0.0}, UsageError), ({"cpu": 1.2}, UsageError),
                                              ({"cpu": 1.0, "cpu:1": 0.4}, DoesNotFit)])  # fmt: skip
def test_what_cannot_be_shared_is_refused(shares: dict[str, float], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"share|cores"):
        Manager(shares=shares)


@pytest.fixture
def hundred_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference device as one with processors of its own, which computes as ever."""
    capabilities = replace(reference.CAPABILITIES, processors=lambda name: 100)
    monkeypatch.setattr(reference, "CAPABILITIES", capabilities)


@pytest.mark.usefixtures("hundred_processors", "home")
def test_shares_of_a_device_with_processors_of_its_own_are_so_many_of_these() -> None:
    with closing(Manager(shares={"reference:0.0": 0.25, "reference:0.1": 0.5})) as manager:
        assert manager.cores == {}
        assert manager.processors == {"reference:0.0": 25, "reference:0.1": 50}
        with labinfer.load(FOLDER, devices="reference:0.0", manager=manager):
            [grant] = all_grants()
            assert (grant.device, grant.processors, grant.cores) == ("reference:0.0", 25, [])
            shown = CliRunner().invoke(devices, catch_exceptions=False).output
            assert "25 processors" in shown
        with pytest.raises(DoesNotFit, match="is granted 50 processors"):
            manager.device("reference:0.1", threads=51)


@pytest.mark.usefixtures("hundred_processors", "home")
@pytest.mark.parametrize(("share", "threads"), [("0.25", 25), ("1", None)])
def test_a_cluster_file_shares_processors(
    share: str, threads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "BUDGET_SECONDS", 0.0)
    file = tmp_path / "cluster.yaml"
    file.write_text(f"devices:\n  reference:0:\n    share: {share}\n")
    [target], _ = cluster_goal(file, "latency", "")
    assert target.threads == threads
    if threads is not None:
        profile_cluster(FOLDER, file, silent, Patience(0), quick=True)
        assert labinfer.compile(FOLDER, cluster=file).devices["reference:0"].threads == threads


@pytest.mark.parametrize("name", ["cpu:", "cpu:x", "cpu:1.", "cpu:1.2.3", "cpu:.1", "cpu:12345"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=r"should be 'cpu', 'cpu:NUMBER' or 'cpu:NUMBER\.PART'"):
        Manager().device(name)


def test_more_threads_than_granted_are_refused() -> None:
    manager = Manager(shares={"reference": 1 / len(CORES)})
    with pytest.raises(DoesNotFit, match="is granted 1 cores"):
        manager.device("reference", threads=2)


def test_devices_of_a_pipeline_get_cores_where_there_are_enough() -> None:
    manager = Manager()
    manager.claim_cores({"cpu:0": len(CORES), "cpu:1": 1})
    assert manager.cores == {}
    manager.claim_cores({"cpu:0": len(CORES)})
    assert manager.cores == {"cpu:0": CORES}


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
@pytest.mark.parametrize("transport", ["local", "shm"])
def test_cores_are_free_again_once_a_pipeline_is_closed(transport: str) -> None:
    pytest.importorskip("numba", reason="the CPU backend needs numba")
    options: dict[str, Any] = {"transport": transport, "threads": 1}
    with closing(Manager()) as manager:
        first = labinfer.load(FOLDER, devices="cpu:0,cpu:1", manager=manager, **options)
        assert manager.cores == {"cpu:0": CORES[:1], "cpu:1": CORES[1:2]}
        again = labinfer.load(FOLDER, devices="cpu:0,cpu:1", manager=manager, **options)
        first.close()
        assert set(manager.cores) == {"cpu:0", "cpu:1"}  # the other model is there still
        assert len(again.generate([1, 2, 3], labinfer.SamplingParams(max_tokens=2))[0].token_ids) == 2
        again.close()
        assert manager.cores == manager.devices == {}
        with labinfer.load(FOLDER, devices="cpu:2,cpu:3", manager=manager, **options):
            assert manager.cores == {"cpu:2": CORES[:1], "cpu:3": CORES[1:2]}


def test_grants_are_seen_by_other_processes_until_they_end(home: Path) -> None:
    code = "import labinfer, sys; model = labinfer.load(sys.argv[1]); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(FOLDER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        [grant] = all_grants()
        assert (grant.device, grant.pid) == ("reference", child.pid)
        assert grant.nbytes == labinfer.compile(FOLDER, max_logits_rows=64).stages[0].bytes.total
        shown = subprocess.run(
            [sys.executable, "-m", "labinfer", "devices", "--json"], capture_output=True, check=True, text=True
        )
        [report] = [each for each in json.loads(shown.stdout) if each["name"] == "reference"]
        assert [each["pid"] for each in report["granted"]] == [child.pid]
        os.kill(child.pid, signal.SIGKILL)
    assert all_grants() == []
    assert list((home / "grants").iterdir()) == []
