"""The recorded figures of the CUDA backend: decode and prefill of random models of well-known shapes, kernel by kernel.

    python benchmarks/models.py FOLDER --random bf16 q4_0          # once: llama-1b-{bf16,q4_0}.gguf
    python benchmarks/models.py FOLDER --random bf16 --shape qwen3-0.6b
    python benchmarks/models.py FOLDER --random bf16 --shape llama-8b
    python benchmarks/gpu.py FOLDER decode prefill quantized ablate kernels sampling workload large

Prints the card and its measured copy bandwidth first. Decoding is greedy and stays on the device, sampling included;
a time is the median of runs, from CUDA events. ``ablate`` turns graphs and the overlap of kernels off in turn.
``sampling`` times the choice of tokens alone, ``large`` Llama-3.1-8B. ``workload`` is that of nano-vllm's bench.py,
through the engine: 256 requests, prompts and answers of 100 to 1024 tokens, temperature 0.6.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import cupy
import numpy as np

import labinfer
from labinfer.backends.cuda.device import CudaDevice
from labinfer.backends.cuda.sampler import CudaSampler
from labinfer.backends.cuda.tape import Row, Tape
from labinfer.backends.sampling import RULE, Choices
from labinfer.bench.device_decode import decode_on_device
from labinfer.llm import LLM
from labinfer.runtime.batch import Part
from labinfer.runtime.pipeline.device_engine import DeviceEngine
from labinfer.runtime.sampling import SamplingParams

WARM, REPEAT = 8, 5


@contextmanager
def loaded(folder: Path, format: str, shape: str = "llama-1b", **options: Any) -> Iterator[tuple[LLM, CudaDevice]]:
    settings = {"max_num_batched_tokens": 2048, "max_model_len": 2112, "kv_dtype": "bf16", "arena_effort_seconds": 0.2}
    with labinfer.load(folder / f"{shape}-{format}.gguf", devices="cuda", **settings | options) as model:
        yield model, model.interpreters[0].device


def elapsed(stream: Any, run: Callable[[], None]) -> float:
    """Milliseconds of the device's work that ``run`` queues."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end))


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source, target = cupy.zeros(1 << 30, np.uint8), cupy.empty(1 << 30, np.uint8)
    stream = cupy.cuda.get_current_stream()
    times = [elapsed(stream, lambda: cupy.copyto(target, source)) for _ in range(WARM)]
    return 2 * source.nbytes / min(times) * 1e3


