"""Codex: a question without a terminal, which it asks as a response with all of its tools."""

import os
import subprocess
import tempfile
from pathlib import Path

CONFIG = """
model = "{MODEL}"
model_provider = "here"
[model_providers.here]
name = "here"
base_url = "{OPENAI_BASE_URL}"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
"""

CUT = "Incomplete response returned, reason: max_output_tokens"
"""What Codex says of an answer that goes on to the end of the context, as a small model's may: it sets no limit."""


def asked(folder: Path) -> subprocess.CompletedProcess[str]:
    """Codex, after it has asked."""
    return subprocess.run(
        ["codex", "exec", "--skip-git-repo-check", "--sandbox", "read-only", "-o", folder / "last.txt", "Say hi."],
        cwd=folder, stdin=subprocess.DEVNULL, env=os.environ | {"CODEX_HOME": str(folder)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "config.toml").write_text(CONFIG.format_map(os.environ))
    for _ in range(3):
        done = asked(folder)
        if done.returncode == 0 or CUT not in done.stdout:
            break
    assert done.returncode == 0, done.stdout
    assert (folder / "last.txt").read_text().strip()
