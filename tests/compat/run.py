"""Run clients of OpenAI's API, each in an environment of its own, against a service of the embedded model.

``python tests/compat/run.py [CLIENT ...]`` (``make compat``); their programs stand in this folder. They read
``OPENAI_BASE_URL``, ``OPENAI_API_KEY`` and ``MODEL``, and raise when something is not as it should be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = {
    "openai_client": "openai",
    "anthropic_client": "anthropic",
    "instructor_client": "instructor",
    "pydantic_ai_client": "pydantic-ai-slim[openai]",
    "langchain_client": "langchain-openai",
    "llm_client": "llm",
    "schemathesis_client": "schemathesis",
}
"""Program -> package."""


def environment(name: str) -> Path:
    """The Python of a client's environment, which is made where it is missing."""
    folder = ROOT / ".venv-compat" / name
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", CLIENTS[name]], check=True)
        (folder / ".ready").touch()
    return python


def main() -> int:
    """Try all clients, or those that are named; how many failed."""
    names, failed = sys.argv[1:] or list(CLIENTS), 0
    pythons = {name: environment(name) for name in names}
    command = [sys.executable, "-m", "labinfer", "-q", "serve", "--port", "0", "--json", "--max-model-len", "512"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        lines = ""
        while not lines.endswith("}\n"):
            lines += server.stdout.readline()
        found = json.loads(lines)
        own = {"OPENAI_BASE_URL": f"{found['url']}/v1", "OPENAI_API_KEY": found["api_key"], "MODEL": found["model"]}
        for name in names:
            program = Path(__file__).with_name(f"{name}.py")
            done = subprocess.run(
                [pythons[name], program], env=os.environ | own | {"NO_PROXY": "127.0.0.1"}, text=True,
                capture_output=True, timeout=300,
            )  # fmt: skip
            failed += bool(done.returncode)
            print(f"{'ok    ' if not done.returncode else 'FAILED'} {name}", flush=True)
            if done.returncode:
                print(done.stdout[-2000:] + done.stderr[-2000:])
    finally:
        server.terminate()
        server.wait()
    return failed


if __name__ == "__main__":
    sys.exit(main())
