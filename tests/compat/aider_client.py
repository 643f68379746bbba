"""aider: a question about a file, asked and answered."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    settings = [{"name": f"openai/{os.environ['MODEL']}", "extra_params": {"max_tokens": 32}}]
    (Path(folder) / ".aider.model.settings.yml").write_text(str(settings))
    (Path(folder) / "a.py").write_text("print(1)\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "aider", "--model", f"openai/{os.environ['MODEL']}", "--no-git", "--yes-always",
         "--no-check-update", "--analytics-disable", "--no-show-model-warnings", "--map-tokens", "0",
         "--message", "Say hi.", "a.py"],
        check=True, cwd=folder, text=True, stdout=subprocess.PIPE,
        env=os.environ | {"HOME": folder, "OPENAI_API_BASE": os.environ["OPENAI_BASE_URL"]},
    )  # fmt: skip
assert "Tokens:" in done.stdout, done.stdout
