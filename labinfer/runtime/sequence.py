"""A sequence being computed, and the step that computes the next tokens of several of them."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

import numpy as np

from labinfer.ops.base import Step


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known so far, how many of them the cache holds, and the cache blocks the sequence owns, in order."""

    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A part of a step: the next ``num_tokens`` uncomputed tokens of a sequence, and how many logit rows it wants.

    The rows are those of the last tokens of the part.
    """

    sequence: Sequence
    num_tokens: int
    num_rows: int


def build_step(parts: Listing[Scheduled], block_size: int) -> Step:
    """The step batch of ``parts``, flat over all sequences (see ``labinfer.ops.base.Step``)."""
    counts = np.array([part.num_tokens for part in parts], np.int32)
    starts = np.array([part.sequence.num_computed for part in parts], np.int32)
    query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]).astype(np.int32)
    width = max(len(part.sequence.blocks) for part in parts)
    block_table = np.zeros((len(parts), width), np.int32)
    token_ids: list[int] = []
    rows: list[int] = []
    for index, part in enumerate(parts):
        sequence, end = part.sequence, int(starts[index]) + part.num_tokens
        block_table[index, : len(sequence.blocks)] = sequence.blocks
        token_ids += sequence.token_ids[starts[index] : end]
        rows += range(int(query_start[index + 1]) - part.num_rows, int(query_start[index + 1]))
    owner = np.repeat(np.arange(len(parts)), counts)
    slots = block_table[owner, positions // block_size] * block_size + positions % block_size
    return Step(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        query_start=query_start,
        context_len=starts + counts,
        total_len=np.array([len(part.sequence.token_ids) for part in parts], np.int32),
        block_table=block_table,
        slot_mapping=slots.astype(np.int32),
        logits_rows=np.array(rows, np.int32),
        block_size=block_size,
    )
