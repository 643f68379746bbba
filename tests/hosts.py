"""Agents in processes, as the hosts of a cluster, for tests and benchmarks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from labinfer.cluster.token import kept_token, token_path
from labinfer.runtime.pipeline.transport import Tls


class Hosts:
    """A host for each of ``names``, with one device of ``memory``, if given, and files of a certificate (``tls``)."""

    def __init__(
        self, folder: Path, names: Sequence[str], device: str = "reference", memory: str = "", tls: Tls | None = None
    ) -> None:
        kept_token()
        self.folder, self.device, self.memory, self.tls = folder, device, memory, tls
        self.ports = dict.fromkeys(names, 0)
        self.agents: dict[str, subprocess.Popen[str]] = {}
        for name in names:
            self.start(name)

    def start(self, name: str, within: Sequence[str] = ()) -> None:
        """Start the agent of a host, at the port it had before, by the command ``within`` if one is given."""
        command = [*within, sys.executable, "-m", "labinfer.cluster.agent", "--token-file", str(token_path())]
        command += ["--address", f"127.0.0.1:{self.ports.get(name, 0)}"]
        command += ["--tls", *self.tls[:3]] if self.tls else []
        agent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert agent.stdout is not None
        line = agent.stdout.readline()
        assert line.startswith("listening"), line
        self.ports[name], self.agents[name] = int(line.rpartition(":")[2]), agent

    @property
    def file(self) -> Path:
        """The cluster file."""
        hosts = [f"  {name}: {{address: '127.0.0.1:{port}'}}" for name, port in self.ports.items()]
        more = f"memory: {self.memory}" if self.memory else ""
        devices = [f"  {self.device}@{name}: {{{more}}}" for name in self.ports]
        path = self.folder / "cluster.yaml"
        tls = (
            [f"tls: {json.dumps(dict(zip(('certificate', 'key', 'ca'), self.tls, strict=False)))}"] if self.tls else []
        )
        path.write_text("\n".join([*tls, "hosts:", *hosts, "devices:", *devices]))
        return path

    def stages(self, name: str) -> list[int]:
        """The processes of the stages on a host."""
        tasks = Path(f"/proc/{self.agents[name].pid}/task").glob("*/children")
        return [int(each) for task in tasks for each in task.read_text().split()]

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signal an agent; a killed one is waited for."""
        self.agents[name].send_signal(number)
        if number == signal.SIGKILL:
            self.agents[name].wait()

    def close(self) -> None:
        """End all agents, and see that no stage is left."""
        stages = [pid for name, agent in self.agents.items() if agent.poll() is None for pid in self.stages(name)]
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.send_signal(signal.SIGCONT)
                agent.terminate()
            agent.wait(60)
            if agent.stdout is not None:
                agent.stdout.close()
        until = time.monotonic() + 60
        while any(os.path.exists(f"/proc/{pid}") for pid in stages):
            assert time.monotonic() < until, "a stage outlived its agent"
            time.sleep(0.02)
