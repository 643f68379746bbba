"""A program, not a module: random load on the engine for minutes, for ``engine.py``.

It reads JSON: ``model`` (path), ``threads``, ``seconds``. Clients stream requests of all kinds: shared beginnings,
every sampling knob, several answers, leaving before the end, in a cache too small for all. Prints what it saw: resident
memory each second, and what was left when all had gone.
"""

import asyncio
import json
import resource
import sys
import threading
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np

from labinfer import SamplingParams
from labinfer.llm import LLM
from labinfer.runtime.request import Request

CLIENTS, BLOCKS, LENGTH = 24, 40, 256
KNOBS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05, "logprobs": 3},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"typical_p": 0.9, "stop": [" the", "."]},
    {"n": 2},
    {"n": 3, "temperature": 1.0, "max_tokens": 24},
    {"prompt_logprobs": 1, "temperature": 0.0},
    {"logit_bias": {7: 4.0}, "min_tokens": 4, "bad_words": ["and"]},
)


class Load:
    """Random requests until ``end``, and counts of what became of them."""

    def __init__(self, model: LLM, seconds: float) -> None:
        self.model, self.random = model, np.random.default_rng(0)
        self.begin = time.perf_counter()
        self.end = self.begin + seconds
        self.counts = {"finished": 0, "left": 0, "tokens": 0}
        self.memory: list[int] = []
        self.prefixes = [self.tokens(int(length)) for length in self.random.integers(16, 96, size=8)]

    def tokens(self, count: int) -> list[int]:
        """So many random tokens."""
        found: list[int] = self.random.integers(3, self.model.vocab_size, size=count).tolist()
        return found

    def request(self) -> Request:
        """A request of a random kind."""
        random = self.random
        prompt = self.prefixes[random.integers(8)] if random.random() < 0.5 else []
        prompt = prompt + self.tokens(int(random.integers(1, 32)))
        knobs: dict[str, Any] = {"max_tokens": int(random.integers(4, 64)), "ignore_eos": bool(random.random() < 0.5)}
        knobs |= KNOBS[random.integers(len(KNOBS))]
        return Request(prompt, SamplingParams(**knobs), priority=int(random.integers(3)))

    async def client(self) -> None:
        """One request after another; some are left before the end."""
        while time.perf_counter() < self.end:
            await asyncio.sleep(float(self.random.exponential(0.05)))
            request, patience = self.request(), float(self.random.exponential(60))
            stream: Any = self.model.engine.stream(request)
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    patience -= 1
                    if patience < 0 and not output.finished and self.random.random() < 0.2:
                        self.counts["left"] += 1
                        break
            self.counts["finished"] += request.finished
            self.counts["tokens"] += sum(len(each.generated) for each in request.sequences)

    async def watch(self) -> None:
        """Note resident memory each second."""
        while time.perf_counter() < self.end:
            self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
            await asyncio.sleep(1.0)

    async def run(self) -> int:
        """All clients, until none is left; tasks that remain beside this one."""
        await asyncio.gather(self.watch(), *(self.client() for _ in range(CLIENTS)))
        while self.model.engine.busy:
            await asyncio.sleep(0.01)
        return len(asyncio.all_tasks()) - 1


def main() -> None:
    """Run the load and print what was left of it."""
    task = json.load(sys.stdin)
    before = set(threading.enumerate())
    limits: dict[str, Any] = {
        "max_num_seqs": 16,
        "max_logits_rows": 16,
        "max_model_len": LENGTH,
        "max_num_batched_tokens": 128,
    }
    room: dict[str, Any] = {"num_blocks": BLOCKS, "swap_space": 0.02, "kv_dtype": "f16", "threads": task["threads"]}
    with LLM(task["model"], devices="cpu", **limits, **room) as model:
        load = Load(model, task["seconds"])
        tasks = asyncio.run(load.run())
        model.blocks.check_integrity()
        found = {
            **load.counts,
            "preemptions": model.engine.scheduler.num_preemptions,
            "memory": load.memory,
            "tasks": tasks,
            "blocks": BLOCKS - model.blocks.num_free,
        }
    found["threads"] = len(set(threading.enumerate()) - before)
    print(json.dumps(found))


main()
