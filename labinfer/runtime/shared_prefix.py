"""Texts with a common beginning are computed once: who comes later waits for a block at work, then takes it over.

So does who has only borrowed tokens of its next block so far.
"""

from __future__ import annotations

import numpy as np

from labinfer.runtime.batch import Batch, Part
from labinfer.runtime.block_digests import block_digest


def take_over(batch: Batch, rows: np.ndarray) -> dict[int, int]:
    """Have ``rows`` go on from what others have computed of their texts by now: by row, how many tokens more it has."""
    blocks, taken = batch.blocks, dict[int, int]()
    known = blocks.hashed[rows] * batch.block_size + blocks.borrowed[rows]
    for row in rows[batch.num_computed[rows] == known].tolist():
        digest, before = next_digest(batch, row), int(batch.num_computed[row])
        if digest is None or not all(group.has(digest, cold=True) for group in blocks.groups if group.window is None):
            continue
        if blocks.match(batch.tokens(row), batch.salts[row]) > before:
            blocks.release(row)
            more = batch.attach(row) - before  # without room for what a colder tier has, 0 or less
            blocks.counted.queries -= int(batch.num_tokens[row])  # it was looked up before
            blocks.counted.hits -= before
            if more:
                taken[row] = more
    return taken


def rows_behind(batch: Batch, rows: np.ndarray, part: Part) -> list[int]:
    """Rows of ``part`` whose next block another of ``rows`` fills, in this step or in one on its way: they can wait."""
    size, known = batch.block_size, batch.blocks.hashed[rows]
    on_its_way = batch.num_computed[rows] >= (known + 1) * size
    can_share = (known < batch.blocks.reusable[rows]) & ((known + 1) * size < batch.num_tokens[rows])
    looked_at = np.flatnonzero(can_share & (on_its_way | np.isin(rows, part.rows)))
    if len(looked_at) < 2:
        return []
    filled, behind = set[bytes | None](), []
    for index in looked_at[np.argsort(~on_its_way[looked_at], kind="stable")].tolist():
        row = int(rows[index])
        digest = next_digest(batch, row)
        if digest not in filled:
            filled.add(digest)
        elif batch.num_computed[row] == known[index] * size + batch.blocks.borrowed[row]:
            behind.append(row)
    return behind


def next_digest(batch: Batch, row: int) -> bytes | None:
    """The digest of the first block of ``row`` that is not known yet; None where it is never taken over."""
    blocks, size = batch.blocks, batch.block_size
    place, tokens, chain = int(blocks.hashed[row]), batch.tokens(row), blocks.chains[row]
    if place >= blocks.reusable[row] or (place + 1) * size >= len(tokens):
        return None
    return block_digest(chain[-1] if chain else blocks.roots[row], tokens[place * size : (place + 1) * size].tobytes())
