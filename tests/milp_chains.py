"""Random partition problems as integer programmes, solved by HiGHS; needs scipy.

``python -m tests.milp_chains 1000`` compares so many with the partitioner.
"""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from labinfer.compiler.partition import Objective, Problem, partition
from labinfer.errors import DoesNotFit

from .brute_chains import main, random_problem, stage_times


def steps_of(problem: Problem) -> tuple[list[tuple[int, int, int, float]], list[tuple[int, int, int, float]]]:
    """All stages (device, start, stop, seconds) and hops (from, to, cut, seconds) that a chain may have."""
    names = [device.name for device in problem.devices]
    stages = [
        (number, start, stop, seconds)
        for number, device in enumerate(problem.devices)
        for (start, stop), seconds in stage_times(problem, device).items()
        if math.isfinite(seconds)
    ]
    hops = [
        (a, b, cut, problem.hop_seconds(names[a], names[b], cut - 1))
        for a, b in permutations(range(len(names)), 2)
        for cut in range(1, len(problem.layers))
        if a < b or not problem.ordered
    ]
    return stages, hops


def best_value(problem: Problem, objective: Objective) -> float:
    """The least latency or bottleneck: a path from (no device, layer 0) to the last layer through stages and hops.

    A node is a device before its stage, or after it, at a cut; each device has one stage at most. ``inf`` where there
    is no chain.
    """
    stages, hops = steps_of(problem)
    count, devices, last = len(stages) + len(hops), len(problem.devices), len(problem.layers)
    if not stages:
        return math.inf
    rows: dict[tuple[str, int, int], dict[int, float]] = {}
    for column, (device, start, stop, _) in enumerate(stages):
        rows.setdefault(("before", device, start), {})[column] = -1
        rows.setdefault(("after", device, stop), {})[column] = 1
        rows.setdefault(("once", device, 0), {})[column] = 1
    for column, (a, b, cut, _) in enumerate(hops, len(stages)):
        rows.setdefault(("after", a, cut), {})[column] = -1
        rows.setdefault(("before", b, cut), {})[column] = 1
    begin = {column: 1.0 for column, (_, start, _, _) in enumerate(stages) if start == 0}
    listed = [row for (kind, _, cut), row in rows.items() if kind != "once" and 0 < cut < last]
    once = [rows["once", device, 0] for device in range(devices) if ("once", device, 0) in rows]
    seconds = np.array([each[3] for each in [*stages, *hops]])
    exact, loose = matrix([*listed, begin], count + 1), matrix(once, count + 1)
    constraints = [
        LinearConstraint(exact, *[np.array([0.0] * len(listed) + [1.0])] * 2),
        LinearConstraint(loose, -np.inf, 1.0),
    ]
    cost = np.append(seconds, 0.0)
    if objective is Objective.THROUGHPUT:  # the last variable is no less than any step that is taken
        cost = np.append(np.zeros(count), 1.0)
        slowest = matrix([{column: each, count: -1.0} for column, each in enumerate(seconds)], count + 1)
        constraints.append(LinearConstraint(slowest, -np.inf, 0.0))
    bounds = Bounds(0.0, np.append(np.ones(count), np.inf))
    found = milp(cost, integrality=np.append(np.ones(count), 0), bounds=bounds, constraints=constraints)
    return float(found.fun) if found.x is not None else math.inf


def matrix(rows: list[dict[int, float]], width: int) -> coo_array:
    """Rows as a sparse matrix."""
    entries = [(value, row, column) for row, each in enumerate(rows) for column, value in each.items()]
    values, where, columns = (np.array(each) for each in zip(*entries, strict=True))
    return coo_array((values, (where.astype(int), columns.astype(int))), shape=(len(rows), width))


def disagreements(seed: int) -> list[str]:
    """Where the partitioner and HiGHS differ on a random problem."""
    problem, wrong = random_problem(seed), []
    for objective in (Objective.LATENCY, Objective.THROUGHPUT):
        least = best_value(problem, objective)
        try:
            value = partition(problem, objective).value
        except DoesNotFit:
            value = math.inf
        if not math.isclose(value, least, rel_tol=1e-6, abs_tol=1e-9):
            wrong.append(f"seed {seed}, {objective}: {value} s, HiGHS {least} s")
    return wrong


if __name__ == "__main__":
    main(disagreements)
