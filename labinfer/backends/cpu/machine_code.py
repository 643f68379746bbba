"""Machine code of the kernels: compiled once by numba in a process of its own, kept on disk, called by address.

A kernel has a name: ``attention_step``, or ``linear/q4_0/2`` where there is one for each format (``exports`` lists
them). Its object file lies in the cache under the digest of all that it depends on. The process that computes imports
neither numba nor LLVM: that saves 120 MB of memory and half a second.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from labinfer.backends.cpu import features
from labinfer.backends.cpu.machine import default_threads
from labinfer.backends.cpu.object_file import load
from labinfer.errors import LabinferError
from labinfer.home import cache_dir

Progress = Callable[[int, int], None]
"""Called with the number of kernels that are ready, and of all that are asked for."""

KEEP_SECONDS = 30 * 24 * 3600
"""How long compiled code that nothing uses is kept."""

_addresses: dict[str, int] = {}
_loading = threading.Lock()


@cache
def cache_key() -> str:
    """Names all that compiled code depends on: this folder's sources, the CPU, the versions of numba and LLVM."""
    try:
        versions = [version("numba"), version("llvmlite")]
    except PackageNotFoundError:
        raise ModuleNotFoundError("No module named 'numba'", name="numba") from None
    parts = [features.LEVEL, *sorted(features.FEATURES), *versions, sys.version]
    digest = hashlib.sha256(" ".join(parts).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@cache
def folder() -> Path:
    """Where compiled code lies; where nothing can be written, a folder that goes with this process."""
    found = cache_dir() / "jit" / cache_key()
    try:
        found.mkdir(parents=True, exist_ok=True)
        os.utime(found)  # so that it does not count as unused
    except OSError:
        pass
    if os.access(found, os.W_OK):
        return found
    temporary = tempfile.TemporaryDirectory(prefix="labinfer-jit-")
    _kept.append(temporary)
    return Path(temporary.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def address(name: str) -> int:
    """The address of a kernel's code, which is compiled now if it never was."""
    if name not in _addresses:
        prepare([name])
    return _addresses[name]


def function(name: str, result: type | None, *arguments: type) -> Callable[..., int]:
    """A kernel as a function for Python, with ctypes types; it holds no GIL while it runs."""
    made: Callable[..., int] = ctypes.CFUNCTYPE(result, *arguments)(address(name))
    return made


def prepare(names: Iterable[str], progress: Progress = lambda done, total: None) -> None:
    """Compile what is missing of ``names``, on all cores, and load all of them."""
    wanted = [name for name in dict.fromkeys(names) if name not in _addresses]
    missing = [name for name in wanted if not object_path(name, folder()).exists()]
    if missing:
        _compile(missing, progress)
    with _loading:
        for name in wanted:
            if name not in _addresses:
                _addresses[name] = _load(object_path(name, folder()))


def _load(path: Path) -> int:
    try:
        return load(path.read_bytes())
    except ValueError as damage:
        path.unlink()
        message = f"{path} is no object file of ours: {damage}"
        raise LabinferError("device.machine-code", message, remedy="start again: it is compiled anew") from None


def object_path(name: str, where: Path) -> Path:
    """The object file of a kernel in the folder of compiled code."""
    return where / (name.replace("/", ".") + ".o")


def _compile(names: Sequence[str], progress: Progress) -> None:
    """Share ``names`` out to compiling processes; each says a name when it is done."""
    _prune()
    count = max(1, min(default_threads(), len(names) // 2))
    done, lock = 0, threading.Lock()

    def advance() -> None:
        nonlocal done
        with lock:
            done += 1
            progress(done, len(names))

    progress(0, len(names))
    with ThreadPoolExecutor(count) as pool:
        for _ in pool.map(lambda part: _compile_part(names[part::count], advance), range(count)):
            pass


def _compile_part(names: Sequence[str], advance: Callable[[], None]) -> None:
    command = [sys.executable, "-m", "labinfer.backends.cpu.build", str(folder()), *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for _ in process.stdout:
                advance()
            said = process.stderr.read()
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        last = said.strip().splitlines()[-1:] or [f"exit {process.returncode}"]
        message = f"compiling the CPU kernels {', '.join(names)} failed: {last[0]}"
        raise LabinferError("device.compile", message, remedy="`labinfer doctor` checks the installation of numba")


def _prune() -> None:
    """Remove compiled code of other versions that no process has used for a month."""
    for other in folder().parent.glob("*"):
        try:
            if other != folder() and time.time() - other.stat().st_mtime > KEEP_SECONDS:
                for path in sorted(other.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                other.rmdir()
        except OSError:  # used, or removed, by somebody else
            continue
