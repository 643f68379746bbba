"""What shares one GPU, and what works beside it: two models, a CPU, weights that are streamed; and how it starts.

    python benchmarks/models.py FOLDER --random bf16               # once: llama-1b-bf16.gguf
    python benchmarks/gpu_together.py FOLDER shares streamed predicted start

``shares``: two models at half of the multiprocessors each, against one alone on all and on half, and against two that
both use all. ``streamed``: decode steps with layers that come from pinned memory, against what copying them takes.
``predicted``: what profiles say of steps, whole, streamed and with layers on the CPU, against what these take.
``start``: where a fresh process spends its time until the first token.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import cupy
import numpy as np
from gpu import REPEAT, WARM, elapsed, sequences
from prediction import STEPS, Room

import labinfer
from labinfer.bench.device_decode import decode_on_device
from labinfer.llm import LLM
from labinfer.profile.measure import warm_up
from labinfer.profile.quiet import Patience
from labinfer.profile.synthetic import SyntheticCheckpoint
from labinfer.profile.validate import validate_step
from labinfer.runtime.batch import Part
from labinfer.runtime.cache import CacheOptions
from labinfer.runtime.cores import available_cores
from labinfer.runtime.manager import Manager
from labinfer.runtime.model import Model

LIMITS: dict[str, Any] = {
    "max_num_seqs": 2, "max_model_len": 2112, "max_num_batched_tokens": 2048, "kv_dtype": "bf16",
    "arena_effort_seconds": 0.2, "enable_prefix_caching": False,
}  # fmt: skip
CONTEXT, TOKENS = 300, 256
HALVES = {"cuda:0.0": 0.5, "cuda:0.1": 0.5}
GOAL = 0.85
"""Of half of the speed alone, which each of two models at half should have."""

START = """
import time
times = [("python", time.time())]
def phase(name):
    times.append((name, time.time()))
