"""Services in processes of their own, started and watched by ``serve.py``."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labinfer.bench.load import Target

KEY = "a-key-for-benchmarks"


class Service:
    """A service that listens on ``port`` once it answers ``/health``. ``command`` starts it; ``log`` gets its log."""

    def __init__(self, command: Sequence[str], port: int, log: Path = Path(os.devnull)) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        environment = os.environ | {"LABINFER_API_KEY": KEY}
        self.began = time.perf_counter()
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment, cwd="/")
        while not self.healthy():
            if self.process.poll() is not None:
                raise SystemExit(f"it ended with code {self.process.returncode}: {' '.join(command)}")
            time.sleep(0.01)

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def target(self, path: str = "/v1/completions") -> Target:
        """What load goes to."""
        return Target("127.0.0.1", self.port, path, {"Authorization": f"Bearer {KEY}"})

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        to = self.target()
        headers = {**to.headers, "Content-Type": "application/json"}
        asked = urllib.request.Request(self.url + to.path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def gauges(self) -> dict[str, float]:
        """What ``/metrics`` says now, without labels."""
        asked = urllib.request.Request(f"{self.url}/metrics", headers=self.target().headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    @property
    def counts(self) -> tuple[int, int]:
        """Threads and open files."""
        folder = f"/proc/{self.process.pid}"
        return len(os.listdir(f"{folder}/task")), len(os.listdir(f"{folder}/fd"))

    def stages(self) -> list[int]:
        """The processes that run stages for it."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = [pid for each in tasks for pid in each.read_text().split()]
        return [int(pid) for pid in children if b"pipeline" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def seconds(self) -> tuple[float, float]:
        """CPU time of the main thread, which has the event loop, and of all threads."""
        folder = Path(f"/proc/{self.process.pid}/task")
        times = {int(each.name): int((each / "schedstat").read_text().split()[0]) / 1e9 for each in folder.iterdir()}
        return times[self.process.pid], sum(times.values())

    def close(self) -> int:
        """End it; its exit code."""
        self.process.terminate()
        return self.process.wait(60)


def free_port() -> int:
    """A port that nobody listens on: another service there would be taken for ours."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def labinfer_service(
    model: str, threads: int, slots: int, length: int, *flags: str, log: Path = Path(os.devnull)
) -> Service:
    """``labinfer serve``, with room for ``slots`` sequences of ``length`` tokens in a step, and further ``flags``."""
    port = free_port()
    options = {
        "port": port, "threads": threads, "max-num-seqs": slots, "max-logits-rows": slots, "max-model-len": length,
        "max-num-batched-tokens": 512, "kv-dtype": "f16", "devices": "cpu",
    }  # fmt: skip
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "labinfer", "-q", "serve", str(Path(model).resolve()), *given, *flags]
    return Service(command, port, log)


def llama_service(program: str, model: str, threads: int, slots: int, length: int) -> Service:
    """``llama-server`` with so many slots, and a cache of its own for each."""
    port = free_port()
    options = {
        "-m": str(Path(model).resolve()), "--port": port, "-t": threads, "-tb": threads, "-np": slots,
        "-c": slots * length, "-b": 512, "-ub": 512, "--api-key": KEY, "--cache-ram": 0,
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (name, str(value))]
    return Service([program, *flags, "--no-kv-unified"], port)
