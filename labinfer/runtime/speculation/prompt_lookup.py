"""Guesses from the text itself: what followed the last few tokens when they were there before.

Saxena, Prompt Lookup Decoding (2023). Good where an answer repeats its prompt: edits, summaries, quotations.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing

import numpy as np

from labinfer.runtime.request import Sequence


class PromptLookup:
    """Looks up the last ``longest`` tokens of a sequence, or fewer, down to ``shortest``."""

    def __init__(self, num_tokens: int, longest: int, shortest: int) -> None:
        self.num_tokens, self.longest, self.shortest = num_tokens, longest, shortest

    def propose(self, sequences: Listing[Sequence], most: Listing[int]) -> list[np.ndarray]:
        """Up to ``most`` tokens for each of ``sequences``, int32."""
        return [self.continuation(each.token_ids, count) for each, count in zip(sequences, most, strict=True)]

    def release(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""

    def continuation(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """What followed the end of ``tokens`` where it was there before, at the latest place of the longest match.

        A text that begins to repeat itself goes on so: the continuation may reach into itself.
        """
        last, ends = len(tokens) - 1, np.flatnonzero(tokens[:-1] == tokens[-1])
        length = 1
        while length < self.longest and len(ends):
            longer = ends[ends >= length]
            longer = longer[tokens[longer - length] == tokens[last - length]]
            if not len(longer):
                break
            ends, length = longer, length + 1
        if length < self.shortest or not len(ends):
            return tokens[:0]
        return np.resize(tokens[ends[-1] + 1 :], count)
