"""Hosts that are killed, stopped, cut off and mended under load: does every request end with the right tokens?

    python benchmarks/chaos.py [MODEL] [--device cpu] [--minutes 20] [--faults 200] [--delay 1] [--loss 1] [--json FILE]

Three hosts as network namespaces (needs root). One fault at a time: a host or a stage is killed or stopped, or a host's
link is cut; then it is mended, and the next fault comes when the requests have gone on and the host is back. Recovery
is the time from the fault to the end of the first step that new stages computed. Bars: all tokens are those of one
process, the median recovery is at most 4 seconds, and no process is left.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from network import Namespaces, netem

import labinfer
from labinfer.cluster.fleet import load
from labinfer.llm import LLM
from labinfer.runtime.request import Request

HOSTS = ("alpha", "beta", "gamma")
PROMPTS = [[5], [1, 2, 3], [7, 8], [9]]
FAULTS = ("host killed", "host stopped", "stage killed", "stage stopped", "link cut")
LIMITS = {"max_model_len": 256, "max_num_seqs": 4}
GOAL = {"objective": "throughput", "workload": f"concurrency={len(PROMPTS)}"}
"""Where costs were measured, one sequence alone would be best off on one host."""


def fault(hosts: Namespaces, name: str, kind: str) -> None:
    """Do ``kind`` to a host."""
    number = signal.SIGKILL if kind.endswith("killed") else signal.SIGSTOP
    if kind == "link cut":
        hosts.link(name, "down")
    else:
        hosts.signal(name, number, stages_only=kind.startswith("stage"))


class Load:
    """Requests on a model, one for each prompt, again and again; each must end with the tokens in ``expected``."""

    def __init__(self, model: LLM, expected: list[list[int]], params: labinfer.SamplingParams) -> None:
        self.model, self.expected, self.params = model, expected, params
        self.running: dict[int, Request] = {}
        self.outcomes: Counter[str] = Counter()
        self.errors: list[str] = []

    def step(self) -> float:
        """One step; when it was done."""
        for number, prompt in enumerate(PROMPTS):
            if number not in self.running:
                self.running[number] = self.model.engine.add(Request(prompt, self.params))
        self.model.engine.step()
        for number, request in list(self.running.items()):
            if request.finished:
                del self.running[number]
                right = request.error is None and request.generated == self.expected[number]
                self.outcomes["right" if right else "error" if request.error else "wrong"] += 1
                self.errors += [str(request.error)] if request.error else []
        return time.monotonic()


def strike(hosts: Namespaces, load: Load, rng: random.Random) -> tuple[str, float, float]:
    """One fault, the seconds until a step was completed by stages that were started after it, and which part of the
    weights was loaded for that.
    """
    name, kind = rng.choice(HOSTS), rng.choice(FAULTS)
    for _ in range(rng.randrange(2, 40)):
        load.step()
    before, began = load.model.pipeline, time.monotonic()
    fault(hosts, name, kind)
    while load.model.pipeline is before and time.monotonic() - began < 30:
        load.step()
    recovered = load.step() - began
    assert load.model.fleet is not None
    start = load.model.fleet.report().starts[-1]
    hosts.mend(name)
    until = time.monotonic() + 30
    while len(load.model.plan.stages) < len(HOSTS) and time.monotonic() < until:
        load.step()
    return kind, recovered, start.loaded / (start.loaded + start.kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--delay", type=float, help="milliseconds that each link takes", default=0)
    parser.add_argument("--loss", type=float, help="percent of packets that each link loses", default=0)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    params = labinfer.SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    with labinfer.load(options.model, devices=options.device, threads=1, **LIMITS) as model:
        expected = [list(answer.token_ids) for answer in model.generate(PROMPTS, params)]
    rng, found, began = random.Random(1), list[tuple[str, float, float]](), time.monotonic()
    hosts = Namespaces(HOSTS, options.device, netem(options.delay, options.loss))
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = hosts.cluster_file(Path(folder) / "cluster.yaml")
            with load(options.model, file, **GOAL, **LIMITS) as model:
                work = Load(model, expected, params)
                while len(found) < options.faults and time.monotonic() - began < 60 * options.minutes:
                    found.append(strike(hosts, work, rng))
                    kind, seconds, part = found[-1]
                    told = f"{len(found):4} {kind:14} {seconds:6.2f} s, {part:4.0%} loaded  {dict(work.outcomes)}"
                    print(told, flush=True)
                model.engine.finish(list(work.running.values()))
            time.sleep(2)
            left = hosts.processes()
    finally:
        hosts.close()
    sys.exit(report(found, work, left, options.json))


def report(found: list[tuple[str, float, float]], work: Load, left: list[int], file: str | None) -> bool:
    """Print what happened; whether a bar was missed."""
    kinds = {kind: [seconds for each, seconds, _ in found if each == kind] for kind in FAULTS}
    result: dict[str, Any] = {
        "faults": len(found), "outcomes": dict(work.outcomes), "errors": sorted(set(work.errors)), "left": left,
        "median_seconds": median(seconds for _, seconds, _ in found),
        "max_seconds": max(seconds for _, seconds, _ in found),
        "median_loaded": median(part for *_, part in found),
        "by_kind": {kind: [len(each), round(median(each), 2)] for kind, each in kinds.items() if each},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if file:
        Path(file).write_text(json.dumps(result, indent=1))
    return bool(left or work.outcomes["wrong"] or work.outcomes["error"] or result["median_seconds"] > 4)


if __name__ == "__main__":
    main()
