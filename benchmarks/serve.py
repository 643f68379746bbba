"""What the service adds to the engine, and what it goes through: load, slow and leaving clients, minutes of all of it.

    python benchmarks/serve.py MODEL.gguf overhead streams connections slow slowloris queue cancel start
    python benchmarks/serve.py MODEL.gguf peer --llama-server BUILD/bin/llama-server
    python benchmarks/serve.py MODEL.gguf soak --minutes 30

The clients are in one process (this one), which takes its part of the processor; the tables tell how much. Prints
Markdown; a missed bar is marked, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from serve_clients import beside_drips, leave_at_random, random_load, slow_readers
from serve_process import Service, labinfer_service, llama_service

from labinfer.backends.cpu.machine import default_threads
from labinfer.bench.load import Sample, load, percentile, summary

FOLDER = Path(__file__).parent
BARS = {"overhead": 0.08, "slow": 1.10, "queue": 2.0, "peer": 1.2, "start": 2.5, "memory": 0.01}
LENGTH = 512
EXPONENTIAL = math.log(100) / math.log(2)
"""p99 over p50 of waits that are distributed exponentially, as behind one server (M/M/1)."""

HELD = ("labinfer:answers_active", "vllm:kv_cache_usage_perc")
"""What is nothing while nobody asks."""

Body = dict[str, Any]


class Bench:
    """The measurements of one model. ``passed`` stays True while every bar is reached; ``found`` goes to JSON."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.threads, self.options = options.model, options.threads, options
        self.passed, self.found, self.random = True, dict[str, Any](), np.random.default_rng(0)

    def service(self, slots: int = 64, *flags: str) -> Service:
        """Ours, warm: steps of most sizes have run."""
        service = labinfer_service(self.model, self.threads, slots, LENGTH, *flags)
        for _ in range(2):
            self.ask(service, self.bodies(slots, made=24), slots)
        return service

    def bodies(self, count: int, made: int | None = None) -> list[Body]:
        """So many streamed requests: random prompts of 32 to 256 tokens, and as many made unless ``made`` says."""
        sizes = self.random.integers(32, 257, size=(count, 2)).tolist()
        stream = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
        return [
            {**stream, "prompt": self.random.integers(100, 40_000, size=size).tolist(), "max_tokens": made or length}
            for size, length in sizes
        ]

    def ask(
        self, service: Service, bodies: list[Body], concurrency: int | None, rate: float = math.inf
    ) -> tuple[list[Sample], float]:
        """The answers of ``service`` to ``bodies``, and the seconds that it took."""
        return asyncio.run(load(service.target(), bodies, rate, concurrency))

    def speed(self, service: Service, bodies: list[Body], concurrency: int) -> float:
        """Tokens per second that the clients see; none may fail."""
        samples, seconds = self.ask(service, bodies, concurrency)
        found = summary(samples, seconds, [99])
        if found["failed"]:
            raise SystemExit(f"{found['failed']} requests failed: {next(each.error for each in samples if each.error)}")
        return float(found["output_throughput"])

    def bar(self, text: str, reached: bool, bar: float | str) -> str:
        """``text``, marked where the bar is missed."""
        self.passed = self.passed and reached
        return text if reached else f"{text} **(bar {bar})**"

    def overhead(self) -> None:
        """Tokens per second of the engine alone, for which nobody waits, and of clients over HTTP, in turn."""
        columns = ["engine alone", "served", "served less (range)", "loop, us a token", "clients", "load"]
        print(f"\n| streams | {' | '.join(columns)} |\n|---|---|---|---|---|---|---|")
        for slots in self.options.streams:
            service, pairs, costs = self.service(slots), [], []
            for _ in range(self.options.pairs):
                bodies = self.bodies(2 * slots)
                made = sum(body["max_tokens"] for body in bodies)
                alone = made / engine_seconds(self.model, self.threads, slots, bodies)
                before, own = service.seconds(), time.process_time()
                served = self.speed(service, bodies, slots)
                after = service.seconds()
                costs.append([1e6 * (after[0] - before[0]) / made, 1e6 * (time.process_time() - own) / made])
                pairs.append((alone, served))
            service.close()
            less = [1 - served / alone for alone, served in pairs]
            text = f"{100 * median(less):.1f} % ({100 * min(less):.1f} - {100 * max(less):.1f})"
            text = self.bar(text, median(less) <= BARS["overhead"], BARS["overhead"])
            cells = [f"{median(column):.0f}" for column in zip(*pairs, strict=True)]
            loop, clients = (median(column) for column in zip(*costs, strict=True))
            print(
                f"| {slots} | {' | '.join(cells)} | {text} | {loop:.0f} | {clients:.0f} | {load_average()} |",
                flush=True,
            )
            self.found[f"overhead {slots}"] = pairs

    def streams(self) -> None:
        """200 streams at once: none may be lost."""
        service = self.service()
        samples, seconds = self.ask(service, self.bodies(200, made=64), None)
        service.close()
        found = summary(samples, seconds, [99])
        text = self.bar(f"{found['failed']}", found["failed"] == 0, 0)
        print("\n| streams | lost | tokens/s | TTFT p50, p99, s | ITL p50, p99, ms | load |\n|---|---|---|---|---|---|")
        first = f"{found['median_ttft_ms'] / 1000:.1f}, {found['p99_ttft_ms'] / 1000:.1f}"
        between = f"{found['median_itl_ms']:.0f}, {found['p99_itl_ms']:.0f}"
        print(f"| 200 | {text} | {found['output_throughput']:.0f} | {first} | {between} | {load_average()} |")
        self.found["streams"] = found

    def connections(self) -> None:
        """1,000 requests at the same time: each is answered, or refused with 503."""
        service = self.service(16)
        before = service.memory
        samples, seconds = self.ask(service, self.bodies(1000, made=8), None)
        grown = (service.memory - before) / 1e6
        refused = sum((each.error or "").startswith("status 503") for each in samples)
        answered = sum(each.error is None for each in samples)
        lost = len(samples) - refused - answered
        healthy = self.bar(str(lost), lost == 0, 0)
        print("\n| connections | answered | refused with 503 | lost | seconds | memory with the cache, MB | load |")
        print("|---|---|---|---|---|---|---|")
        print(f"| 1000 | {answered} | {refused} | {healthy} | {seconds:.1f} | {grown:+.0f} | {load_average()} |")
        service.close()
        self.found["connections"] = {"answered": answered, "refused": refused, "lost": lost, "seconds": seconds}

    def slow(self) -> None:
        """The gaps of 16 streams beside 8 that read what they get, and beside 8 that read nothing, in turn."""
        service, ratios = self.service(32), []
        print("\n| beside 8 that | read: p99 ITL, ms | read nothing | ratio | load |\n|---|---|---|---|---|")
        for number in range(self.options.pairs):
            tails = []
            for reads in (True, False):
                samples = asyncio.run(slow_readers(service.target(), self.bodies(16, made=128), reads))
                tails.append(percentile([1000 * gap for each in samples for gap in each.gaps], 99))
            ratios.append(tails[1] / tails[0])
            print(f"| pair {number + 1} | {tails[0]:.1f} | {tails[1]:.1f} | {ratios[-1]:.2f} | {load_average()} |")
        text = self.bar(f"{median(ratios):.2f}", median(ratios) <= BARS["slow"], BARS["slow"])
        print(f"| median | | | {text} | |")
        service.close()
        self.found["slow"] = ratios

    def slowloris(self) -> None:
        """1,000 connections that send a byte of their header a second, beside 16 streams: all are told to go."""
        service, slots = self.service(16), 16
        before, bodies = service.counts[1], self.bodies(slots, made=300)
        alone, _ = self.ask(service, bodies, slots)
        samples, drips = asyncio.run(beside_drips(service.target(), bodies, 1000))
        told, last = sum(b" 408 " in said for _, said in drips), max(seconds for seconds, _ in drips)
        time.sleep(1)
        left, failed = service.counts[1] - before, sum(each.error is not None for each in samples)
        tails = [percentile([1000 * gap for each in of for gap in each.gaps], 99) for of in (alone, samples)]
        good = told == len(drips) and last < 15 and left <= 0 and not failed
        text = self.bar(f"{told}, after {last:.1f} s at most", good, "all, 15 s")
        print("\n| connections told to go | streams failed, files left | p99 ITL without, with, ms | load |")
        print("|---|---|---|---|")
        print(f"| {text} | {failed}, {left} | {tails[0]:.1f}, {tails[1]:.1f} | {load_average()} |")
        service.close()
        self.found["slowloris"] = {"told": told, "last": last, "left": left, "failed": failed, "tails": tails}

    def queue(self) -> None:
        """Times to the first token at 80 % of what can be served, beside a queue with exponential waits."""
        service = self.service(16)
        bodies = self.bodies(48)
        samples, seconds = self.ask(service, bodies, 16)
        rate = 0.8 * len(bodies) / seconds
        samples, seconds = self.ask(service, self.bodies(self.options.requests), None, rate)
        service.close()
        found = summary(samples, seconds, [99])
        p50, p99 = found["median_ttft_ms"], found["p99_ttft_ms"]
        ratio = p99 / (EXPONENTIAL * p50)
        text = self.bar(f"{ratio:.2f}", ratio <= BARS["queue"] and not found["failed"], BARS["queue"])
        print("\n| requests/s | TTFT p50, ms | model's p99 | p99 | p99 / model's | load |\n|---|---|---|---|---|---|")
        print(f"| {rate:.2f} | {p50:.0f} | {EXPONENTIAL * p50:.0f} | {p99:.0f} | {text} | {load_average()} |")
        self.found["queue"] = found

    def cancel(self) -> None:
        """500 clients that leave at any time, for a minute: nothing stays behind, and answers are what they were."""
        service = self.service(16)
        control = {"prompt": list(range(100, 140)), "max_tokens": 32, "temperature": 0, "ignore_eos": True}
        expected, before, memory = service.answer(control)["choices"], service.counts, service.memory
        left = asyncio.run(leave_at_random(service.target(), self.bodies(500), self.options.seconds))
        end = time.monotonic() + 10
        while any((gauges := service.gauges())[name] for name in HELD) and time.monotonic() < end:
            time.sleep(0.1)
        same = service.answer(control)["choices"] == expected
        threads, files = (now - then for now, then in zip(service.counts, before, strict=True))
        leaks = [*(gauges[name] for name in HELD), max(files, 0), float(not same)]
        text = self.bar(", ".join(f"{each:g}" for each in leaks), not any(leaks), 0)
        print("\n| left | answers, blocks, files left, wrong answers | threads | memory, MB | load |")
        print("|---|---|---|---|---|")
        grown = (service.memory - memory) / 1e6
        print(f"| {left} | {text} | {threads:+d} | {grown:+.1f} | {load_average()} |")
        service.close()
        self.found["cancel"] = {"left": left, "leaks": leaks}

    def start(self) -> None:
        """Seconds from the command to the first token, with everything compiled before."""
        labinfer_service(self.model, self.threads, 16, LENGTH).close()
        ready, first = [], []
        for _ in range(self.options.pairs):
            service = labinfer_service(self.model, self.threads, 16, LENGTH)
            ready.append(time.perf_counter() - service.began)
            service.answer({"prompt": "Hello", "max_tokens": 1})
            first.append(time.perf_counter() - service.began)
            service.close()
        text = self.bar(f"{median(first):.2f}", median(first) <= BARS["start"], BARS["start"])
        print("\n| ready after, s | first token after, s | load |\n|---|---|---|")
        print(f"| {median(ready):.2f} | {text} | {load_average()} |")
        self.found["start"] = {"ready": ready, "first": first}

    def peer(self) -> None:
        """Tokens per second of the same load, ours and llama-server's in turn, which tries several numbers of slots."""
        ours, theirs = [], []
        print("\n| slots of llama-server | ours, tokens/s | llama-server | ratio | load |\n|---|---|---|---|---|")
        for slots in (8, 16, 32, 64):
            bodies, speeds = self.bodies(96), []
            for start in (
                lambda: self.service(64),
                lambda slots=slots: llama_service(self.options.llama_server, self.model, self.threads, slots, LENGTH),
            ):
                service = start()
                speeds.append(self.speed(service, bodies, 64))
                service.close()
            ours.append(speeds[0])
            theirs.append(speeds[1])
            ratio = f"{ours[-1] / theirs[-1]:.2f}"
            print(f"| {slots} | {ours[-1]:.0f} | {theirs[-1]:.0f} | {ratio} | {load_average()} |", flush=True)
        best = median(ours) / max(theirs)
        text = self.bar(f"{best:.2f}", best >= BARS["peer"], BARS["peer"])
        print(f"| the best | {median(ours):.0f} (median) | {max(theirs):.0f} | {text} | |")
        self.found["peer"] = {"ours": ours, "peer": theirs}

    def soak(self) -> None:
        """Random load of all kinds for minutes: memory stays what it was, and nothing is left.

        The cache is a small one, since a block's memory counts from its first use on: all are used soon.
        """
        service, memory = self.service(16, "--kv-memory", "128MB"), list[int]()
        before = service.counts
        counts, reasons = asyncio.run(
            random_load(service.target(), self.random, 60 * self.options.minutes, lambda: memory.append(service.memory))
        )
        time.sleep(1)
        left = [
            service.gauges()["labinfer:answers_active"],
            *(a - b for a, b in zip(service.counts, before, strict=True)),
        ]
        service.close()
        quarter = max(len(memory) // 4, 1)
        early, late = median(memory[quarter : 2 * quarter]), median(memory[-quarter:])  # the first quarter warms up
        grown = late / early - 1
        text = self.bar(f"{100 * grown:+.2f} %", abs(grown) <= BARS["memory"] and not reasons, BARS["memory"])
        print("\n| minutes | answers | answers, threads, files left | memory, second to last quarter, MB | load |")
        print("|---|---|---|---|---|")
        told = ", ".join(f"{value} {name}" for name, value in counts.items())
        remains = ", ".join(f"{each:g}" for each in left)
        sizes = f"{early / 1e6:.1f} to {late / 1e6:.1f}: {text}"
        print(f"| {self.options.minutes:g} | {told} | {remains} | {sizes} | {load_average()} |")
        self.found["soak"] = {"counts": counts, "reasons": reasons, "left": left, "memory": memory}


def engine_seconds(model: str, threads: int, slots: int, bodies: list[Body]) -> float:
    """Seconds that the engine takes for the same requests, in a process of its own."""
    task = {
        "model": model, "threads": threads, "slots": slots, "temperature": 0.0,
        "requests": [[body["prompt"], body["max_tokens"]] for body in bodies],
    }  # fmt: skip
    program = [sys.executable, str(FOLDER / "engine_labinfer.py")]
    done = subprocess.run(program, input=json.dumps(task), stdout=subprocess.PIPE, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def load_average() -> str:
    """The machine's load average of the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def main() -> int:
    """Run the chosen measurements; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["overhead", "streams", "connections", "slow", "queue", "slowloris", "cancel", "start", "peer", "soak"]
    parser.add_argument("model")
    parser.add_argument("measurements", nargs="+", choices=names)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64], help="at once, for the overhead")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each of what is compared")
    parser.add_argument("--requests", type=int, default=200, help="of the queue")
    parser.add_argument("--seconds", type=float, default=60, help="of leaving clients")
    parser.add_argument("--minutes", type=float, default=30, help="of random load")
    parser.add_argument("--llama-server", default="llama-server", metavar="PROGRAM", help="the peer")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    bench = Bench(options)
    for name in options.measurements:
        measure: Callable[[], None] = getattr(bench, name)
        measure()
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(bench.found | {"passed": bench.passed}, indent=1) + "\n")
    return 0 if bench.passed else 1


if __name__ == "__main__":
    sys.exit(main())
