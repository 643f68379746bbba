"""The hosts of a Ray cluster: Ray finds them, sets their devices aside, and starts an agent on each, again if it dies.

Everything else is as over a cluster file: agents start the stages, and what these say to each other goes over our own
sockets, never through Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from labinfer.cluster.agent import Agent
from labinfer.errors import LabinferError
from labinfer.extras import missing
from labinfer.home import cache_dir
from labinfer.runtime.pipeline.transport import Credentials

FIRST_PORT = 7700
"""Where the agent of a host listens; the next one where an address has several hosts, as in a Ray cluster for tests."""

PLACE_SECONDS = 30.0
"""How long Ray may take to set the devices aside, which other tasks may hold."""

START_SECONDS = 60.0
"""How long the agents may take to start: Ray starts a Python for each."""

DEVICE = "labinfer:"
"""Resources of this name and that of a device, such as ``labinfer:cpu``, say which devices a host gives."""

PIN = 0.001
"""How much of ``node:ADDRESS``, of which each host has 1, keeps a bundle of a placement group on that host."""


def is_ray(cluster: str | Path) -> bool:
    """Whether ``cluster`` is a Ray cluster, ``auto`` or ``ray://HOST:PORT``, rather than a file."""
    return str(cluster) == "auto" or str(cluster).startswith("ray://")


@dataclass(frozen=True, slots=True)
class RayHost:
    """A host of a Ray cluster that has devices for us; ``resources`` are those that Ray sets aside for them."""

    name: str
    address: str
    port: int
    resources: Mapping[str, float]

    @property
    def devices(self) -> dict[str, dict[str, int]]:
        """The devices by their names in a cluster file: those that resources name, else the GPUs, else the CPU."""
        given = [each.removeprefix(DEVICE) for each in self.resources if each.startswith(DEVICE)]
        gpus, threads = int(self.resources.get("GPU", 0)), int(self.resources.get("CPU", 0))
        names = given or [f"cuda:{number}" for number in range(gpus)] or ["cpu"]
        return {f"{name}@{self.name}": {"threads": threads} if name == "cpu" and threads else {} for name in names}


def hosts_with_devices(nodes: Sequence[Mapping[str, Any]]) -> list[RayHost]:
    """The hosts among ``nodes``, as ``ray.nodes()`` lists them, that live and have devices."""
    hosts, seen = list[RayHost](), Counter[str]()
    for node in sorted(nodes, key=lambda each: (each["NodeManagerAddress"], each["NodeID"])):
        found = {name: amount for name, amount in node["Resources"].items() if is_device(name) and amount >= 1}
        if not node["Alive"] or not found:
            continue
        address = node["NodeManagerAddress"]
        number, seen[address] = seen[address], seen[address] + 1
        hosts.append(RayHost(address if not number else f"{address}-{number}", address, FIRST_PORT + number, found))
    return hosts


def is_device(resource: str) -> bool:
    """Whether a resource of Ray stands for devices."""
    return resource in ("CPU", "GPU") or resource.startswith(DEVICE)


class RayAgent:
    """An actor: the agent of a host, at its ``address``. Ray makes it anew, at the same address, if it dies."""

    def __init__(self, address: str, port: int, token: bytes) -> None:
        self.agent = Agent(socket.create_server((address, port), backlog=64), Credentials(token))
        threading.Thread(target=self.agent.serve, daemon=True).start()

    def listening(self) -> bool:
        """Answers once it listens."""
        return True


class RayAgents:
    """The agents on the hosts of the Ray cluster at ``address``, which know ``token``; they run until ``close``.

    ``file`` is the cluster file of these hosts. Raises ``LabinferError`` where there is no Ray cluster, no host of it
    has devices, or others hold them.
    """

    def __init__(self, address: str, token: bytes) -> None:
        self.ray = imported()
        self.joined = not self.ray.is_initialized()  # else it is the caller's, and stays
        if self.joined:
            join(self.ray, address)
        self.group: Any = None
        self.actors: list[Any] = []
        try:
            hosts = hosts_with_devices(self.ray.nodes())
            if not hosts:
                remedy = "let them have CPUs or GPUs: ray start --num-cpus N --num-gpus N"
                raise LabinferError("cluster.ray", "no host of the Ray cluster has devices", remedy=remedy)
            self.start(hosts, token)
            self.file = cache_dir() / "cluster" / "ray.yaml"
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(cluster_text(hosts))
        except BaseException:
            self.close()
            raise

    def start(self, hosts: Sequence[RayHost], token: bytes) -> None:
        """Set the devices of ``hosts`` aside and start the agents there."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = [{**host.resources, f"node:{host.address}": PIN} for host in hosts]
        self.group = placement_group(bundles, strategy="STRICT_SPREAD")
        if not self.group.wait(PLACE_SECONDS):
            message = f"Ray did not set the devices of {len(hosts)} hosts aside within {PLACE_SECONDS:.0f} seconds"
            raise LabinferError("cluster.ray", message, remedy="see who holds them: ray status")
        actor = self.ray.remote(RayAgent)
        for number, host in enumerate(hosts):
            named = {name: amount for name, amount in host.resources.items() if name.startswith(DEVICE)}
            options = {
                "num_cpus": host.resources.get("CPU", 0), "num_gpus": host.resources.get("GPU", 0), "resources": named,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, number), "max_restarts": -1,
            }  # fmt: skip
            self.actors.append(actor.options(**options).remote(host.address, host.port, token))
        try:
            self.ray.get([each.listening.remote() for each in self.actors], timeout=START_SECONDS)
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1] or type(error).__name__
            remedy = f"every host needs the same labinfer, Python and Ray, and a free port {FIRST_PORT}"
            raise LabinferError("cluster.ray", f"an agent did not start: {reason:.300}", remedy=remedy) from None

    def close(self) -> None:
        """End the agents, and with them what runs there; leave the Ray cluster."""
        if not self.ray.is_initialized():
            return
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(self.ray.exceptions.RayError, ConnectionError):  # Ray itself may be gone
            for each in self.actors:
                self.ray.kill(each)
            if self.group is not None:
                remove_placement_group(self.group)
        self.actors, self.group = [], None
        if self.joined:
            self.ray.shutdown()


def imported() -> ModuleType:
    """Ray."""
    try:
        import ray
    except ImportError:
        raise missing("ray") from None
    module: ModuleType = ray
    return module


def join(ray: ModuleType, address: str) -> None:
    """Connect this process to the Ray cluster at ``address``."""
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "start one (ray start --head), or name its client port: ray://HOST:10001"
        raise LabinferError("cluster.ray", f"no Ray cluster at '{address}': {reason:.300}", remedy=remedy) from None


def cluster_text(hosts: Sequence[RayHost]) -> str:
    """The cluster file of ``hosts``; JSON, which is YAML too."""
    devices = {name: device for host in hosts for name, device in host.devices.items()}
    addresses = {host.name: {"address": f"{host.address}:{host.port}"} for host in hosts}
    return json.dumps({"hosts": addresses, "devices": devices}, indent=1)
