"""Checkpoints on a host: the one that lies at the same path, or a copy that the head sends piece by piece.

Copies are kept under the digests of their files, and an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from labinfer.errors import LabinferError
from labinfer.home import cache_dir

PIECE_BYTES = 8 << 20
MAX_FILES = 4096
_SUFFIXES = (".safetensors", ".json", ".gguf")


def manifest(checkpoint: Path, digests: bool) -> dict[str, Any]:
    """The files of a checkpoint (a folder, or one file), their sizes, and their SHA-256 if asked for."""
    files = [checkpoint] if checkpoint.is_file() else sorted(each for each in checkpoint.iterdir() if is_part(each))
    listed = [
        {"name": each.name, "size": each.stat().st_size} | ({"sha256": file_digest(each)} if digests else {})
        for each in files
    ]
    return {"path": str(checkpoint), "folder": checkpoint.is_dir(), "files": listed}


def is_part(path: Path) -> bool:
    """Whether a file of a checkpoint's folder is needed to load it."""
    return path.is_file() and path.suffix in _SUFFIXES


def file_digest(path: Path) -> str:
    """SHA-256 of a file; computed once while it does not change."""
    status = path.stat()
    return _digest(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(4096)
def _digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """The checkpoints of an agent's host."""

    def find(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where the checkpoint of a manifest lies here (``path``); else what is missing.

        That is ``digests`` first, of which the name of the copy is made, then bytes of a file: ``file``, ``offset``.
        """
        files = listed(wanted)
        there = Path(wanted["path"])
        if self.is_whole(there if wanted["folder"] else there.parent, files):
            return {"path": str(there)}
        if "sha256" not in files[0]:
            return {"digests": True}
        folder = self.folder(files)
        if not self.is_whole(folder, files):
            return self.missing(folder, files)
        return {"path": str(folder if wanted["folder"] else folder / files[0]["name"])}

    def add(self, wanted: dict[str, Any], piece: bytes) -> dict[str, Any]:
        """Append a piece to the file it belongs to; the same answer as ``find``."""
        files = listed(wanted)
        each, folder = files[wanted["file"]], self.folder(files)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{each['name']}.part"
        with part.open("ab") as file:
            if file.tell() != wanted["offset"] or file.tell() + len(piece) > each["size"]:
                raise LabinferError("cluster.checkpoint", "a piece came that was not asked for")
            file.write(piece)
        if part.stat().st_size == each["size"]:
            if file_digest(part) != each["sha256"]:
                part.unlink()
                raise LabinferError("cluster.checkpoint", f"{each['name']} arrived damaged")
            os.replace(part, folder / each["name"])
        return self.find(wanted)

    def folder(self, files: Iterable[dict[str, Any]]) -> Path:
        """Where the copy of these files lies."""
        names = "\n".join(f"{each['sha256']} {each['name']}" for each in files)
        return cache_dir() / "cluster" / "checkpoints" / hashlib.sha256(names.encode()).hexdigest()[:24]

    def is_whole(self, folder: Path, files: Iterable[dict[str, Any]]) -> bool:
        """Whether all files are in ``folder``, as large as they should be."""
        paths = [(folder / each["name"], each["size"]) for each in files]
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)

    def missing(self, folder: Path, files: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """The first bytes that are not here."""
        for number, each in enumerate(files):
            part = folder / f".{each['name']}.part"
            if not (folder / each["name"]).is_file():
                return {"file": number, "offset": part.stat().st_size if part.is_file() else 0}
        raise LabinferError("cluster.checkpoint", f"files in {folder} have other sizes: remove them")


def listed(wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The files of a manifest that another host has sent: their names must not lead out of a folder."""
    files: list[dict[str, Any]] = wanted["files"]
    names = [each["name"] for each in files]
    if not 0 < len(files) <= MAX_FILES or any(Path(name).name != name or name == ".." for name in names):
        raise LabinferError("cluster.checkpoint", "a checkpoint has files, which have plain names")
    return files


def provide(ask: Callable[..., dict[str, Any]], checkpoint: Path) -> str:
    """Where the host that is asked with ``ask`` has ``checkpoint``, after sending what it lacks."""
    wanted = manifest(checkpoint, digests=False)
    answer = ask(do="checkpoint", **wanted)
    if "digests" in answer:
        wanted = manifest(checkpoint, digests=True)
        answer = ask(do="checkpoint", **wanted)
    while "path" not in answer:
        path = checkpoint / wanted["files"][answer["file"]]["name"] if checkpoint.is_dir() else checkpoint
        with path.open("rb") as file:
            file.seek(answer["offset"])
            piece = file.read(PIECE_BYTES)
        answer = ask(piece, do="piece", file=answer["file"], offset=answer["offset"], **wanted)
    return str(answer["path"])
