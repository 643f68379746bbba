"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A file that becomes ``path`` when the block ends well, and leaves nothing behind when it does not.

    It is written beside ``path``, synced and renamed; a ``path`` that is a device or a pipe is written directly.
    Raises ``OSError``.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            yield stream
        return
    partial = path.with_name(f".{path.name[:100]}.{os.getpid()}.partial")
    try:
        stream = partial.open("xb")
    except OSError as problem:
        problem.filename = str(path)  # the name the user knows
        raise
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
