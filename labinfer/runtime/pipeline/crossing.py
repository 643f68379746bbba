"""The values that arrive at a stage with a step and those that leave it, as the bytes on the host that frames hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from labinfer.compiler.plan import Plan
from labinfer.ops.base import dim
from labinfer.runtime.interpreter import Tape
from labinfer.runtime.pipeline.message import crossing, crossing_types, view
from labinfer.runtime.stage import LoadedStage


class CrossingValues:
    """Those of stage ``group``, for one step at a time: ``arriving`` is to be filled, ``leaving`` to be sent.

    A value is in the arena where the host can reach that, so that nothing is copied; else it has memory of its own, as
    has one that goes on as it came, whose place in the arena may be written over.
    """

    def __init__(self, plan: Plan, group: int, stage: LoadedStage) -> None:
        at_stages = [*crossing(plan), []]
        self.arriving_names, self.leaving_names = at_stages[group], at_stages[group + 1]
        self.types, self.stage = crossing_types(plan), stage
        self.arriving: list[memoryview] = []
        self.leaving: list[memoryview] = []
        self.inward: list[tuple[np.ndarray, Any]] = []  # own memory, and where on the device it belongs
        self.outward: list[tuple[np.ndarray, Any]] = []

    def bind(self, tape: Tape, tokens: int, rows: int) -> None:
        """Get ready for a step of ``tokens`` tokens and ``rows`` rows of logits that ``tape`` runs."""
        self.inward, self.outward = [], []
        names = dict.fromkeys([*self.arriving_names, *self.leaving_names])
        places = {name: self.place(name, tape, tokens, rows) for name in names}
        self.arriving = [places[name] for name in self.arriving_names]
        self.leaving = [places[name] for name in self.leaving_names]

    def place(self, name: str, tape: Tape, tokens: int, rows: int) -> memoryview:
        """Where a value is on the host."""
        kind, window = self.types[name], tape.values.get(name)  # None: only later stages need it
        arrives, stays = name in self.arriving_names, name not in self.leaving_names
        if window is not None:
            window = window[: dim(kind.shape[0], tokens, rows)]
            if isinstance(window, np.ndarray) and window.flags.c_contiguous and (stays or not arrives):
                return view(window)
        memory = np.empty(kind.nbytes(tokens, rows), np.uint8)
        if window is not None:
            moves = self.inward if arrives else self.outward
            moves.append((memory.view(window.dtype).reshape(window.shape), window))
        return view(memory)

    def move_in(self) -> None:
        """Bring what has arrived to the device."""
        for memory, window in self.inward:
            self.stage.device.move_in(memory, window)

    def move_out(self) -> None:
        """Fetch what leaves from the device."""
        for memory, window in self.outward:
            self.stage.device.move_out(window, memory)
