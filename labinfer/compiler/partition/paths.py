"""Placements with replicas and many paths: the best found for a network, with a bound on any."""

from __future__ import annotations

import random
import time
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass

from labinfer.compiler.partition.groups import best_groups
from labinfer.compiler.partition.network import CLOSE, SCALE, Network, flow_graph, max_flow, upper_bound
from labinfer.errors import DoesNotFit


@dataclass(frozen=True, slots=True)
class Paths:
    """Where layers are held, and what flows.

    ``value`` and ``upper_bound`` are tokens/s, ``placement`` maps each used node to its layers [start, stop), ``flows``
    is the list of (from, to, tokens/s) of the used links, and ``seconds`` the time that the search took.
    """

    value: float
    upper_bound: float
    placement: Mapping[str, tuple[int, int]]
    flows: tuple[tuple[str, str, float], ...]
    seconds: float

    @property
    def gap(self) -> float:
        """By what part of the bound the value may be below the best; 0 means that it is optimal."""
        gap = 1 - self.value / self.upper_bound
        return gap if gap > CLOSE else 0.0

    def to_json(self) -> dict[str, object]:
        """The plan as plain data."""
        return {**asdict(self), "gap": self.gap}


def best_paths(network: Network, *, effort_seconds: float = 5.0) -> Paths:
    """The placement of most tokens/s found: groups of equal nodes, then local search while the bound is not met.

    Raises ``DoesNotFit`` (``partition.does-not-fit``) where no placement was found through which anything flows.
    """
    started = time.monotonic()
    bound = upper_bound(network)
    value, placement = best_groups(network, bound)
    if value < bound * (1 - CLOSE) and placement:
        value, placement = _improve(network, placement, value, bound, started + effort_seconds)
    if not value:
        raise DoesNotFit("partition.does-not-fit", f"no placement of {network.layers} layers lets a token through")
    graph = flow_graph(network, placement)
    graph.run()
    flows = [(_name(tail), _name(head), flow / SCALE) for tail, head, flow in graph.flows()]
    used = tuple(each for each in flows if each[0] != each[1])  # links, not the way through a node
    return Paths(value, bound, placement, used, time.monotonic() - started)


def _name(vertex: Hashable) -> str:
    return str(vertex[0] if isinstance(vertex, tuple) else vertex)


def _improve(
    network: Network, placement: dict[str, tuple[int, int]], value: float, bound: float, deadline: float
) -> tuple[float, dict[str, tuple[int, int]]]:
    """Small random changes, each kept unless it makes the flow less. The random numbers are seeded."""
    rng = random.Random(0)
    while value < bound * (1 - CLOSE) and time.monotonic() < deadline:
        changed = placement
        for _ in range(rng.choice((1, 1, 2, 3))):
            changed = _changed(network, changed, rng)
        flow = max_flow(network, changed)
        if flow >= value:
            value, placement = flow, changed
    return value, placement


def _changed(network: Network, placement: dict[str, tuple[int, int]], rng: random.Random) -> dict[str, tuple[int, int]]:
    """A neighbour of a placement: a cut moved by a layer, two nodes exchanged, or a node that holds what others do."""
    changed = dict(placement)
    names, spans = list(network.rates), list(placement.values())
    move = rng.random()
    if move < 0.3:
        cut, by = rng.choice(spans)[1], rng.choice((-1, 1))
        if cut < network.layers:
            for name, (start, stop) in placement.items():
                changed[name] = (start + by * (start == cut), stop + by * (stop == cut))
    elif move < 0.6:
        one, other = rng.choice(list(placement)), rng.choice(names)
        changed[other] = placement[one]
        if other in placement:
            changed[one] = placement[other]
        elif other != one:
            del changed[one]
    else:
        start, stop = rng.choice(spans)
        if rng.random() < 0.5:
            stop = rng.choice([end for _, end in spans if end > start])
        changed[rng.choice(names)] = (start, stop)
    fits = all(0 < stop - start <= len(network.rates[name]) for name, (start, stop) in changed.items())
    return changed if fits else placement
