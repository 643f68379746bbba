"""The recorded tables of the CPU backend: speed beside llama.cpp and the machine's limits, memory, time to start.

    python benchmarks/models.py FOLDER --from SmolLM2-135M-Instruct.Q4_1.gguf --random q4_0 bf16   # once
    LABINFER_BENCH_PYTHON=peers/bin/python python benchmarks/cpu.py FOLDER speed     # SmolLM2 in four formats
    LABINFER_BENCH_PYTHON=peers/bin/python python benchmarks/cpu.py FOLDER large     # the shape of Llama-3.2-1B
    python benchmarks/cpu.py FOLDER memory start

Prints Markdown. Ratios are medians over alternating pairs of processes; a missed goal is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

SMOLLM2 = ("q4_1", "q4_0", "q8_0", "bf16")
LARGE = ("q4_0", "q8_0", "q4_k", "q5_k", "q6_k", "bf16")
GOALS = {"prefill": {"bf16": 1.15, "": 2.2}, "decode": {"bf16": 1.4, "": 2.2}, "batch": {"": 1.5}}
"""Times llama.cpp, by what is measured and format ('': every other)."""

READ_GOAL, MEMORY_GOAL, START_GOAL = 0.85, 150_000_000, 1.2
"""Part of the machine's read bandwidth; bytes beyond those planned; seconds from process start to the first token."""


def bench(model: Path, *words: str) -> Any:
    """What ``labinfer bench --json`` says."""
    command = [sys.executable, "-m", "labinfer", "bench", str(model), "--devices", "cpu", "--json", *words]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def marked(text: str, reached: bool, goal: str) -> str:
    """``text``, with the goal beside it where it was missed."""
    return text if reached else f"{text} **(goal {goal})**"


def speed(title: str, models: dict[str, Path], pairs: int, prompt: int, decode: int) -> None:
    """The table of speed: each format against its peers, alone for bytes and bandwidth, and with int8 activations.

    The last is lossy, as the peers are; beside their numbers of the same minutes, but not in pairs.
    """
    words = ["--prompt-lengths", str(prompt), "--decode-lengths", str(decode), "--batch", "1,8"]
    print(f"\n{title}: prefill of {prompt} tokens, decode of {decode}, one sequence and 8; tokens/s, {pairs} pairs\n")
    print("| format | measured | labinfer | peer | ratio (range) | read | of the machine's | load |")
    print("|---|---|---|---|---|---|---|---|")
    for format, path in models.items():
        compared = bench(path, *words, "--compare", "--repeat", str(pairs))
        found = bench(path, *words, "--repeat", str(pairs))
        alone = {test["name"]: test for test in found["tests"]}
        lossy = bench(path, *words, "--repeat", str(pairs), "--activations", "int8")["tests"]
        for peer, tests in compared["peers"].items():
            for name, test in tests.items():
                print(speed_row(format, peer, name, test, alone[name], found["machine"]), flush=True)
            for test in lossy:
                if test["kind"] == "prefill" or test["batch"] > 1:
                    print(lossy_row(format, peer, test, tests[test["name"]]["peer"]), flush=True)


def speed_row(
    format: str, peer: str, name: str, test: dict[str, Any], alone: dict[str, Any], machine: dict[str, Any]
) -> str:
    """One line of the table."""
    what = alone["kind"] if alone["batch"] == 1 else "batch"
    goal = GOALS[what].get(format, GOALS[what][""])
    ratio = "{:.2f} ({:.2f} - {:.2f})".format(test["ratio"], *test["ratio_range"])
    read = share = ""
    if alone["kind"] == "decode":
        read = f"{alone['bytes_per_second'] / 1e9:.1f} of {machine['read_bytes_per_second'] / 1e9:.1f} GB/s"
        part = alone["share_of_ceiling"]
        share = marked(f"{100 * part:.0f} %", what == "batch" or part >= READ_GOAL, f"{100 * READ_GOAL:.0f} %")
    cells = [
        format, name.removesuffix(" x 1"), f"{test['labinfer']:.1f}", f"{peer} {test['peer']:.1f}",
        marked(ratio, test["ratio"] >= goal, f"{goal}"), read, share, f"{os.getloadavg()[0]:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def lossy_row(format: str, peer: str, test: dict[str, Any], theirs: float) -> str:
    """A line for int8 activations."""
    rate = test["tokens_per_second"]
    cells = [f"{format} int8", test["name"].removesuffix(" x 1"), f"{rate:.1f}", f"{peer} {theirs:.1f}"]
    return f"| {' | '.join(cells)} | {rate / theirs:.2f} | | | {os.getloadavg()[0]:.1f} |"


def memory(models: dict[str, Path]) -> None:
    """Peak memory of a process beside what the plan promised."""
    print("\nPeak memory, MB\n\n| model | weights | KV cache | arena | peak | beyond the plan |")
    print("|---|---|---|---|---|---|")
    for name, path in models.items():
        words = ("--prompt-lengths", "512", "--decode-lengths", "32", "--batch", "1", "--repeat", "1")
        bench(path, *words)  # compiles kernels, where that was never done
        found = bench(path, *words)
        planned = found["planned_bytes"]
        beyond = found["peak_rss_bytes"] - sum(planned.values())
        last = marked(f"{beyond / 1e6:.0f}", beyond <= MEMORY_GOAL, f"{MEMORY_GOAL / 1e6:.0f}")
        cells = [*(f"{size / 1e6:.1f}" for size in planned.values()), f"{found['peak_rss_bytes'] / 1e6:.0f}"]
        print(f"| {name} | {' | '.join(cells)} | {last} |", flush=True)


def start(models: dict[str, Path], repeat: int) -> None:
    """Seconds from process start to the first token of an answer, with compiled kernels on disk."""
    print("\nSeconds from process start to the first token (second start)\n\n| model | median | range |\n|---|---|---|")
    for name, path in models.items():
        seconds = sorted([first_token(path) for _ in range(repeat + 1)][1:])
        text = marked(f"{median(seconds):.2f}", median(seconds) <= START_GOAL, f"{START_GOAL}")
        print(f"| {name} | {text} | {seconds[0]:.2f} - {seconds[-1]:.2f} |", flush=True)


def first_token(path: Path) -> float:
    """Seconds until ``labinfer run`` has written the first characters of its answer."""
    words = ["--devices", "cpu", "--prompt", "What is the capital of France?", "--max-new-tokens", "8"]
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "labinfer", "run", str(path), *words], stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where benchmarks/models.py has put the models")
    parser.add_argument("tables", nargs="+", choices=["speed", "large", "memory", "start"])
    parser.add_argument("--formats", nargs="+", default=SMOLLM2, choices=sorted({*SMOLLM2, *LARGE}))
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    small = {format: options.folder / f"smollm2-{format}.gguf" for format in options.formats if format in SMOLLM2}
    large = {format: options.folder / f"llama-1b-{format}.gguf" for format in LARGE if format in options.formats}
    tables: dict[str, Callable[[], None]] = {
        "speed": lambda: speed("SmolLM2-135M", small, options.pairs, 512, 128),
        "large": lambda: speed("Llama-3.2-1B's shape", large, options.pairs, 128, 32),
        "memory": lambda: memory(small | {f"1B {format}": path for format, path in large.items()}),
        "start": lambda: start(small, options.pairs),
    }
    for table in options.tables:
        tables[table]()


if __name__ == "__main__":
    main()
