"""The step batch: what is to be computed, on the host, and fixed memory on a device that every batch is copied into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from labinfer.backends.base import Device
from labinfer.compiler.plan import Limits
from labinfer.ops.base import NO_ADAPTER, Step


@dataclass(slots=True)
class StepBatch:
    """The one input of a step: the arrays of ``labinfer.ops.base.Step``, int32, with those of every cache group.

    ``block_tables[group]`` [S, B] and ``slot_mappings[group]`` [T] say where a group's layers find and put keys and
    values; a table's entries before the window are never looked at.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    query_start: np.ndarray
    context_len: np.ndarray
    total_len: np.ndarray
    logits_rows: np.ndarray
    block_tables: Sequence[np.ndarray]
    slot_mappings: Sequence[np.ndarray]
    adapter: np.ndarray | None = None


def is_decode(batch: StepBatch) -> bool:
    """Whether each sequence computes one token and wants its logits."""
    return len(batch.token_ids) == len(batch.context_len) == len(batch.logits_rows)


def filled_up(batch: StepBatch, sequences: int) -> StepBatch:
    """A decode step of so many sequences: the last one again and again, which writes the same each time."""
    if sequences == len(batch.token_ids):
        return batch

    def more(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.repeat(array[-1:], sequences - len(array), 0)])

    numbers = np.arange(sequences + 1, dtype=np.int32)
    names = ("token_ids", "positions", "context_len", "total_len")
    return replace(
        batch,
        **{name: more(getattr(batch, name)) for name in names},
        query_start=numbers,
        logits_rows=numbers[:-1],
        block_tables=[more(table) for table in batch.block_tables],
        slot_mappings=[more(slots) for slots in batch.slot_mappings],
        adapter=None if batch.adapter is None else more(batch.adapter),
    )


class StepMemory:
    """Arrays at the plan's upper bounds; ``steps`` show as much of them as the present step uses, one a cache group.

    Bound kernels always find a step there. The steps differ in ``block_table`` and ``slot_mapping`` only. A batch
    without ``adapter`` has none in any sequence.
    """

    def __init__(self, device: Device, limits: Limits) -> None:
        self.device = device
        self.buffer = device.allocate(limits.step_bytes, "step")
        self.offset = 0
        self.arrays = self._views(limits.step_shapes)
        self.own = [self._views(limits.group_shapes) for _ in limits.groups]
        size, sequences = limits.block_size, limits.max_num_seqs
        self.steps = [Step(**self.arrays, **own, block_size=size, max_num_seqs=sequences) for own in self.own]

    def _views(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        views = {}
        for name, shape in shapes.items():
            views[name] = self.device.view(self.buffer, self.offset, shape, "i32")
            self.offset += 4 * prod(shape)
        return views

    def load(self, batch: StepBatch) -> None:
        """Copy ``batch`` to the device."""
        for name, memory in self.arrays.items():
            host = getattr(batch, name)
            if host is None:
                host = np.full(len(batch.context_len), NO_ADAPTER, np.int32)
            used = getattr(self.steps[0], name)
            if len(used) != len(host):
                used = memory[: len(host)]
                for step in self.steps:
                    setattr(step, name, used)
            self.device.move_in(host, used)
        for step, own, table, slots in zip(self.steps, self.own, batch.block_tables, batch.slot_mappings, strict=True):
            step.block_table, step.slot_mapping = own["block_table"][: len(table)], own["slot_mapping"][: len(slots)]
            self.device.move_in(table, step.block_table[:, : table.shape[1]])
            self.device.move_in(slots, step.slot_mapping)

    def load_token_ids(self, batch: StepBatch) -> None:
        """Copy the token ids of ``batch``, which have changed since it was loaded, filled up or not."""
        used = self.steps[0].token_ids
        more = np.repeat(batch.token_ids[-1:], len(used) - len(batch.token_ids))
        self.device.move_in(np.concatenate([batch.token_ids, more]), used)

    def close(self) -> None:
        """Give the memory back."""
        self.arrays.clear()
        self.own.clear()
        self.device.deallocate(self.buffer)
