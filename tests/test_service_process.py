"""The command: what it prints, how it ends, and what it goes on through."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from .service import KEY, wait_for

LONG = {"prompt": [5, 6], "max_tokens": 120, "ignore_eos": True}


def serve_process(
    model: Path, home: Path, *arguments: str, stderr: int = subprocess.PIPE, files: str = ""
) -> subprocess.Popen[str]:
    """``files`` are limits of open files, as ``ulimit`` takes them."""
    command = [sys.executable, "-m", "labinfer", "serve", str(model), "--port", "0", *arguments]
    environment = os.environ | {"LABINFER_HOME": str(home)}
    if files:
        command = ["bash", "-c", f'{files}; exec "$@"', "bash", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)


@contextmanager
def serving(
    model: Path, home: Path, *arguments: str, stderr: int = subprocess.PIPE, files: str = ""
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A service in a process of its own, and a client of it."""
    with serve_process(model, home, "--api-key", KEY, *arguments, stderr=stderr, files=files) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1].removesuffix("/v1")
            with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
                yield process, client
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> int:
    """The exit code after SIGTERM."""
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


def log_of(process: subprocess.Popen[str]) -> str:
    """What is in the pipe of a process that has ended."""
    assert process.stderr is not None
    return process.stderr.read()


def test_the_command_prints_what_works_and_ends_well_on_sigterm(tiny_model: Path, home: Path) -> None:
    with serve_process(tiny_model, home, "--log-format", "json") as process:
        assert process.stdout is not None
        where, page, key, curl = (process.stdout.readline() for _ in range(4))
        url = where.split()[-1]
        token = key.split()[2]
        assert page.strip().endswith(f"/#key={token}")
        assert (home / "api-key").read_text().strip() == token
        assert (home / "api-key").stat().st_mode & 0o777 == 0o600
        assert httpx.get(f"{url}/models", headers={"authorization": f"Bearer {token}"}).status_code == 200
        answer = json.loads(subprocess.run(curl, shell=True, capture_output=True, check=True).stdout)
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    served_line = next(each for each in records if each.get("path") == "/v1/chat/completions")
    assert served_line["status"] == 200
    assert served_line["request_id"]
    assert token not in log


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--host", "0.0.0.0"], "serve.no-key"),
        (["--api-key", "short"], "serve.api-key"),
        (["--api-key-file", "/nowhere"], "serve.api-key-file"),
        (["--api-key", "a-good-key-1", "--api-key-file", "/nowhere"], "cli.usage"),
        (["--replicas", "2", "--prefill-replicas", "2"], "cli.usage"),
    ],
)
def test_what_cannot_be_served_is_refused(tiny_model: Path, home: Path, arguments: list[str], code: str) -> None:
    with serve_process(tiny_model, home, *arguments) as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"error[{code}]" in log


def test_a_port_that_is_taken_is_named(tiny_model: Path, home: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with serve_process(tiny_model, home, "--port", port) as process:
            _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"port {port}" in log


@pytest.mark.parametrize(
    ("files", "count", "refused"),
    [("ulimit -Sn 128", 200, False), ("ulimit -n 128", 30, True)],
    ids=["soft", "hard"],
)
def test_few_open_files_lose_no_connection(tiny_model: Path, home: Path, files: str, count: int, refused: bool) -> None:
    async def statuses(url: str) -> list[bytes]:
        ends = [await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])) for _ in range(count)]
        for _, writer in ends:
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = [(await reader.readline()).split()[1] for reader, _ in ends]
        for _, writer in ends:
            writer.close()
        return found

    with serving(tiny_model, home, files=files) as (process, client):
        found = asyncio.run(statuses(str(client.base_url).rstrip("/")))
        assert set(found) == ({b"200", b"503"} if refused else {b"200"})
        assert end(process) == 0
        assert ("at most 16 connections" in log_of(process)) == refused


def test_too_few_open_files_are_told_at_the_start(tiny_model: Path, home: Path) -> None:
    with serve_process(tiny_model, home, files="ulimit -n 64") as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error[serve.open-files]" in log
    assert "ulimit -n 2144" in log


def test_a_log_that_nobody_reads_stops_no_answer(tiny_model: Path, home: Path) -> None:
    with serving(tiny_model, home) as (process, client):
        for number in range(400):  # 64 KiB are in the pipe by then
            path = f"/{number}{'x' * 300}"
            assert client.get(path).status_code == 404
        assert client.post("/v1/completions", json=LONG).json()["usage"]["completion_tokens"] == 120
        assert end(process) == 0
        log = log_of(process)
    assert "/0xxx" in log
    assert "/399xxx" not in log  # else the pipe was never full


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_stops_no_answer(tiny_model: Path, home: Path) -> None:
    with open("/dev/full", "wb") as full, serving(tiny_model, home, stderr=full.fileno()) as (process, client):
        assert client.get("/nothing").status_code == 404
        assert client.post("/v1/completions", json=LONG).json()["usage"]["completion_tokens"] == 120
        assert end(process) == 0


def test_streams_end_well_when_sigterm_comes_under_load(tiny_model: Path, home: Path) -> None:
    found: list[str] = []
    began = threading.Semaphore(0)
    with serving(tiny_model, home, "--max-num-seqs", "4", stderr=subprocess.DEVNULL) as (process, client):

        def ask() -> None:
            try:
                with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
                    began.release()
                    found.append(answer.read().decode() if answer.status_code == 200 else str(answer.status_code))
            except httpx.ConnectError:
                began.release()
                found.append("refused")

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            began.acquire()
        code = end(process)
        for thread in threads:
            thread.join(60)
    assert code == 0
    assert len(found) == 16
    whole = [text for text in found if text.endswith("data: [DONE]\n\n") and '"error"' not in text]
    assert len(whole) >= 4
    assert all(text in ("503", "refused") for text in found if text not in whole)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_go_on_after_a_stage_died(tiny_model: Path, home: Path, number: int) -> None:
    options = ("--devices", "reference,reference:1", "--transport", "shm")
    with serving(tiny_model, home, *options) as (process, client):
        stages = stages_of(process.pid)
        assert len(stages) == 2
        asked = {**LONG, "max_tokens": 300, "temperature": 0}
        expected = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
        texts: list[str] = []

        def ask() -> None:
            with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        texts.extend(choice["text"] for choice in json.loads(line[6:])["choices"])

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: len(texts) > 4)
        os.kill(stages[1], number)
        thread.join(60)
        assert "".join(texts) == expected
        # Where the whole answer was made before the stage died, the next request starts it anew.
        assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == expected
        assert len(stages_of(process.pid)) == 2
        assert end(process) == 0
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in stages))


def stages_of(server: int) -> list[int]:
    """The processes that run stages for a server."""
    children = [
        int(pid) for each in Path(f"/proc/{server}/task").glob("*/children") for pid in each.read_text().split()
    ]
    return [pid for pid in children if b"pipeline" in Path(f"/proc/{pid}/cmdline").read_bytes()]
