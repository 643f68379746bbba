"""A model whose weights are about twice the memory for them: tokens a second against what streaming them allows.

    python benchmarks/streaming.py MODEL.gguf [--share 0.5] [--threads N] [--stream-from disk] [--json FILE]

Copying is timed with nothing else running, as a step copies: where the device leaves a core to it (the default here)
with that and with the core that else computes. A step is then at least as long as one of resident weights, and as the
work of both cores shared evenly: copying, and half of such a step. A device that computes with all cores
(``--threads``) copies with them as well, so its bound is the sum of both. Bar: 80 % of it, with the tokens of resident
weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import labinfer
from labinfer.llm import LLM
from labinfer.runtime.cores import available_cores

BAR = 0.8
PROMPT = list(range(100, 116))


def answer(model: LLM, tokens: int) -> tuple[float, list[int]]:
    """Seconds a decode step, and the tokens."""
    params = labinfer.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    found = model.generate(PROMPT, params)[0]
    metrics = found.metrics
    return metrics.inter_token_seconds or 0.0, found.token_ids


def copy_seconds(model: LLM, rounds: int) -> float:
    """Seconds for bringing all streamed layers once, with nothing else running: the window is used by nobody else."""
    [stage] = model.stages
    assert stage.streamed is not None
    best = float("inf")
    with model.lock:
        for _ in range(rounds):
            started = time.perf_counter()
            for layer in stage.streamed.layers:
                stage.streamed.reach(layer)
            stage.streamed.end()
            best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--share", type=float, default=0.5, help="of the weights that fit the device")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=max(1, len(available_cores()) - 1))
    parser.add_argument("--stream-from", choices=["host", "disk"], default="host")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    limits: dict[str, Any] = {
        "devices": "cpu", "threads": options.threads,
        "max_num_seqs": 1, "max_model_len": 256, "max_num_batched_tokens": 64,
    }  # fmt: skip
    whole = labinfer.compile(options.model, **limits).stages[0].bytes.weights
    count, fits = 0, whole
    while fits > options.share * whole:
        count += 2
        plan = labinfer.compile(options.model, streamed_layers=count, stream_from=options.stream_from, **limits)
        taken = plan.stages[0].bytes
        if len(plan.stages[0].streamed) < count:
            sys.exit(f"not even with all layers streamed: {fits} of {whole} bytes stay on the device")
        fits = taken.weights + taken.window
    with labinfer.load(options.model, **limits) as model:
        answer(model, 4)
        resident, expected = answer(model, options.tokens)
    with labinfer.load(plan) as model:
        answer(model, 4)
        streamed, tokens = answer(model, options.tokens)
        copying = copy_seconds(model, 3)
        [stage] = model.stages
        assert stage.streamed is not None
        nbytes, ahead = sum(stage.streamed.sizes.values()), stage.streamed.ahead
    bound = max(resident, copying + resident / 2) if ahead else copying + resident
    print(f"weights {whole / 1e6:.0f} MB, on the device {fits / 1e6:.0f} MB ({count} layers streamed)")
    print(f"copying {nbytes / copying / 1e9:.1f} GB/s, {copying * 1e3:.1f} ms; resident {resident * 1e3:.1f} ms")
    print(f"streamed {streamed * 1e3:.1f} ms a token, bound {bound * 1e3:.1f} ms: {bound / streamed:.0%} of it")
    print(f"tokens {'equal' if tokens == expected else 'DIFFER'}")
    if options.json:
        found = {"weights": whole, "device": fits, "layers": count, "resident": resident, "streamed": streamed}
        found |= {"threads": options.threads, "from": options.stream_from, "copying": copying, "bound": bound}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**found, "share": bound / streamed}, file, indent=1)
    sys.exit(tokens != expected or bound / streamed < BAR)


if __name__ == "__main__":
    main()
