"""Placements with replicas and many paths: maximum flow, bounds, and the program that reads instances."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labinfer.compiler.partition.maxflow import FlowGraph
from labinfer.compiler.partition.network import SINK, SOURCE, Network, max_flow, read_network, upper_bound
from labinfer.compiler.partition.paths import best_paths
from labinfer.errors import DoesNotFit, InvalidFile

from .mutation import damaged

ROOT = Path(__file__).resolve().parent.parent


def network(layers: int, rates: dict[str, list[float]], link: float, slow: dict[tuple[str, str], float]) -> Network:
    links = {(a, b): link for a, b in product(rates, repeat=2) if a != b}
    links |= {(SOURCE, name): 1e9 for name in rates} | {(name, SINK): 1e9 for name in rates} | slow
    return Network(layers, {name: tuple(table) for name, table in rates.items()}, links)


@pytest.mark.parametrize("seed", range(20))
def test_maximum_flow_equals_networkx(seed: int) -> None:
    rng = random.Random(seed)
    edges = {(rng.randrange(9), rng.randrange(9)): rng.randrange(30) for _ in range(40)}
    graph = nx.DiGraph()
    graph.add_nodes_from((0, 8))
    graph.add_edges_from((a, b, {"capacity": capacity}) for (a, b), capacity in edges.items() if a != b)
    ours = FlowGraph(0, 8, [(a, b, capacity) for (a, b), capacity in edges.items() if a != b])
    assert ours.run() == nx.maximum_flow_value(graph, 0, 8)
    balance = dict.fromkeys(range(9), 0)
    for tail, head, flow in ours.flows():
        assert 0 < flow <= edges[tail, head]  # type: ignore[index]
        balance[tail] -= flow  # type: ignore[index]
        balance[head] += flow  # type: ignore[index]
    assert not any(balance[vertex] for vertex in range(1, 8))


@pytest.mark.parametrize("seed", range(25))
def test_no_placement_exceeds_the_bound(seed: int) -> None:
    """Every placement of up to four nodes on up to four layers."""
    rng = random.Random(seed)
    layers, names = rng.randint(1, 4), [f"n{i}" for i in range(rng.randint(1, 4))]
    rates = {name: sorted((rng.uniform(1, 20) for _ in range(rng.randint(1, 4))), reverse=True) for name in names}
    slow = {(a, b): rng.uniform(1, 20) for a, b in product(names, repeat=2) if a != b and rng.random() < 0.5}
    made = network(layers, {name: table[:layers] for name, table in rates.items()}, 50.0, slow)
    spans = [
        [(a, b) for a in range(layers) for b in range(a + 1, layers + 1) if b - a <= len(made.rates[n])] for n in names
    ]
    best = max(max_flow(made, dict(zip(names, choice, strict=True))) for choice in product(*spans))
    assert best <= upper_bound(made) * (1 + 1e-9)
    try:
        found = best_paths(made, effort_seconds=0.05)
    except DoesNotFit:
        assert best == 0
        return
    assert found.value == max_flow(made, found.placement) <= best
    assert found.value >= best / 2


def test_slow_links_are_shared_by_replicas() -> None:
    """Two fast nodes in one region, four in another; one link carries 10 tokens/s, a stage of two nodes gets 20."""
    rates = {f"a{i}": [40.0, 20.0] for i in range(2)} | {f"b{i}": [40.0, 20.0] for i in range(4)}
    slow = {(x, y): 10.0 for x, y in product(rates, repeat=2) if x[0] != y[0]}
    plan = best_paths(network(7, rates, 100.0, slow))
    assert plan.value == 20.0  # a chain would be held to 10
    assert sum(flow for source, _, flow in plan.flows if source == SOURCE) == pytest.approx(plan.value)


def test_a_met_bound_ends_the_search() -> None:
    plan = best_paths(network(6, {f"n{i}": [9.0, 6.0, 3.0] for i in range(3)}, 100.0, {}), effort_seconds=60)
    assert (plan.value, plan.gap) == (6.0, 0.0)
    assert plan.seconds < 30


def test_few_layers_on_many_nodes_are_replicated() -> None:
    plan = best_paths(network(2, {f"n{i}": [10.0, 4.0] for i in range(6)}, 100.0, {}), effort_seconds=0.2)
    assert plan.value == 30.0


INSTANCE = {
    "layers": 3,
    "nodes": {"a": {"1": 9.0, "2": 5.0}, "b": {"1": 7.0}},
    "links": [["source", "a", 1e3], ["a", "b", 50.0], ["b", "sink", 1e3]],
}


def helix(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "partition" / "helix.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_program_prints_objective_bound_and_seconds(tmp_path: Path) -> None:
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"other": {**INSTANCE, "layers": 9}, "small": INSTANCE}))
    row = json.loads(helix(str(file), "small", "--placement").stdout)
    assert (row["objective"], row["instance"], row["placement"]) == (5.0, "small", {"a": [0, 2], "b": [2, 3]})
    assert row["bound"] >= 5.0
    assert row["seconds"] < 60
    assert helix(str(file)).returncode == 4  # nine layers do not fit
    assert "no instance 'third'" in helix(str(file), "third").stderr


@pytest.mark.parametrize("rate", [1e16, 1e303, -1.0, float("inf")])
def test_rates_that_no_link_has_are_refused(rate: float, tmp_path: Path) -> None:
    file = tmp_path / "instance.json"
    file.write_text(json.dumps({"small": {**INSTANCE, "links": [["source", "a", rate]]}}))
    with pytest.raises(InvalidFile, match="is no rate"):
        read_network(file)


@pytest.mark.parametrize("name", ["source", "sink"])
def test_a_node_cannot_be_an_end(name: str, tmp_path: Path) -> None:
    file = tmp_path / "instance.json"
    file.write_text(json.dumps({"small": {**INSTANCE, "nodes": {**INSTANCE["nodes"], name: {"1": 1.0}}}}))
    with pytest.raises(InvalidFile, match=f"a node is called '{name}'"):
        read_network(file)


@settings(max_examples=200, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_mutated_instances_are_read_or_refused(rng: random.Random, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("instances") / "instance.json"
    file.write_text(json.dumps(damaged({"small": INSTANCE}, rng)))
    with suppress(InvalidFile, DoesNotFit):
        best_paths(read_network(file)[1], effort_seconds=0.01)
