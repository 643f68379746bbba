"""How heads, features and experts are shared out among the ranks of a tensor-parallel group, in proportion to weights.

What can be cut comes in units that cannot: a head, a block of a stored format. Every rank gets at least one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, groupby, pairwise
from math import gcd, lcm

from labinfer.errors import DoesNotFit

Columns = tuple[tuple[int, int], ...]
"""Runs [start, stop) of columns that a rank has, in its own order; a column may be in several."""

Cut = tuple[Columns, ...]
"""The columns of each rank."""

MIN_FEATURES = 32
"""Hidden features are cut in multiples of so many where they can be: whole vectors and tiles of every kernel."""


@dataclass(frozen=True, slots=True)
class HeadCut:
    """The query heads and the key-value heads of each rank, as runs of columns of heads."""

    queries: Cut
    keys: Cut

    def of_queries(self, head_dim: int) -> Cut:
        """The columns of the query heads, or of their values, where a head has ``head_dim``."""
        return scaled(self.queries, head_dim)

    def of_keys(self, head_dim: int) -> Cut:
        """The columns of the key-value heads."""
        return scaled(self.keys, head_dim)


def width(columns: Columns) -> int:
    """How many columns there are."""
    return sum(stop - start for start, stop in columns)


def scaled(cut: Cut, size: int) -> Cut:
    """``cut`` where each column is ``size`` columns."""
    return tuple(tuple((start * size, stop * size) for start, stop in columns) for columns in cut)


def apportion(total: int, split: Sequence[float], what: str) -> list[int]:
    """``total`` units in proportion to ``split``, by the largest remainders, at least one for each.

    Raises ``DoesNotFit`` when there are fewer than ranks; ``what`` says what is shared out.
    """
    if total < len(split):
        message = f"{total} {what} cannot be shared out among {len(split)} ranks"
        raise DoesNotFit("shard.too-few", message, remedy="use a smaller --tensor-parallel-size")
    spare, whole = total - len(split), sum(map(Fraction, split))
    exact = [max(Fraction(each) * total / whole - 1, Fraction(0)) for each in split]
    scale = Fraction(spare) / sum(exact) if sum(exact) else Fraction(0)
    exact = [each * scale for each in exact]
    counts = [int(each) for each in exact]
    order = sorted(range(len(split)), key=lambda rank: (counts[rank] - exact[rank], rank))
    for rank in order[: spare - sum(counts)]:
        counts[rank] += 1
    return [1 + count for count in counts]


def cut_features(total: int, split: Sequence[float], block: int = 1) -> Cut:
    """Hidden features, on the boundaries of blocks of ``block`` numbers."""
    whole = lcm(block, MIN_FEATURES)
    unit = whole if total % whole == 0 and total >= whole * len(split) else block
    return runs(apportion(total // unit, split, f"blocks of {unit} features" if unit > 1 else "features"), unit)


def cut_rows(total: int, split: Sequence[float], what: str) -> Cut:
    """Rows of a table, or experts."""
    return runs(apportion(total, split, what), 1)


def runs(counts: Sequence[int], unit: int) -> Cut:
    """One run for each rank, of so many units."""
    return tuple(((start * unit, stop * unit),) for start, stop in pairwise([0, *accumulate(counts)]))


def cut_heads(num_heads: int, num_kv_heads: int, value_dim: int, split: Sequence[float], block: int = 1) -> HeadCut:
    """Query heads in proportion, each rank with the key-value heads that its own look at.

    A group of query heads that share a key-value head may be cut: then both ranks have that one. Where what is left of
    groups differs in size, key-value heads are repeated until each has as many query heads. Of all ways, that one is
    taken whose busiest rank has least to do. The values of a rank's heads must be whole blocks of ``block`` numbers.
    """
    group = num_heads // num_kv_heads
    units = [unit for unit in range(group, 0, -1) if group % unit == 0 and unit * value_dim % block == 0]
    if not units:
        group_bound = lcm(group * value_dim, block) // value_dim
        units = [group_bound] if num_heads % group_bound == 0 else []
    if not units:
        message = f"heads of {value_dim} numbers cannot be cut: the output projection is stored in blocks of {block}"
        raise DoesNotFit("shard.blocks", message, remedy="use a version of the model that is quantized otherwise")
    found = []
    for unit in units:
        if num_heads // unit < len(split) and unit != units[-1]:
            continue
        queries = runs(apportion(num_heads // unit, split, f"groups of {unit} heads" if unit > 1 else "heads"), unit)
        cut = HeadCut(queries, tuple(keys_of(columns, group) for columns in queries))
        load = max((width(q) + width(k)) / share for q, k, share in zip(cut.queries, cut.keys, split, strict=True))
        found.append((load, -unit, cut))
    return min(found, key=lambda each: each[:2])[2]


def keys_of(queries: Columns, group: int) -> Columns:
    """The key-value heads for a run of query heads, of which ``group`` share one: equally many queries for each."""
    [(start, stop)] = queries
    heads = [head // group for head in range(start, stop)]
    each = gcd(*(len(list(run)) for _, run in groupby(heads)))
    columns: list[tuple[int, int]] = []
    for head in heads[::each]:
        if columns and columns[-1][1] == head:
            columns[-1] = (columns[-1][0], head + 1)
        else:
            columns.append((head, head + 1))
    return tuple(columns)
