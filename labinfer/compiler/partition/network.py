"""Plans in which stages are replicated and tokens take many paths: a placement of layers, and its maximum flow.

The formulation of Helix (ASPLOS 2025): every node holds one run of layers, a token visits nodes that hold adjoining
runs, and the rate of the whole is the maximum flow from source to sink through nodes and links of limited rate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

from labinfer.compiler.partition.maxflow import FlowGraph
from labinfer.errors import InvalidFile, Place

SOURCE, SINK = "source", "sink"
MAX_RATE = 1e15  # tokens/s, far beyond any link; much larger ones would overflow
SCALE = 1e6  # rates are rounded down to whole millionths of tokens/s, so that flows are exact
MAX_BYTES = 64 << 20
CLOSE = 1e-9  # relative difference that counts as none

_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
    StopIteration,
)

Placement = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Network:
    """Nodes that can hold layers, and links between them; all rates in tokens/s.

    ``rates[node][k - 1]`` is the rate of a node that holds k of the ``layers``; it cannot hold more than are listed.
    ``links`` maps (from, to) to a rate; tokens come from ``SOURCE`` and go to ``SINK``. A link not listed is not there.
    """

    layers: int
    rates: Mapping[str, tuple[float, ...]]
    links: Mapping[tuple[str, str], float]

    def link(self, source: str, target: str) -> float:
        """The rate of a link, 0 where there is none."""
        return self.links.get((source, target), 0.0)


def flow_graph(network: Network, placement: Placement) -> FlowGraph:
    """The graph whose maximum flow from ``SOURCE`` to ``SINK`` is the rate of a placement, in millionths of tokens/s.

    ``placement`` maps a node to its layers [start, stop). Each node is two vertices, (name, 0) and (name, 1), with its
    rate between them; a link joins nodes where one stops and the other starts.
    """
    starts: dict[int, list[str]] = {}
    for name, (start, _) in placement.items():
        starts.setdefault(start, []).append(name)
    edges: list[tuple[Hashable, Hashable, float]]
    edges = [(SOURCE, (name, 0), network.link(SOURCE, name)) for name in starts.get(0, ())]
    for name, (start, stop) in placement.items():
        edges.append(((name, 0), (name, 1), network.rates[name][stop - start - 1]))
        if stop == network.layers:
            edges.append(((name, 1), SINK, network.link(name, SINK)))
        edges += [((name, 1), (other, 0), network.link(name, other)) for other in starts.get(stop, ())]
    return FlowGraph(SOURCE, SINK, [(source, target, math.floor(rate * SCALE)) for source, target, rate in edges])


def max_flow(network: Network, placement: Placement) -> float:
    """The rate of a placement in tokens/s."""
    return flow_graph(network, placement).run() / SCALE


def upper_bound(network: Network) -> float:
    """A rate that no placement exceeds, replicated or not.

    Each token needs ``layers`` layers of work. A node that holds k of them does at most k for each token, and sees no
    more tokens than its rate, the links it has, and the rate F of the whole: F * layers <= sum of the best
    k * min(rate(k), links, F). The largest such F is found by bisection. Source and sink links bound F as well.
    """
    incoming, outgoing = dict.fromkeys(network.rates, 0.0), dict.fromkeys(network.rates, 0.0)
    for (source, target), rate in network.links.items():
        if target in incoming:
            incoming[target] += rate
        if source in outgoing:
            outgoing[source] += rate
    limits = {name: min(incoming[name], outgoing[name]) for name in network.rates}
    kinds: dict[tuple[tuple[float, ...], float], int] = {}
    for name, rates in network.rates.items():
        kinds[rates, limits[name]] = kinds.get((rates, limits[name]), 0) + 1

    def possible(flow: float) -> bool:
        done = sum(
            count * max((k * min(rate, limit, flow) for k, rate in enumerate(rates, 1)), default=0.0)
            for (rates, limit), count in kinds.items()
        )
        return done >= network.layers * flow

    low, high = 0.0, sum(network.link(SOURCE, name) for name in network.rates)
    high = min(high, sum(network.link(name, SINK) for name in network.rates))
    if possible(high):
        return high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return high


def read_network(path: Path, instance: str | None = None) -> tuple[str, Network]:
    """An instance of a JSON file, the first unless it is named, and its name.

    A file maps names of instances to ``{"layers": L, "nodes": {node: {"k": rate}}, "links": [[from, to, rate]]}``.
    Raises ``InvalidFile`` (``partition.file``) for anything else.
    """
    place = Place(str(path))
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("the file is larger than 64 MiB")
        data = json.loads(path.read_text("utf-8"))
        name = next(iter(data)) if instance is None else instance
        if name not in data:
            raise ValueError(f"there is no instance '{name}'; the file has {', '.join(data)}")
        given = data[name]
        rates = {node: _rates(by_count) for node, by_count in given["nodes"].items()}
        if reserved := {SOURCE, SINK} & rates.keys():
            raise ValueError(f"a node is called '{min(reserved)}', which stands for one end of every path")
        links = {(str(source), str(target)): _rate(rate) for source, target, rate in given["links"]}
        layers = given["layers"]
        if not isinstance(layers, int) or not 1 <= layers <= 10_000 or not rates:
            raise ValueError("an instance needs a node, and from 1 to 10000 layers")
        if unknown := {end for link in links for end in link} - {SOURCE, SINK, *rates}:
            raise ValueError(f"there is no node '{min(unknown)}' to link")
    except _UNREADABLE as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        remedy = 'write {"name": {"layers": 80, "nodes": {"a": {"1": 900.0}}, "links": [["source", "a", 1e6]]}}'
        raise InvalidFile(
            "partition.file", f"not a partition instance: {reason}", place=place, remedy=remedy
        ) from error
    return name, Network(layers, {node: table[:layers] for node, table in rates.items()}, links)


def _rate(value: object) -> float:
    rate = float(value) if isinstance(value, int | float) else -1.0
    if not 0 <= rate <= MAX_RATE:
        raise ValueError(f"{value!r} is no rate from 0 to {MAX_RATE:g}")
    return rate


def _rates(by_count: Mapping[str, object]) -> tuple[float, ...]:
    numbers = {int(count): _rate(rate) for count, rate in by_count.items()}
    if sorted(numbers) != list(range(1, len(numbers) + 1)):
        raise ValueError("the rates of a node must be given for 1, 2, 3, ... layers")
    return tuple(numbers[count] for count in sorted(numbers))
