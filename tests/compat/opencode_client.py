"""opencode: a question without a terminal, which it asks as a chat with all of its tools."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

model = os.environ["MODEL"]
server = {"baseURL": os.environ["OPENAI_BASE_URL"], "apiKey": os.environ["OPENAI_API_KEY"]}
provider = {"npm": "@ai-sdk/openai-compatible", "name": "here", "options": server,
            "models": {model: {"name": model, "limit": {"context": 8192, "output": 32}}}}  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    config = {"autoupdate": False, "share": "disabled", "provider": {"here": provider}}
    (Path(folder) / "opencode.json").write_text(json.dumps(config))
    homes = dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"), folder)
    # It looks for its configuration in the folder that PWD names.
    done = subprocess.run(
        ["opencode", "run", "-m", f"here/{model}", "Say hi."], check=True, cwd=folder, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=os.environ | homes | {"PWD": folder},
    )  # fmt: skip
assert done.stdout.strip()
