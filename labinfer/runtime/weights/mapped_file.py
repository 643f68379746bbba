"""Open a weight file as a read-only memory map, refusing what is not a plain file."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

from labinfer.errors import Place, WeightsError

_REMEDY = "check the path, its permissions and the disk"


def map_file(path: Path) -> mmap.mmap:
    """Map ``path`` for reading; nothing is read yet.

    Raises WeightsError when the file is missing, unreadable, empty, or not a regular file.
    """
    place = Place(str(path))
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to must not hang before fstat can refuse it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise WeightsError(
            "weights.unreadable", f"cannot open: {_reason(error)}", place=place, remedy=_REMEDY
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise WeightsError("weights.unreadable", "not a regular file", place=place, remedy=_REMEDY)
        if status.st_size == 0:
            raise WeightsError("weights.truncated", "the file is empty", place=place, remedy="download the file again")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise WeightsError(
            "weights.unreadable", f"cannot map: {_reason(error)}", place=place, remedy=_REMEDY
        ) from error
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
