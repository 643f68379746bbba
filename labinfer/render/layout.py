"""Layered drawing of a directed acyclic graph, top to bottom (Sugiyama, Tagawa, Toda 1981).

Ranks by longest path, order within a rank by barycentres, x by four alignments whose median is taken (Brandes and Köpf,
"Fast and Simple Horizontal Coordinate Assignment", 2001). An edge over several ranks gets a lane of its own there, which
stays straight; this is what keeps residual connections beside the ops and not across them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LANE = 14.0
"""Width of a lane, in pixels."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies, in pixels: the centre of each node, the points of each edge, and the size of the whole."""

    centres: list[Point]
    routes: list[list[Point]]
    width: float
    height: float


@dataclass(slots=True)
class _Net:
    """Nodes, then lanes, with the edges between neighbouring ranks."""

    rank: list[int]
    width: list[float]
    real: int
    up: list[list[int]]
    down: list[list[int]]
    chains: list[list[int]]
    ranks: list[list[int]]


def layered(sizes: Sequence[Point], edges: Sequence[tuple[int, int]], gap: Point = (20.0, 22.0)) -> Layout:
    """Lay out nodes of the given ``sizes`` (width, height).

    ``edges`` go from lower to higher numbers. ``gap`` is the space between neighbours, and between ranks.
    """
    net = _net(sizes, edges)
    _order(net)
    x = _coordinates(net, gap[0])
    left = min((x[v] - net.width[v] / 2 for v in range(len(x))), default=0.0)
    x = [value - left for value in x]
    tops, heights, y = [], [], 0.0
    for rank in net.ranks:
        height = max((sizes[v][1] for v in rank if v < net.real), default=0.0)
        tops.append(y)
        heights.append(height)
        y += height + gap[1]
    centres = [(x[v], tops[net.rank[v]] + heights[net.rank[v]] / 2) for v in range(net.real)]
    routes = _routes(net, sizes, edges, x, centres, tops, heights)
    width = max((x[v] + net.width[v] / 2 for v in range(len(x))), default=0.0)
    return Layout(centres, routes, width, max(0.0, y - gap[1]))


def _net(sizes: Sequence[Point], edges: Sequence[tuple[int, int]]) -> _Net:
    count = len(sizes)
    rank = [0] * count
    for source, target in sorted(edges, key=lambda edge: edge[1]):
        rank[target] = max(rank[target], rank[source] + 1)
    nearest: dict[int, int] = {}
    for source, target in edges:
        nearest[source] = min(nearest.get(source, rank[target]), rank[target])
    fed = {target for _, target in edges}
    for source, first in nearest.items():  # what nothing feeds stands right above its first user
        if source not in fed:
            rank[source] = first - 1
    net = _Net(rank, [size[0] for size in sizes], count, [[] for _ in sizes], [[] for _ in sizes], [], [])
    for source, target in edges:
        chain = [source]
        for level in range(rank[source] + 1, rank[target]):
            chain.append(len(net.rank))
            net.rank.append(level)
            net.width.append(LANE)
            net.up.append([])
            net.down.append([])
        chain.append(target)
        for a, b in zip(chain, chain[1:], strict=False):
            net.down[a].append(b)
            net.up[b].append(a)
        net.chains.append(chain)
    net.ranks = [[] for _ in range(max(net.rank, default=-1) + 1)]
    for v, level in enumerate(net.rank):
        net.ranks[level].append(v)
    return net


def _order(net: _Net) -> None:
    """Order each rank so that few edges cross: sweeps down and up by the mean place of neighbours, the best is kept."""
    sweeps = 12 if len(net.rank) < 1500 else 2
    best, fewest = [list(rank) for rank in net.ranks], _crossings(net)
    for sweep in range(sweeps):
        down = sweep % 2 == 0
        place = {v: i for rank in net.ranks for i, v in enumerate(rank)}
        for level in range(len(net.ranks)) if down else reversed(range(len(net.ranks))):
            near = net.up if down else net.down
            rank = net.ranks[level]
            keys = {v: sum(place[u] for u in near[v]) / len(near[v]) if near[v] else float(place[v]) for v in rank}
            rank.sort(key=lambda v: keys[v])  # noqa: B023 - used at once
            place.update({v: i for i, v in enumerate(rank)})
        crossings = _crossings(net)
        if crossings < fewest:
            best, fewest = [list(rank) for rank in net.ranks], crossings
    net.ranks = best


def _crossings(net: _Net) -> int:
    total = 0
    for upper, lower in zip(net.ranks, net.ranks[1:], strict=False):
        place = {v: i for i, v in enumerate(lower)}
        ends = [place[w] for v in upper for w in sorted(net.down[v], key=place.__getitem__)]
        total += sum(a > b for i, a in enumerate(ends) for b in ends[i + 1 :])
    return total


