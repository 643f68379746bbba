"""Tensor parallelism over two unequal cores: equal shares against shares in proportion to speed, in alternating runs.

    python benchmarks/tensor_parallel.py MODEL.gguf [--split 3,1] [--tokens 16] [--rounds 3] [--json FILE]

Rank 0 has a core to itself. Beside rank 1, on its core, runs a process of higher real-time priority that takes all but
the part that makes the ranks as fast as ``--split`` says: of 3,1 it takes two thirds. Priorities need root, or a
permission (``ulimit -r``). Bar: unequal shares decode at least 1.3 times as fast as equal ones. The ceiling is what the
two parts of cores could do without exchanging anything, against equal shares: for 3,1 half of (3 + 1) / 1 is 2 times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import labinfer
from labinfer.llm import LLM

BAR = 1.3
PERIOD = 300e-6
"""Seconds of a round of the competitor: less than an op takes."""

PRIORITY = 60


def compete(core: int, part: float) -> None:
    """Take ``part`` of ``core`` until the parent ends it."""
    os.sched_setaffinity(0, [core])
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    parent = os.getppid()
    print("ready", flush=True)
    while os.getppid() == parent:
        until = time.monotonic() + part * PERIOD
        while time.monotonic() < until:
            pass
        time.sleep((1 - part) * PERIOD)


def decode(model: LLM, tokens: int) -> float:
    """Tokens a second of one sequence."""
    params = labinfer.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    model.generate([[1, 2, 3, 4]], params)
    return tokens / (time.perf_counter() - started)


def open_model(path: str, split: str) -> LLM:
    return labinfer.load(
        path, devices="cpu:0,cpu:1", tensor_split=split, transport="shm", threads=1,
        max_model_len=256, max_num_seqs=1, max_num_batched_tokens=16,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--split", default="3,1")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    fast, slow = map(float, options.split.split(","))
    core = sorted(os.sched_getaffinity(0))[1]
    found: dict[str, list[float]] = {"equal": [], "unequal": []}
    with open_model(options.model, "1,1") as equal, open_model(options.model, options.split) as unequal:
        command = [sys.executable, __file__, "--compete", str(core), str(1 - slow / fast)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as competitor:
            assert competitor.stdout is not None
            try:
                if competitor.stdout.readline().strip() != "ready":
                    sys.exit("the competitor did not get its priority")
                for model in (equal, unequal):
                    decode(model, 2)
                for _ in range(options.rounds):
                    found["equal"].append(decode(equal, options.tokens))
                    found["unequal"].append(decode(unequal, options.tokens))
            finally:
                competitor.kill()
    ratio = statistics.median(b / a for a, b in zip(found["equal"], found["unequal"], strict=True))
    ceiling = (fast + slow) / (2 * slow)
    for name, speeds in found.items():
        print(f"{name:8} {', '.join(f'{speed:.2f}' for speed in speeds)} tokens/s")
    print(f"shares {options.split} against equal ones: {ratio:.2f} times (bar {BAR}, ceiling {ceiling:.2f})")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"model": options.model, "split": options.split, "ratio": ratio, **found}, file, indent=1)
    sys.exit(ratio < BAR)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compete"]:
        compete(int(sys.argv[2]), float(sys.argv[3]))
    else:
        main()
