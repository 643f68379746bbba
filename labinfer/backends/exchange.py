"""The interface of what ranks of a tensor-parallel group exchange their parts through."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol


class RankPeers(Protocol):
    """The ranks that run a stage together, as one of them sees them."""

    def leave(self) -> None:
        """Compute no more: whoever waits for this rank goes on, and finds out by ``check``."""

    def together(self) -> AbstractContextManager[None]:
        """Within, this rank runs a step for which it is ready, as all others are: what it runs may wait for theirs."""

    def check(self) -> None:
        """Raise ``LabinferError`` where a rank has left, so that what was computed since is not right."""


class Exchange(Protocol):
    """Memory of several devices through which they exchange parts: ``peers`` for each of them, in order."""

    peers: Sequence[RankPeers]

    def close(self) -> None:
        """Give the memory back."""
