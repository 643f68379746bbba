"""Layered drawing of a directed acyclic graph, top to bottom (Sugiyama, Tagawa, Toda 1981).

Ranks by longest path, order within a rank by barycentres, x by four alignments whose median is taken (Brandes and Köpf,
"Fast and Simple Horizontal Coordinate Assignment", 2001). An edge over several ranks gets a lane of its own, and
lanes stay straight: this is what keeps residual connections beside the ops and not across them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LANE = 14.0
"""Width of a lane, in pixels."""

ARROW = 7.0
"""Room for an arrow head above a node."""

STRAIGHT_GAP = 0.68
"""Share of the gap between ranks that is left where all edges go straight down."""

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


def layered(sizes: Sequence[Point], edges: Sequence[tuple[int, int]], gap: Point = (20.0, 25.0)) -> Layout:
    """Lay out nodes of the given ``sizes`` (width, height).

    ``edges`` go from lower to higher numbers. ``gap`` is the space between neighbours, and between ranks.
    """
    net = _net(sizes, edges)
    _order(net)
    x = _coordinates(net, gap[0])
    _centre_pairs(net, x, gap[0])
    _straighten(net, x, gap[0] * 0.6)
    left = min((x[v] - net.width[v] / 2 for v in range(len(x))), default=0.0)
    x = [value - left for value in x]
    tops, heights, y = [], [], 0.0
    for level, rank in enumerate(net.ranks):
        height = max((sizes[v][1] for v in rank if v < net.real), default=0.0)
        tops.append(y)
        heights.append(height)
        y += height + (gap[1] if _bends(net, level, x) else gap[1] * STRAIGHT_GAP)
    centres = [(x[v], tops[net.rank[v]] + heights[net.rank[v]] / 2) for v in range(net.real)]
    routes = _routes(net, sizes, edges, x, centres, tops, heights)
    width = max((x[v] + net.width[v] / 2 for v in range(len(x))), default=0.0)
    return Layout(centres, routes, width, tops[-1] + heights[-1] if tops else 0.0)


def _bends(net: _Net, level: int, x: Sequence[float]) -> bool:
    """Whether an edge below the rank ``level`` goes sideways, or several meet, so that it takes room."""
    return any(
        len(net.down[v]) > 1 or len(net.up[w]) > 1 or abs(x[v] - x[w]) > 1
        for v in net.ranks[level]
        for w in net.down[v]
    )


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
        for a, b in pairwise(chain):
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
            keys = {v: _mean([place[u] for u in _widest(net, near[v])], place[v]) for v in rank}
            rank.sort(key=keys.__getitem__)
            place.update({v: i for i, v in enumerate(rank)})
        crossings = _crossings(net)
        if crossings < fewest:
            best, fewest = [list(rank) for rank in net.ranks], crossings
    net.ranks = best


def _widest(net: _Net, near: Sequence[int]) -> list[int]:
    """The neighbours that a vertex is placed by: real nodes before pills, pills before lanes."""
    width = max((net.width[u] for u in near), default=0.0)
    return [u for u in near if net.width[u] > 0.8 * width]


def _mean(values: Sequence[int], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _crossings(net: _Net) -> int:
    total = 0
    for upper, lower in pairwise(net.ranks):
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
    for upper, lower in pairwise(net.ranks):
        above, below = ({v: i for i, v in enumerate(rank)} for rank in (upper, lower))
        edges = [(v, w) for v in upper for w in net.down[v]]
        lanes = [(above[v], below[w]) for v, w in edges if v >= net.real and w >= net.real]
        for v, w in edges:
            crosses = any((above[v] - a) * (below[w] - b) < 0 for a, b in lanes)
            if crosses and (v < net.real or w < net.real):
                found |= {(v, w), (w, v)}
    return found


def _align(net: _Net, ranks: list[list[int]], near: list[list[int]], blocked: set[tuple[int, int]]) -> list[int]:
    """The topmost vertex of the vertical run that each vertex joins; lanes only join lanes."""
    root, after = list(range(len(net.rank))), list(range(len(net.rank)))
    place = {v: i for rank in ranks for i, v in enumerate(rank)}
    for rank in ranks:
        last = -1
        for v in rank:
            alike = [u for u in _widest(net, near[v]) if v < net.real or u >= net.real]
            others = sorted(alike, key=place.__getitem__)
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
        for a, b in pairwise(rank):
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


def _centre_pairs(net: _Net, x: list[float], gap: float) -> None:
    """Centre a diamond (gate and up, between norm and glu) under its top, moving outer lanes aside to make room."""
    outer = {
        v: chain[1:-1]
        for chain in net.chains
        for v in chain[1:-1]
        if all(net.ranks[net.rank[u]][-1] == u for u in chain[1:-1])
    }
    for rank in net.ranks:
        for a, b in pairwise(rank):
            fed, feeds = ({u for v in (a, b) for u in near[v]} for near in (net.up, net.down))
            only = {len(net.up[v]) == len(net.down[v]) == 1 for v in (a, b)} == {True}
            if max(a, b) >= net.real or not only or len(fed) != 1 or len(feeds) != 1 or max(fed) >= net.real:
                continue
            shift = x[fed.pop()] - (x[a] + x[b]) / 2
            last = rank.index(b) + 1
            lane = rank[last] if shift > 0 and last < len(rank) else None
            if lane in outer:
                over = x[b] + shift + (net.width[b] + net.width[lane]) / 2 + gap - x[lane]
                for u in outer[lane] if over > 0 else ():
                    x[u] += over
            first = rank.index(a) - 1
            beside = [(a, rank[first])] if first >= 0 else []
            beside += [(b, rank[last])] if last < len(rank) else []
            if all(abs(x[v] + shift - x[u]) >= (net.width[u] + net.width[v]) / 2 + gap / 2 for v, u in beside):
                x[a], x[b] = x[a] + shift, x[b] + shift


def _straighten(net: _Net, x: list[float], reach: float) -> None:
    """Move nodes that almost lie over their middle user, and lanes under their source or over their target: no jogs."""
    for rank in reversed(net.ranks):
        for i, v in enumerate(rank):
            below = sorted(x[w] for w in net.down[v] if w < net.real) if v < net.real else []
            shift = below[len(below) // 2] - x[v] if len(below) % 2 else 0.0
            besides = [rank[j] for j in (i - 1, i + 1) if 0 <= j < len(rank)]
            room = all(abs(x[v] + shift - x[u]) >= (net.width[u] + net.width[v]) / 2 + LANE / 2 for u in besides)
            if 0 < abs(shift) <= 2 * reach and room:
                x[v] += shift
    for source, *lanes, target in net.chains:
        for end in (source, target):
            if lanes and 0 < abs(x[lanes[0]] - x[end]) <= reach:
                for lane in lanes:
                    x[lane] = x[end]
                break


def _routes(
    net: _Net,
    sizes: Sequence[Point],
    edges: Sequence[tuple[int, int]],
    x: list[float],
    centres: list[Point],
    tops: list[float],
    heights: list[float],
) -> list[list[Point]]:
    """The points of each edge: from under its source, down its lane, to the top of its target.

    Between ranks an edge goes sideways on a line of its own source, so that edges of two sources never run together.
    """
    bottoms = [top + height for top, height in zip(tops, heights, strict=True)]
    arriving: dict[int, list[int]] = {}
    for number, (_, target) in enumerate(edges):
        arriving.setdefault(target, []).append(number)
    entry: dict[int, float] = {}
    for target, numbers in arriving.items():
        numbers.sort(key=lambda number: x[net.chains[number][-2]])
        step = min(28.0, (sizes[target][0] - 24) / len(numbers))
        straight = [i for i, number in enumerate(numbers) if abs(x[net.chains[number][-2]] - x[target]) < 1]
        middle = straight[0] if straight and len(numbers) < 4 else (len(numbers) - 1) / 2
        entry.update({number: x[target] + (i - middle) * step for i, number in enumerate(numbers)})
    track = _tracks(net, x)
    routes = []
    for number, (source, target) in enumerate(edges):
        chain = net.chains[number]
        points = [(x[source], centres[source][1] + sizes[source][1] / 2)]
        for a, b in pairwise(chain):
            level, end = net.rank[a], x[b] if b != target else entry[number]
            start = points[-1][0]
            if abs(start - end) > 0.5:
                side = bottoms[level] + (tops[level + 1] - bottoms[level] - ARROW) * track[a]
                points += [(start, side), (end, side)]
            points.append((end, tops[level + 1]))
            if b != target:
                points.append((end, bottoms[level + 1]))
        points[-1] = (entry[number], centres[target][1] - sizes[target][1] / 2)
        routes.append(points)
    return routes


def _tracks(net: _Net, x: Sequence[float]) -> dict[int, float]:
    """How far down the gap below its rank (0 to 1) each vertex's edges go sideways."""
    found: dict[int, float] = {}
    for rank in net.ranks:
        users = [v for v in rank if net.down[v]]
        reach = {v: max(abs(x[w] - x[v]) for w in net.down[v]) for v in users}
        bent = sorted((v for v in users if reach[v] > 16), key=lambda v: reach[v])
        found.update(dict.fromkeys(users, 0.5))
        found.update({v: (i + 1) / (len(bent) + 1) for i, v in enumerate(bent)})
    return found
