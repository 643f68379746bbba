"""Prompts that arrive while answers are made: replicas that do both, and one that computes prompts for the other.

    python benchmarks/disaggregation.py [MODEL] [--transport shm] [--rate 0.3] [--prompt 512] [--answer 96] [--turns 2]

Two devices of one thread each. Requests of random tokens come evenly, so many a second, and somebody waits for each
token. The kinds of service take turns, each with fresh texts; `no limit` is the first without a limit on how much
longer steps may get for the sake of a prompt (LABINFER_STALL=0). A wait is the time between two tokens of an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

import labinfer
from labinfer.llm import LLM
from labinfer.runtime.outputs import RequestOutputKind
from labinfer.runtime.replicas import Replicas
from labinfer.runtime.request import Request

KINDS = {"both do both": (0, True), "both, no limit": (0, False), "one prefills": (1, True)}
"""By name: replicas that only prefill, and whether stalls are limited."""


@dataclass
class Found:
    """Of one kind of service: seconds to first tokens, the waits of each answer, tokens, and how long it all took."""

    first: list[float] = field(default_factory=list)
    waits: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    moved_bytes: int = 0
    moving_seconds: float = 0.0

    def row(self, name: str) -> str:
        """A line of the table, milliseconds."""
        first, waits = 1e3 * np.array(self.first), 1e3 * np.concatenate(self.waits)
        longest = 1e3 * np.array([max(each) for each in self.waits])
        parts = [
            np.median(first), np.quantile(first, 0.9), np.median(waits), np.quantile(waits, 0.99), np.median(longest),
        ]  # fmt: skip
        rate = self.moved_bytes / self.moving_seconds / 1e9 if self.moving_seconds else 0.0
        told = f"{self.moved_bytes / 1e6:,.0f} MB, {rate:.1f} GB/s" if rate else ""
        numbers = " | ".join(f"{each:,.0f}" if each >= 100 else f"{each:.1f}" for each in parts)
        return f"| {name} | {numbers} | {self.tokens / self.seconds:.0f} | {told} |"


async def answer(replicas: Replicas, request: Request, found: Found) -> None:
    """Run one request and note when its tokens come."""
    times = [time.perf_counter()]
    request.metrics.arrival_time = times[0]
    async for output in replicas.stream(request, RequestOutputKind.DELTA):
        count = len(output.outputs[0].token_ids)
        times += [time.perf_counter()] * (count > 0)
        found.tokens += count
    found.first.append(times[1] - times[0])
    found.waits.append(np.diff(times[1:]).tolist())


async def serve(
    models: list[LLM], num_prefill: int, prompts: list[list[int]], rate: float, tokens: int, found: Found
) -> None:
    """All requests, evenly."""
    replicas = Replicas([model.engine for model in models], num_prefill)
    params = labinfer.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    started, tasks = time.perf_counter(), []
    for number, prompt in enumerate(prompts):
        await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(answer(replicas, Request(prompt, params), found)))
    await asyncio.gather(*tasks)
    found.seconds += time.perf_counter() - started
    for moved in (each.moved for each in replicas.all if each.moved is not None):
        found.moved_bytes, found.moving_seconds = (
            found.moved_bytes + moved.num_bytes,
            found.moving_seconds + moved.seconds,
        )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--transport", choices=["local", "shm", "tcp"])
    parser.add_argument("--devices", default="cpu:0,cpu:1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=96)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    limits = {"max_model_len": options.prompt + options.answer, "max_num_seqs": 32, "kv_memory": 2 << 30}
    if options.threads:
        limits["threads"] = options.threads
    rng, found = random.Random(1), {kind: Found() for kind in KINDS}
    with ExitStack() as stack:
        models = [
            stack.enter_context(labinfer.load(options.model, devices=device, transport=options.transport, **limits))
            for device in options.devices.split(",")
        ]

        def prompts(count: int) -> list[list[int]]:
            return [[rng.randrange(100, 40_000) for _ in range(options.prompt)] for _ in range(count)]

        for kind in (0, 1):  # compiles what is left, and what a step costs is known afterwards
            asyncio.run(serve(models, kind, prompts(4), 4 * options.rate, 32, Found()))
        for _ in range(options.turns):
            for name, (num_prefill, limited) in KINDS.items():
                for model in models:
                    model.engine.scheduler.limits_stalls = limited
                texts = prompts(options.requests)
                asyncio.run(serve(models, num_prefill, texts, options.rate, options.answer, found[name]))
    print(
        f"{options.rate:g} requests/s, prompts of {options.prompt} tokens, answers of {options.answer}, milliseconds\n"
    )
    print("| replicas | first token | 90 % | wait | 99 % | an answer's longest | tokens/s | moved |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, each in found.items():
        print(each.row(name))
    sys.exit(any(len(each.first) < options.requests * options.turns for each in found.values()))


if __name__ == "__main__":
    main()
