"""The kernels that are called by address, by name: the only list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from labinfer.backends.cpu import digit_tiles, driver, greedy_steps, linear, lora, matrix_unit, panels, peers, steps

_I = types.int64

STEP = types.void(_I, _I, _I, _I)
"""Arguments of a row, sequences of the step, worker, workers."""

_FORMATTED: dict[str, tuple[Callable[..., Any], Any]] = {
    "linear": (lambda format, digits: linear.linear_kernel(format, int(digits)), linear.LINEAR),
    "digits": (digit_tiles.digit_tiles_kernel, linear.LINEAR),
    "matrix": (lambda format, parts: matrix_unit.matrix_kernel(format, int(parts)), linear.LINEAR),
    "pack": (panels.pack_kernel, panels.PACK),
    "unpack": (panels.unpack_kernel, panels.UNPACK),
}
"""Kernels with a version for each format: what makes it of the rest of the name, and its signature."""

_SINGLE: dict[str, tuple[Callable[..., Any], Any]] = {
    "serve": (driver.serve, types.void(_I, _I, _I, _I, _I)),
    "lead": (driver.lead, _I(_I, _I, _I, _I, _I, _I, _I, _I)),
    "announce": (driver.announce, types.void(_I)),
    "best_step": (greedy_steps.best_step, STEP),
    "advance_step": (greedy_steps.advance_step, STEP),
    "offer_step": (peers.offer_step, STEP),
    "all_reduce_step": (peers.all_reduce_step, STEP),
    "all_gather_step": (peers.all_gather_step, STEP),
    "lora_down_step": (lora.lora_down_step, STEP),
    "lora_up_step": (lora.lora_up_step, STEP),
}


def export(name: str) -> tuple[Callable[..., Any], Any]:
    """The Python function of a kernel, not compiled yet, and its signature."""
    kind, *rest = name.split("/")
    if kind in _FORMATTED:
        make, signature = _FORMATTED[kind]
        return make(*rest), signature
    return _SINGLE.get(name) or (getattr(steps, name), STEP)