import labinfer, labinfer.llm
phase("import labinfer")
import cupy
phase("import cupy")
from labinfer.runtime.manager import Manager
manager = Manager()
manager.device("cuda")
phase("open the device")
plan = labinfer.compile(MODEL, devices="cuda", max_model_len=2048)
phase("compile the plan")
model = labinfer.load(plan, manager=manager)
phase("load the weights and kernels")
model.generate([1, 2, 3], labinfer.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
phase("first token")
for name, at in times:
    print(name, at)
"""


def decoding(model: LLM) -> Callable[[], float]:
    """Milliseconds of a decode step, whenever it is asked for."""
    rows, device = sequences(model, 1, CONTEXT), model.interpreters[0].device

    def run() -> float:
        decode = decode_on_device(model, rows, TOKENS + WARM)
        decode.run(WARM)
        device.synchronize()
        time = elapsed(device.stream, partial(decode.run, TOKENS)) / TOKENS
        decode.close()
        return time

    return run


def prefilling(model: LLM) -> Callable[[], float]:
    """Milliseconds of a prompt of 2,048 tokens, until its logits are on the host."""
    device, count = model.interpreters[0].device, np.array([2048], np.int32)

    def run() -> float:
        device.use()
        row = model.batch.add(np.arange(3, 2051, dtype=np.int32))
        part = Part(np.array([row]), count, 0 * count + 1, 0 * count)
        time = elapsed(device.stream, lambda: model.compute(part))
        model.batch.remove(row)
        return time

    return run


def at_once(runs: Sequence[Callable[[], float]]) -> list[float]:
    """Medians of what each takes while all run, which start together each time."""
    barrier, found = threading.Barrier(len(runs)), [list[float]() for _ in runs]

    def work(run: Callable[[], float], times: list[float]) -> None:
        run()
        for _ in range(REPEAT):
            barrier.wait()
            times.append(run())

    threads = [threading.Thread(target=work, args=each) for each in zip(runs, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [median(times) for times in found]


def shares(folder: Path) -> None:
    print("\n| what | alone on all, ms | alone on half | two at half, each | two on all, each | goal |")
    print("|---|---|---|---|---|---|")
    settings: list[tuple[dict[str, float], list[str]]] = [
        ({}, ["cuda:0"]), (HALVES, ["cuda:0.0"]), (HALVES, [*HALVES]), ({}, ["cuda:0", "cuda:0.1"])
    ]  # fmt: skip
    found: dict[str, list[list[float]]] = {"a decode step": [], "a prompt of 2,048 tokens": []}
    for granted, names in settings:
        with closing(Manager(shares=granted)) as manager, ExitStack() as stack:
            models = [
                stack.enter_context(
                    labinfer.load(folder / "llama-1b-bf16.gguf", devices=name, manager=manager, **LIMITS)
                )
                for name in names
            ]
            print(f"<!-- {[manager.devices[name].describe() for name in names]} -->")
            for what, make in zip(found, (decoding, prefilling), strict=True):
                found[what].append(at_once([make(model) for model in models]))
    for what, ((alone,), (half,), halves, both) in found.items():
        goal = 2 * alone / GOAL
        texts = [" and ".join(f"{time:.3f}" for time in times) for times in (halves, both)]
        print(f"| {what} | {alone:.3f} | {half:.3f} | {texts[0]} | {texts[1]} | {goal:.3f} |")


def pinned_bandwidth() -> float:
    """Bytes a second of a large copy from pinned memory."""
    size = 1 << 30
    pinned, target = cupy.cuda.alloc_pinned_memory(size), cupy.empty(size, np.uint8)
    stream = cupy.cuda.get_current_stream()
    copy = partial(
        cupy.cuda.runtime.memcpyAsync, target.data.ptr, pinned.ptr, size, cupy.cuda.runtime.memcpyHostToDevice,
        stream.ptr,
    )  # fmt: skip
    return size / min(elapsed(stream, copy) for _ in range(4)) * 1e3


def streamed(folder: Path) -> None:
    bandwidth, resident = pinned_bandwidth(), 0.0
    print(f"\npinned memory to the GPU: {bandwidth / 1e9:.1f} GB/s\n")
    print("| streamed layers | MB a step | ms a token | copying, ms | longer of copying and resident, ms | of it |")
    print("|---|---|---|---|---|---|")
    params = labinfer.SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    expected: list[int] = []
    for layers in (0, 2, 4, 8, 16):
        options = LIMITS | {"streamed_layers": layers}
        with labinfer.load(folder / "llama-1b-bf16.gguf", devices="cuda", **options) as model:
            model.generate([*range(100, 116)], params)
            [answer] = model.generate([*range(100, 116)], params)
            took, tokens = 1e3 * (answer.metrics.inter_token_seconds or 0), list(answer.token_ids)
            moved = model.plan.stages[0].bytes.host
        expected, resident = expected or tokens, resident or took
        copying = moved / bandwidth * 1e3
        bound = max(copying, resident)
        same = "" if tokens == expected else " (the tokens DIFFER)"
        print(f"| {layers} | {moved / 1e6:.0f} | {took:.2f}{same} | {copying:.2f} | {bound:.2f} | {bound / took:.0%} |")


def predicted(folder: Path) -> None:
    patience, cpu, threads = Patience(0), "cpu:0", len(available_cores())
    model_file = str(folder / "llama-1b-bf16.gguf")
    placed = labinfer.compile(model_file, devices=f"cuda:0,{cpu}").devices.values()
    shared = set.intersection(*(set(device.fusions) for device in placed))  # a plan has the fused ops of all
    alone = Room(model_file, patience, {"cuda:0": None}, quick=True, again=False)
    room = Room(model_file, patience, {"cuda:0": None, cpu: threads}, quick=True, again=False, fusions=shared)
    gpu, both = "'cuda:0': {}", f"'cuda:0': {{}}, '{cpu}': {{threads: {threads}}}"
    cut = len(room.units) - 5
    pins = ", ".join(f"{unit}: '{cpu if number >= cut else 'cuda:0'}'" for number, unit in enumerate(room.units))
    plans = {"whole": (alone, alone.compile(gpu)), "GPU + CPU": (room, room.compile(both, pins))}
    plans |= {f"{layers} streamed": (alone, alone.compile(gpu, streamed_layers=layers)) for layers in (4, 16)}
    print("\n| plan | step | predicted, ms | measured, ms | error |\n|---|---|---|---|---|")
    for name, (room, plan) in plans.items():
        with Model(plan, SyntheticCheckpoint(plan), cache=CacheOptions(enable_prefix_caching=False)) as model:
            warm_up(model)
            for step in STEPS:
                each = validate_step(model, room.costs, room.links, step, patience)
                predicted, measured = 1e3 * each.predicted, 1e3 * each.measured
                error = f"{predicted / measured - 1:+.1%}"
                print(f"| {name} | {each.what} | {predicted:.3f} | {measured:.3f} | {error} |", flush=True)


def start(folder: Path) -> None:
    code = START.replace("MODEL", repr(str(folder / "llama-1b-bf16.gguf")))
    for attempt in ("first", "again"):  # the first fills caches: of kernels, and of the file's pages
        text = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
        times = [(name, float(at)) for name, _, at in (row.rpartition(" ") for row in text.splitlines())]
        print(f"\n{attempt}: {times[-1][1] - times[0][1]:.2f} s to the first token (goal: 4 s)")
        for (_, before), (name, at) in pairwise(times):
            print(f"  {name}: {at - before:.2f} s")


PARTS = {"shares": shares, "streamed": streamed, "predicted": predicted, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    print(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    for part in arguments.parts:
        PARTS[part](arguments.folder)


if __name__ == "__main__":
    main()
