"""Two replicas of a model and prompts that begin alike: by the router, and in turns.

    python benchmarks/replicas.py [MODEL] [--transport shm] [--prefixes 8] [--asked 8] [--pairs 2]

So many beginnings of 384 tokens are asked so many questions of 32 each, in random order, 4 at a time. A replica's
cache has room for half of the beginnings. Runs take turns, each with fresh texts; medians of all requests count.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from statistics import median

import labinfer
from labinfer.runtime.engine import Engine
from labinfer.runtime.replicas import Replicas
from labinfer.runtime.request import Request

BEGINNING, QUESTION, ANSWER, AT_ONCE, BLOCK = 384, 32, 16, 4, 16


class InTurns(Replicas):
    """One after another, whatever they have cached."""

    def __init__(self, engines: list[Engine]) -> None:
        super().__init__(engines)
        self.turns = cycle(self.all)

    def choose(self, request: Request) -> Engine:
        replica = next(self.turns)
        replica.num_sent += 1
        return replica.engine


def prompts(rng: random.Random, prefixes: int, asked: int) -> list[list[int]]:
    """Texts of random tokens in random order, `asked` of which begin alike."""
    some: Callable[[int], list[int]] = lambda count: [rng.randrange(100, 40_000) for _ in range(count)]  # noqa: E731
    found = [
        [*beginning, *some(QUESTION)] for beginning in [some(BEGINNING) for _ in range(prefixes)] for _ in range(asked)
    ]
    rng.shuffle(found)
    return found


async def answer_all(replicas: Replicas, texts: list[list[int]]) -> list[Request]:
    """All requests, so many at a time."""
    params = labinfer.SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    requests, waiting = [Request(text, params) for text in texts], asyncio.Semaphore(AT_ONCE)

    async def answer(request: Request) -> None:
        async with waiting:
            request.metrics.arrival_time = time.perf_counter()
            async for _ in replicas.stream(request):
                pass

    await asyncio.gather(*map(answer, requests))
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--transport", choices=["local", "shm", "tcp"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--asked", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    room = (options.prefixes // 2 * BEGINNING + AT_ONCE * (QUESTION + ANSWER + BLOCK)) // BLOCK
    limits = {"max_model_len": 512, "max_num_seqs": AT_ONCE, "num_blocks": room, "block_size": BLOCK, "threads": 1}
    rng, found = random.Random(1), {kind: list[Request]() for kind in (Replicas, InTurns)}
    seconds = dict.fromkeys(found, 0.0)
    with ExitStack() as stack:
        models = [
            stack.enter_context(
                labinfer.load(options.model, devices=f"{options.device}:{n}", transport=options.transport, **limits)
            )
            for n in range(2)
        ]
        for model in models:
            model.generate([prompts(rng, 1, 1)[0]])  # compiles what is left
        for _ in range(options.pairs):
            for kind, made in found.items():
                started = time.perf_counter()
                made += asyncio.run(
                    answer_all(kind([each.engine for each in models]), prompts(rng, options.prefixes, options.asked))
                )
                seconds[kind] += time.perf_counter() - started
    for kind, made in found.items():
        tokens = sum(len(request.prompt) for request in made)
        cached = 100 * sum(request.metrics.num_cached_tokens for request in made) / tokens
        first = sorted(1e3 * (request.metrics.first_token_seconds or 0.0) for request in made)
        told = f"first token {median(first):4.0f} ms (90 %: {first[len(first) * 9 // 10]:.0f})"
        print(
            f"{kind.__name__:9} {cached:4.1f} % of prompts cached, {told}, {len(made) / seconds[kind]:.2f} requests/s"
        )
    sys.exit(any(request.error for made in found.values() for request in made))


if __name__ == "__main__":
    main()
