"""Which algorithm for which problem: exact ones where they finish soon, else the best found and how good it must be."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from labinfer.compiler.partition import counts, furthest
from labinfer.compiler.partition.bounds import bottleneck_bound, latency_bound
from labinfer.compiler.partition.lengths import Lengths
from labinfer.compiler.partition.local import CLOSE, improve
from labinfer.compiler.partition.ordered import best_in_order
from labinfer.compiler.partition.problem import Objective, Problem, check
from labinfer.compiler.partition.result import Partition, Stage, verify
from labinfer.compiler.partition.tables import Chain, Tables
from labinfer.errors import DoesNotFit
from labinfer.units import human_bytes

EXACT_WORK = 3e8  # numbers that an exact search may compute: about a second
MOST_STATES = 1_000_000  # counts of devices of the search for the furthest layer

Exact = Callable[[float], Chain | None]  # the best chain of stages and hops below a limit


@dataclass(frozen=True, slots=True)
class Answer:
    """A chain, a value no other is below, how that is known, and what found the chain."""

    chain: Chain
    lower_bound: float
    bound_kind: str
    algorithm: str


def partition(
    problem: Problem,
    objective: Objective = Objective.THROUGHPUT,
    *,
    effort_seconds: float = 5.0,
    excluded: frozenset[str] = frozenset(),
) -> Partition:
    """The best chain of stages found for a problem, with a lower bound.

    Problems that no exact algorithm fits are searched for ``effort_seconds`` at most. Devices named in ``excluded`` are
    not used. Raises ``UsageError`` for a problem that makes no sense and ``DoesNotFit`` (``partition.does-not-fit``)
    where no chain of stages fits the devices.
    """
    started = time.monotonic()
    check(problem)
    if all(device.name in excluded for device in problem.devices):
        raise DoesNotFit("partition.does-not-fit", "no device is left to run the layers")
    tables = Tables(problem, excluded)
    answer = _solve(tables, objective, effort_seconds)
    stages = []
    for run, number in zip(answer.chain, tables.name_devices(answer.chain), strict=True):
        residencies = tables.tables[run.group].residencies(run.start, run.stop)
        stages.append(Stage(tables.devices[number].name, run.start, run.stop, residencies))
    loads = verify(problem, tuple(stages))
    latency = sum(load.seconds + load.hop_seconds for load in loads)
    bottleneck = max(max(load.seconds, load.hop_seconds) for load in loads)
    value = objective_value(problem, objective, latency, bottleneck)
    bound = min(answer.lower_bound, value)
    if bound >= value * (1 - CLOSE):
        bound = value
    return Partition(
        objective=objective,
        value=value,
        lower_bound=bound,
        bound_kind=answer.bound_kind,
        algorithm=answer.algorithm,
        stages=tuple(stages),
        loads=loads,
        latency=latency,
        bottleneck=bottleneck,
        seconds=time.monotonic() - started,
    )


def objective_value(problem: Problem, objective: Objective, latency: float, bottleneck: float) -> float:
    """The objective of a chain from its latency and its bottleneck, in seconds."""
    if objective is Objective.LATENCY:
        return latency
    if objective is Objective.THROUGHPUT:
        return bottleneck
    return latency + (problem.workload.micro_batches - 1) * bottleneck


def _solve(tables: Tables, objective: Objective, effort_seconds: float) -> Answer:
    exact, algorithm = _exact_search(tables, bottleneck=objective is Objective.THROUGHPUT)
    if exact is None:
        return _search(tables, objective, effort_seconds)
    chain = _balance(tables, exact) if objective is Objective.BALANCED else exact(math.inf)
    if chain is None:
        raise _does_not_fit(tables)
    value = objective_value(tables.problem, objective, *tables.measure(chain))
    if tables.exact:
        return Answer(chain, value, "exhausted", algorithm)
    return Answer(chain, _bound(tables, objective), "relaxed lengths and loads", algorithm)


def _exact_search(tables: Tables, *, bottleneck: bool) -> tuple[Exact | None, str]:
    """An exact algorithm of acceptable cost, and its name."""
    if tables.problem.ordered:
        order = list(range(len(tables.groups)))
        return lambda limit: best_in_order(tables, order, bottleneck=bottleneck, limit=limit), "fixed order"
    if counts.work(tables) <= EXACT_WORK:
        return counts.CountSearch(tables, bottleneck=bottleneck).best_chain, "counts of devices"
    return None, ""


def _balance(tables: Tables, shortest: Exact) -> Chain | None:
    """The least latency + (m - 1) * bottleneck, by walking along the plans that are best in both.

    Each step asks for the least latency below the last bottleneck. Latency only grows on the way, so the walk ends
    when even an unchanged bottleneck of nothing could not pay for it.
    """
    extra = tables.problem.workload.micro_batches - 1
    best, value, limit = None, math.inf, math.inf
    while (chain := shortest(limit)) is not None:
        latency, limit = tables.measure(chain)
        if latency >= value:
            break
        if latency + extra * limit < value:
            best, value = chain, latency + extra * limit
    return best


def _bound(tables: Tables, objective: Objective) -> float:
    tables, extra = tables.relaxed(), tables.problem.workload.micro_batches - 1
    lengths = Lengths(tables)
    if objective is Objective.LATENCY:
        return latency_bound(tables, lengths)
    if objective is Objective.THROUGHPUT:
        return bottleneck_bound(tables, lengths)
    return latency_bound(tables, lengths) + extra * bottleneck_bound(tables, lengths)


def _search(tables: Tables, objective: Objective, effort_seconds: float) -> Answer:
    """Relaxations that give a bound and often a plan that meets it; local search for the rest."""
    lengths, bound = Lengths(tables), _bound(tables, objective)
    if math.isinf(bound):
        raise _does_not_fit(tables)
    kind = "relaxed lengths and loads"
    seeds = {
        "layers by number": lengths.bottleneck()[1],
        "layers by knapsack": lengths.latency(tables.hop_range()[0])[1],
    }

    def score(chain: Chain) -> tuple[float, float]:
        latency, bottleneck = tables.measure(chain)
        value = objective_value(tables.problem, objective, latency, bottleneck)
        return value, latency if objective is Objective.THROUGHPUT else bottleneck

    possible = {name: chain for name, chain in seeds.items() if chain is not None and math.isfinite(score(chain)[0])}
    best = min((score(chain)[0] for chain in possible.values()), default=math.inf)
    throughput = objective is Objective.THROUGHPUT
    if throughput and best > bound * (1 + CLOSE) and furthest.states(tables) <= MOST_STATES:
        least, chain = furthest.best_bottleneck(tables, bound, best)
        if tables.exact and least > bound:
            bound, kind = min(least, best), "exhausted without hops"
        if chain is not None:
            possible["furthest layers"] = chain
    found = improve(tables, list(possible.values()), score, bottleneck=throughput, goal=bound, seconds=effort_seconds)
    if found is None:
        raise _does_not_fit(tables)
    algorithm = next((name for name, chain in possible.items() if score(chain) <= score(found)), "local search")
    return Answer(found, bound, kind, algorithm)


def _does_not_fit(tables: Tables) -> DoesNotFit:
    """An error that says which bytes are missing, as far as that is the reason."""
    problem = tables.problem
    kept = problem.workload.kv_tokens
    needed = sum(layer.weight_bytes + layer.kv_bytes * kept for layer in problem.layers)
    room = sum(max(device.memory - device.reserved, 0) for device in tables.devices)
    message = f"no chain of stages fits: weights and cache are {human_bytes(needed)}, devices have {human_bytes(room)}"
    remedy = "give more memory, a smaller cache, a smaller weight format, or let layers be streamed or run on the host"
    return DoesNotFit("partition.does-not-fit", message, remedy=remedy)
