"""llm, Simon Willison's command: a prompt and a schema."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    model = {"model_id": "here", "model_name": os.environ["MODEL"], "api_base": os.environ["OPENAI_BASE_URL"],
             "api_key_name": "here", "supports_schema": True}  # fmt: skip
    (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps([model]))
    command = [
        str(Path(sys.executable).parent / "llm"),
        "-m",
        "here",
        "-o",
        "max_tokens",
        "60",
        "-o",
        "temperature",
        "0",
    ]
    for more in ([], ["--schema", "name, age int"]):
        done = subprocess.run(
            [*command, *more, "Name a city."], env=os.environ | {"LLM_USER_PATH": folder}, text=True,
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        assert done.stdout.strip()
    assert json.loads(done.stdout)["name"] is not None
