"""Writes into a plan what its placement was decided by: the cost of each op, predictions of stages, the bound."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from labinfer.compiler.costs.plans import StageCost, predict_pipeline, predict_plan
from labinfer.compiler.costs.predict import StepShape
from labinfer.compiler.costs.table import LinkProfile, interpolate
from labinfer.compiler.fold import unfold_states
from labinfer.compiler.partition import Partition
from labinfer.compiler.partition.service import MOST_REQUESTS, EngineTimes, Load, stall_of, ways_to_serve
from labinfer.compiler.partition.solve import objective_value
from labinfer.compiler.place_by_cost import Goal, PlacedByCost
from labinfer.compiler.placement_record import (
    Change,
    OtherPlacement,
    PlannedStep,
    PlanPlacement,
    ServicePrediction,
    StagePrediction,
)
from labinfer.compiler.plan import Plan, Stage

SAME = 1e-6
"""By what part sums may differ that were added up in another order."""

NANOSECONDS = 9
"""Decimals of the seconds in a plan."""


def record_placement(plan: Plan, placed: PlacedByCost, goal: Goal) -> None:
    """Fill ``plan.placement`` and the costs of all ops from the numbers that the placement was decided by."""
    chosen, work, devices = placed.chosen, goal.workload, len(placed.problem.devices)
    decode, prefill = work.decode_step(goal.objective, devices), work.prefill_step(plan.limits)
    costs = [predict_plan(plan, goal.costs, goal.links, step) for step in (decode, prefill)]
    for stage, *phases in zip(plan.stages, *costs, strict=True):
        write_costs(stage, *phases)
    value = value_of(placed, goal, *costs)
    bound = min(chosen.lower_bound, value)
    plan.placement = PlanPlacement(
        objective=goal.objective.value,
        workload=work.told(),
        decode=planned_step(decode),
        prefill=planned_step(prefill),
        micro_batches=placed.problem.workload.micro_batches,
        value=rounded(value),
        lower_bound=rounded(bound),
        gap=rounded(1 - bound / value) if bound < value * (1 - SAME) else 0.0,
        bound_kind=chosen.bound_kind,
        algorithm=chosen.algorithm,
        served=rounded(placed.served.units_per_second * decode.sequences),
        stages=predictions(placed, *costs),
        origins=origins(placed, goal),
        transports=transports(plan, goal, (decode, prefill), costs) if len(plan.stages) > 1 else {},
        reasons=placed.told.reasons,
        runner_ups=[other_placement(placed, each) for each in placed.told.runner_ups],
        changes=[Change(what=each.what, value=rounded(each.value)) for each in placed.told.changes],
        services=services(plan, goal) if work.replicas > 1 else [],
    )


def value_of(placed: PlacedByCost, goal: Goal, decode: Sequence[StageCost], prefill: Sequence[StageCost]) -> float:
    """The objective, where each stage has its overhead, which the search counts with the hop into it."""
    unit = placed.problem.workload
    pairs = list(zip(decode, prefill, strict=True))
    stages = [unit.decode_steps * a.seconds + unit.prefill_steps * b.seconds for a, b in pairs]
    hops = [unit.decode_steps * a.hop + unit.prefill_steps * b.hop for a, b in pairs[:-1]]
    return objective_value(placed.problem, goal.objective, sum(stages + hops), max(stages + hops))


def predictions(
    placed: PlacedByCost, decode: Sequence[StageCost], prefill: Sequence[StageCost]
) -> list[StagePrediction]:
    """Each stage by the names of its units, with its seconds."""
    unit, found = placed.problem.workload, []
    for run, in_decode, in_prefill in zip(placed.chosen.stages, decode, prefill, strict=True):
        found.append(
            StagePrediction(
                device=run.device,
                units=(placed.units[run.start].name, placed.units[run.stop - 1].name),
                decode=rounded(in_decode.seconds),
                prefill=rounded(in_prefill.seconds),
                decode_hop=rounded(in_decode.hop),
                prefill_hop=rounded(in_prefill.hop),
                unit=rounded(unit.decode_steps * in_decode.seconds + unit.prefill_steps * in_prefill.seconds),
            )
        )
    return found


def rounded(seconds: float) -> float:
    """To a nanosecond, so that plans stay readable."""
    return round(seconds, NANOSECONDS)


def planned_step(step: StepShape) -> PlannedStep:
    """A step as the plan states it."""
    return PlannedStep(tokens=step.tokens, sequences=step.sequences, past=step.past)


def write_costs(stage: Stage, decode: StageCost, prefill: StageCost) -> None:
    """Give each op of a stage's blocks its cost, which is the same in every layer that a block stands for."""
    by_name = {op.name: (rounded(a), rounded(b)) for (op, a), (_, b) in zip(decode.ops, prefill.ops, strict=True)}
    for entry in stage.schedule:
        for op in stage.blocks[entry.block]:
            layer = "" if entry.layers is None else str(entry.layers[0])
            names = [each.name.replace("{i}", layer) for each in [op, *op.body]]
            found = [by_name[name] for name in dict.fromkeys(names) if name in by_name]
            if found:
                op.cost = (rounded(sum(a for a, _ in found)), rounded(sum(b for _, b in found)))


