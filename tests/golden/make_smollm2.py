"""Make smollm2.json: what transformers says SmolLM2-135M-Instruct continues, from the same dequantized weights.

Run from the repository root with the test-hf extra and `gguf` installed: ``python -m tests.golden.make_smollm2 GGUF``.
Takes some minutes. The perplexity text is stored as token ids, so later edits of the files it came from do not matter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

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
    tokenizer = _tokenizer(gguf)
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


def _tokenizer(gguf: Path) -> Tokenizer:
    """SmolLM's tokenizer: transformers' reading of the GGUF file misses that each digit is a word of its own."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).backend_tokenizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return tokenizer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
