"""Places layers on devices by what they cost there: the op graph becomes a partition problem, and its answer stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import groupby, permutations
from math import ceil

from labinfer.compiler.costs import Costs, LinkProfile, Signer, StepShape
from labinfer.compiler.fold import GRAPH_INPUTS, layer_matrices
from labinfer.compiler.graph import Op, OpGraph
from labinfer.compiler.partition import (
    Device,
    DeviceKind,
    Layer,
    Link,
    Objective,
    Partition,
    Problem,
    Residency,
    partition,
)
from labinfer.compiler.partition.explain import Explanation, explain
from labinfer.compiler.partition.simulate import Simulation, rank
from labinfer.compiler.partition.solve import objective_value
from labinfer.compiler.plan import Limits
from labinfer.compiler.residency import ALIGNMENT, SLOTS
from labinfer.compiler.target import Placement, Target
from labinfer.compiler.workload import Workload
from labinfer.errors import DoesNotFit, InvalidFile, Place, UsageError
from labinfer.ops.base import TensorType
from labinfer.ops.fusions import is_view

EFFORT_SECONDS = 2.0
"""How long a placement is searched for where no exact algorithm fits."""

MOST_EXPLAINED = 24
"""Devices of a problem that is solved again without each of them, and with more of it."""

FEWEST_UNITS, MOST_UNITS, MOST_EVENTS = 8, 64, 200_000
"""Units of work that are simulated, and how many visits of stages they may take together, but for the fewest units."""

MOST_VISITS = 2_000_000
"""Visits of stages that the fewest units may take; of longer ones a part of their steps is simulated."""

NO_CAP = 1 << 60
"""Bytes of a device whose memory nobody limits."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Units whose names match ``pattern`` must run on ``device``, as ``place`` says."""

    pattern: str
    device: str
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """What a placement should be best at, and what is known of devices and links: costs by device, links by pair."""

    objective: Objective
    workload: Workload
    costs: Mapping[str, Costs]
    links: Mapping[tuple[str, str], LinkProfile]
    pins: Sequence[Pin] = field(default=())
    transports: Mapping[str, LinkProfile] = field(default_factory=dict)
    """Hops of a pipeline by transport, where all devices are here and hops were measured."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What is placed as a whole: a layer, or what stands before the first (``layer`` is None) or after the last one."""

    name: str
    ops: tuple[Op, ...]
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class PlacedByCost:
    """The chosen partition of ``units``, why it is so, and what it serves; ``problem`` is what was solved."""

    units: Sequence[Unit]
    problem: Problem
    chosen: Partition
    told: Explanation
    served: Simulation

    def placements(self, targets: Sequence[Target]) -> list[Placement]:
        """The run of ops of each stage, and which of its layers are streamed."""
        known = {target.name: target for target in targets}
        found = []
        for stage in self.chosen.stages:
            units = self.units[stage.start : stage.stop]
            kept = zip(units, stage.residencies, strict=True)
            streamed = tuple(u.layer for u, how in kept if how is Residency.STREAMED and u.layer is not None)
            found.append(Placement(known[stage.device], tuple(op for unit in units for op in unit.ops), streamed))
        return found


def place_by_cost(
    graph: OpGraph,
    targets: Sequence[Target],
    limits: Limits,
    goal: Goal,
    reserved: Callable[[Target], int],
    kv_tokens: int = 0,
    streams: bool = True,
) -> PlacedByCost:
    """The best placement of ``graph`` on ``targets`` for ``goal``.

    ``reserved`` gives the bytes that a device needs beside weights and cache, which holds ``kv_tokens`` at least. With
    ``streams``, layers that do not fit a device may be streamed to it, where it is known how long that takes. Of
    the best plans by static value the one is taken that serves most in a simulation; for latency alone, which that does
    not change, the first.
    """
    units = split(graph)
    problem = problem_of(graph, units, targets, limits, goal, reserved, kv_tokens, streams)
    best = partition(problem, goal.objective, effort_seconds=EFFORT_SECONDS)
    told = tell(problem, best)
    candidates = [best]
    if goal.objective is not Objective.LATENCY:
        quickest = partition(problem, Objective.LATENCY, effort_seconds=EFFORT_SECONDS)
        candidates += told.runner_ups
        candidates.append(restated(problem, quickest, best))
    chosen, served = most_served(problem, candidates)
    if chosen is not best:
        told = tell(problem, chosen)
    return PlacedByCost(units, problem, chosen, told, served)


