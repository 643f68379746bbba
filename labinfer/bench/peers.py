"""Other engines on the same model: each measurement in its own process, taking turns with ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from labinfer.bench.measure import Workload
from labinfer.compiler.plan import Source
from labinfer.errors import LabinferError

TIMEOUT_SECONDS = 1800

Run = Callable[[], dict[str, float]]
"""Measures once, in a fresh process: tokens/s by the name of the test."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine that can be compared with: the ``module`` it needs, and the ``program`` beside this file that runs it.

    ``kind`` is the kind of checkpoint it reads.
    """

    name: str
    module: str
    program: str
    kind: str

    def installed(self, python: str) -> bool:
        """Whether ``python`` has the engine."""
        code = f"import sys, importlib.util as u; sys.exit(u.find_spec('{self.module}') is None)"
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0

    def run(self, python: str, model: str, threads: int, tests: Sequence[Workload]) -> dict[str, float]:
        """Tokens/s by test, measured in a fresh process; a ``LabinferError`` with its last words when it fails."""
        task = {"model": model, "threads": threads, "tests": [(t.kind, t.tokens, t.batch) for t in tests]}
        program = str(Path(__file__).parent / self.program)
        found: dict[str, float] = run_json([python, program, json.dumps(task)], self.name)
        return found


PEERS = (
    Peer("llama.cpp", "llama_cpp", "peer_llama_cpp.py", "gguf"),
    Peer("transformers", "transformers", "peer_transformers.py", "hf"),
)


def run_json(command: list[str], name: str) -> Any:
    """What ``command`` writes, which is JSON; a ``LabinferError`` when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except OSError as error:
        raise LabinferError("bench.peer", f"cannot run {name}: {error}") from None
    except subprocess.TimeoutExpired:
        raise LabinferError("bench.peer", f"{name} took more than {TIMEOUT_SECONDS} s") from None
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise LabinferError("bench.peer", f"{name} failed: {words[-1] if words else f'exit {done.returncode}'}")
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise LabinferError("bench.peer", f"{name} wrote no result: {done.stdout.strip()[-200:]}") from None


def peer_python() -> str:
    """The Python that peers run in: ``LABINFER_BENCH_PYTHON``, or this one."""
    return os.environ.get("LABINFER_BENCH_PYTHON") or sys.executable


def find_peers(kind: str) -> list[Peer]:
    """The installed peers that read checkpoints of this kind."""
    return [peer for peer in PEERS if peer.kind == kind and peer.installed(peer_python())]


def compare(
    source: Source, ours: list[str], threads: int, tests: Sequence[Workload], pairs: int, note: Callable[[str], None]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Every installed peer that reads the checkpoint of ``source``, taking turns with the command ``ours``.

    Results by peer and by test, as ``pairwise`` gives them. ``note`` is told about each pair.
    """
    python, model, names = peer_python(), source.checkpoint, [test.name for test in tests]
    peers = find_peers(source.kind) if model is not None else []
    if model is None or not peers:
        wanted = " or ".join(peer.name for peer in PEERS if peer.kind == source.kind)
        message = f"{python} has no engine to compare with that reads this model: {wanted}"
        raise LabinferError("bench.no-peer", message, remedy="set LABINFER_BENCH_PYTHON to a Python that has it")
    found = {}
    for peer in peers:

        def mine() -> dict[str, float]:
            return {test["name"]: test["tokens_per_second"] for test in run_json(ours, "labinfer bench")["tests"]}

        def theirs(peer: Peer = peer) -> dict[str, float]:
            note(f"{', '.join(names)}: {peer.name}, load average {os.getloadavg()[0]:.1f}")
            return peer.run(python, model, threads, tests)

        found[peer.name] = pairwise(mine, theirs, pairs)
    return found


def pairwise(ours: Run, theirs: Run, pairs: int) -> dict[str, dict[str, Any]]:
    """Medians over ``pairs`` pairs of runs, the order changing from pair to pair, and the ratios within pairs."""
    mine: list[dict[str, float]] = []
    other: list[dict[str, float]] = []
    for number in range(pairs):
        for run, results in ((ours, mine), (theirs, other))[:: 1 if number % 2 == 0 else -1]:
            results.append(run())
    found = {}
    for test in mine[0]:
        ratios = sorted(a[test] / b[test] for a, b in zip(mine, other, strict=True))
        found[test] = {
            "labinfer": median(each[test] for each in mine),
            "peer": median(each[test] for each in other),
            "ratio": median(ratios),
            "ratio_range": [ratios[0], ratios[-1]],
        }
    return found
