"""Cosines and sines of all positions, made once for all layers that turn alike."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from labinfer.backends.base import Device
    from labinfer.ops.rope import Rope


def table_bytes(attrs: Any, max_model_len: int) -> int:
    """Bytes of the cosines and sines that all ropes with these attributes share."""
    if not hasattr(attrs, "turned") or (attrs.length_dependent and not attrs.recompute_after):
        return 0
    variants, half = 2 if attrs.recompute_after else 1, int(attrs.turned) // 2
    return variants * max_model_len * 2 * half * 4


def rope_tables(
    attrs: Rope.Attrs,
    max_len: int,
    freq_factors: np.ndarray | None = None,
    long_freq_factors: np.ndarray | None = None,
) -> np.ndarray:
    """Cosines and sines for positions below ``max_len``: float32 ``[max_len, 2, turned / 2]``.

    For longrope ``[2 * max_len, ...]``, the rows of sequences beyond the trained length in the second half.
    """
    import numpy as np

    short = np.float32(1) if freq_factors is None else freq_factors
    long = short if long_freq_factors is None else long_freq_factors
    variants: list[tuple[int | None, np.ndarray | np.float32]] = [(None, short)]
    if attrs.recompute_after:
        variants.append((attrs.recompute_after + 1, long))
    positions = np.arange(max_len, dtype=np.float32)[:, None]
    tables = np.empty((len(variants), max_len, 2, attrs.turned // 2), np.float32)
    for table, (total_len, divisor) in zip(tables, variants, strict=True):
        inv_freq, factor = attrs.frequencies(total_len)
        angles = positions * (inv_freq / divisor)
        np.cos(angles, out=table[:, 0])
        np.sin(angles, out=table[:, 1])
        table *= np.float32(factor)
    return tables.reshape(-1, 2, attrs.turned // 2)


class RopeTables:
    """The tables in the memory of ``device``, each of which is there for as long as somebody has it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.tables: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()

    def table(self, attrs: Rope.Attrs, max_len: int, weights: Mapping[str, Any]) -> Any:
        """An array of the device as ``rope_tables`` makes it; ``weights`` of the op may have factors."""
        device = self.device
        found = [weights.get(name) for name in ("freq_factors", "long_freq_factors")]
        factors = [None if array is None else device.move_out(array) for array in found]
        key = (attrs, max_len, *(None if array is None else array.tobytes() for array in factors))
        table = self.tables.get(key)
        if table is None:
            made = rope_tables(attrs, max_len, *factors)
            buffer = device.allocate(made.nbytes, "rope tables")
            table = device.view(buffer, 0, made.shape, "f32")
            device.move_in(made, table)
            weakref.finalize(table, device.deallocate, buffer)
            self.tables[key] = table
        return table
