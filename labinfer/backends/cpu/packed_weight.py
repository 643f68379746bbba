"""Weights in panels (see ``layout``) in the memory of the device, and how stored bytes get there."""

from __future__ import annotations

from ctypes import c_int64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from labinfer.backends.cpu import machine_code
from labinfer.backends.cpu.layout import PANEL_ROWS, packed_bytes, panel_bytes
from labinfer.errors import WeightsError
from labinfer.ops.formats import stored_bytes


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in panels: its stored format, rows and columns of a matrix, bytes of one.

    A stack of experts has its matrices one after another.
    """

    memory: np.ndarray
    format: str
    rows: int
    columns: int
    nbytes: int

    @property
    def panels(self) -> int:
        """Panels of a matrix."""
        return -(-self.rows // PANEL_ROWS)

    @property
    def address(self) -> int:
        """The address of the first panel."""
        return int(self.memory.ctypes.data)


def pack(format: str, raw: NDArray[np.uint8], rows: int, columns: int, out: NDArray[np.uint8]) -> None:
    """Pack a weight [rows, columns] stored in ``raw`` (uint8, as in the file) into ``out`` (uint8 [packed_bytes]).

    ``out`` must begin at a multiple of 64 bytes. Holds no GIL. Raises WeightsError when ``raw`` has not the size it
    should.
    """
    expected, size = stored_bytes(format, (rows, columns)), packed_bytes(format, rows, columns)
    if raw.dtype != np.uint8 or raw.size != expected or not raw.flags.c_contiguous:
        message = f"{format} of shape [{rows}, {columns}] takes {expected} contiguous bytes, {raw.nbytes} were given"
        raise WeightsError("weights.corrupt", message)
    if out.dtype != np.uint8 or out.size != size or not out.flags.c_contiguous or out.ctypes.data % 64:
        raise ValueError(f"{format} [{rows}, {columns}] packs into {size} bytes, aligned to 64, not {out.nbytes}")
    panel = panel_bytes(format, columns)
    if rows % PANEL_ROWS:
        out[-panel:] = 0
    packer = machine_code.function(f"pack/{format}", None, *[c_int64] * 6)
    packer(raw.ctypes.data, expected // max(rows, 1), rows, columns, out.ctypes.data, panel)
