"""What the engine does with many requests: throughput beside its peers, stalls, prefix reuse, and what each part is
worth.

    python benchmarks/engine.py MODEL.gguf throughput                # beside llama.cpp with parallel sequences
    python benchmarks/engine.py MODEL.gguf throughput --peer transformers
    python benchmarks/engine.py MODEL.gguf stall prefix ablate
    python benchmarks/engine.py MODEL.gguf soak --minutes 20

``LABINFER_BENCH_PYTHON`` is the Python that has the peer. Every measurement is a process of its own; what is compared
takes turns. Prints Markdown; a missed bar is marked, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from labinfer.backends.cpu.machine import default_threads
from labinfer.bench.ceiling import float32_flops, read_bandwidth
from labinfer.bench.cost import decode_bytes, prefill_flops
from labinfer.bench.measure import weight_memory
from labinfer.bench.peers import peer_python
from labinfer.llm import LLM

FOLDER = Path(__file__).parent
BARS = {"llama.cpp": 1.3, "transformers": 3.0, "stall": 1.5, "prefix": 10.0, "memory": 0.01}
SLOTS = (8, 16, 32, 64)
"""Sequences at once that llama.cpp is tried with."""

Task = dict[str, Any]


class Ablation(NamedTuple):
    """An environment variable, its value that changes something, what that is, and the workload that shows it."""

    variable: str
    value: str
    meaning: str
    task: str


ABLATIONS = (
    Ablation("LABINFER_TAPE_REUSE", "0", "bind a tape for every size of a step", "greedy"),
    Ablation("LABINFER_OVERLAP", "1", "prepare a step while the one before it runs", "greedy"),
    Ablation("LABINFER_OVERLAP", "1", "the same", "sampled"),
    Ablation("LABINFER_MULTI_STEP", "0", "return to the host after every decode step", "alone"),
    Ablation("LABINFER_SPECULATION", "0", "guess no tokens, of a text that repeats itself", "repeats"),
    Ablation("LABINFER_PREFIX_CACHE", "0", "compute every prompt whole", "prefix"),
    Ablation("LABINFER_STALL", "0", "let a prompt take whole steps", "stall"),
)


class Bench:
    """The workloads for one model. ``passed`` stays True while every bar is reached; ``found`` is what goes to JSON."""

    def __init__(self, model: str, threads: int, pairs: int) -> None:
        self.model, self.threads, self.pairs = model, threads, pairs
        self.passed, self.found = True, dict[str, Any]()
        with LLM(model, devices="cpu", max_model_len=512, max_num_seqs=64, kv_dtype="f16", threads=threads) as loaded:
            self.vocab_size, self.config = loaded.vocab_size, dict(loaded.checkpoint.config)
            self.bandwidth = read_bandwidth(weight_memory(loaded), threads)
            self.bytes_per_token = decode_bytes(loaded.plan, 64, 216) / 64
            self.flops_per_token = prefill_flops(loaded.plan, 1)

    def task(self, name: str) -> Task:
        """A workload as ``engine_labinfer.py`` reads it, the same each time; prompts are random tokens."""
        random = np.random.default_rng(0)

        def tokens(count: int) -> list[int]:
            return [int(token) for token in random.integers(3, self.vocab_size - 1, size=count)]

        task: Task = {"model": self.model, "threads": self.threads, "slots": 64, "temperature": 0.0}
        if name == "prefix":
            shared = tokens(1000)
            requests = [[shared + tokens(16), 1] for _ in range(32)]
            return task | {"slots": 32, "in_turn": True, "watched": True, "requests": requests}
        if name == "alone":
            return task | {"slots": 1, "requests": [[tokens(32), 800]]}
        if name == "repeats":
            return task | {"slots": 1, "speculates": True, "requests": [[8 * tokens(40), 400]]}
        if name == "stall":
            return task | {
                "slots": 9,
                "watched": True,
                "requests": [[tokens(32), 800] for _ in range(8)],
                "late": tokens(4000),
                "after": 100,
            }
        sizes = random.integers(32, 257, size=(64, 2)).tolist()
        return task | {
            "requests": [[tokens(prompt), made] for prompt, made in sizes],
            "temperature": 0.8 if name == "sampled" else 0.0,
        }

    def bar(self, text: str, reached: bool, bar: float) -> str:
        """``text``, marked where the bar is missed."""
        self.passed = self.passed and reached
        return text if reached else f"{text} **(bar {bar})**"

    def throughput(self, peer: str) -> None:
        """Tokens per second of 64 requests, ours and the peer's in turn, with each setting of the peer's."""
        task = self.task("greedy")
        made = sum(tokens for _, tokens in task["requests"])
        bound = self.bandwidth / self.bytes_per_token
        flops = float32_flops() / self.flops_per_token
        print(f"\n64 requests, {made} tokens made; a step of 64 sequences reads {64e-6 * self.bytes_per_token:.0f} MB:")
        print(f"at {self.bandwidth / 1e9:.1f} GB/s {bound:.0f} tokens/s; products in float32 by numpy's BLAS at all")
        print(f"threads: {flops:.0f} tokens/s (units for int8 and bf16 do more)\n")
        print(f"| {peer} with | ours, tokens/s | {peer}, tokens/s | ratio | load |\n|---|---|---|---|---|")
        settings = [{"slots": slots} for slots in SLOTS] if peer == "llama.cpp" else [{"dtype": d} for d in DTYPES]
        ours, theirs = [], []
        for setting in settings:
            ours.append(made / measured("labinfer", task)["seconds"])
            theirs.append(made / measured(peer, task | setting | {"config": llama_config(self.config)})["seconds"])
            name = " ".join(f"{key} {value}" for key, value in setting.items())
            print(
                f"| {name} | {ours[-1]:.0f} | {theirs[-1]:.0f} | {ours[-1] / theirs[-1]:.2f} | {load()} |", flush=True
            )
        ratio = median(ours) / max(theirs)
        text = self.bar(f"{ratio:.2f}", ratio >= BARS[peer], BARS[peer])
        print(f"| the best | {median(ours):.0f} (median) | {max(theirs):.0f} | {text} | |")
        self.found[f"throughput {peer}"] = {"ours": ours, "peer": theirs, "ratio": ratio}

    def stall(self) -> None:
        """The gaps between tokens of 8 sequences while a prompt of 4,000 is computed, and of the same without it.

        Both in one process, whose steps of the same work differ by less than those of two processes.
        """
        print("\nA prompt of 4,000 tokens arrives while 8 sequences decode: ms from token to token\n")
        columns = ["stall limit", "median without", "p99 without", "median", "p99", "worst", "p99 of with / without"]
        print(f"| {' | '.join(columns)} | TTFT, s | load |")
        print("|---|---|---|---|---|---|---|---|---|")
        task = self.task("stall")
        for value in ("1", "0"):
            found = measured("labinfer", task, {"LABINFER_STALL": value})
            without, during = gaps(found["alone"], found)
            ratio = float(np.percentile(np.divide(during, without), 99))
            text = f"{ratio:.2f}" if value == "0" else self.bar(f"{ratio:.2f}", ratio <= BARS["stall"], BARS["stall"])
            numbers = [
                median(without),
                np.percentile(without, 99),
                median(during),
                np.percentile(during, 99),
                max(during),
            ]
            cells = [*(f"{1000 * each:.1f}" for each in numbers), text, f"{found['served'] - found['arrived']:.1f}"]
            print(f"| {'off' if value == '0' else 'on'} | {' | '.join(cells)} | {load()} |", flush=True)
            self.found[f"stall {value}"] = {"without": without, "during": during}

    def prefix(self) -> None:
        """Tokens computed of 32 prompts that share 1,000, and the mean time to the first token."""
        task = self.task("prefix")
        total = sum(len(prompt) for prompt, _ in task["requests"])
        print(f"\n32 requests, {total} tokens of prompts, 1,000 shared by all\n")
        print("| they arrive | prefix cache | tokens computed | mean TTFT, s | load |\n|---|---|---|---|---|")
        for arrive, in_turn in (("in turn", True), ("at once", False)):
            found = list[dict[str, Any]]()
            for name, value in (("on", "1"), ("off", "0")):
                found.append(measured("labinfer", task | {"in_turn": in_turn}, {"LABINFER_PREFIX_CACHE": value}))
                computed, seconds = found[-1]["computed"], found[-1]["first_token_seconds"]
                print(f"| {arrive} | {name} | {computed} | {seconds:.3f} | {load()} |", flush=True)
            ratios = [found[1][key] / found[0][key] for key in ("computed", "first_token_seconds")]
            cells = [self.bar(f"{ratio:.1f}", ratio >= BARS["prefix"], BARS["prefix"]) for ratio in ratios]
            print(f"| {arrive} | times less | {cells[0]} | {cells[1]} | |")
            self.found[f"prefix {arrive}"] = dict(zip(("work", "first_token"), ratios, strict=True))

    def soak(self, minutes: float) -> None:
        """Random load for so long: memory must not grow, and nothing be left."""
        found = measured("soak", {"model": self.model, "threads": self.threads, "seconds": 60 * minutes})
        memory = found.pop("memory")
        quarter = max(len(memory) // 4, 1)
        early, late = median(memory[quarter : 2 * quarter]), median(memory[-quarter:])  # the first quarter warms up
        grown = late / early - 1
        print(f"\n{minutes:.0f} minutes of random load, load average {load()}\n\n| seen | |\n|---|---|")
        for name, value in found.items():
            left = name in ("tasks", "blocks", "threads")
            text = self.bar(str(value), value == 0, 0) if left else str(value)
            print(f"| {name}{' left' if left else ''} | {text} |")
        text = self.bar(f"{100 * grown:+.2f} %", abs(grown) <= BARS["memory"], BARS["memory"])
        print(f"| resident memory, second to last quarter | {early / 1e6:.1f} to {late / 1e6:.1f} MB: {text} |")
        self.found["soak"] = found | {"memory": memory}

    def ablate(self) -> None:
        """What each optimisation is worth: its workload with and without it, in turn."""
        print("\n| variable | does | workload | as it is | with it | ratio (range) | load |")
        print("|---|---|---|---|---|---|---|")
        for variable, value, meaning, name in ABLATIONS:
            task, ratios, pairs = self.task(name), list[float](), list[tuple[float, float]]()
            for _ in range(self.pairs):
                pair = tuple(figure(name, measured("labinfer", task, change)) for change in ({}, {variable: value}))
                pairs.append((pair[0], pair[1]))
                ratios.append(pair[1] / pair[0])
            plain, changed = (median(column) for column in zip(*pairs, strict=True))
            spread = f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            unit = "ms worst gap" if name == "stall" else "tokens/s"
            cells = [f"`{variable}={value}`", meaning, name, f"{plain:.0f} {unit}", f"{changed:.0f}", spread, load()]
            print(f"| {' | '.join(cells)} |", flush=True)
            self.found[f"{variable} {name}"] = pairs


DTYPES = ("bfloat16", "float32")


def figure(name: str, found: dict[str, Any]) -> float:
    """The figure of a workload: the worst gap in ms for ``stall``, else all tokens a second, prompts counted too."""
    if name == "stall":
        return 1000 * max(gaps(found["times"], found)[1])
    return float(found["tokens"] / found["seconds"])


def gaps(alone: list[list[float]], found: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds from token to token of the times ``alone`` and, of the same tokens, while a late prompt was computed."""
    without, during = list[float](), list[float]()
    for quiet, times in zip(alone, found["times"], strict=True):
        for (before, then), (last, now) in zip(pairwise(quiet), pairwise(times), strict=True):
            if found["arrived"] < now <= found["served"]:
                without.append(then - before)
                during.append(now - last)
    return without, during


