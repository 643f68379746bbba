"""What speculation is worth: tokens/s with and without it, on a text that repeats itself and on one that does not.

    python benchmarks/speculation.py models/smollm2-q4_0.gguf                                     # prompt lookup
    python benchmarks/speculation.py models/smollm2-bf16.gguf --draft models/smollm2-q4_0.gguf    # a draft model

Both sides answer the same prompt in turn, in one process after a warm-up: greedily where the text repeats, else with
temperature 0.8 and a seed, since greedy answers of small models repeat themselves. The ratio is the median of those
within pairs. The ceiling is what speculation would give if every step had guesses that are right as often: the
mean accepted length, times the seconds of a plain step over those of a step with guesses. Exits 1 where the tokens
differ, or where speculation loses more than a twentieth.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import labinfer
from labinfer import SamplingParams
from labinfer.runtime.outputs import RequestOutput

CODE = '''\
def area(shape):
    """The area of a shape."""
    if shape.kind == "circle":
        return 3.14159 * shape.radius ** 2
    if shape.kind == "square":
        return shape.side ** 2
    if shape.kind == "rectangle":
        return shape.width * shape.height
    raise ValueError("unknown shape: " + shape.kind)
'''
PROMPTS = {
    "repeats": (
        f"Add a case for triangles to this function, and give the whole function:\n\n```python\n{CODE}```",
        0.0,
    ),
    "free": ("Write a story about a lighthouse keeper who finds a strange shell.", 0.8),
}
"""Prompts and temperatures."""

KEPT = 0.95
"""Speculation that does not pay may cost so much."""


def tokens_per_second(answer: RequestOutput) -> float:
    """Tokens after the first, by the time from it to the end."""
    metrics = answer.metrics
    assert metrics.seconds is not None
    assert metrics.first_token_seconds is not None
    return (len(answer.token_ids) - 1) / (metrics.seconds - metrics.first_token_seconds)


def step_seconds(model: labinfer.LLM, guesses: bool) -> float | None:
    """The median time of the steps that decode with guesses, or without; None without any."""
    steps = [step for step in model.engine.stats if not step.num_prompt_tokens and bool(step.num_proposed) == guesses]
    return median(step.seconds for step in steps) if steps else None


def measure(
    plain: labinfer.LLM, guessing: labinfer.LLM, prompt: str, params: SamplingParams, pairs: int
) -> dict[str, Any]:
    """Figures of one prompt."""
    assert plain.tokenizer is not None
    ids = plain.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    speeds: list[tuple[float, float]] = []
    equal = True
    for number in range(pairs + 1):
        guessing.engine.stats.clear()
        without, with_guesses = plain.generate(ids, params)[0], guessing.generate(ids, params)[0]
        equal = equal and without.token_ids == with_guesses.token_ids
        if number:  # the first is a warm-up
            speeds.append((tokens_per_second(without), tokens_per_second(with_guesses)))
    steps = [step for step in guessing.engine.stats if step.num_proposed]
    proposed, accepted = sum(step.num_proposed for step in steps), sum(step.num_accepted for step in steps)
    plain_step, guess_step = step_seconds(plain, guesses=False), step_seconds(guessing, guesses=True)
    ratios = sorted(after / before for before, after in speeds)
    accepted_length = 1 + accepted / len(steps) if steps else 1.0
    return {
        "without": median(before for before, _ in speeds),
        "with": median(after for _, after in speeds),
        "ratio": median(ratios),
        "range": [ratios[0], ratios[-1]],
        "proposed": proposed,
        "accepted": accepted,
        "mean_accepted_length": accepted_length,
        "step_ratio": guess_step / plain_step if guess_step and plain_step else None,
        "ceiling": accepted_length * plain_step / guess_step if guess_step and plain_step else None,
        "equal": equal,
    }


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    low, high = found["range"]
    parts = [
        f"| {name} | {found['without']:.0f} | {found['with']:.0f} | {found['ratio']:.2f} ({low:.2f} - {high:.2f})",
        f"{found['accepted']} of {found['proposed']} | {found['mean_accepted_length']:.2f}",
        f"{found['step_ratio']:.2f} | {found['ceiling']:.2f} |" if found["ceiling"] else " |  |",
    ]
    return " | ".join(parts) + ("" if found["equal"] else " TOKENS DIFFER")


def main() -> int:
    """Measure, print, and exit 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path, help="a smaller model; without it, prompt lookup")
    parser.add_argument("--tokens", type=int, default=4, help="guesses a step")
    parser.add_argument("--length", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    limits = {"devices": "cpu", "max_num_seqs": 1, "max_logits_rows": 1 + given.tokens, "max_model_len": 1024}
    config = {"model": given.draft, "num_speculative_tokens": given.tokens}
    found = {}
    print("| text | tokens/s without | with | ratio (range) | right guesses | accepted length | step | ceiling |")
    print("|---|---|---|---|---|---|---|---|")
    with (
        labinfer.LLM(given.model, **limits) as plain,
        labinfer.LLM(given.model, speculative_config=config, **limits) as guessing,
    ):
        for name, (prompt, temperature) in PROMPTS.items():
            params = SamplingParams(temperature=temperature, seed=1, max_tokens=given.length, ignore_eos=True)
            found[name] = measure(plain, guessing, prompt, params, given.pairs)
            print(line(name, found[name]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(each["equal"] and each["ratio"] >= KEPT for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
