"""The partitioner: equal to brute force, bounds that hold, relaxations that are exact, explanations and simulation."""

from __future__ import annotations

import math
import random
from contextlib import suppress
from dataclasses import replace

import pytest

from labinfer.compiler.partition import (
    Device,
    DeviceKind,
    Layer,
    Link,
    Objective,
    Partition,
    Problem,
    Residency,
    Stage,
    Workload,
    partition,
    solve,
    stages,
    verify,
)
from labinfer.compiler.partition.explain import explain
from labinfer.compiler.partition.simulate import cache_limit, rank, simulate
from labinfer.errors import DoesNotFit, Errors, UsageError

from .brute_chains import best_values, disagreements, random_problem

OBJECTIVES = (Objective.LATENCY, Objective.THROUGHPUT, Objective.BALANCED)


def alike(count: int, *seconds: float, memory: int = 1000, hop: float = 0.0) -> Problem:
    """Layers of 10 bytes, and one device for each number of seconds that a layer takes it."""
    layers = tuple(Layer(f"l{i}", 10, 1, 1) for i in range(count))
    devices = [Device(f"d{i}", DeviceKind(f"k{s}", (s,) * count, (s,) * count), memory) for i, s in enumerate(seconds)]
    return Problem(layers, tuple(devices), default_link=Link(hop))


def placement(plan: Partition) -> list[tuple[str, int, int]]:
    return [(stage.device, stage.start, stage.stop) for stage in plan.stages]


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_chains_equal_brute_force(first: int) -> None:
    assert not [message for seed in range(first, first + 50) for message in disagreements(seed)]


