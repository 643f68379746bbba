"""From how many tokens on the matrix unit beats vector instructions, by weight format; imports nothing that compiles.

Unpacking weights for it costs as much as multiplying some 10 tokens does. Rows and columns hardly matter, since both
kernels' times grow with them alike; tokens do. ``labinfer doctor --warm`` measures the numbers on the machine and
leaves them in a file; without one, those measured on a Granite Rapids server stand in. Plans record what they used.
bf16 weights always meet the kernel of the matrix unit, which gives a token the same bits in any company; float16 ones,
which would not have them there, only with the lossy option.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from ctypes import c_int64
from pathlib import Path

import numpy as np

from labinfer.backends.cpu import machine_code
from labinfer.backends.cpu.features import has_matrix_unit
from labinfer.backends.cpu.layout import (
    PANEL_FORMATS,
    PANEL_ROWS,
    activation_bytes,
    activation_form,
    activations_bytes,
    packed_bytes,
    product_kernel,
    scattered_form,
)
from labinfer.home import cache_dir
from labinfer.ops.base import KernelOptions

_QUANTIZED = [name for name, layout in PANEL_FORMATS.items() if layout.quantized]
_TUNED = {"exact": _QUANTIZED, "int8": [*_QUANTIZED, "f16"]}
_BUILT_IN = {
    "exact": {**dict.fromkeys(_QUANTIZED, 12), "q8_0": 24, "bf16": 1},
    "int8": {**dict.fromkeys(_QUANTIZED, 16), "f16": 8, "bf16": 1},
}

_TOKENS = (2, 4, 8, 12, 16, 20, 24, 32, 48, 64)
_ROWS, _COLUMNS, _ROUNDS = 2048, 2048, 7


def fewest_tokens(activations: str) -> Mapping[str, int]:
    """The fewest tokens for which the matrix unit is the faster one, by format; empty without one."""
    if not has_matrix_unit():
        return {}
    return {**_BUILT_IN[activations], **_measured(activations)}


def _file() -> Path:
    return cache_dir() / "matrix-unit.json"


def _measured(activations: str) -> dict[str, int]:
    """What ``tune`` has left on this machine; nothing, if it cannot be read."""
    try:
        found = json.loads(_file().read_text())[activations]
        return {name: int(count) for name, count in found.items() if name in _TUNED[activations] and int(count) > 0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def tune(formats: Iterable[str]) -> None:
    """Measure both kernels of each of ``formats`` on this machine, some 0.3 s each, and keep the results."""
    if not has_matrix_unit():
        return
    found = {}
    for activations in ("exact", "int8"):
        found[activations] = dict(_measured(activations))
        for format in formats:
            if (tokens := _crossover(format, KernelOptions(activations, {format: 1}))) is not None:
                found[activations][format] = tokens
    _file().parent.mkdir(parents=True, exist_ok=True)
    _file().write_text(json.dumps(found, indent=1) + "\n")


def _crossover(format: str, options: KernelOptions) -> int | None:
    """The fewest of ``_TOKENS`` from which on the matrix unit is faster; None for formats that have no choice."""
    if format not in _TUNED[options.activations]:
        return None
    weights = np.zeros(packed_bytes(format, _ROWS, _COLUMNS) + 64, np.uint8)
    forms = scattered_form(format, options), activation_form(format, _COLUMNS, 1, options)
    best = None
    for tokens in reversed(_TOKENS):
        vector, matrix = (_Product(format, form, tokens, weights) for form in forms)
        pairs = [(vector.seconds(), matrix.seconds()) for _ in range(_ROUNDS)]
        if min(pair[1] for pair in pairs) >= min(pair[0] for pair in pairs):
            break
        best = tokens
    return best or 2 * _TOKENS[-1]


class _Product:
    """A product to be timed on one thread."""

    def __init__(self, format: str, form: int, tokens: int, weights: np.ndarray) -> None:
        self.run = machine_code.function(product_kernel(format, form), None, *[c_int64] * 12)
        self.x = np.zeros(activations_bytes(form, tokens, _COLUMNS) + 64, np.uint8)
        self.y = np.zeros(tokens * _ROWS, np.float32)
        at, x = (-(-array.ctypes.data // 64) * 64 for array in (weights, self.x))
        self.arguments = (
            at, _COLUMNS, x, activation_bytes(form, _COLUMNS), self.y.ctypes.data, _ROWS, tokens, 0,
            _ROWS // PANEL_ROWS, _ROWS, 0, 0,
        )  # fmt: skip

    def seconds(self) -> float:
        """One run."""
        start = time.perf_counter()
        self.run(*self.arguments)
        return time.perf_counter() - start