def other_placement(placed: PlacedByCost, other: Partition) -> OtherPlacement:
    """A runner-up by the names of its units."""
    names = [unit.name for unit in placed.units]
    stages = [(each.device, names[each.start], names[each.stop - 1]) for each in other.stages]
    return OtherPlacement(stages=stages, value=rounded(other.value))


def origins(placed: PlacedByCost, goal: Goal) -> dict[str, str]:
    """How the numbers of each device, and of each link that is used, are known."""
    found: dict[str, str] = {device.name: goal.costs[device.name].origin for device in placed.problem.devices}
    used = [stage.device for stage in placed.chosen.stages]
    for pair in pairwise(used):
        found[" to ".join(pair)] = goal.links[pair].origin
    return found


def transports(
    plan: Plan, goal: Goal, steps: Sequence[StepShape], costs: Sequence[Sequence[StageCost]]
) -> dict[str, tuple[float, float]]:
    """What both ``steps``, whose stages cost so much, take in a pipeline by each transport that was measured."""

    def whole(number: int, link: LinkProfile) -> float:
        return rounded(predict_pipeline(plan, costs[number], goal.costs, link, steps[number]).seconds)

    return {name: (whole(0, link), whole(1, link)) for name, link in goal.transports.items()}


def services(plan: Plan, goal: Goal) -> list[ServicePrediction]:
    """How the replicas of the workload can serve, the best first."""
    work = goal.workload
    load = Load(work.prompt, work.output, work.rate / 60)
    found = ways_to_serve(engine_times(plan, goal), load, work.replicas)
    return [
        ServicePrediction(
            prefill=each.prefill,
            request=rounded(each.request),
            first=rounded(each.first),
            wait=rounded(each.wait),
            longest=rounded(each.longest),
        )
        for each in found
    ]


def engine_times(plan: Plan, goal: Goal) -> EngineTimes:
    """What an engine that runs ``plan`` takes, whose stages run one after another, as predicted from their ops."""
    work, limits = goal.workload, plan.limits
    most = min(limits.max_num_seqs, MOST_REQUESTS)

    def seconds(step: StepShape) -> float:
        return sum(stage.total for stage in predict_plan(plan, goal.costs, goal.links, step))

    sizes = sorted({min(1 << power, most) for power in range(most.bit_length() + 1)})
    known = [(size, seconds(StepShape.decode(size, work.prompt + work.output // 2))) for size in sizes]
    prefill = work.prefill_step(limits)
    out = goal.costs[plan.stages[-1].device].out
    moved = sum(
        limits.blocks_needed(limits.groups[state.group], work.prompt) * limits.block_size * state.width
        for state in unfold_states(plan).values()
    )
    nbytes = moved * limits.cache_bytes_per_number
    return EngineTimes(
        decode=tuple(interpolate(known, size) for size in range(1, most + 1)),
        token=seconds(prefill) / prefill.tokens,
        max_tokens=limits.max_num_batched_tokens,
        stall=stall_of(work.prompt),
        move=2 * out.seconds(nbytes) if out else 0.0,
        rest=-(-limits.block_size // 2),
    )
