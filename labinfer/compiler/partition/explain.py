"""Why a plan is as it is: the next best plans, a reason for each device, and what other hardware would buy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from labinfer.compiler.partition.local import CLOSE
from labinfer.compiler.partition.problem import Link, Problem
from labinfer.compiler.partition.result import Partition
from labinfer.compiler.partition.solve import partition
from labinfer.errors import DoesNotFit

GB = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Change:
    """A change of hardware, and the value (in seconds) of the best plan found after it."""

    what: str
    value: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """``runner_ups`` are the best other plans, ``reasons`` say for each device why it was used or refused, ``changes``
    list what one more GB on a used device, or a link of a used hop twice as fast, would buy, the best first."""

    runner_ups: tuple[Partition, ...]
    reasons: dict[str, str]
    changes: tuple[Change, ...]


def explain(problem: Problem, plan: Partition, *, effort_seconds: float = 1.0, runner_ups: int = 3) -> Explanation:
    """Explain a plan by solving changed problems: without each used device, and with more of what it uses.

    Every problem is solved as ``partition`` does it, with ``effort_seconds`` for each that no exact algorithm fits.
    """
    without: dict[str, Partition | None] = {}
    for stage in plan.stages:
        without[stage.device] = _try(problem, plan, effort_seconds, frozenset([stage.device]))
    others: dict[object, Partition] = {}
    for other in filter(None, without.values()):
        others.setdefault(other.stages, other)
    reasons = {device.name: _refused(problem, plan, device.name) for device in problem.devices}
    for stage in plan.stages:
        reasons[stage.device] = _used(plan, stage.device, without[stage.device])
    changes = []
    for what, changed in _changed(problem, plan):
        better = _try(changed, plan, effort_seconds)
        changes.append(Change(what, min(plan.value, better.value) if better else plan.value))
    return Explanation(
        tuple(sorted(others.values(), key=lambda other: other.value)[:runner_ups]),
        reasons,
        tuple(sorted(changes, key=lambda change: change.value)),
    )


def _try(problem: Problem, plan: Partition, effort: float, excluded: frozenset[str] = frozenset()) -> Partition | None:
    pins = {layer: name for layer, name in problem.pins.items() if name not in excluded}
    try:
        return partition(replace(problem, pins=pins), plan.objective, effort_seconds=effort, excluded=excluded)
    except DoesNotFit:
        return None


def _used(plan: Partition, device: str, without: Partition | None) -> str:
    if without is None:
        return "used: nothing fits without it"
    more = without.value / plan.value - 1 if plan.value else 0.0
    if more <= CLOSE:
        return "used, but a plan without it is as good"
    return f"used: without it {plan.objective} would be {without.value:.4g} s, {more:.1%} more"


def _refused(problem: Problem, plan: Partition, name: str) -> str:
    """Why a device has no stage."""
    device = next(device for device in problem.devices if device.name == name)
    kept = problem.workload.kv_tokens
    needed = min(layer.weight_bytes + layer.kv_bytes * kept for layer in problem.layers)
    kind = device.kind
    if needed > device.memory - device.reserved and not (kind.stream_bandwidth or kind.host_prefill):
        return "refused: no layer fits its memory"
    work = problem.workload
    costs = zip(kind.prefill, kind.decode, strict=True)
    quickest = min(
        sum(steps * each for steps, each in zip((work.prefill_steps, work.decode_steps), cost, strict=True) if steps)
        for cost in costs
    )
    if plan.stages and math.isfinite(quickest):
        first = plan.stages[0].device
        hop = problem.hop_seconds(first, name, 0)
        proof = "no plan with it is better" if plan.gap == 0 else "no better plan with it was found"
        return f"refused: {proof}; a layer takes it {quickest:.4g} s or more, and a hop to it {hop:.4g} s"
    return "refused: it can run no layer"


def _changed(problem: Problem, plan: Partition) -> Iterator[tuple[str, Problem]]:
    used = {stage.device for stage in plan.stages}
    for number, device in enumerate(problem.devices):
        if device.name in used:
            devices = list(problem.devices)
            devices[number] = replace(device, memory=device.memory + GB)
            yield f"1 GB more on {device.name}", replace(problem, devices=tuple(devices))
    for before, after in pairwise(plan.stages):
        link = problem.link(before.device, after.device)
        quicker = {(before.device, after.device): Link(link.latency / 2, link.bandwidth * 2)}
        what = f"a link from {before.device} to {after.device} twice as fast"
        yield what, replace(problem, links={**problem.links, **quicker})