def sequences(model: LLM, batch: int, context: int) -> list[int]:
    """Rows of random tokens of which all but the last are computed."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(batch):
        row = model.batch.add(random.integers(3, model.vocab_size, context).astype(np.int32))
        done = 0
        while done < context - 1:
            count = min(2048, context - 1 - done)
            one = np.array([count], np.int32)
            model.compute(Part(np.array([row]), one, 0 * one + 1, 0 * one))
            done += count
        rows.append(row)
    return rows


def decode_time(model: LLM, device: CudaDevice, batch: int, context: int, steps: int) -> float:
    """Milliseconds for a step at contexts ``context`` to ``context + steps``, median of runs."""
    rows = sequences(model, batch, context)
    times = []
    for repeat in range(REPEAT):
        decode = decode_on_device(model, rows, steps + WARM)
        decode.run(WARM)
        device.synchronize()
        times.append(elapsed(device.stream, partial(decode.run, steps)) / steps)
        decode.close()
        if repeat == 0 and times[0] * steps > 400:
            break
    for row in rows:
        model.batch.remove(row)
    return median(times)


def row(name: str, milliseconds: float, batch: int, bytes_read: float, bandwidth: float, goal: str = "") -> None:
    share = bytes_read / milliseconds * 1e3 / bandwidth
    rate = batch / milliseconds * 1e3
    print(f"| {name} | {milliseconds:.3f} | {rate:,.0f} | {share:.0%} | {goal} |", flush=True)


HEADER = "\n| what | ms a step | tok/s | of the copy bandwidth | goal (H200) |\n|---|---|---|---|---|"


def decode(folder: Path, bandwidth: float) -> None:
    print(HEADER)
    with loaded(folder, "bf16", max_num_seqs=1, num_blocks=160) as (model, device):
        weights = model.plan.stages[0].bytes.weights
        for context, steps, goal in ((64, 512, "1,450"), (768, 512, "1,350")):
            time = decode_time(model, device, 1, context, steps)
            row(f"bf16 batch 1, context {context} to {context + steps}", time, 1, weights, bandwidth, goal)
    with loaded(folder, "bf16", max_num_seqs=256, max_logits_rows=256, num_blocks=256 * 70) as (model, device):
        for context, goals in ((385, ("9,500", "42,000", "75,000")), (897, ("8,500", "38,000", "60,000"))):
            for batch, goal in zip((8, 64, 256), goals, strict=True):
                time = decode_time(model, device, batch, context, 128)
                cache = batch * (context + 64) * 16 * 2 * 512 * 2
                row(f"bf16 batch {batch}, mean context {context + 64}", time, batch, weights + cache, bandwidth, goal)


def prefill(folder: Path, bandwidth: float) -> None:
    with loaded(folder, "bf16", max_num_seqs=1, enable_prefix_caching=False) as (model, device):
        for tokens in (32, 512, 2048):
            times = []
            for _ in range(3 * REPEAT):  # the first make the graph
                row = model.batch.add(np.arange(3, 3 + tokens, dtype=np.int32))
                count = np.array([tokens], np.int32)
                part = Part(np.array([row]), count, 0 * count + 1, 0 * count)
                times.append(elapsed(device.stream, lambda part=part: model.compute(part)))
                model.batch.remove(row)
            goal = " (goal on an H200: 10 ms)" if tokens == 2048 else ""
            print(f"prefill of {tokens} tokens, logits on the host: {median(times):.2f} ms, first {times[0]:.1f}{goal}")


def quantized(folder: Path, bandwidth: float) -> None:
    print(HEADER)
    for format in ("q4_0", "q8_0", "q4_k"):
        if (folder / f"llama-1b-{format}.gguf").exists():
            with loaded(folder, format, max_num_seqs=1, num_blocks=160) as (model, device):
                weights = model.plan.stages[0].bytes.weights
                goal = "2.2 x bf16" if format == "q4_0" else ""
                row(
                    f"{format} batch 1, context 64 to 576",
                    decode_time(model, device, 1, 64, 512),
                    1,
                    weights,
                    bandwidth,
                    goal,
                )


def large(folder: Path, bandwidth: float) -> None:
    """A model of which the embedding, of which a step reads one row, is not the output matrix."""
    print(HEADER)
    with loaded(folder, "bf16", "llama-8b", max_num_seqs=1, num_blocks=160) as (model, device):
        read = model.plan.stages[0].bytes.weights - 128_256 * 4096 * 2
        row("llama-8b, context 64 to 320", decode_time(model, device, 1, 64, 256), 1, read, bandwidth, "85% of it")


def ablate(folder: Path, bandwidth: float) -> None:
    print(HEADER)
    with loaded(folder, "bf16", max_num_seqs=1, num_blocks=160) as (model, device):
        weights = model.plan.stages[0].bytes.weights
        for graphs, overlap in ((True, True), (True, False), (False, True), (False, False)):
            device.graphs, device.overlap = graphs, overlap
            name = f"graphs {'on' if graphs else 'off'}, overlap {'on' if overlap else 'off'}"
            row(name, decode_time(model, device, 1, 64, 512), 1, weights, bandwidth)
        device.graphs = device.overlap = True


def kernels(folder: Path, bandwidth: float) -> None:
    """Each kernel of a step by what the step takes less without it; the context stays as it is."""
    for shape, format, batches, context in (
        ("llama-1b", "bf16", (1, 8, 64), 300), ("llama-1b", "q4_0", (1,), 300), ("qwen3-0.6b", "bf16", (256,), 700)
    ):  # fmt: skip
        if not (folder / f"{shape}-{format}.gguf").exists():
            continue
        most = max(batches)
        options = {"max_num_seqs": most, "max_logits_rows": most, "num_blocks": most * (context // 16 + 2)}
        with loaded(folder, format, shape, **options) as (model, device):
            for batch in batches:
                rows = sequences(model, batch, context)
                step = decode_on_device(model, rows, 1)
                made = [each for each in step.tape.rows if label(each).partition(" ")[0] not in ("advance", "slots")]
                print_kernels(f"{shape} {format} batch {batch}, context {context}", device, made)
                step.close()
                for each in rows:
                    model.batch.remove(each)
            if format == "bf16":
                sequences(model, 1, 2049)
                made, _ = device.rows(model.interpreters[0].calls(2048, 1), 1)
                print_kernels(f"{shape}: prefill of 2048 tokens", device, made)


def print_kernels(name: str, device: CudaDevice, made: Sequence[Any]) -> None:
    names = [label(each) for each in made]
    whole = graph_time(device, made)
    print(f"\n{name}: {whole * 1e3:.1f} us in {len(made)} launches\n\n| kernel | launches | us each |\n|---|---|---|")
    for kernel, count in Counter(names).items():
        left = [each for each, other in zip(made, names, strict=True) if other != kernel]
        print(f"| {kernel} | {count} | {(whole - graph_time(device, left)) * 1e3 / count:.2f} |", flush=True)


def label(runnable: Any) -> str:
    if not isinstance(runnable, Row):
        return f"cuBLAS {runnable.product.rows} x {runnable.product.columns}"
    shape = [
        define for define in runnable.source.defines if define.partition("=")[0] in ("NORM", "GLU", "ADD", "CLUSTER")
    ]
    return " ".join([runnable.kernel, f"{runnable.grid[0]}x{runnable.grid[1]}x{runnable.grid[2]}", *shape])


def graph_time(device: CudaDevice, rows: Any) -> float:
    tape = Tape(device, rows, [])
    for _ in range(WARM):
        tape()
    return median(elapsed(device.stream, lambda: [tape() for _ in range(20)] and None) / 20 for _ in range(3))


RULES: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 0.1": {"temperature": 0.1},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top-p 0.9": {"temperature": 0.6, "top_p": 0.9},
    "min-p 0.05": {"temperature": 1.0, "floor": float(np.log(0.05))},
    "temperature 0.6, 1,000 tokens penalized": {"temperature": 0.6, "repetition": 1.2, "frequency": 0.1},
}


def sampling(folder: Path, bandwidth: float) -> None:
    """Microseconds to choose the tokens of so many rows, without the way of parameters and tokens over the bus."""
    vocabulary, batches = 128_256, (1, 8, 64, 256)
    print(f"\n| tokens of {vocabulary:,} |" + "".join(f" {rows} rows, us |" for rows in batches))
    print("|---|" + "---|" * len(batches))
    device = CudaDevice("cuda")
    random_logits = np.random.default_rng(0).standard_normal((256, vocabulary), np.float32)
    for name, knobs in RULES.items():
        times = []
        for rows in batches:
            sampler = CudaSampler(device, rows, vocabulary)
            times.append(sampling_time(device, sampler, cupy.asarray(random_logits[:rows]), knobs))
            sampler.close()
        print(f"| {name} |" + "".join(f" {each * 1e3:.1f} |" for each in times), flush=True)
    device.close()


def sampling_time(device: CudaDevice, sampler: CudaSampler, logits: Any, knobs: dict[str, float]) -> float:
    """Milliseconds."""
    rules = np.zeros(len(logits), RULE)
    rules["top_p"], rules["repetition"], rules["source"], rules["floor"] = 1, 1, -1, -np.inf
    rules["seed"] = np.arange(len(rules))
    for knob, value in knobs.items():
        rules[knob] = value
    listed = 1000 if "repetition" in knobs else 0
    starts = np.arange(len(rules), dtype=np.int32) * listed
    spans = np.stack([starts, starts, starts + listed], axis=1) if listed else None
    tokens = np.tile(np.arange(listed, dtype=np.int32), len(rules))
    choices = Choices(rules, spans, tokens, np.ones_like(tokens))
    for _ in range(WARM):
        sampler.choose(logits, choices)()
    tape = sampler.tape(logits, listed > 0, "temperature" in knobs)
    return median(elapsed(device.stream, lambda: [tape() for _ in range(20)] and None) / 20 for _ in range(REPEAT))


def workload(folder: Path, bandwidth: float) -> None:
    print("\n| workload | output tok/s | goal on an H200 | steps | seconds | of them the device works |")
    print("|---|---|---|---|---|---|")
    for shape, goal in (("qwen3-0.6b", "28,000"), ("llama-1b", "36,000")):
        if not (folder / f"{shape}-bf16.gguf").exists():
            continue
        options = {"max_num_seqs": 256, "max_logits_rows": 256, "num_blocks": 256 * 80, "max_num_batched_tokens": 8192}
        options["enable_prefix_caching"] = False  # which would serve the second run's prompts from the first's
        with loaded(folder, "bf16", shape, **options) as (model, device):
            short = SamplingParams(temperature=0.6, ignore_eos=True, detokenize=False)
            ends = [index // 8 + max(0, index - 248) for index in range(256)]
            each = [replace(short, max_tokens=3 + 3 * end) for end in ends]
            model.generate([[index, 1, 2, 3] for index in range(256)], each)  # each size of a decode step
            model.generate([[index] * (100 + 3 * index) for index in range(256)], replace(short, max_tokens=1))
            for text in (False, True):
                prompts, params = requests(text)
                clock = StepClock(model, device)
                start = time.perf_counter()
                model.generate(prompts, params)
                seconds = time.perf_counter() - start
                made = sum(each.max_tokens or 0 for each in params)
                name = f"{shape} bf16{', with text' if text else ''}"
                share = clock.close()
                print(
                    f"| {name} | {made / seconds:,.0f} | {goal} | {clock.steps} | {seconds:.2f} | {share:.1%} |",
                    flush=True,
                )


def requests(text: bool) -> tuple[list[list[int]], list[SamplingParams]]:
    """Those of nano-vllm's bench.py."""
    number = random.Random(0).randint
    prompts = [[number(0, 10_000) for _ in range(number(100, 1024))] for _ in range(256)]
    options = {"temperature": 0.6, "ignore_eos": True, "detokenize": text}
    return prompts, [SamplingParams(max_tokens=number(100, 1024), **options) for _ in range(256)]


