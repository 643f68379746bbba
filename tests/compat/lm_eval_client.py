"""lm-eval: a task of choices, whose texts local-completions scores by loglikelihood, and one that generates."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

QUESTIONS = [
    {"question": "The capital of France is", "choices": [" Paris", " Oslo qxz", " 7"], "answer": 0},
    {"question": "One, two, three,", "choices": [" banana zzz", " four", " Peru"], "answer": 1},
]
CHOICES = {"task": "choices", "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
TEXTS = {"task": "texts", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}",
         "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]},
         "metric_list": [{"metric": "exact_match"}]}  # fmt: skip

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
            "test_split": "test", "doc_to_text": "{{question}}"}  # fmt: skip
    for task in (CHOICES, TEXTS):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(data | task))
    served = {"model": os.environ["MODEL"], "base_url": f"{os.environ['OPENAI_BASE_URL']}/completions",
              "tokenizer": os.environ["TOKENIZER"], "tokenized_requests": "False", "num_concurrent": "2"}  # fmt: skip
    subprocess.run(
        [Path(sys.executable).parent / "lm-eval", "run", "--model", "local-completions",
         "--model_args", ",".join(f"{key}={value}" for key, value in served.items()),
         "--tasks", "choices,texts", "--include_path", folder, "--output_path", folder / "out"],
        check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{folder}/cache"},
    )  # fmt: skip
    results = json.loads(next((folder / "out").rglob("results*.json")).read_text())["results"]
assert results["choices"]["acc,none"] == 1.0
assert "exact_match,none" in results["texts"]
