"""An independent check of a packing; it shares no code with the planner."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

from labinfer.compiler.packing.problem import Buffer
from labinfer.errors import InvalidFile


def verify(buffers: Sequence[Buffer], offsets: Mapping[str, int], peak: int) -> None:
    """Raise ``InvalidFile`` unless every buffer lies in [0, peak) and none overlaps another that is alive with it.

    Buffers that are never alive take no space, wherever they lie.

    Codes: ``plan.arena-missing`` (a buffer has no offset), ``plan.arena-bounds``, ``plan.arena-overlap`` (both named).
    """
    for buffer in buffers:
        offset = offsets.get(buffer.id)
        if offset is None:
            raise InvalidFile("plan.arena-missing", f"buffer '{buffer.id}' has no offset")
        never_alive = buffer.upper <= buffer.lower
        if offset < 0 or (offset + buffer.size > peak and not never_alive):
            where = f"[{offset}, {offset + buffer.size})"
            raise InvalidFile("plan.arena-bounds", f"buffer '{buffer.id}' lies at {where}, outside [0, {peak})")
    events: list[tuple[int, bool, int]] = []  # time, birth (deaths sort first), index
    for index, buffer in enumerate(buffers):
        if buffer.size > 0 and buffer.upper > buffer.lower:
            events += ((buffer.lower, True, index), (buffer.upper, False, index))
    events.sort()
    alive: list[tuple[int, int]] = []  # offset, index; disjoint, so only the two beside a newcomer can meet it
    for _, birth, index in events:
        entry = (offsets[buffers[index].id], index)
        if not birth:
            del alive[bisect_left(alive, entry)]
            continue
        position = bisect_left(alive, entry)
        around = [*alive[max(position - 1, 0) : position], entry, *alive[position : position + 1]]
        for (below, lower), (above, upper) in pairwise(around):
            if below + buffers[lower].size > above:
                raise _overlap(buffers[lower], below, buffers[upper], above)
        alive.insert(position, entry)


def _overlap(lower: Buffer, below: int, upper: Buffer, above: int) -> InvalidFile:
    steps = f"[{max(lower.lower, upper.lower)}, {min(lower.upper, upper.upper)})"
    return InvalidFile(
        "plan.arena-overlap",
        f"buffers '{lower.id}' at [{below}, {below + lower.size}) and '{upper.id}' at [{above}, {above + upper.size})"
        f" overlap and are both alive in steps {steps}",
        remedy="plan again; offsets edited by hand must keep buffers alive together apart",
    )
