"""Where a step of the CPU backend spends its time: the tape with a clock between its ops.

    python benchmarks/cpu_profile.py model.gguf                  # decode at a context of 64
    python benchmarks/cpu_profile.py model.gguf --tokens 512     # prefill

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
from labinfer.bench.measure import limits, num_threads, plan_tests, weight_memory
from labinfer.llm import LLM
from labinfer.ops.base import Call
from labinfer.runtime.batch import part_of


def weights_of(call: Call) -> list[PackedWeight]:
    """The matrices an op reads."""
    own = [w for w in call.weights.values() if isinstance(w, PackedWeight)]
    return own + [w for part in call.parts for w in weights_of(part)]


class Profile:
    """A step's tape with a clock after each op."""

    def __init__(self, model: LLM, tokens: int) -> None:
        (self.interpreter,) = model.interpreters
        self.bound = [each for each in self.interpreter.bind(tokens, 1).bound if each.kernel is not None]
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
    parser.add_argument("--context", type=int, default=64, help="tokens before the step")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    threads = {} if options.threads is None else {"threads": options.threads}
    room = limits(plan_tests([options.tokens + options.context], [1], [1]))
    with LLM(options.model, devices="cpu", max_num_batched_tokens=max(512, options.tokens), **room, **threads) as model:
        row = model.batch.add([1] * (options.context + options.tokens))
        for start in range(0, options.context, 512):  # fills the cache
            model.compute(part_of(row, min(512, options.context - start), 1))
        part = part_of(row, options.tokens, 1)
        model.batch.grow(part)
        step = model.batch.step(part)
        profile = Profile(model, options.tokens)
        show(profile, step, options.steps, model)


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
            rows = 1 if bound.op.outputs[0] == "logits" else len(step.token_ids)
            macs[key] += sum(w.rows * w.columns for w in weights_of(bound.call)) * rows
    total = sum(spent.values())
    reads = read_bandwidth(weight_memory(model), num_threads(model.plan)) / 1e9
    print(f"{LEVEL}, step {1000 * median(seconds):.3f} ms, plain read {reads:.1f} GB/s")
    for key, took in sorted(spent.items(), key=lambda item: -item[1]):
        rate = f"{nbytes[key] / took / 1e9:7.1f} GB/s {macs[key] / took / 1e9:8.0f} GMAC/s" if nbytes[key] else ""
        print(f"{key:60} x{count[key]:<3} {1000 * took:9.3f} ms {100 * took / total:5.1f} % {rate}")


if __name__ == "__main__":
    main()