class StepClock:
    """Measures how much of the time, from the first step to the last, the device computes one.

    A step is on the clock from its first kernel to the choice of its tokens; its way to the device is not.
    """

    def __init__(self, model: LLM, device: CudaDevice) -> None:
        engine = model.engine
        assert isinstance(engine, DeviceEngine)
        self.stream, self.marks = device.stream, list[Any]()
        self.interpreter, self.sampler = engine.steps.ranks.interpreters[0], engine.steps.samplers[0]
        execute, choose = self.interpreter.execute, self.sampler.choose
        self.interpreter.execute = lambda *args: (self.mark(), execute(*args))[1]  # type: ignore[method-assign]
        self.sampler.choose = lambda *args: (choose(*args), self.mark())[0]  # type: ignore[method-assign]

    def mark(self) -> None:
        self.marks.append(cupy.cuda.Event())
        self.marks[-1].record(self.stream)

    @property
    def steps(self) -> int:
        return len(self.marks) // 2

    def close(self) -> float:
        """The share."""
        del self.interpreter.execute, self.sampler.choose
        self.stream.synchronize()
        between = [cupy.cuda.get_elapsed_time(*pair) for pair in pairwise(self.marks)]
        return float(sum(between[::2]) / sum(between))


PARTS = {
    "decode": decode, "prefill": prefill, "quantized": quantized, "ablate": ablate, "kernels": kernels,
    "sampling": sampling, "workload": workload, "large": large,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    driver = cupy.cuda.runtime.driverGetVersion()
    bandwidth = copy_bandwidth()
    name, version = properties["name"].decode(), f"{driver // 1000}.{driver % 1000 // 10}"
    print(f"{name}, driver for CUDA {version}, {os.cpu_count()} cores; copy {bandwidth / 1e12:.2f} TB/s")
    for part in arguments.parts:
        PARTS[part](arguments.folder, bandwidth)


if __name__ == "__main__":
    main()
