"""The partitioner on large random problems: ``python benchmarks/partition/scale.py``, one line of JSON a problem."""

from __future__ import annotations

import argparse
import json
import random

from labinfer.compiler.partition import Device, DeviceKind, Layer, Link, Objective, Problem, Workload, partition


def problem(seed: int, layers: int, devices: int, kinds: int, *, alike: bool, hosts: int = 1) -> Problem:
    """Devices of several kinds on hosts; links within a host are quick. Costs vary by half unless layers are alike."""
    rng = random.Random(seed)
    shape = tuple(Layer(f"layers.{i}", 100_000_000, 4096, 8192) for i in range(layers))
    made = []
    for index in range(kinds):
        prefill, decode = rng.uniform(1e-3, 1e-2), rng.uniform(1e-4, 2e-3)
        varied = [1.0 if alike else rng.uniform(0.75, 1.25) for _ in range(layers)]
        made.append(DeviceKind(f"kind{index}", tuple(prefill * v for v in varied), tuple(decode * v for v in varied)))
    caps = [rng.randrange(3, 9) * layers * 100_000_000 // devices for _ in made]
    owned = [Device(f"d{i}", made[i % kinds], caps[i % kinds]) for i in range(devices)]
    links = {
        (a.name, b.name): Link(1e-3, 1.25e8)
        for i, a in enumerate(owned)
        for j, b in enumerate(owned)
        if i % hosts != j % hosts
    }
    work = Workload(prefill_steps=1, decode_steps=100, prefill_tokens=512, decode_tokens=8, kv_tokens=1000)
    return Problem(shape, tuple(owned), work, links, Link(2e-5, 1e10))


CASES = (
    (1000, 64, 5, True, 1),
    (1000, 64, 5, False, 1),
    (1000, 64, 5, True, 4),
    (126, 512, 8, True, 1),
    (126, 512, 8, True, 16),
    (126, 512, 8, False, 16),
    (1000, 512, 8, False, 16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Partition large random problems.")
    parser.add_argument("--effort", type=float, default=1.0, help="seconds of local search where the bound is not met")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for layers, devices, kinds, alike, hosts in CASES:
        for objective in Objective:
            made = problem(arguments.seed, layers, devices, kinds, alike=alike, hosts=hosts)
            plan = partition(made, objective, effort_seconds=arguments.effort)
            row = {
                "layers": layers,
                "devices": devices,
                "kinds": kinds,
                "layers_alike": alike,
                "hosts": hosts,
                "objective": objective,
                "value": plan.value,
                "lower_bound": plan.lower_bound,
                "gap": plan.gap,
                "stages": len(plan.stages),
                "algorithm": plan.algorithm,
                "bound_kind": plan.bound_kind,
                "seconds": round(plan.seconds, 3),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
