"""Where one tensor lies in a checkpoint, and the checks every container format shares."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from labinfer.errors import ErrorSink, Place, WeightsError

MAX_DIMS = 8
MAX_ELEMENTS = 1 << 48  # far above any weight, far below where 64-bit sizes overflow


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: logical ``shape`` (row-major, as Hugging Face names it) and its bytes in ``file``.

    ``format`` is a key of ``labinfer.ops.formats.FORMATS``; ``nbytes`` and ``offset`` (from the start of the
    file) are in bytes.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


def quoted(name: str) -> str:
    """A name from an untrusted file, safe and short enough to print."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def check_tensor(name: str, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a name or shape from a file, or None; afterwards every size product fits 64 bits."""
    if not name.isprintable():
        return "a name with unprintable characters"
    if len(shape) > MAX_DIMS:
        return f"{len(shape)} dimensions, at most {MAX_DIMS} are allowed"
    # Zero is counted as one: a tensor without elements must not hide an absurd dimension.
    if any(size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        return f"impossible shape {list(shape)}"
    return None


def check_extents(infos: Iterable[TensorInfo], start: int, end: int, sink: ErrorSink) -> None:
    """Add an error for every tensor outside bytes [start, end) of its file and for every pair that overlaps."""
    previous: TensorInfo | None = None
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        place = Place(str(info.file))
        last = info.offset + info.nbytes
        if info.offset < start or last > end:
            message = (
                f"tensor {quoted(info.name)} lies at bytes {info.offset}..{last}, outside the data at {start}..{end}"
            )
            remedy = "the file is truncated or corrupt: download it again"
            sink.add(WeightsError("weights.truncated", message, place=place, remedy=remedy))
        elif previous is not None and info.offset < previous.offset + previous.nbytes:
            message = f"tensors {quoted(previous.name)} and {quoted(info.name)} overlap at byte {info.offset}"
            remedy = "the file is corrupt: download or convert it again"
            sink.add(WeightsError("weights.overlap", message, place=place, remedy=remedy))
        if info.nbytes and last <= end:
            previous = info
