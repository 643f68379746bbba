"""Where a step of the CPU backend spends its time: the tape with a clock between its ops.

    python benchmarks/cpu_profile.py model.gguf                  # decode at a context of 64
    python benchmarks/cpu_profile.py model.gguf --tokens 512     # prefill
    python benchmarks/cpu_profile.py model.gguf --sequences 64   # decode of many sequences

The step runs as always: one compiled loop, all workers; a barrier counts with the op before it. Medians over steps;
bytes are those of the op's weights.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from statistics import median
from typing import Any

import numpy as np

from labinfer.backends.cpu.features import LEVEL
from labinfer.backends.cpu.packed_weight import PackedWeight
from labinfer.bench.ceiling import read_bandwidth
from labinfer.bench.measure import Workload, limits, num_threads, weight_memory
from labinfer.llm import LLM
from labinfer.ops.base import Call
from labinfer.runtime.batch import Part, part_of


def weights_of(call: Call) -> list[PackedWeight]:
    """The matrices an op reads."""
    own = [w for w in call.weights.values() if isinstance(w, PackedWeight)]
    return own + [w for part in call.parts for w in weights_of(part)]


class Profile:
    """A step's tape with a clock after each op."""

    def __init__(self, model: LLM, tokens: int, logits: int) -> None:
        (self.interpreter,) = model.interpreters
        self.bound = [each for each in self.interpreter.resolve(tokens, logits)[0] if each.kernel is not None]
        self.program = self.interpreter.device.timed([(each.kernel, each.call) for each in self.bound])

    def run(self, step: Any) -> list[float]:
        """Seconds of each op in one step."""
        self.interpreter.step_memory.load(step)
        return list(self.program())


def name(op: Any, call: Call) -> str:
    """The kind of an op, with the shapes of the matrices it multiplies with."""
    shapes = " ".join(f"{w.rows}x{w.columns}" for w in weights_of(call))
    return f"{op.kind} {shapes}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=1, help="so many, each of so many tokens")
    parser.add_argument("--context", type=int, default=64, help="tokens before the step")
    parser.add_argument("--kv-dtype", default="f32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    count, tokens = options.sequences, options.sequences * options.tokens
    length = options.context + options.tokens
    room = limits([Workload("decode", length, count)]) | {"max_num_batched_tokens": max(512, tokens)}
    if options.threads is not None:
        room["threads"] = options.threads
    with LLM(options.model, devices="cpu", kv_dtype=options.kv_dtype, **room) as model:
        rows = [model.batch.add([1] * length) for _ in range(count)]
        for row in rows:
            for start in range(0, options.context, 512):  # fills the cache
                model.compute(part_of(row, min(512, options.context - start), 1))
        ones = np.ones(count, np.int32)
        part = Part(np.array(rows), ones * options.tokens, ones, ones)
        model.batch.grow(part)
        profile = Profile(model, tokens, count)
        show(profile, model.batch.step(part), options.steps, model)


def show(profile: Profile, step: Any, steps: int, model: LLM) -> None:
    """Run and print the table."""
    import time

    profile.run(step)
    runs, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        runs.append(profile.run(step))
        seconds.append(time.perf_counter() - start)
    each_op = np.median(runs, axis=0)
    spent: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    nbytes: dict[str, int] = defaultdict(int)
    macs: dict[str, int] = defaultdict(int)
    for bound, took in zip(profile.bound, each_op, strict=True):
        key = name(bound.op, bound.call)
        spent[key] += took
        count[key] += 1
        if bound.op.kind != "embedding":
            nbytes[key] += sum(w.nbytes for w in weights_of(bound.call))
            rows = len(step.logits_rows if bound.op.outputs[0] == "logits" else step.token_ids)
            macs[key] += sum(w.rows * w.columns for w in weights_of(bound.call)) * rows
    total = sum(spent.values())
    reads = read_bandwidth(weight_memory(model), num_threads(model.plan)) / 1e9
    print(f"{LEVEL}, step {1000 * median(seconds):.3f} ms, plain read {reads:.1f} GB/s")
    for key, took in sorted(spent.items(), key=lambda item: -item[1]):
        rate = f"{nbytes[key] / took / 1e9:7.1f} GB/s {macs[key] / took / 1e9:8.0f} GMAC/s" if nbytes[key] else ""
        print(f"{key:60} x{count[key]:<3} {1000 * took:9.3f} ms {100 * took / total:5.1f} % {rate}")


if __name__ == "__main__":
    main()
