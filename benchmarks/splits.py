"""Tokens a second of a pipeline over two unequal CPU devices: layers placed by measured cost against other splits.

    python benchmarks/splits.py MODEL.gguf [--slow 0.5] [--json FILE]

Each device has a core; one of them gets only a part of its core's time (``--slow``, by a control group: Linux, root).
Beside the placement by cost stand the usual ones: an even share of the layers, and a share by memory, of which the slow
device has twice as much. Bars: never slower than these, and 1.3 times as fast where the devices differ 2 : 1. Profiles
are measured first, and not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import labinfer
from labinfer.api import compile_options, read_model
from labinfer.compiler.compile import compile_plan
from labinfer.compiler.costs import Measured
from labinfer.compiler.fold import unfold_ops
from labinfer.compiler.plan import Plan
from labinfer.placing import cluster_goal
from labinfer.profile.grid import QUICK
from labinfer.profile.measure import measure_device
from labinfer.profile.quiet import Patience
from labinfer.profile.session import compile_for
from labinfer.progress import silent

NAMES = ("cpu:0", "cpu:1")
SEQUENCES, PROMPT, OUTPUT = 16, 16, 60
LIMITS: dict[str, Any] = {"max_num_seqs": SEQUENCES, "max_model_len": 256, "max_num_batched_tokens": 128}
PERIOD = 4000
"""Microseconds in which a slowed process gets its part."""


class SlowGroup:
    """A control group (version 1 or 2) whose processes get ``part`` of a core."""

    def __init__(self, part: float) -> None:
        first = Path("/sys/fs/cgroup/cpu").is_dir()
        self.root = own_group() if first else Path("/sys/fs/cgroup")
        self.group = self.root / "labinfer-splits"
        self.group.mkdir(exist_ok=True)
        quota = round(part * PERIOD)
        if first:
            (self.group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (self.group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (self.group / "cpu.max").write_text(f"{quota} {PERIOD}")

    def take(self, process: int) -> None:
        """Slow a process."""
        (self.group / "cgroup.procs").write_text(str(process))

    def close(self) -> None:
        """Remove the group, whose processes have ended."""
        self.group.rmdir()

    @contextmanager
    def slowed(self) -> Iterator[None]:
        """Slow this process."""
        self.take(os.getpid())
        try:
            yield
        finally:
            (self.root / "cgroup.procs").write_text(str(os.getpid()))


def own_group() -> Path:
    """Where the group of this process lies in version 1."""
    groups = (line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines())
    name = next(path for _, controllers, path in groups if "cpu" in controllers.split(","))
    return Path("/sys/fs/cgroup/cpu", name.strip("/"))


def profile(model: str) -> Measured:
    """What ops cost now on a CPU device of one thread."""
    plan = compile_for(model, "cpu", threads=1, num_blocks=1024, max_num_seqs=SEQUENCES)
    steps = replace(QUICK, decode=(1, 8, 16), prefill=(16, 64, 128), past=(0, 128))
    return Measured(measure_device(plan, steps, True, Patience(), silent))


def by_cost(model: str, costs: dict[str, Measured], memory: dict[str, int]) -> Plan:
    """The plan that costs choose."""
    devices = "".join(f"  '{name}': {{threads: 1, memory: {memory[name]}}}\n" for name in NAMES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_text(f"devices:\n{devices}")
        work = f"prompt={PROMPT},output={OUTPUT},concurrency={SEQUENCES}"
        places, goal = cluster_goal(path, "throughput", work)
    goal = replace(goal, costs=costs)
    blueprint, source, checkpoint = read_model(model)
    return compile_plan(blueprint, source, places, compile_options(LIMITS), checkpoint, goal=goal)


def by_share(model: str, layers: int, first: float) -> Plan:
    """The plan that gives the first device a share of the layers."""
    cut = min(max(round(first * layers), 1), layers - 1)
    devices = f"{NAMES[0]}=0-{cut - 1},{NAMES[1]}={cut}-{layers - 1}"
    return labinfer.compile(model, devices=devices, threads=1, **LIMITS)


def layers_of(plan: Plan) -> str:
    """How many layers each stage has."""
    counts = {stage.device: len({op.layer for op, _ in unfold_ops(stage)} - {None}) for stage in plan.stages}
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def tokens_per_second(plan: Plan, slow: dict[str, SlowGroup], rounds: int) -> float:
    """Median over some rounds."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1000, PROMPT).tolist() for _ in range(SEQUENCES)]
    params = labinfer.SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    rates = []
    with labinfer.load(plan, transport="shm", enable_prefix_caching=False) as model:
        assert model.pipeline is not None
        for stage, process in zip(plan.stages, model.pipeline.workers.stages, strict=True):
            if stage.device in slow:
                slow[stage.device].take(process.process.pid)
        model.generate(prompts, params)
        for _ in range(rounds):
            started = time.perf_counter()
            model.generate(prompts, params)
            rates.append(SEQUENCES * OUTPUT / (time.perf_counter() - started))
    return median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--slow", type=float, default=0.5, help="part of its core that the slow device gets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    group = SlowGroup(options.slow)
    quick = profile(options.model)
    with group.slowed():
        slow = profile(options.model)
    whole = labinfer.compile(options.model, devices="cpu", threads=1, **LIMITS).stages[0]
    layers = len({op.layer for op, _ in unfold_ops(whole)} - {None})
    found, passed = [], True
    for slowed in (None, *NAMES):
        costs = {name: slow if name == slowed else quick for name in NAMES}
        larger = slowed or NAMES[1]
        memory = {name: (2 if name == larger else 1) * 2 * whole.bytes.total for name in NAMES}
        plans = {
            "by cost": by_cost(options.model, costs, memory),
            "even": by_share(options.model, layers, 0.5),
            "by memory": by_share(options.model, layers, memory[NAMES[0]] / sum(memory.values())),
        }
        groups = {slowed: group} if slowed else {}
        rates = {name: tokens_per_second(plan, groups, options.rounds) for name, plan in plans.items()}
        print(f"slow: {slowed or 'none'}; twice the memory: {larger}")
        for name, plan in plans.items():
            gain = rates["by cost"] / rates[name]
            print(f"  {name:9} {rates[name]:6.0f} tokens/s ({layers_of(plan)}); by cost: {gain:.2f} x", flush=True)
            passed &= name == "by cost" or gain >= (1.3 if slowed else 1.0)
        found.append({"slow": slowed, "larger": larger, "tokens/s": rates})
    group.close()
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
