"""A pipeline of two CPU devices, a core each: tokens a second and how busy its stages are, by transport and by split.

    python benchmarks/pipeline.py MODEL.gguf [--sequences 16] [--trace trace.json] [--json FILE]

Beside each figure stands the same plan without a pipeline (its stages one after another). The ceiling is twice that:
two stages that never wait. Bar: with the layers split by measured time (how busy the stages of an even split are), both
stages compute at least 85 % of the time in steady state. ``--trace`` writes the last run's timeline for Perfetto.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

import labinfer
from labinfer.llm import LLM
from labinfer.render.step_trace import render_steps
from labinfer.runtime.pipeline.transport import TRANSPORTS

BAR = 0.85
PROMPT = 16


def generate(model: LLM, sequences: int, tokens: int) -> float:
    """Seconds for so many tokens in each of ``sequences``."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1000, PROMPT).tolist() for _ in range(sequences)]
    params = labinfer.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    model.generate(prompts, params)
    return time.perf_counter() - started


def busy(times: np.ndarray) -> list[float]:
    """Shares of the time that each stage computed, without the first and the last quarter of [steps, stages, 2]."""
    middle = times[len(times) // 4 : -max(1, len(times) // 4)]
    whole = middle[-1, :, 1] - middle[0, :, 0]
    shares: list[float] = ((middle[:, :, 1] - middle[:, :, 0]).sum(0) / whole).tolist()
    return shares


def measure(path: str, devices: str, transport: str | None, sequences: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of a split, and what its stages did."""
    options = {"threads": 1, "max_num_seqs": sequences, "max_model_len": 256, "max_num_batched_tokens": 128}
    with labinfer.load(path, devices=devices, transport=transport, **options) as model:
        generate(model, sequences, 8)
        if model.pipeline is not None:
            model.pipeline.spans.clear()
        seconds = generate(model, sequences, tokens)
        found: dict[str, Any] = {"devices": devices, "transport": transport, "tokens/s": sequences * tokens / seconds}
        if model.pipeline is not None:
            times = np.stack(list(model.pipeline.spans))
            found |= {"busy": busy(times), "times": times}
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--trace", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    weights = labinfer.compile(options.model).weights
    layers = 1 + max(line.layers[1] for line in weights if line.layers)
    found, passed = [], True
    splits = {"even": layers // 2, "a third": layers // 3}
    even = f"cpu:0=0-{splits['even'] - 1},cpu:1={splits['even']}-{layers - 1}"
    first_busy, second_busy = measure(options.model, even, "local", options.sequences, options.tokens)["busy"]
    splits["by time"] = round(splits["even"] * (first_busy + second_busy) / (2 * first_busy))
    for name, first in splits.items():
        devices = f"cpu:0=0-{first - 1},cpu:1={first}-{layers - 1}"
        alone = measure(options.model, devices, None, options.sequences, options.tokens)
        rate = alone["tokens/s"]
        print(f"{name}, {devices}: ceiling {2 * rate:.0f} tokens/s, one after another {rate:.0f}")
        for transport in options.transports:
            run = measure(options.model, devices, transport, options.sequences, options.tokens)
            times, shares = run.pop("times"), run["busy"]
            passed &= name != "by time" or min(shares) >= BAR
            shown = " ".join(f"{share:.0%}" for share in shares)
            print(f"  {transport:6} {run['tokens/s']:6.0f} tokens/s, stages busy {shown}")
            found += [run]
            if options.trace:
                with open(options.trace, "w", encoding="utf-8") as file:
                    file.write(render_steps({f"cpu:{stage}": times[:, stage] for stage in range(2)}))
        found += [alone]
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
