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
"""What a block holds: its tokens as int32 bytes, its digest, and that of the text before it."""


def text_of(digest: bytes) -> Text:
    """A text of which only the digest is known: it is not found by its beginning."""
    return b"", digest, b""


class BlockTexts:
    """``after[before]`` are the blocks after the text of digest ``before``, sorted."""

    def __init__(self) -> None:
        self.after: dict[bytes, list[Text]] = {}

    def add(self, texts: Iterable[Text]) -> None:
        """Blocks of ``texts``, which are new, can be found from now on."""
        after = self.after
        for text in texts:
            blocks = after.get(text[2])
            if blocks is None:
                after[text[2]] = [text]
            else:
                insort(blocks, text)

    def remove(self, text: Text) -> None:
        """The block of ``text``, if it can be found, cannot any more."""
        blocks = self.after.get(text[2], [])
        at = bisect_left(blocks, text)
        if blocks[at : at + 1] == [text]:
            del blocks[at]
            if not blocks:
                del self.after[text[2]]

    def nearest(self, before: bytes, raw: bytes) -> tuple[bytes, int]:
        """The block after ``before`` that begins like ``raw`` longest: its digest, and how many tokens are equal."""
        blocks = self.after.get(before, [])
        at = bisect_left(blocks, (raw, b"", b""))
        found = [(equal_tokens(raw, text), digest) for text, digest, _ in blocks[max(0, at - 1) : at + 1]]
        common, digest = max(found, default=(0, b""))
        return digest, common


def equal_tokens(one: bytes, other: bytes) -> int:
    """How many tokens two texts have in common before the first that differs."""
    end = min(len(one), len(other))
    differing = (at for at in range(0, end, TOKEN_BYTES) if one[at : at + TOKEN_BYTES] != other[at : at + TOKEN_BYTES])
    return next(differing, end) // TOKEN_BYTES
