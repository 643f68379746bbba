"""Placements built for a rate: chains of stages, each of one node or of several equal ones that share the tokens.

For a rate F, nodes joined by links of at least F form regions. Inside one, nodes are taken alone or in groups of equal
nodes, whichever runs more layers at F. Where a path leaves a region for another over slow links, the stages on both
sides are groups of a and b nodes such that a * b links carry F. The regions' order and the groups' sizes are chosen by
dynamic programming for most layers; the largest F with enough layers wins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import networkx as nx

from labinfer.compiler.partition.network import CLOSE, SINK, SOURCE, Network, max_flow

MAX_GROUP = 6  # nodes in a group at the end of a region
MAX_REGIONS = 9  # regions of which all orders are tried

Kind = tuple[float, ...]
Group = tuple[Kind, int, int]  # the rates of its nodes, how many there are, how many layers they hold


def most_layers(rates: Kind, needed: float) -> int:
    """How many layers a node can hold and still have the needed rate."""
    return max((k for k, rate in enumerate(rates, 1) if rate >= needed), default=0)


@dataclass
class Region:
    """Nodes that exchange F tokens/s with each other."""

    flow: float
    nodes: list[str]
    kinds: dict[Kind, int] = field(default_factory=dict)

    @cached_property
    def shares(self) -> dict[Kind, list[tuple[int, tuple[int, ...]]]]:
        """For each kind and number of nodes: the most layers, and the sizes of the groups that run them."""
        result = {}
        for kind, count in self.kinds.items():
            best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
            by_size = [0, *(most_layers(kind, self.flow / size) for size in range(1, count + 1))]
            for n in range(1, count + 1):
                options = [best[n - 1]]
                for size, layers in enumerate(by_size[: n + 1]):
                    if layers:
                        options.append((best[n - size][0] + layers, (*best[n - size][1], size)))
                best.append(max(options, key=lambda option: option[0]))
            result[kind] = best
        return result

    @cached_property
    def chains(self) -> dict[tuple[int, int], tuple[int, list[Group]]]:
        """For the sizes of the first and the last group: the most layers, and the groups in order."""
        result: dict[tuple[int, int], tuple[int, list[Group]]] = {}
        for first, last in product(range(1, MAX_GROUP + 1), repeat=2):
            for one, other in product(self.kinds, repeat=2):
                found = self._chain((one, first), (other, last))
                if found and found[0] > result.get((first, last), (0, []))[0]:
                    result[first, last] = found
        for kind, count in self.kinds.items():
            for size in range(1, min(count, MAX_GROUP) + 1):
                layers = most_layers(kind, self.flow / size)
                if layers > result.get((size, size), (0, []))[0]:
                    result[size, size] = layers, [(kind, size, layers)]
        return result

    def _chain(self, first: tuple[Kind, int], last: tuple[Kind, int]) -> tuple[int, list[Group]] | None:
        left = dict(self.kinds)
        ends: list[Group] = []
        for kind, size in (first, last):
            left[kind] -= size
            ends.append((kind, size, most_layers(kind, self.flow / size)))
        if min(left.values()) < 0 or not all(layers for _, _, layers in ends):
            return None
        inner = [
            (kind, size, most_layers(kind, self.flow / size))
            for kind, count in left.items()
            for size in self.shares[kind][count][1]
        ]
        chain = [ends[0], *inner, ends[1]]
        return sum(layers for _, _, layers in chain), chain


def regions(network: Network, flow: float) -> list[Region]:
    """The nodes that can carry anything of a flow, by regions; the ones that can do most work first."""
    graph = nx.Graph()
    graph.add_nodes_from(network.rates)
    graph.add_edges_from(
        pair for pair, rate in network.links.items() if rate >= flow and network.link(pair[1], pair[0]) >= flow
    )
    graph.remove_nodes_from((SOURCE, SINK))
    found = []
    for members in nx.connected_components(graph):
        region = Region(flow, sorted(members))
        for name in region.nodes:
            region.kinds[network.rates[name]] = region.kinds.get(network.rates[name], 0) + 1
        found.append(region)
    work = {id(region): sum(share[-1][0] for share in region.shares.values()) for region in found}
    return sorted(found, key=lambda region: -work[id(region)])[:MAX_REGIONS]


def placement_for(network: Network, flow: float, *, careful: bool) -> dict[str, tuple[int, int]] | None:
    """A placement of groups that should carry the flow, or None where no order of regions runs all layers."""
    found = regions(network, flow)
    slow = [
        [_between(network, one, other, careful=careful) if one is not other else 0.0 for other in found]
        for one in found
    ]
    best: dict[tuple[frozenset[int], int, int], tuple[int, list[tuple[int, tuple[int, int]]]]] = {}
    for index, region in enumerate(found):
        for sizes, (layers, _) in region.chains.items():
            state = (frozenset([index]), index, sizes[1])
            if layers > best.get(state, (0, []))[0]:
                best[state] = (layers, [(index, sizes)])
    level = dict(best)
    while level:
        longer: dict[tuple[frozenset[int], int, int], tuple[int, list[tuple[int, tuple[int, int]]]]] = {}
        for (used, last, senders), (layers, path) in level.items():
            for index, region in enumerate(found):
                if index in used:
                    continue
                for sizes, (more, _) in region.chains.items():
                    state = (used | {index}, index, sizes[1])
                    carried = senders * sizes[0] * slow[last][index] >= flow
                    if carried and layers + more > longer.get(state, (0, []))[0]:
                        longer[state] = (layers + more, [*path, (index, sizes)])
        best |= longer
        level = longer
    layers, path = max(best.values(), key=lambda option: (option[0], -len(option[1])), default=(0, []))
    if layers < network.layers:
        return None
    enough = min((option for option in best.values() if option[0] >= network.layers), key=lambda option: len(option[1]))
    return _place(network, [(found[index], sizes) for index, sizes in enough[1]])


def _between(network: Network, one: Region, other: Region, *, careful: bool) -> float:
    """The rate to count on for a link from one region to another: the slowest of them, or the mean."""
    rates = [network.link(a, b) for a in one.nodes for b in other.nodes]
    return min(rates) if careful else sum(rates) / len(rates)


def _place(network: Network, path: list[tuple[Region, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Name the nodes of the groups along a path, nearest to the ones before; layers that are too many are cut off.

    Groups at the ends of a region keep a layer at least, so that they can share its slow links; others may be left out.
    """
    placement: dict[str, tuple[int, int]] = {}
    surplus = sum(region.chains[sizes][0] for region, sizes in path) - network.layers
    done, before = 0, [SOURCE]
    for region, sizes in path:
        groups, spare = region.chains[sizes][1], list(region.nodes)
        for position, (kind, size, layers) in enumerate(groups):
            taken = min(surplus, layers - (position in (0, len(groups) - 1)))
            surplus -= taken
            if taken == layers:
                continue
            able = [name for name in spare if network.rates[name] == kind]
            nearest = sorted(able, key=lambda name: -sum(network.link(other, name) for other in before))[:size]
            placement |= dict.fromkeys(nearest, (done, done + layers - taken))
            spare, before = [name for name in spare if name not in nearest], nearest
            done += layers - taken
    return placement if done == network.layers else {}


def best_groups(network: Network, bound: float) -> tuple[float, dict[str, tuple[int, int]]]:
    """The placement of groups of the largest rate found, by bisection over the rates at which something changes."""
    rates = {rate for table in network.rates.values() for rate in table} | set(network.links.values())
    sizes = range(1, max(MAX_GROUP**2, len(network.rates)) + 1)
    candidates = sorted({rate * size for rate in rates for size in sizes if rate * size <= bound})
    whole = {name: (0, network.layers) for name, table in network.rates.items() if len(table) == network.layers}
    best = max_flow(network, whole), whole
    for careful in (True, False):
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high) // 2
            placement = placement_for(network, candidates[middle], careful=careful) or {}
            reached = max_flow(network, placement)
            best = max(best, (reached, placement), key=lambda found: found[0])
            enough = placement if careful else reached >= candidates[middle] * (1 - CLOSE)
            low, high = (middle + 1, high) if enough else (low, middle)
    return best
