"""Hosts of a Ray cluster: found, set aside, given agents, taken back in when Ray has started an agent anew."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import labinfer
from labinfer.cluster import ray_hosts
from labinfer.cluster.agents import status
from labinfer.cluster.fleet import load
from labinfer.cluster.ray_hosts import RayAgents, cluster_text, hosts_with_devices, is_ray
from labinfer.compiler.cluster import read_cluster
from labinfer.errors import LabinferError
from labinfer.llm import LLM

from .tiny import GOLDEN

FOLDER = GOLDEN / "gemma3_text-linear_global"
LIMITS = {"max_model_len": 256, "max_num_seqs": 4}
PROMPTS = [[5], [1, 2, 3]]
NEEDS_RAY = "needs Ray: pip install 'labinfer[cluster]'"
GREEDY = labinfer.SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


def node(address: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeManagerAddress": address, "NodeID": address, "Alive": alive, "Resources": resources}


def test_devices_are_those_that_resources_name_else_gpus_else_the_cpu(tmp_path: Path) -> None:
    named = {"CPU": 4.0, "labinfer:reference": 1.0, "labinfer:cpu": 1.0}
    nodes = [
        node("10.0.0.3", CPU=8.0, memory=1e9), node("10.0.0.2", CPU=8.0, GPU=2.0), node("10.0.0.4", memory=1e9),
        node("10.0.0.5", alive=False, CPU=8.0), node("10.0.0.6", **named), node("10.0.0.3", CPU=1.0),
    ]  # fmt: skip
    file = tmp_path / "ray.yaml"
    file.write_text(cluster_text(hosts_with_devices(nodes)))
    cluster = read_cluster(file)
    assert {name: host.address for name, host in cluster.hosts.items()} == {
        "10.0.0.2": "10.0.0.2:7700", "10.0.0.3": "10.0.0.3:7700", "10.0.0.3-1": "10.0.0.3:7701",
        "10.0.0.6": "10.0.0.6:7700",
    }  # fmt: skip
    assert {name: device.threads for name, device in cluster.devices.items()} == {
        "cuda:0@10.0.0.2": None, "cuda:1@10.0.0.2": None, "cpu@10.0.0.3": 8, "cpu@10.0.0.3-1": 1,
        "reference@10.0.0.6": None, "cpu@10.0.0.6": 4,
    }  # fmt: skip


def test_addresses_of_ray_are_no_files() -> None:
    assert [is_ray(each) for each in ("auto", "ray://head:10001", "cluster.yaml", Path("auto.yaml"))] == [
        True, True, False, False,
    ]  # fmt: skip


def test_where_there_is_no_ray_cluster_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason=NEEDS_RAY)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(LabinferError, match="no Ray cluster at 'auto'"):
        load(FOLDER, "auto", **LIMITS)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray, while it has a cluster of a head and three hosts with a device each; ``ray.cluster`` is that."""
    pytest.importorskip("ray", reason=NEEDS_RAY)
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABINFER_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with socket.create_server(("127.0.0.1", 0)) as server:
            patch.setattr(ray_hosts, "FIRST_PORT", server.getsockname()[1])
        each = {"num_cpus": 1, "object_store_memory": 100 << 20, "resources": {"labinfer:reference": 1}}
        cluster = Cluster(True, head_node_args={**each, "num_cpus": 0, "resources": {}, "include_dashboard": False})
        try:
            for _ in range(3):
                cluster.add_node(**each)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield ray
        finally:
            ray.shutdown()
            cluster.shutdown()


def answers() -> list[list[int]]:
    with labinfer.load(FOLDER, devices="reference", **LIMITS) as model:
        return [list(answer.token_ids) for answer in model.generate(PROMPTS, GREEDY)]


def agent_processes() -> list[int]:
    """The processes in which Ray runs our agents."""
    names = {int(each.name): (each / "cmdline") for each in Path("/proc").iterdir() if each.name.isdigit()}
    return [number for number, path in names.items() if path.exists() and b"ray::RayAgent" in path.read_bytes()]


def wait_for_hosts(model: LLM, count: int) -> None:
    until = time.monotonic() + 60
    while len(model.plan.stages) != count:
        assert time.monotonic() < until
        model.generate([PROMPTS[0]], GREEDY)


def test_a_model_over_the_hosts_of_a_ray_cluster_survives_an_agent_which_ray_starts_again(ray: Any) -> None:
    expected = answers()
    with load(FOLDER, "auto", **LIMITS) as model:
        assert len(model.plan.stages) == 3
        reports = status(read_cluster(ray_hosts.cache_dir() / "cluster" / "ray.yaml"))
        assert [len((report or {"stages": []})["stages"]) for report in reports.values()] == [1, 1, 1]
        assert [list(each.token_ids) for each in model.generate(PROMPTS, GREEDY)] == expected
        killed, *_ = agent_processes()
        os.kill(killed, signal.SIGKILL)
        assert [list(each.token_ids) for each in model.generate(PROMPTS, GREEDY)] == expected
        wait_for_hosts(model, 3)
        assert killed not in agent_processes()
        assert [list(each.token_ids) for each in model.generate(PROMPTS, GREEDY)] == expected
    assert not ray.is_initialized()
    until = time.monotonic() + 60
    while agent_processes():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_devices_are_set_aside_and_a_ray_cluster_that_the_caller_has_joined_stays_joined(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.init("auto", log_to_driver=False)
    monkeypatch.setattr(ray_hosts, "PLACE_SECONDS", 2.0)
    with (
        closing(RayAgents("auto", bytes(32))),
        pytest.raises(LabinferError, match="devices of 3 hosts"),
    ):
        RayAgents("auto", bytes(32))
    monkeypatch.undo()
    RayAgents("auto", bytes(32)).close()
    assert ray.is_initialized()
    ray.shutdown()


def test_an_agent_that_cannot_listen_is_told(ray: Any) -> None:
    ray.init("auto", log_to_driver=False)
    [address] = {each["NodeManagerAddress"] for each in ray.nodes()}
    ray.shutdown()
    with (
        socket.create_server((address, ray_hosts.FIRST_PORT)),
        pytest.raises(LabinferError, match=r"an agent did not start: .*in use"),
    ):
        RayAgents("auto", bytes(32))


def test_hosts_without_devices_are_told(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_hosts, "is_device", lambda resource: False)
    with pytest.raises(LabinferError, match="no host of the Ray cluster has devices"):
        load(FOLDER, "auto", **LIMITS)
    assert not ray.is_initialized()
