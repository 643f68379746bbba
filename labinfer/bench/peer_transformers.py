"""A program, not a module: measures transformers on a model directory, run by a Python that has torch and it.

Its one argument is JSON: ``model`` (path), ``threads``, ``tests`` (kind, tokens, batch). Prints tokens/s by test.
"""

import json
import sys
import time
from typing import Any

import torch
import transformers


def prefill(model: Any, length: int) -> float:
    """Seconds until the first token of a prompt."""
    prompt = torch.randint(model.config.vocab_size, (1, length))
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1).logits.argmax()
    return time.perf_counter() - start


def decode(model: Any, batch: int, length: int) -> float:
    """Seconds for ``length`` tokens of each of ``batch`` sequences, from an empty cache."""
    tokens, cache = torch.randint(model.config.vocab_size, (batch, 1)), None
    start = time.perf_counter()
    for _ in range(length):
        made = model(tokens, past_key_values=cache, use_cache=True)
        tokens, cache = made.logits[:, -1:].argmax(-1), made.past_key_values
    return time.perf_counter() - start


def main() -> None:
    """Measure each test once, after a warm-up of the same kind."""
    task = json.loads(sys.argv[1])
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(task["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype="auto", local_files_only=True).eval()
    found = {}
    with torch.inference_mode():
        for kind, tokens, batch in task["tests"]:
            if kind == "prefill":
                prefill(model, tokens)
                seconds = prefill(model, tokens)
            else:
                decode(model, batch, 2)
                seconds = decode(model, batch, tokens)
            found[f"{kind} {tokens} x {batch}"] = tokens * batch / seconds
    print(json.dumps(found))


main()
