"""Poison: fills memory whose value is dead with NaN, so that a kernel which reads too late shows it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from labinfer.backends.base import Buffer, Device
from labinfer.compiler.fold import Slot
from labinfer.compiler.graph import Op
from labinfer.compiler.plan import Limits, Stage
from labinfer.ops.base import Call, elements


class Poison:
    """A listener: after each op, fills every byte of the arena that holds no live value."""

    def __init__(
        self, ops: Sequence[Op], slots: Mapping[str, Slot], stage: Stage, limits: Limits, device: Device, arena: Buffer
    ) -> None:
        self.device, self.arena, self.size = device, arena, stage.arena.size
        last = {name: index for index, op in enumerate(ops) for name in (*op.outputs, *op.inputs) if name in slots}
        last.update(dict.fromkeys(stage.outputs, len(ops)))
        self.spans = {name: self._span(slot, limits) for name, slot in slots.items()}
        born = {name: index for index, op in enumerate(ops) for name in op.outputs}
        self.live = [
            [self.spans[name] for name in last if born.get(name, -1) <= index < last[name]] for index in range(len(ops))
        ]

    @staticmethod
    def _span(slot: Slot, limits: Limits) -> tuple[int, int]:
        first = limits.max_num_batched_tokens if slot.type.shape[0] == "T" else limits.max_logits_rows
        if isinstance(slot.type.shape[0], int):
            first = elements(slot.type.shape[:1], 1, 1)
        return slot.at, slot.at + first * slot.row_bytes

    def __call__(self, index: int, op: Op, call: Call) -> None:
        """Fill every byte that no live value holds."""
        at = 0
        for start, end in [*sorted(self.live[index]), (self.size, self.size)]:
            if start > at:
                self.fill(at, min(start, self.size))
            at = max(at, end)

    def fill(self, start: int, end: int) -> None:
        """Set bytes ``[start, end)`` to 0xFF: a NaN as float32, -1 as int32."""
        self.device.view(self.arena, start, ((end - start) // 4,), "i32").fill(-1)
