"""Which sequences form the next micro-batch: each sequence belongs to one of as many groups as there are stages."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from typing import Any

import numpy as np

from labinfer.runtime.batch import Part
from labinfer.runtime.request import Sequence
from labinfer.runtime.scheduler import Scheduler


class GroupScheduler(Scheduler):
    """Schedules the sequences of one group at a time, that of ``turn``.

    While a step of a group is on its way the next one can be scheduled, but for ``held`` rows: their next token is not
    made by the last stage.
    """

    copies_in_order = True

    def __init__(self, groups: int, *args: Any) -> None:
        super().__init__(*args)
        self.groups, self.turn = groups, 0
        self.group, self.held = np.zeros(0, np.int32), np.zeros(0, np.bool_)

    def take(self, sequence: Sequence, row: int) -> None:
        """``row`` is that of ``sequence`` from now on, which joins the smallest group."""
        if row >= len(self.group):
            more = len(self.batch.num_tokens) - len(self.group)
            self.group = np.concatenate([self.group, np.zeros(more, np.int32)])
            self.held = np.concatenate([self.held, np.zeros(more, np.bool_)])
        owned = np.fromiter(self.owners, np.intp, len(self.owners))
        self.group[row] = np.bincount(self.group[owned], minlength=self.groups).argmin()
        self.held[row] = False
        super().take(sequence, row)

    def split(self, ahead: bool, behind: Listing[int] = ()) -> Part | None:
        """See ``Scheduler.split``; never the last decode step again, which may be that of another group."""
        return super().split(True, behind)

    def remaining(self, ahead: bool) -> np.ndarray:
        """Tokens that each sequence of the group can compute in its next step."""
        remaining = super().remaining(ahead=True)
        remaining[(self.group[self.rows] != self.turn) | self.held[self.rows]] = 0
        return remaining
