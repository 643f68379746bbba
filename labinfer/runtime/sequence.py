"""A sequence being computed, and the batch that computes the next tokens of several of them."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np

from labinfer.ops.base import NO_ADAPTER
from labinfer.runtime.block_manager import BlockManager
from labinfer.runtime.step_memory import StepBatch


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known so far, the ``BlockManager``'s row with its cache blocks, and how many tokens these hold.

    ``adapter`` is the slot of its LoRA adapter.
    """

    token_ids: list[int]
    row: int
    num_computed: int = 0
    adapter: int = NO_ADAPTER


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A part of a step: the next ``num_tokens`` uncomputed tokens of a sequence, and how many logit rows it wants.

    The rows are those of the last tokens of the part.
    """

    sequence: Sequence
    num_tokens: int
    num_rows: int


def build_step(parts: Listing[Scheduled], blocks: BlockManager) -> StepBatch:
    """The step batch of ``parts``, flat over all sequences; their rows have the blocks already."""
    counts = np.array([part.num_tokens for part in parts], np.int32)
    starts = np.array([part.sequence.num_computed for part in parts], np.int32)
    query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]).astype(np.int32)
    token_ids: list[int] = []
    rows: list[int] = []
    for index, part in enumerate(parts):
        sequence, end = part.sequence, int(starts[index]) + part.num_tokens
        token_ids += sequence.token_ids[starts[index] : end]
        rows += range(int(query_start[index + 1]) - part.num_rows, int(query_start[index + 1]))
    tables = blocks.block_tables(np.array([part.sequence.row for part in parts]), int((starts + counts).max()))
    owner, size = np.repeat(np.arange(len(parts)), counts), blocks.block_size
    adapters = np.array([part.sequence.adapter for part in parts], np.int32)
    return StepBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        query_start=query_start,
        context_len=starts + counts,
        total_len=np.array([len(part.sequence.token_ids) for part in parts], np.int32),
        logits_rows=np.array(rows, np.int32),
        block_tables=tables,
        slot_mappings=[table[owner, positions // size] * size + positions % size for table in tables],
        adapter=adapters if (adapters != NO_ADAPTER).any() else None,
    )