def test_random_chains_equal_an_integer_programme() -> None:
    pytest.importorskip("scipy", reason="HiGHS is an optional checker")
    from . import milp_chains

    assert not [message for seed in range(10) for message in milp_chains.disagreements(seed)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_search_without_exact_algorithms_keeps_its_bounds(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "EXACT_WORK", 0)
    found = optimal = 0
    for seed in range(1000, 1060):
        problem = replace(random_problem(seed), ordered=False)
        least = best_values(problem)[OBJECTIVES.index(objective)]
        if math.isinf(least):
            with pytest.raises(DoesNotFit):
                partition(problem, objective, effort_seconds=0.02)
            continue
        plan = partition(problem, objective, effort_seconds=0.1)
        found += 1
        optimal += math.isclose(plan.value, least, rel_tol=1e-9)
        assert plan.lower_bound <= least * (1 + 1e-9), seed
        assert plan.value >= least * (1 - 1e-9), seed
    assert found > 40
    assert optimal > found / 2


def test_slow_devices_are_left_out_for_latency_and_share_the_work_for_throughput() -> None:
    problem = alike(12, 1.0, 2.0, 2.0, hop=0.1)
    assert placement(partition(problem, Objective.LATENCY)) == [("d0", 0, 12)]
    plan = partition(problem, Objective.THROUGHPUT)
    assert plan.value == plan.lower_bound == 6.0
    assert sorted(stage.stop - stage.start for stage in plan.stages) == [3, 3, 6]


def test_balanced_goes_from_latency_to_throughput() -> None:
    problem = alike(12, 1.0, 2.0, 2.0, hop=0.5)
    values = []
    for micro_batches in (1, 4, 1000):
        plan = partition(replace(problem, workload=Workload(micro_batches=micro_batches)), Objective.BALANCED)
        assert plan.value == pytest.approx(plan.latency + (micro_batches - 1) * plan.bottleneck)
        values.append(plan)
    assert values[0].latency == partition(problem, Objective.LATENCY).value
    assert values[2].bottleneck == partition(problem, Objective.THROUGHPUT).value


def test_many_equal_devices_are_certified() -> None:
    rng = random.Random(1)
    kinds = [rng.uniform(1, 3) for _ in range(5)]
    problem = alike(1000, *(kinds[i % 5] for i in range(64)), memory=400)
    plan = partition(problem, Objective.THROUGHPUT)
    assert plan.gap == 0
    room = [int(plan.value * (1 + 1e-9) / kinds[i % 5]) for i in range(64)]
    assert sum(min(40, each) for each in room) >= 1000
    less = [int(plan.value * (1 - 1e-9) / kinds[i % 5]) for i in range(64)]
    assert sum(min(40, each) for each in less) < 1000


def test_hundreds_of_devices_have_a_stated_gap() -> None:
    rng = random.Random(2)
    count = 60
    layers = tuple(Layer(f"l{i}", rng.randint(5, 15), 0, 1) for i in range(count))
    kinds = [DeviceKind(f"k{k}", (0,) * count, tuple(rng.uniform(1, 3) for _ in range(count))) for k in range(300)]
    devices = tuple(Device(f"d{i}", kind, rng.randint(10, 60)) for i, kind in enumerate(kinds))
    plan = partition(Problem(layers, devices, default_link=Link(0.1)), Objective.THROUGHPUT, effort_seconds=0.5)
    assert 0 < plan.lower_bound <= plan.value
    assert plan.gap == pytest.approx(1 - plan.lower_bound / plan.value)


def test_streaming_and_the_host_are_chosen_by_what_they_cost() -> None:
    layers = tuple(Layer(f"l{i}", 10) for i in range(6))
    kind = DeviceKind("gpu", (1.0,) * 6, (1.0,) * 6, (9.0,) * 6, (9.0,) * 6, stream_bandwidth=5.0)
    problem = Problem(layers, (Device("d", kind, 50),))
    plan = partition(problem, Objective.LATENCY)
    assert plan.value == 6.0  # three layers of 10 bytes are copied in 6 s, while all six are computed
    assert plan.stages[0].residencies.count(Residency.STREAMED) == 3
    slow = replace(problem, devices=(Device("d", replace(kind, stream_bandwidth=0.5), 50),))
    assert partition(slow, Objective.LATENCY).value == 5 * 1.0 + 9.0
    assert partition(slow, Objective.LATENCY).stages[0].residencies.count(Residency.HOST) == 1


def test_tied_weights_lie_once_on_a_device_that_holds_both_ends() -> None:
    problem = replace(alike(3, 1.0, memory=25), tied_bytes=10)
    assert partition(problem, Objective.LATENCY).loads[0].weight_bytes == 20
    with pytest.raises(DoesNotFit, match="no chain of stages fits"):
        partition(replace(problem, tied_bytes=0), Objective.LATENCY)


def test_pins_and_the_order_of_devices_are_kept() -> None:
    problem = replace(alike(6, 1.0, 5.0), pins={"l2": "d1"})
    plan = partition(problem, Objective.THROUGHPUT)
    assert [stage.device for stage in plan.stages if stage.start <= 2 < stage.stop] == ["d1"]
    ordered = replace(alike(6, 5.0, 1.0), pins={"l0": "d1", "l5": "d0"}, ordered=True)
    with pytest.raises(DoesNotFit):
        partition(ordered)


def test_what_makes_no_sense_is_refused_all_at_once() -> None:
    problem = alike(2, 1.0)
    kind = replace(problem.devices[0].kind, decode=(1.0,), prefill=(-1.0, math.nan), stream_bandwidth=math.inf)
    bad = replace(problem, devices=(Device("d", kind, -1),), pins={"x": "y"}, default_link=Link(-1.0, 0.0))
    with pytest.raises(Errors) as caught:
        partition(bad)
    assert {error.code.split(".")[1] for error in caught.value.errors} == {"number", "costs", "unknown"}
    with pytest.raises(UsageError, match="no device"):
        partition(replace(problem, devices=()))


@pytest.mark.parametrize(
    "wrong",
    [
        [("d0", 0, 3)],
        [("d0", 0, 3), ("d1", 2, 4)],
        [("d0", 0, 2), ("d0", 2, 4)],
        [("d1", 0, 2), ("d0", 2, 4)],
        [("d0", 0, 4)],
    ],
    ids=["gap", "overlap", "twice", "order", "memory"],
)
def test_wrong_stages_are_found(wrong: list[tuple[str, int, int]]) -> None:
    problem = replace(alike(4, 1.0, 1.0, memory=30), ordered=True)
    made = tuple(Stage(name, a, b, (Residency.RESIDENT,) * (b - a)) for name, a, b in wrong)
    with pytest.raises(DoesNotFit) as caught:
        verify(problem, made)
    assert caught.value.code == "partition.invalid"


def test_explanation_says_what_a_device_is_worth() -> None:
    problem = alike(12, 1.0, 2.0, 40.0, hop=0.1)
    plan = partition(problem, Objective.THROUGHPUT)
    told = explain(problem, plan)
    assert told.reasons["d1"].startswith("used: without it throughput would be 12 s, 50.0% more")
    assert told.reasons["d2"].startswith("refused: no plan with it is better")
    assert told.runner_ups[0].value == 12.0
    assert {change.value for change in told.changes} == {plan.value}


def test_one_more_gigabyte_is_worth_what_it_saves() -> None:
    problem = alike(4, 1.0, 10.0, memory=20)
    plan = partition(problem, Objective.LATENCY)
    best = explain(problem, plan).changes[0]
    assert (plan.value, best.what, best.value) == (22.0, "1 GB more on d0", 4.0)


def test_simulation_of_full_stages_reaches_the_bottleneck() -> None:
    problem = replace(alike(12, 1.0, 2.0, hop=0.25), workload=Workload(decode_steps=5, micro_batches=3))
    plan = partition(problem, Objective.THROUGHPUT)
    alone = simulate(replace(problem, workload=replace(problem.workload, micro_batches=1)), plan, units=4)
    assert alone.median_seconds == pytest.approx(2.5 * plan.latency)  # the units wait for each other
    full = simulate(problem, plan, units=60)
    assert full.units_per_second == pytest.approx(1 / plan.bottleneck, rel=0.05)
    assert max(full.busy) > 0.95


def test_simulation_ranks_by_what_the_cache_allows() -> None:
    work = Workload(decode_steps=4, micro_batches=8)
    problem = replace(alike(8, 1.0, 1.0, memory=52), workload=work)
    split = partition(problem, Objective.THROUGHPUT)
    assert cache_limit(problem, split) == 0  # 40 bytes of weights leave 12; a unit keeps 4 bytes a token, 4 tokens
    roomy = replace(problem, devices=tuple(replace(device, memory=400) for device in problem.devices))
    both = [split, partition(roomy, Objective.LATENCY)]
    best, result = rank(roomy, both)[0]
    assert best is split
    assert result.in_flight == 8
    assert simulate(problem, split).units_per_second < result.units_per_second


def test_bounds_hold_where_choices_of_residencies_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PRUNE_ABOVE", 4)
    monkeypatch.setattr(stages, "MAX_OPTIONS", 4)
    gaps = 0
    for seed in range(40):
        problem = random_problem(seed)
        for objective, least in zip(OBJECTIVES, best_values(problem), strict=True):
            with suppress(DoesNotFit):
                plan = partition(problem, objective)
                assert plan.lower_bound <= least * (1 + 1e-9) <= plan.value * (1 + 2e-9)
                gaps += plan.gap > 0
    assert gaps > 0
