"""guidellm: a load of two streams."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    report, tokenizer = Path(folder) / "report.json", os.environ["TOKENIZER"]
    target, key = os.environ["OPENAI_BASE_URL"].removesuffix("/v1"), os.environ["OPENAI_API_KEY"]
    subprocess.run(
        [Path(sys.executable).parent / "guidellm", "run",
         "--backend", f"kind=openai_http,target={target},model={os.environ['MODEL']},api_key={key}",
         "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6",
         "--tokenizer", f"kind=hf_auto,model={tokenizer}",
         "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8", "--output", f"kind=json,path={report}"],
        check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
assert totals["successful"] == 6
assert totals["errored"] == 0