def _coordinates(net: _Net, gap: float) -> list[float]:
    """Brandes and Köpf: align each vertex with a median neighbour, pack, four ways; the mean of the middle two wins."""
    blocked = _conflicts(net)
    ways: list[tuple[bool, list[float]]] = []
    for near, ranks in ((net.up, net.ranks), (net.down, net.ranks[::-1])):
        for flip in (False, True):
            turned = [rank[::-1] if flip else rank for rank in ranks]
            root = _align(net, turned, near, blocked)
            x = _compact(net, turned, root, gap)
            ways.append((flip, [-value for value in x] if flip else x))

    def extent(x: list[float]) -> Point:
        half = net.width
        return min(x[v] - half[v] / 2 for v in range(len(x))), max(x[v] + half[v] / 2 for v in range(len(x)))

    if not net.rank:
        return []
    low, high = min((extent(x) for _, x in ways), key=lambda pair: pair[1] - pair[0])
    shifted = []
    for flip, x in ways:
        shift = high - extent(x)[1] if flip else low - extent(x)[0]
        shifted.append([value + shift for value in x])
    middle = [sorted(values)[1:3] for values in zip(*shifted, strict=True)]
    return [(a + b) / 2 for a, b in middle]


def _conflicts(net: _Net) -> set[tuple[int, int]]:
    """Edges that cross a lane between two ranks: the lane stays straight, they do not count for alignment."""
    found: set[tuple[int, int]] = set()
    for upper, lower in zip(net.ranks, net.ranks[1:], strict=False):
        above, below = ({v: i for i, v in enumerate(rank)} for rank in (upper, lower))
        edges = [(v, w) for v in upper for w in net.down[v]]
        lanes = [(above[v], below[w]) for v, w in edges if v >= net.real and w >= net.real]
        for v, w in edges:
            if v < net.real or w < net.real:
                if any((above[v] - a) * (below[w] - b) < 0 for a, b in lanes):
                    found.add((v, w))
                    found.add((w, v))
    return found


def _align(net: _Net, ranks: list[list[int]], near: list[list[int]], blocked: set[tuple[int, int]]) -> list[int]:
    """The topmost vertex of the vertical run that each vertex joins. Nodes follow nodes and lanes follow lanes first."""
    root, after = list(range(len(net.rank))), list(range(len(net.rank)))
    place = {v: i for rank in ranks for i, v in enumerate(rank)}
    for rank in ranks:
        last = -1
        for v in rank:
            alike = [u for u in near[v] if (u < net.real) == (v < net.real)]
            others = sorted(alike or (near[v] if v < net.real else ()), key=place.__getitem__)
            for u in dict.fromkeys(others[i] for i in ((len(others) - 1) // 2, len(others) // 2) if others):
                if after[v] == v and last < place[u] and (u, v) not in blocked:
                    after[u], root[v] = v, root[u]
                    after[v] = root[v]
                    last = place[u]
    return root


def _compact(net: _Net, ranks: list[list[int]], root: list[int], gap: float) -> list[float]:
    """Leftmost x of each run, then each run moved right as far as its right neighbours allow."""
    before: dict[int, dict[int, float]] = {r: {} for r in set(root)}
    behind: dict[int, dict[int, float]] = {r: {} for r in set(root)}
    for rank in ranks:
        for a, b in zip(rank, rank[1:], strict=False):
            distance = (net.width[a] + net.width[b]) / 2 + gap
            before[root[b]][root[a]] = max(before[root[b]].get(root[a], 0.0), distance)
            behind[root[a]][root[b]] = max(behind[root[a]].get(root[b], 0.0), distance)
    order, waiting = [], {r: len(before[r]) for r in before}
    ready = [r for r in before if not waiting[r]]
    while ready:
        r = ready.pop()
        order.append(r)
        for b in behind[r]:
            waiting[b] -= 1
            if not waiting[b]:
                ready.append(b)
    x: dict[int, float] = {}
    for r in order:
        x[r] = max((x[a] + distance for a, distance in before[r].items()), default=0.0)
    for r in reversed(order):
        if behind[r]:
            x[r] = max(x[r], min(x[b] - distance for b, distance in behind[r].items()))
    return [x[r] for r in root]


def _routes(
    net: _Net,
    sizes: Sequence[Point],
    edges: Sequence[tuple[int, int]],
    x: list[float],
    centres: list[Point],
    tops: list[float],
    heights: list[float],
) -> list[list[Point]]:
    """The points of each edge: from under its source, down its lane, to the top of its target."""
    arriving: dict[int, list[int]] = {}
    for number, (_, target) in enumerate(edges):
        arriving.setdefault(target, []).append(number)
    entry: dict[int, float] = {}
    for target, numbers in arriving.items():
        numbers.sort(key=lambda number: x[net.chains[number][-2]])
        step = min(28.0, (sizes[target][0] - 24) / len(numbers))
        for i, number in enumerate(numbers):
            entry[number] = x[target] + (i - (len(numbers) - 1) / 2) * step
    routes = []
    for number, (source, target) in enumerate(edges):
        points = [(x[source], centres[source][1] + sizes[source][1] / 2)]
        for lane in net.chains[number][1:-1]:
            top = tops[net.rank[lane]]
            points += [(x[lane], top), (x[lane], top + heights[net.rank[lane]])]
        points.append((entry[number], centres[target][1] - sizes[target][1] / 2))
        routes.append(points)
    return routes
