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

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "config.toml").write_text(CONFIG.format_map(os.environ))
    subprocess.run(
        ["codex", "exec", "--skip-git-repo-check", "--sandbox", "read-only", "-o", folder / "last.txt", "Say hi."],
        check=True, cwd=folder, stdin=subprocess.DEVNULL, env=os.environ | {"CODEX_HOME": name},
    )  # fmt: skip
    assert (folder / "last.txt").read_text().strip()
