"""What a plan does under load: an event simulation with queues, limited cache and hops.

A plan of small bottleneck may still serve less than another: its many hops make a token late, so that more work must be
in flight than the cache can hold. Static values do not see that, so plans worth comparing are ranked by this.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from labinfer.compiler.partition.problem import Problem
from labinfer.compiler.partition.result import Partition, Stage


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened: units of work per second once the first is done, seconds a unit took from its arrival (median,
    95th percentile), units in flight at most, and the part of the time that each stage was busy."""

    units_per_second: float
    median_seconds: float
    p95_seconds: float
    in_flight: int
    busy: tuple[float, ...]


def cache_limit(problem: Problem, plan: Partition) -> float:
    """How many units of work have room for their keys and values on every stage at once; ``inf`` if they need none."""
    devices = {device.name: device for device in problem.devices}
    limit = math.inf
    for stage, load in zip(plan.stages, plan.loads, strict=True):
        device = devices[stage.device]
        layers = problem.layers[stage.start : stage.stop]
        a_token = sum(x.kv_bytes for x, where in zip(layers, stage.residencies, strict=True) if where != "host")
        if a_token and problem.workload.tokens:
            room = device.memory - device.reserved - load.weight_bytes - load.buffer_bytes
            limit = min(limit, room // (a_token * problem.workload.tokens))
    return limit


def simulate(
    problem: Problem, plan: Partition, *, units: int = 64, arrivals_per_second: float = math.inf, part: float = 1.0
) -> Simulation:
    """Serve ``units`` units of work, arriving evenly, all at once by default.

    A unit goes through all stages once for each of its steps, prefill first, and starts the next step when it leaves
    the last stage. Stages take one step at a time in order of arrival. At most the workload's ``micro_batches`` are in
    flight, and no more than ``cache_limit`` (but one). Of units that take for ever a ``part`` of their steps says what
    all of them would take.
    """
    work = problem.workload
    prefills, decodes = math.ceil(work.prefill_steps * part), math.ceil(work.decode_steps * part)
    steps = prefills + decodes
    service = [(load.decode_seconds, load.prefill_seconds) for load in plan.loads]
    hops = [_hop(problem, *pair) for pair in pairwise(plan.stages)]
    in_flight = max(1, int(min(work.micro_batches, cache_limit(problem, plan), units)))
    arrival = [unit * part / arrivals_per_second for unit in range(units)]
    events = [(arrival[unit], unit, 0) for unit in range(in_flight)]  # time, unit, visits to stages so far
    waiting, free, busy = in_flight, [0.0] * len(service), [0.0] * len(service)
    finished: dict[int, float] = {}
    while events:
        time, unit, visits = heapq.heappop(events)
        step, stage = divmod(visits, len(service))
        if step == steps:
            finished[unit] = time
            if waiting < units:
                heapq.heappush(events, (max(time, arrival[waiting]), waiting, 0))
                waiting += 1
            continue
        seconds = service[stage][step < prefills]
        free[stage] = max(time, free[stage]) + seconds
        busy[stage] += seconds
        hop = hops[stage][step < prefills] if stage < len(hops) else 0.0
        heapq.heappush(events, (free[stage] + hop, unit, visits + 1))
    times = np.array([finished[unit] - arrival[unit] for unit in range(units)]) / part
    end, first = max(finished.values()), min(finished.values())
    rate = part * ((units - 1) / (end - first) if end > first else units / max(end, 1e-300))
    shares = tuple(each / max(end, 1e-300) for each in busy)
    return Simulation(rate, float(np.median(times)), float(np.quantile(times, 0.95)), in_flight, shares)


def _hop(problem: Problem, before: Stage, after: Stage) -> tuple[float, float]:
    """Seconds to hand on one decode step and one prefill step."""
    link, work = problem.link(before.device, after.device), problem.workload
    each = problem.layers[before.stop - 1].boundary_bytes / link.bandwidth
    return link.latency + work.decode_tokens * each, link.latency + work.prefill_tokens * each


def rank(
    problem: Problem, plans: Sequence[Partition], *, units: int = 64, part: float = 1.0
) -> list[tuple[Partition, Simulation]]:
    """The plans by simulated rate, the quickest first; of equal ones that with the lower median time."""
    simulated = [(plan, simulate(problem, plan, units=units, part=part)) for plan in plans]
    return sorted(simulated, key=lambda pair: (-pair[1].units_per_second, pair[1].median_seconds))
