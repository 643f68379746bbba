"""The steps of ``lora_add``: down to the rank of an adapter, and up again onto the result of the linear op.

Sequences side by side that have one adapter are a run; each run takes both products with its adapter's matrices, which
lie in float32 panels. A step without adapters walks over the sequences and does nothing else.
"""

from __future__ import annotations

from labinfer.backends.cpu.driver import share
from labinfer.backends.cpu.isa import njit
from labinfer.backends.cpu.linear import linear
from labinfer.backends.cpu.simd import i32p, i64p
from labinfer.backends.cpu.tape import ACCUMULATE


@njit
def run_end(adapters: int, first: int, sequences: int) -> int:
    """The sequence after the run of equal adapters that begins at sequence ``first``."""
    slots = i32p(adapters)
    end = first + 1
    while end < sequences and slots[end] == slots[first]:
        end += 1
    return end


def lora_down_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """code, a, bytes of a slot, columns, x, x_bytes, low, low_stride, tokens, panels, rank, query_start, adapters.

    Shared are pairs of panel and token, panel by panel.
    """
    p = i64p(a)
    bounds, slots, tokens = i32p(p[11]), i32p(p[12]), p[8]
    start, stop = share(tokens * p[9], worker, workers)
    s = 0
    while s < sequences:
        end = run_end(p[12], s, sequences)
        if slots[s] >= 0:
            for g in range(p[9]):
                first, last = max(bounds[s], start - g * tokens), min(bounds[end], stop - g * tokens)
                if first < last:
                    linear(
                        p[0], p[1] + slots[s] * p[2], p[3], p[4] + first * p[5], p[5], p[6] + 4 * first * p[7], p[7],
                        last - first, g, g + 1, p[10], 0, 0,
                    )  # fmt: skip
        s = end


def lora_up_step(a: int, sequences: int, worker: int, workers: int) -> None:
    """code, b, bytes of a slot, rank, low, low_stride, y, y_stride, panels, rows, query_start, adapters."""
    p = i64p(a)
    bounds, slots = i32p(p[10]), i32p(p[11])
    start, stop = share(p[8], worker, workers)
    s = 0
    while s < sequences:
        end = run_end(p[11], s, sequences)
        if slots[s] >= 0 and start < stop:
            first = bounds[s]
            linear(
                p[0], p[1] + slots[s] * p[2], p[3], p[4] + 4 * first * p[5], 4 * p[5], p[6] + 4 * first * p[7], p[7],
                bounds[end] - first, start, stop, p[9], 0, ACCUMULATE,
            )  # fmt: skip
        s = end