def measured(engine: str, task: Task, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What the program of an engine finds when it serves ``task``."""
    python = sys.executable if engine == "labinfer" else peer_python()
    program = FOLDER / f"engine_{engine.replace('.', '_')}.py"
    done = subprocess.run(
        [python, str(program)],
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=os.environ | (environment or {}),
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def llama_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """GGUF metadata of a llama as transformers' configuration."""
    return {
        "hidden_size": metadata["llama.embedding_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "vocab_size": metadata["llama.vocab_size"],
        "tie_word_embeddings": True,
    }


def load() -> str:
    """The machine's load average of the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def main() -> int:
    """Run the chosen measurements; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("measurements", nargs="+", choices=["throughput", "stall", "prefix", "ablate", "soak"])
    parser.add_argument("--peer", default="llama.cpp", choices=["llama.cpp", "transformers"])
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--pairs", type=int, default=1, help="pairs of runs for each optimisation")
    parser.add_argument("--minutes", type=float, default=20, help="of random load")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    bench = Bench(options.model, options.threads, options.pairs)
    run: dict[str, Callable[[], None]] = {
        "throughput": lambda: bench.throughput(options.peer),
        "stall": bench.stall,
        "prefix": bench.prefix,
        "ablate": bench.ablate,
        "soak": lambda: bench.soak(options.minutes),
    }
    for measurement in options.measurements:
        run[measurement]()
    if options.json:
        options.json.write_text(json.dumps(bench.found | {"passed": bench.passed}, indent=1) + "\n")
    return 0 if bench.passed else 1


if __name__ == "__main__":
    sys.exit(main())
