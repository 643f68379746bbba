"""How often each token occurs in a prompt and in its answer: what penalties look at."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class TokenCounts:
    """The distinct tokens of a prompt and an answer, and how often each is in the answer.

    Adding a token takes constant time, and memory goes with the distinct tokens, not with the vocabulary.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self.places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.fromiter(self.places, np.int64, len(self.places))
        self._counts = np.zeros(len(self.places), np.int32)

    @property
    def ids(self) -> np.ndarray:
        """The distinct tokens, int64."""
        return self._ids[: len(self.places)]

    @property
    def counts(self) -> np.ndarray:
        """How often each of ``ids`` is in the answer, int32."""
        return self._counts[: len(self.places)]

    def add(self, token: int) -> None:
        """One more token of the answer."""
        place = self.places.setdefault(token, len(self.places))
        if place == len(self._ids):
            more = max(64, place)
            self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, np.int32)])
        self._ids[place] = token
        self._counts[place] += 1

    def copy(self) -> TokenCounts:
        """Counts of their own that go on from here."""
        other = TokenCounts(())
        other.places, other._ids, other._counts = dict(self.places), self._ids.copy(), self._counts.copy()
        return other
