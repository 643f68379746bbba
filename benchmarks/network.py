"""Hosts on one machine: network namespaces with addresses of their own, wired to a bridge. Needs root and `ip`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from labinfer.cluster.token import kept_token, token_path
from labinfer.runtime.cores import available_cores

NETWORK, BRIDGE, PORT = "10.77.0", "labinfer0", 7700


def ip(*words: str, check: bool = True) -> None:
    """Run ``ip``."""
    subprocess.run(["ip", *words], check=check, capture_output=not check)


def netem(delay: float, loss: float) -> list[str]:
    """What ``tc`` is told so that a link takes ``delay`` milliseconds and loses ``loss`` percent of the packets."""
    return ["delay", f"{delay}ms"] * bool(delay) + ["loss", f"{loss}%"] * bool(loss)


class Namespaces:
    """A host for each of ``names``, whose agent has one device and one core of this machine, in turn.

    ``netem`` says what is done to all that a host sends, as ``tc`` does: ``("delay", "1ms", "loss", "1%")``.
    """

    def __init__(self, names: Sequence[str], device: str, netem: Sequence[str] = ()) -> None:
        kept_token()
        self.addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, 2)}
        self.device, self.agents = device, dict[str, subprocess.Popen[bytes]]()
        self.close()  # what an earlier run has left
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for name, address in self.addresses.items():
            here, there = f"lab-{name}"[:15], "eth0"
            ip("netns", "add", f"lab-{name}")
            ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", f"lab-{name}")
            ip("link", "set", here, "master", BRIDGE, "up")
            self.inside(name, "ip", "address", "add", f"{address}/24", "dev", there)
            for device_name in (there, "lo"):
                self.inside(name, "ip", "link", "set", device_name, "up")
            if netem:
                self.inside(name, "tc", "qdisc", "add", "dev", there, "root", "netem", *netem)
            self.start(name)

    def inside(self, name: str, *command: str) -> None:
        """Run a command in a host."""
        subprocess.run(["ip", "netns", "exec", f"lab-{name}", *command], check=True)

    def start(self, name: str) -> None:
        """Start the agent of a host."""
        command = ["ip", "netns", "exec", f"lab-{name}", sys.executable, "-m", "labinfer.cluster.agent"]
        command += ["--address", f"{self.addresses[name]}:{PORT}", "--token-file", str(token_path())]
        agent = self.agents[name] = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert agent.stdout is not None
        assert agent.stdout.readline().startswith(b"listening"), f"the agent of {name} did not start"
        agent.stdout.close()
        cores = available_cores()
        number = list(self.addresses).index(name)
        os.sched_setaffinity(agent.pid, [cores[number % len(cores)]])  # its threads and stages inherit it

    def cluster_file(self, path: Path, layers: Sequence[int] = ()) -> Path:
        """Write the cluster file; if ``layers`` are given, so many are on each of the first hosts."""
        hosts = [f"  {name}: {{address: '{address}:{PORT}'}}" for name, address in self.addresses.items()]
        devices = [f"  {self.device}@{name}: {{threads: 1}}" for name in self.addresses]
        path.write_text("\n".join(["hosts:", *hosts, "devices:", *devices, *self.pins(layers)]) + "\n")
        return path

    def pins(self, layers: Sequence[int]) -> Iterator[str]:
        """Lines of a cluster file: so many layers are on each of the first hosts, what is beside them on the ends."""
        if layers:
            used = list(self.addresses)[: len(layers)]
            owners = [name for name, count in zip(used, layers, strict=True) for _ in range(count)]
            units = {"start": used[0], **{f"layers.{n}": name for n, name in enumerate(owners)}, "end": used[-1]}
            yield "pins:"
            yield from (f"  {unit}: {self.device}@{name}" for unit, name in units.items())

    def stages(self, name: str) -> list[int]:
        """The processes of the stages of a host."""
        found = list[int]()
        for task in Path(f"/proc/{self.agents[name].pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread that has ended
                found += map(int, task.read_text().split())
        return found

    def link(self, name: str, state: str) -> None:
        """Cut the link of a host (``down``), or mend it (``up``)."""
        ip("link", "set", f"lab-{name}"[:15], state)

    def signal(self, name: str, number: int, stages_only: bool = False) -> None:
        """Signal the stages of a host, and its agent too unless said otherwise."""
        for pid in self.stages(name) + ([] if stages_only else [self.agents[name].pid]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def mend(self, name: str) -> None:
        """Whatever was done to a host is undone."""
        self.link(name, "up")
        self.signal(name, signal.SIGCONT)
        if self.agents[name].poll() is not None:
            self.start(name)

    def processes(self) -> list[int]:
        """All stages that run on any host."""
        return [pid for name, agent in self.agents.items() if agent.poll() is None for pid in self.stages(name)]

    def close(self) -> None:
        """End the agents and remove the network."""
        left = self.processes()
        for agent in self.agents.values():
            agent.send_signal(signal.SIGCONT)
            agent.terminate()
            agent.wait(10)
        until = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < until:
            time.sleep(0.05)
        for name in self.addresses:
            ip("netns", "delete", f"lab-{name}", check=False)
        ip("link", "delete", BRIDGE, check=False)
