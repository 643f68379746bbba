"""schemathesis: right and wrong data on all paths; no server error, no undocumented status.

Examples are few, deterministic and not shrunk, and answers are short (``schemathesis_hooks.py``), so that it ends.
"""

import os
import subprocess
import sys
from pathlib import Path

program = Path(sys.executable).parent / "schemathesis"
url = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
checks = "not_a_server_error,status_code_conformance,response_schema_conformance"
subprocess.run(
    [program, "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {os.environ['OPENAI_API_KEY']}",
     "--checks", checks, "--mode", "all", "--max-examples", "10", "--no-shrink", "--generation-deterministic",
     "--phases", "examples,coverage,fuzzing", "--request-timeout", "60"],
    check=True, cwd=Path(__file__).parent, env={**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks"},
)  # fmt: skip
