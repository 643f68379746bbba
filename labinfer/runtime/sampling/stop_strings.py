"""Finds the texts that end an answer while it is being written."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """An automaton over ``stops``: it reads a text once, character by character, whatever pieces it comes in.

    The text stops where the first of them is complete, at the longest of those that are complete there. The work is
    linear in the text, and independent of how many stops there are.
    Aho and Corasick: Efficient string matching (CACM 1975).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth, self._fail = [0], [0]
        self._found: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()

    def _add(self, stop: str) -> None:
        node = 0
        for character in stop:
            if character not in self._next[node]:
                self._next[node][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._fail.append(0)
                self._found.append(None)
            node = self._next[node][character]
        self._found[node] = stop

    def _link(self) -> None:
        """Breadth first: where a node's text cannot go on, its longest suffix that begins a stop can."""
        queue = [0]
        for node in queue:
            for character, child in self._next[node].items():
                if node:
                    self._fail[child] = self.step(self._fail[node], character)
                if self._found[child] is None:
                    self._found[child] = self._found[self._fail[child]]
                queue.append(child)

    def step(self, node: int, character: str) -> int:
        """The node after one more character; 0 is where a text begins."""
        while character not in self._next[node]:
            if node == 0:
                return 0
            node = self._fail[node]
        return self._next[node][character]

    def depth(self, node: int) -> int:
        """Characters at the end of the text that may become a stop."""
        return self._depth[node]

    def found(self, node: int) -> str | None:
        """The stop that the text ends with."""
        return self._found[node]
