"""What goes wrong beside a load: is every client answered rightly or told why not, and does nothing stay behind?

    python benchmarks/serve_faults.py MODEL.gguf killed stopped nan disk term [--seconds 30] [--clients 32]

The clients ask known questions again and again, greedily and streamed, while the fault comes, several times where it
can: a process that runs a stage is killed (``killed``) or stopped (``stopped``); half of the clients ask for an
adapter whose weights are not numbers (``nan``); no file of the service can grow any more, as on a full disk
(``disk``); the service is told to end (``term``). Prints Markdown; a missed bar is marked, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from serve_clients import Body, Watch, ask_again
from serve_process import Service, labinfer_service

SLOTS, LENGTH, MADE = 32, 256, 64
PIPELINE = ("--devices", "cpu:0,cpu:1", "--transport", "shm")
"""Flags for a stage in a process of its own on each of two devices."""

TARGET = "base_model.model.model.layers.0.self_attn.q_proj"


class Faults:
    """The faults of one run. ``passed`` stays True while every bar is reached."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.passed = options, folder, True
        source = np.random.default_rng(0)
        prompts = [source.integers(100, 40_000, size=size).tolist() for size in source.integers(8, 65, size=16)]
        common = {"max_tokens": MADE, "temperature": 0, "ignore_eos": True}
        self.bodies: list[Body] = [{**common, "prompt": prompt} for prompt in prompts]

    def service(self, *flags: str, threads: int | None = None, log: Path = Path(os.devnull)) -> Service:
        """A service for the clients of a fault, which writes its log to ``log``."""
        return labinfer_service(self.options.model, threads or self.options.threads, SLOTS, LENGTH, *flags, log=log)

    def killed(self) -> None:
        """A stage is killed every few seconds: every answer is right all the same."""
        self.strike_stages(signal.SIGKILL)

    def stopped(self) -> None:
        """A stage is stopped every few seconds: every answer is right all the same."""
        self.strike_stages(signal.SIGSTOP)

    def strike_stages(self, number: signal.Signals) -> None:
        """Send a signal to one of the stages every few seconds."""
        service, source = self.service(*PIPELINE, threads=1), random.Random(0)
        began, stages = service.counts[1], set(service.stages())

        async def strike(end: float) -> None:
            while (at := time.monotonic() + 6) < end - 6:
                await asyncio.sleep(at - time.monotonic())
                stages.update(running := service.stages())
                if running:
                    os.kill(source.choice(running), number)
                    faults.append(time.monotonic())

        faults: list[float] = []
        watch = self.load(service, strike)
        stages.update(service.stages())
        left = self.left(service, began)
        service.close()
        time.sleep(1)
        left += sum(Path(f"/proc/{pid}").exists() for pid in stages)
        bad = watch.outcomes["told"]
        self.row(
            f"{len(faults)} stages {number.name}",
            watch,
            left + bad,
            f"silence of at most {watch.silence:.1f} s",
        )

    def nan(self) -> None:
        """Every second client asks for an adapter that makes logits no numbers: it is told so, the others are right."""
        service = self.service("--lora", f"broken={broken_adapter(self.folder / 'broken')}")
        began = service.counts[1]
        watch = self.load(service, broken="broken")
        found = service.gauges()["vllm:corrupted_requests_total"]
        other = watch.outcomes["told"] != found or not found
        left = self.left(service, began) + other
        service.close()
        self.row("logits that are no numbers", watch, left, f"{found:.0f} counted by the service")

    def disk(self) -> None:
        """No file of the service can grow any more: answers go on without the log."""
        log = self.folder / "log"
        service = self.service(log=log)
        began = service.counts[1]

        async def strike(end: float) -> None:
            await asyncio.sleep(3)
            resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (log.stat().st_size,) * 2)
            sizes.append(log.stat().st_size)

        sizes: list[int] = []
        watch = self.load(service, strike)
        left = self.left(service, began) + watch.outcomes["told"] + (log.stat().st_size > sizes[0])
        left += service.close() != 0
        self.row("full disk", watch, left, f"{sizes[0]} bytes of log before, {log.stat().st_size} after")

    def term(self) -> None:
        """SIGTERM: what was begun is ended, what comes later is told or finds nobody, and the service ends well."""
        service = self.service()

        async def strike(end: float) -> None:
            await asyncio.sleep(5)
            service.process.terminate()

        watch = self.load(service, strike)
        code = service.process.wait(60)
        self.row(
            "SIGTERM", watch, int(code != 0), f"exit code {code}, {watch.outcomes['nobody']} found nobody", ended=True
        )

    def load(self, service: Service, strike: Callable[[float], Any] | None = None, broken: str | None = None) -> Watch:
        """The clients for as long as was asked for, beside ``strike``; every second one asks for model ``broken``."""
        expected = [service.answer(body)["choices"][0]["text"] for body in self.bodies]
        watch, end = Watch(), time.monotonic() + self.options.seconds

        async def run() -> None:
            clients = [
                ask_again(service.target(), self.bodies, expected, end, watch, broken if number % 2 else None)
                for number in range(self.options.clients)
            ]
            await asyncio.gather(*clients, *([strike(end)] if strike else []))

        asyncio.run(run())
        return watch

    def left(self, service: Service, files: int) -> int:
        """What is held though nobody asks: answers, cache blocks, and files more than there were."""
        end = time.monotonic() + 10
        while (held := self.held(service, files)) and time.monotonic() < end:
            time.sleep(0.2)
        return held

    def held(self, service: Service, files: int) -> int:
        """The same at this moment."""
        gauges, more = service.gauges(), max(service.counts[1] - files, 0)
        return more + sum(gauges[name] > 0 for name in ("labinfer:answers_active", "vllm:kv_cache_usage_perc"))

    def row(self, name: str, watch: Watch, left: int, told: str, ended: bool = False) -> None:
        """Print what came of a fault."""
        counts = watch.outcomes
        good = counts["right"] > 0 and not (
            counts["wrong"] or counts["lost"] or left or (counts["nobody"] and not ended)
        )
        self.passed = self.passed and good
        cells = [name, *(str(counts[each]) for each in ("right", "told", "wrong", "lost")), str(left), told]
        print(f"| {' | '.join(cells)} |{'' if good else ' **(missed)**'}", flush=True)


def broken_adapter(folder: Path) -> Path:
    """An adapter, as PEFT writes it, that makes every value of one layer's queries NaN."""
    folder.mkdir()
    tensors = {"A": np.ones((1, 576)), "B": np.full((576, 1), np.nan)}
    save_file(
        {f"{TARGET}.lora_{name}.weight": array.astype(np.float32) for name, array in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main() -> int:
    """Run the chosen faults; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="SmolLM2-135M, for whose size the broken adapter is made")
    parser.add_argument("faults", nargs="+", choices=["killed", "stopped", "nan", "disk", "term"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30, help="of each")
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    print("| fault | right | told | wrong | lost | left or amiss | |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(options, Path(folder))
        for name in options.faults:
            getattr(faults, name)()
    return 0 if faults.passed else 1


if __name__ == "__main__":
    sys.exit(main())
