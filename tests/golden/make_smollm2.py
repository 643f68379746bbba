"""Make smollm2.json: what transformers says SmolLM2-135M-Instruct continues, from the same dequantized weights.

Run from the repository root with the test-hf extra installed: ``python -m tests.golden.make_smollm2 GGUF``.
Takes some minutes. The perplexity text is stored as token ids, so later edits of its files do not matter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ..hf import smollm2

_FOLDER = Path(__file__).parent
_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_PROMPTS = [
    _CHAT.format("What is the capital of France?"),
    _CHAT.format("Write a Python function that reverses a string."),
    "In 1969, the Apollo 11 mission",
    "def fibonacci(n):\n",
    "The first 12 prime numbers are 2, 3, 5, 7,",
]
_CLEAR_MARGIN = 0.02
_PERPLEXITY_SOURCES = ("labinfer/errors.py", "labinfer/catalogue.py")


def main(gguf: Path) -> None:
    """Continue each prompt by 128 tokens; a prompt whose greedy choices come near a tie is refused."""
    tokenizer = smollm2.build_tokenizer(gguf)
    model = smollm2.build_model(gguf)
    text = "\n".join((_FOLDER.parents[1] / name).read_text() for name in _PERPLEXITY_SOURCES)
    tokens = tokenizer.encode(text, add_special_tokens=False).ids[:2000]
    likelihood = smollm2.negative_log_likelihood(model, tokens)
    perplexity = {length: float(np.exp(likelihood[: length - 1].mean())) for length in (256, 2000)}
    print(f"perplexity {perplexity} of {len(tokens)} tokens", flush=True)
    runs = []
    for text in _PROMPTS:
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        generated, margin = smollm2.greedy(model, prompt, 128)
        continuation = tokenizer.decode(generated, skip_special_tokens=True)
        print(f"margin {margin:.4f}: {text!r} -> {continuation[:60]!r}", flush=True)
        assert margin > _CLEAR_MARGIN, text
        runs.append({"text": text, "prompt": prompt, "generated": generated, "continuation": continuation})
    golden = {"runs": runs, "perplexity_tokens": tokens, "perplexity": perplexity}
    (_FOLDER / "smollm2.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
