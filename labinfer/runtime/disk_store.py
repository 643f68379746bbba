"""Cache blocks on a disk: a file for each block of a group, found by the digest of its text.

Several processes may share a folder. A file gets its name when it is whole, is believed only if its content has the
digest written in it, and is a miss in every other case: the worst that a disk can do is to make a prompt be computed.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np

from labinfer.errors import UsageError

MAGIC = b"labinfer-kv-1\n"
_NAME = re.compile(r"[0-9a-f]{32}\.[0-9]{1,2}", re.ASCII)
_PARTIAL = ".labinfer-partial"
STALE_SECONDS = 3600.0
"""A partial file of this age belongs to nobody any more."""


class DiskStore:
    """Blocks in a folder of ``folder`` named ``key``, which stands for all that their content depends on.

    All keys together take at most ``max_bytes``; the files used least recently are deleted first. Other files in the
    folder are left alone.
    """

    def __init__(self, folder: Path, key: str, max_bytes: int) -> None:
        self.root, self.folder, self.max_bytes = folder, folder / key, max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot keep cache blocks in {folder}: {error.strerror}"
            raise UsageError("run.cache-folder", message, remedy="name a folder you can write to") from None
        self.nbytes = self.written = 0
        self.hits = self.failures = 0
        self.shrink()

    def path(self, group: int, digest: bytes) -> Path:
        """The file of a block."""
        return self.folder / f"{digest.hex()}.{group}"

    def has(self, group: int, digest: bytes) -> bool:
        """Whether there is a file; it may still turn out to be damaged."""
        return self.path(group, digest).is_file()

    def put(self, group: int, digest: bytes, content: Sequence[np.ndarray]) -> None:
        """Keep a block; a disk that is full or gone is not an error, ``failures`` counts."""
        path, size = self.path(group, digest), len(MAGIC) + 16 + sum(array.nbytes for array in content)
        if size > self.max_bytes or self.has(group, digest):
            return
        partial = None
        try:
            handle, partial = tempfile.mkstemp(_PARTIAL, dir=self.folder)
            with open(handle, "wb") as stream:
                stream.write(MAGIC + checksum(path, content))
                for array in content:
                    stream.write(array.data)
            os.replace(partial, path)
        except OSError:
            self.failures += 1
            if partial:
                with suppress(OSError):
                    os.unlink(partial)
            return
        self.nbytes += size
        self.written += size
        if self.nbytes > self.max_bytes or self.written > self.max_bytes // 16:  # others may have written too
            self.shrink()

    def get(self, group: int, digest: bytes, content: Sequence[np.ndarray]) -> bool:
        """Fill ``content`` from a file; False if there is none. A damaged one is deleted."""
        path, wanted = self.path(group, digest), sum(array.nbytes for array in content)
        try:
            with path.open("rb") as stream:
                head = stream.read(len(MAGIC) + 16)
                whole = os.fstat(stream.fileno()).st_size == len(head) + wanted
                whole = whole and all(stream.readinto(array.data.cast("B")) == array.nbytes for array in content)
            if whole and head == MAGIC + checksum(path, content):
                os.utime(path)
                self.hits += 1
                return True
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError:
            pass
        self.failures += 1
        return False

    def shrink(self) -> None:
        """Count the files of all keys, and delete the oldest until a sixteenth of ``max_bytes`` is free."""
        found = sorted(self._files())
        self.nbytes, self.written = sum(size for _, size, _ in found), 0
        most = self.max_bytes - self.max_bytes // 16 if self.nbytes > self.max_bytes else self.max_bytes
        for _, size, path in found:
            if self.nbytes <= most:
                break
            with suppress(OSError):
                os.unlink(path)
            self.nbytes -= size

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """When each file was used last, its size and its path; deletes partial ones that were left behind."""
        for folder in self._folders():
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        if _NAME.fullmatch(entry.name):
                            yield status.st_mtime, status.st_size, entry.path
                        elif entry.name.endswith(_PARTIAL) and status.st_mtime < time.time() - STALE_SECONDS:
                            os.unlink(entry.path)

    def _folders(self) -> list[str]:
        with suppress(OSError), os.scandir(self.root) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        return []


def checksum(path: Path, content: Sequence[np.ndarray]) -> bytes:
    """The digest of a block's content, and of what it is the content of."""
    digest = blake2b(f"{path.parent.name}/{path.name}".encode(), digest_size=16)
    for array in content:
        digest.update(array.data)
    return digest.digest()
