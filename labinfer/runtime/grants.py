"""What is granted to whom, also told to other processes: a small file in the cache folder for each that has grants.

A file counts while its process holds the lock on it, so a process that dies leaves no grant behind.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from labinfer.home import cache_dir

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Grant:
    """So many bytes of a device for ``owner`` in process ``pid``.

    ``cores`` are those of the machine that the device computes with, ``processors`` how many of its own: empty and 0
    where it may use all.
    """

    owner: str
    device: str
    nbytes: int
    cores: list[int]
    pid: int
    processors: int = 0


@dataclass(slots=True)
class Grants:
    """The grants of a manager."""

    given: list[Grant] = field(default_factory=list)
    file: IO[str] | None = None

    def on(self, device: str) -> int:
        """Bytes granted on ``device``."""
        return sum(grant.nbytes for grant in self.given if grant.device == device)

    def add(self, owner: str, device: str, nbytes: int, cores: list[int], processors: int) -> None:
        """Grant so many more bytes."""
        self.given.append(Grant(owner, device, nbytes, cores, os.getpid(), processors))
        self.tell()

    def remove(self, owner: str) -> None:
        """Take back what ``owner`` has."""
        self.given = [grant for grant in self.given if grant.owner != owner]
        if self.given:
            self.tell()
        else:
            self.close()

    def tell(self) -> None:
        """Write the file anew; one that cannot be written is not missed."""
        with suppress(OSError):
            if self.file is None and self.given:
                folder().mkdir(parents=True, exist_ok=True)
                self.file = (folder() / f"{os.getpid()}-{next(_numbers)}.json").open("w")
                fcntl.flock(self.file, fcntl.LOCK_EX)
            if self.file is not None:
                self.file.seek(0)
                self.file.truncate()
                json.dump([asdict(grant) for grant in self.given], self.file)
                self.file.flush()

    def close(self) -> None:
        """Forget all, and remove the file."""
        self.given = []
        if self.file is not None:
            Path(self.file.name).unlink(missing_ok=True)
            self.file.close()
            self.file = None


def folder() -> Path:
    """Where the files are."""
    return cache_dir() / "grants"


def all_grants() -> list[Grant]:
    """What living processes were granted; files of dead ones are removed."""
    found = []
    for path in sorted(folder().glob("*.json")):
        with suppress(OSError, ValueError, TypeError), path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found += [Grant(**grant) for grant in json.load(file)]
            else:
                path.unlink()
    return found