def most_served(problem: Problem, plans: Sequence[Partition]) -> tuple[Partition, Simulation]:
    """The plan that serves most in a simulation, and what it serves."""
    work = problem.workload
    visits = (ceil(work.prefill_steps) + ceil(work.decode_steps)) * len(problem.devices)
    units = max(FEWEST_UNITS, min(MOST_UNITS, MOST_EVENTS // visits))
    return rank(problem, plans, units=units, part=min(1.0, MOST_VISITS / (FEWEST_UNITS * visits)))[0]


def tell(problem: Problem, plan: Partition) -> Explanation:
    """Why a plan is as it is; of many devices that would take too long."""
    if len(problem.devices) > MOST_EXPLAINED:
        reasons = dict.fromkeys((device.name for device in problem.devices), "refused: a better plan was found")
        reasons |= {stage.device: "used" for stage in plan.stages}
        return Explanation((), reasons, ())
    return explain(problem, plan)


def restated(problem: Problem, plan: Partition, best: Partition) -> Partition:
    """A plan that was found for another objective, as a plan for that of ``best``, whose bound holds for it too."""
    value = objective_value(problem, best.objective, plan.latency, plan.bottleneck)
    bound = min(best.lower_bound, value)
    return replace(plan, objective=best.objective, value=value, lower_bound=bound, bound_kind=best.bound_kind)


def split(graph: OpGraph) -> list[Unit]:
    """The ops in order by layer; those of no layer are ``start`` or ``end``, or go with the layer before them."""
    units: list[Unit] = []
    layers = [op.layer for op in graph.ops if op.layer is not None]
    last = layers[-1] if layers else None
    for layer, run in groupby(graph.ops, key=lambda op: op.layer):
        ops = tuple(run)
        if layer is not None:
            units.append(Unit(f"layers.{layer}", ops, layer))
        elif not units:
            units.append(Unit("start", ops))
        elif units[-1].name == f"layers.{last}":
            units.append(Unit("end", ops))
        else:
            units[-1] = replace(units[-1], ops=units[-1].ops + ops)
    return units


def problem_of(
    graph: OpGraph,
    units: Sequence[Unit],
    targets: Sequence[Target],
    limits: Limits,
    goal: Goal,
    reserved: Callable[[Target], int],
    kv_tokens: int,
    streams: bool,
) -> Problem:
    """The partition problem: bytes and seconds of each unit on each device, links, pins."""
    work = goal.workload
    steps = work.prefill_step(limits), work.decode_step(goal.objective, len(targets))
    devices: list[Device] = []
    entering: dict[str, float] = {}
    known: list[tuple[Target, Costs, Device]] = []  # devices of a kind, which the search may exchange
    for target in targets:
        costs = goal.costs[target.name]
        device = next((each for like, at, each in known if alike(like, target) and at == costs), None)
        if device is None:
            kind = kind_of(target, costs, units, signer_of(graph, limits, target), steps, streams)
            taken = reserved(target) + SLOTS * ALIGNMENT if target.memory is not None else 0
            device = Device(target.name, kind, target.memory or NO_CAP, taken)
            known.append((target, costs, device))
        devices.append(replace(device, name=target.name))
        entering[target.name] = costs.overhead_seconds(steps[1])
    links = {}
    for pair in permutations(entering, 2):
        links[pair] = Link(goal.links[pair].latency + entering[pair[1]], goal.links[pair].bandwidth)
    usual = Counter(links.values()).most_common(1)[0][0] if links else Link()  # of many hosts, nearly all links
    return Problem(
        layers=layers_of(graph, units, targets, limits, work),
        devices=tuple(devices),
        workload=work.unit(goal.objective, len(targets), limits, kv_tokens),
        links={pair: link for pair, link in links.items() if link != usual},
        default_link=usual,
        pins=pins_of(units, targets, goal.pins),
        tied_bytes=tied_bytes(graph, units, targets),
    )


def alike(one: Target, other: Target) -> bool:
    """Whether two devices differ in their names only."""
    return replace(one, name=other.name) == other


def kind_of(
    target: Target,
    costs: Costs,
    units: Sequence[Unit],
    signer: Signer,
    steps: tuple[StepShape, StepShape],
    streams: bool,
) -> DeviceKind:
    """Seconds of each unit on devices like ``target``, in a step of prefill and in one of decode."""
    seconds = [[unit_seconds(unit, target, costs, signer, step) for unit in units] for step in steps]
    for phase, step in zip(seconds, steps, strict=True):
        phase[0] += costs.overhead_seconds(step)  # that of further stages comes with the hop into them
    kind = DeviceKind(target.name, tuple(seconds[0]), tuple(seconds[1]))
    if streams and target.memory is not None and costs.stream:
        kind = replace(kind, stream_bandwidth=costs.stream.bandwidth, overlap=costs.stream.overlap)
    return kind


def signer_of(graph: OpGraph, limits: Limits, target: Target) -> Signer:
    """Writes the signatures of the graph's ops on a device."""
    types = dict.fromkeys(GRAPH_INPUTS, TensorType(("T",), "i32")) | graph.values
    return Signer(types, graph.weights, graph.states, limits, target.options)


def unit_seconds(unit: Unit, target: Target, costs: Costs, signer: Signer, step: StepShape) -> float:
    """Seconds of a unit's ops; ``DoesNotFit`` where one was never measured."""
    return sum(costs.op_seconds(signer, op, step) for op in target.steps(unit.ops) if not is_view(op.kind))


def layers_of(
    graph: OpGraph, units: Sequence[Unit], targets: Sequence[Target], limits: Limits, work: Workload
) -> tuple[Layer, ...]:
    """Bytes of each unit: weights, cache per token, and what it hands on per token.

    Of a window, no sequence keeps more than its blocks, so its layers count for that part of a token.
    """
    matrices = layer_matrices(graph.ops, graph.weights)
    last_use = {name: number for number, unit in enumerate(units) for op in unit.ops for name in op.inputs}
    made: dict[str, TensorType] = {}
    length, found = work.prompt + work.output, []
    for number, unit in enumerate(units):
        parts = [part for op in unit.ops for part in op.primitives()]
        made |= {name: graph.values[name] for part in parts for name in part.outputs if name in last_use}
        crossing = [kind for name, kind in made.items() if last_use[name] > number]
        cache = 0.0
        for name in dict.fromkeys(part.state for part in parts if part.state):
            state = graph.states[name]
            group = limits.groups[state.group]
            kept = limits.blocks_needed(group, length) / -(-length // limits.block_size)
            cache += kept * state.width * limits.cache_bytes_per_number
        weights = {name: weight_bytes(graph, name, targets) for name in unit_weights(unit)}
        streamed = {weight.name for weight in matrices.get(unit.layer, ())} if unit.layer is not None else set()
        fixed, crossed = sum(b for n, b in weights.items() if n not in streamed), sum(k.nbytes(1, 1) for k in crossing)
        found.append(Layer(unit.name, sum(weights.values()), round(cache), crossed, fixed))
    return tuple(found)


def unit_weights(unit: Unit) -> list[str]:
    """The weights of a unit, each once."""
    return list(dict.fromkeys(name for op in unit.ops for part in op.primitives() for name in part.weights.values()))


def weight_bytes(graph: OpGraph, name: str, targets: Sequence[Target]) -> int:
    """Bytes of a weight, on the device where it takes most: layouts hardly differ, and what fits must fit for sure."""
    weight = graph.weights[name]
    return max(target.weight_bytes(weight.format, weight.shape) for target in targets)


def tied_bytes(graph: OpGraph, units: Sequence[Unit], targets: Sequence[Target]) -> int:
    """Bytes of weights that the first and the last unit share."""
    shared = set(unit_weights(units[0])) & set(unit_weights(units[-1])) if len(units) > 1 else set()
    return sum(weight_bytes(graph, name, targets) for name in shared)


def pins_of(units: Sequence[Unit], targets: Sequence[Target], pins: Sequence[Pin]) -> dict[str, str]:
    """The device that each pinned unit must run on, from ``device:`` in the map and from patterns."""
    names, found = {target.name for target in targets}, dict[str, str]()
    for unit in units:
        wanted = {op.device: str(op.origin) for op in unit.ops if op.device is not None}
        matching = [pin for pin in pins if fnmatchcase(unit.name, pin.pattern)]
        wanted |= {pin.device: str(pin.place or "pins") for pin in matching}
        if len(wanted) > 1:
            listed = " and ".join(f"'{device}' (at {where})" for device, where in wanted.items())
            raise UsageError("device.pins", f"'{unit.name}' is pinned to {listed}", remedy="pin it once")
        for device, where in wanted.items():
            if device not in names:
                message = f"'{unit.name}' is pinned to device '{device}' (at {where}), which is not among the devices"
                raise DoesNotFit("device.unknown", message, remedy=f"devices: {', '.join(sorted(names))}")
            found[unit.name] = device
    for pin in pins:
        if not any(fnmatchcase(unit.name, pin.pattern) for unit in units):
            shown = f"{units[0].name}, {units[1].name} ... {units[-1].name}" if len(units) > 1 else units[0].name
            message = f"no layer is called '{pin.pattern}'"
            raise InvalidFile("cluster.pins", message, place=pin.place, remedy=f"layers: {shown}")
    return found
