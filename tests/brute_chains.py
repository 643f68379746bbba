"""Random partition problems and their best values by trying everything; shares no code with the partitioner."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from labinfer.compiler.partition import Device, DeviceKind, Layer, Link, Objective, Problem, Workload, partition
from labinfer.errors import DoesNotFit


def random_problem(seed: int) -> Problem:
    """A chain of 1 to 12 layers and 1 to 6 devices; alike or all different, tight or roomy, with any residencies."""
    rng = random.Random(seed)
    count = rng.randint(1, 12)
    shape = Layer("", rng.randint(1, 9), rng.randint(0, 2), rng.randint(0, 5))
    alike = rng.random() < 0.3
    layers = tuple(
        Layer(f"l{i}", shape.weight_bytes, shape.kv_bytes, shape.boundary_bytes)
        if alike
        else Layer(f"l{i}", rng.randint(1, 9), rng.randint(0, 2), rng.randint(0, 5))
        for i in range(count)
    )
    if rng.random() < 0.3:  # of some layers a part cannot be streamed, or nothing
        layers = tuple(replace(each, fixed_bytes=rng.choice([0, 1, each.weight_bytes])) for each in layers)
    kinds = [random_kind(rng, f"k{i}", count, alike) for i in range(rng.randint(1, 3))]
    devices = tuple(
        Device(f"d{i}", rng.choice(kinds), rng.choice([10, 25, 40, 90]), rng.randint(0, 3))
        for i in range(rng.randint(1, 6))
    )
    names = [device.name for device in devices]
    chosen = rng.random()  # part of the links that differ from the default
    links = {
        (a, b): Link(rng.choice([0.0, 0.5, 2.0]), rng.choice([1.0, 4.0, math.inf]))
        for a in names
        for b in names
        if a != b and rng.random() < chosen and chosen > 0.3
    }
    pins = {layer.name: rng.choice(names) for layer in layers if rng.random() < 0.05}
    tied = min(layers[0].weight_bytes, layers[-1].weight_bytes) if count > 1 and rng.random() < 0.2 else 0
    workload = Workload(
        rng.choice([0.0, 1.0, 0.25]), rng.choice([1.0, 3.0]), rng.randint(1, 4), 1, rng.randint(0, 3), rng.randint(1, 5)
    )
    return Problem(layers, devices, workload, links, Link(0.25, 8.0), pins, tied, ordered=rng.random() < 0.2)


def random_kind(rng: random.Random, name: str, count: int, alike: bool) -> DeviceKind:
    def costs(scale: float) -> tuple[float, ...]:
        one = rng.uniform(0.2, 3.0) * scale
        return tuple(one if alike else rng.uniform(0.2, 3.0) * scale for _ in range(count))

    on_host = rng.random() < 0.5
    return DeviceKind(
        name,
        costs(rng.choice([0.5, 1.0, 2.0])),
        costs(0.5),
        costs(3.0) if on_host else (),
        costs(2.0) if on_host else (),
        rng.choice([0.0, 1.0, 6.0]),
        rng.choice([1.0, 1.0, 0.0, 0.6]),
    )


def stage_times(problem: Problem, device: Device) -> dict[tuple[int, int], float]:
    """The least seconds of each run of layers, over all 3 ** n choices of residencies."""
    work, kind, count = problem.workload, device.kind, len(problem.layers)
    room = device.memory - device.reserved
    times = {}
    for start in range(count):
        rows = np.zeros((1, 5))  # bytes, prefill, decode, copies, largest streamed layer
        ends = np.ones(1, dtype=bool)  # the first layer is resident
        for number in range(start, count):
            layer = problem.layers[number]
            if problem.pins.get(layer.name, device.name) != device.name:
                break
            weight, cache = layer.weight_bytes, layer.kv_bytes * work.kv_tokens
            ways = [[weight + cache, kind.prefill[number], kind.decode[number], 0, 0]]
            if kind.stream_bandwidth:
                moved = weight - layer.fixed_bytes
                ways.append([layer.fixed_bytes + cache, *ways[0][1:3], moved / kind.stream_bandwidth, moved])
            if kind.host_prefill:
                ways.append([0, kind.host_prefill[number], kind.host_decode[number], 0, 0])
            parts = [np.column_stack([rows[:, :4] + way[:4], np.maximum(rows[:, 4], way[4])]) for way in ways]
            firsts = [ends if number > start else np.full(1, i == 0) for i in range(len(parts))]
            sizes = [len(part) for part in parts]
            rows, ends = np.concatenate(parts), np.concatenate(firsts)
            last = np.repeat([i == 0 for i in range(len(parts))], sizes)
            whole = start == 0 and number == count - 1
            used = rows[:, 0] + 2 * rows[:, 4] - np.where(ends & last & whole, problem.tied_bytes, 0)
            prefill, decode = (step_times(column, rows[:, 3], kind.overlap) for column in (rows[:, 1], rows[:, 2]))
            seconds = work.prefill_steps * prefill + work.decode_steps * decode
            times[start, number + 1] = float(seconds[used <= room].min(initial=math.inf))
            keep = rows[:, 0] + 2 * rows[:, 4] <= room + (problem.tied_bytes if start == 0 else 0)
            rows, ends = rows[keep], ends[keep]
    return times


def step_times(computed: np.ndarray, copied: np.ndarray, overlap: float) -> np.ndarray:
    """Seconds of a step: the longer of both, and what of the shorter does not hide in it."""
    return np.maximum(computed, copied) + (1 - overlap) * np.minimum(computed, copied)


def best_values(problem: Problem) -> tuple[float, float, float]:
    """The least latency, bottleneck and balanced value, over all chains of stages."""
    count, extra = len(problem.layers), problem.workload.micro_batches - 1
    times = [stage_times(problem, device) for device in problem.devices]
    names = [device.name for device in problem.devices]
    best = [math.inf, math.inf, math.inf]

    def extend(cut: int, used: tuple[int, ...], total: float, largest: float) -> None:
        values = (total, largest, total + extra * largest)
        if all(value >= least for value, least in zip(values, best, strict=True)):
            return
        if cut == count:
            best[:] = map(min, best, values)
            return
        first = max(used, default=-1) + 1 if problem.ordered else 0
        for device in range(first, len(names)):
            if device in used:
                continue
            hop = problem.hop_seconds(names[used[-1]], names[device], cut - 1) if used else 0.0
            for stop in range(count, cut, -1):
                seconds = times[device].get((cut, stop), math.inf)
                extend(stop, (*used, device), total + hop + seconds, max(largest, hop, seconds))

    extend(0, (), 0.0, 0.0)
    return best[0], best[1], best[2]


def disagreements(seed: int) -> list[str]:
    """What the partitioner gets wrong on a random problem, for each objective; nothing if all is right."""
    problem, wrong = random_problem(seed), []
    for objective, least in zip(
        (Objective.LATENCY, Objective.THROUGHPUT, Objective.BALANCED), best_values(problem), strict=True
    ):
        try:
            plan = partition(problem, objective)
        except DoesNotFit as error:
            if error.code != "partition.does-not-fit" or math.isfinite(least):
                wrong.append(f"seed {seed}, {objective}: {error.message}, but {least} s is possible")
            continue
        if not math.isclose(plan.value, least, rel_tol=1e-9, abs_tol=1e-12):
            wrong.append(f"seed {seed}, {objective}: {plan.value} s, but {least} s is best")
        if plan.lower_bound > least * (1 + 1e-9):
            wrong.append(f"seed {seed}, {objective}: bound {plan.lower_bound} s is above {least} s")
    return wrong


def main(disagreements: Callable[[int], list[str]] = disagreements) -> None:
    """Compare many random problems: ``python -m tests.brute_chains 5000``."""
    count = int(sys.argv[1])
    wrong = [message for seed in range(count) for message in disagreements(seed)]
    print("\n".join([*wrong, f"{count} problems, {len(wrong)} disagreements"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
