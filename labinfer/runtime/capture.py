"""Values of the model that single requests want to see: the rows of their own tokens, out of steps that many share."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from labinfer.runtime.batch import Part
from labinfer.runtime.request import Request, Sequence

if TYPE_CHECKING:
    from labinfer.runtime.model import Model


class Capture:
    """Listens to values for as long as a request wants them; the engine says which ``part`` a step computes."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.listening: dict[str, ExitStack] = {}
        self.wanted: dict[str, int] = {}
        self.part: Part | None = None
        self.owners: Listing[Sequence] = ()

    def check(self, request: Request) -> None:
        """``UsageError`` for a value that the model does not have, or that cannot be seen."""
        for name in request.capture:
            self.model.maker(name)

    def attach(self, request: Request) -> None:
        """Begin to listen for ``request``, to all that it wants or, where that fails, to nothing."""
        names = list(dict.fromkeys(request.capture))
        for index, name in enumerate(names):
            if name not in self.wanted:
                stack = ExitStack()
                try:
                    stack.enter_context(self.model.listen(name, partial(self.keep, name)))
                except BaseException:
                    self.leave(names[:index])
                    raise
                self.listening[name], self.wanted[name] = stack, 0
            self.wanted[name] += 1

    def detach(self, request: Request) -> None:
        """Listen no more for ``request``."""
        self.leave(dict.fromkeys(request.capture))

    def leave(self, names: Iterable[str]) -> None:
        """One less wants each of ``names``."""
        for name in names:
            self.wanted[name] -= 1
            if self.wanted[name] == 0:
                del self.wanted[name]
                self.listening.pop(name).close()

    def begin(self, part: Part, owners: Listing[Sequence]) -> None:
        """The next step computes ``part``, whose rows belong to ``owners``."""
        self.part, self.owners = part, owners

    def keep(self, name: str, array: np.ndarray) -> None:
        """Give each sequence that wants it its rows of ``array``: one for a token, or one for a row of logits."""
        part = self.part
        if part is None:
            return
        counts = part.counts if len(array) == int(part.counts.sum()) else part.wanted
        computed, start = self.model.batch.num_computed[part.rows], 0
        for sequence, count, end in zip(self.owners, counts.tolist(), computed.tolist(), strict=True):
            if name in sequence.request.capture:
                rows = sequence.captured.setdefault(name, {})
                for offset in range(count):
                    rows[end - count + offset] = array[start + offset].copy()
            start += count


def captured(sequence: Sequence) -> dict[str, np.ndarray]:
    """What was captured for ``sequence``: by name, a row for each position that was computed, in order."""
    return {name: np.stack([rows[at] for at in sorted(rows)]) for name, rows in sequence.captured.items()}
