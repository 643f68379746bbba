"""The texts of cached blocks, by the text before them: finds the block that begins like a text longest.

Blocks after one text stand in the order of their bytes, where the one with the longest common beginning is next to the
text looked for.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

TOKEN_BYTES = 4

LEAST_BORROWED = 0.25
"""The part of a block that must be equal: to copy a block takes about as long as to compute a few tokens."""


Text = tuple[bytes, bytes, bytes]
"""What a block holds: its digest, that of the text before it, its tokens as int32 bytes."""


class BlockTexts:
    """``after[before]`` are the blocks after the text of digest ``before``: (tokens as int32 bytes, digest), sorted."""

    def __init__(self) -> None:
        self.after: dict[bytes, list[tuple[bytes, bytes]]] = {}
        self.places: dict[bytes, Text] = {}  # by digest

    def add(self, texts: Iterable[Text]) -> None:
        """Blocks of ``texts`` can be found from now on."""
        after, places = self.after, self.places
        for text in texts:
            digest, before, raw = text
            if digest not in places:
                places[digest] = text
                blocks = after.get(before)
                if blocks is None:
                    after[before] = [(raw, digest)]
                else:
                    insort(blocks, (raw, digest))

    def remove(self, digest: bytes) -> None:
        """The block of ``digest``, if it is known, is not to be found any more."""
        if digest in self.places:
            _, before, raw = self.places.pop(digest)
            blocks = self.after[before]
            del blocks[bisect_left(blocks, (raw, digest))]
            if not blocks:
                del self.after[before]

    def nearest(self, before: bytes, raw: bytes) -> tuple[bytes, int]:
        """The block after ``before`` that begins like ``raw`` longest: its digest, and how many tokens are equal."""
        blocks = self.after.get(before, [])
        at = bisect_left(blocks, (raw, b""))
        found = [(equal_tokens(raw, text), digest) for text, digest in blocks[max(0, at - 1) : at + 1]]
        common, digest = max(found, default=(0, b""))
        return digest, common


def equal_tokens(one: bytes, other: bytes) -> int:
    """How many tokens two texts have in common before the first that differs."""
    end = min(len(one), len(other))
    differing = (at for at in range(0, end, TOKEN_BYTES) if one[at : at + TOKEN_BYTES] != other[at : at + TOKEN_BYTES])
    return next(differing, end) // TOKEN_BYTES
