"""Which sizes of steps are measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from labinfer.compiler.costs import StepShape

MOST_CACHED_TOKENS = 8192
"""Tokens that all sequences of a measured step have together at most: the cache for them takes about as much memory as
the weights of a small model."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Sequences of a decode step, tokens of a prefill step, and tokens that sequences had before."""

    decode: Sequence[int]
    prefill: Sequence[int]
    past: Sequence[int]

    def steps(self) -> list[StepShape]:
        """The steps to measure, small ones first."""
        shapes = [StepShape.decode(count, past) for count in self.decode for past in self.past]
        shapes += [StepShape.prefill(count, past) for count in self.prefill for past in self.past if count > 1]
        return [each for each in shapes if each.sequences * each.past <= MOST_CACHED_TOKENS]


FULL = Grid((1, 2, 4, 8, 16), (16, 64, 128, 256, 512), (0, 256, 1024, 4096))
QUICK = Grid((1, 8), (64, 256, 512), (0, 512, 2048))


def grid_for(quick: bool, max_tokens: int, max_sequences: int, longest: int, crossings: Iterable[int] = ()) -> Grid:
    """The full or the quick grid within the bounds of a plan (tokens and sequences of a step, tokens of a sequence).

    ``crossings`` are numbers of tokens from which on a device multiplies in another way: both sides are measured.
    """
    base, max_tokens = QUICK if quick else FULL, min(max_tokens, longest - 1)
    decode = {each for each in base.decode if each <= max_sequences} | {min(max_sequences, 64)}
    prefill = {each for each in base.prefill if each <= max_tokens} | {max_tokens}
    if not quick:
        prefill |= {each for count in crossings for each in (count - 1, count) if 1 < each <= max_tokens}
    room = longest - max(prefill)
    return Grid(sorted(decode), sorted(prefill), sorted({min(each, room) for each in base.past}))
