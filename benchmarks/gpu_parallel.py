"""What several GPUs of one host do together, against one of them; weights are made up, no model file is needed.

    python benchmarks/gpu_parallel.py collectives tensor pipeline large

``collectives``: sums and gathered columns of two GPUs by size, by words for few numbers and by pieces for many.
``tensor``: Llama-3.1-8B bf16 with two ranks, batch 1 and larger, and a prompt of 2,048 tokens. ``pipeline``: the same
model as two stages, batch 256. ``large``: a model of Llama-3.1-70B's shape, 141 GB, over both. Tokens go through the
engine, sampling included; memory is what the driver says is taken beside the context, against the plan.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cupy
import numpy as np
from gpu import elapsed

import labinfer
from labinfer.backends.cuda import emit_exchange
from labinfer.backends.cuda.device import CudaDevice
from labinfer.compiler.plan import Plan
from labinfer.ops.base import OPS, Call
from labinfer.profile.synthetic import SyntheticCheckpoint
from labinfer.runtime.cache import CacheOptions
from labinfer.runtime.manager import Manager
from labinfer.runtime.model import Model
from labinfer.runtime.sampling import SamplingParams

TWO = ("cuda:0", "cuda:1")
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 128_256, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131_072,
    "hidden_act": "silu", "tie_word_embeddings": False, "head_dim": 128,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672
}  # fmt: skip
ROUNDS = 3
BATCH = 256
"""Sequences in a step of the pipeline."""


class RepeatedCheckpoint(SyntheticCheckpoint):
    """One whose tensors of a size are one array, so that a large model is not made up for minutes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.arrays: dict[int, Any] = {}

    def raw(self, name: str) -> Any:
        """The bytes of a tensor."""
        nbytes = self.tensors[name].nbytes
        if nbytes not in self.arrays:
            self.arrays[nbytes] = super().raw(name)
        return self.arrays[nbytes]


@contextmanager
def opened(config: dict[str, Any], devices: Sequence[str], **options: Any) -> Iterator[Model]:
    """A model of this shape on ``devices``; tells how much memory each took."""
    with closing(Manager()) as manager, tempfile.TemporaryDirectory() as folder:
        gpus = [manager.device(name) for name in devices]
        before = [gpu.memory()[0] for gpu in gpus]
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        limits = {"kv_dtype": "bf16", "arena_effort_seconds": 0.2, **options}
        plan = labinfer.compile("llama", config=path, devices=",".join(devices), **limits)
        cache = CacheOptions(enable_prefix_caching=False)
        started = time.perf_counter()
        with Model(plan, RepeatedCheckpoint(plan), manager=manager, cache=cache) as model:
            print(f"<!-- {', '.join(devices)}: loaded in {time.perf_counter() - started:.0f} s -->", flush=True)
            yield model
            for gpu, start, stage in zip(gpus, before, plan.stages, strict=True):
                taken, planned = start - gpu.memory()[0], stage.bytes.total
                share = f"{taken / planned - 1:+.2%}"
                print(f"<!-- {gpu.name}: {taken / 1e9:.3f} GB taken, {planned / 1e9:.3f} planned: {share} -->")


def decode_rate(model: Model, batch: int, context: int, tokens: int, rounds: int = ROUNDS) -> float:
    """Output tokens a second of ``batch`` requests at once, after their first tokens; median of rounds."""
    random = np.random.default_rng(0)
    prompts = [random.integers(3, model.vocab_size, context).tolist() for _ in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    rates = []
    for _ in range(rounds + 1):  # the first makes graphs
        answers = model.generate(prompts, params)
        between = [answer.metrics.inter_token_seconds or 0 for answer in answers]
        rates.append(batch / max(between))
    return median(rates[1:])


def first_token(model: Model, length: int) -> float:
    """Milliseconds until the first token of a prompt; median of rounds."""
    prompt = np.random.default_rng(1).integers(3, model.vocab_size, length).tolist()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    times = []
    for _ in range(ROUNDS + 2):
        started = time.perf_counter()
        model.generate(prompt, params)
        times.append(time.perf_counter() - started)
    return 1e3 * median(times[2:])


def at_once(runs: Sequence[Callable[[], float]]) -> float:
    """The longest of what each returns, which run in threads."""
    found = [0.0] * len(runs)

    def work(number: int) -> None:
        found[number] = runs[number]()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(found)


def collective_time(devices: Sequence[CudaDevice], peers: Sequence[Any], kind: str, rows: int, width: int) -> float:
    """Microseconds of a collective, of which a graph has a hundred."""
    runs = []
    for device, own in zip(devices, peers, strict=True):
        device.use()
        x, y = cupy.ones((rows, width), np.float32), cupy.ones((rows, width * len(devices)), np.float32)
        gathers = kind == "all_gather"
        attrs = OPS[kind].Attrs.model_validate({"sizes": (width,) * len(devices)} if gathers else {})
        call = Call(attrs, (x,), (y if gathers else y[:, :width],), peers=own)
        program = device.program([(device.F.kernels[kind], call)] * 100)

        def run(device: CudaDevice = device, program: Any = program, own: Any = own) -> float:
            device.ready(program)
            with own.together():
                for _ in range(3):
                    program(0, 0)
                return min(elapsed(device.stream, partial(program, 0, 0)) for _ in range(5)) * 10

        runs.append(run)
    return at_once(runs)


def collectives() -> None:
    print("\n| numbers of a part | words, µs | pieces, µs | GB/s each way | gathered: words, µs | pieces, µs |")
    print("|---|---|---|---|---|---|")
    in_words = emit_exchange.in_words
    with closing(Manager()) as manager:
        devices = [device for name in TWO if isinstance(device := manager.device(name), CudaDevice)]
        with closing(devices[0].exchange(devices)) as exchange:
            for rows in (1, 2, 4, 8, 16, 32, 64, 256, 2048):
                times = []
                for kind in ("all_reduce", "all_gather"):
                    for words in (True, False):
                        fits = in_words(rows * 1024) or not words
                        emit_exchange.in_words = lambda fours, words=words: words
                        times.append(collective_time(devices, exchange.peers, kind, rows, 4096) if fits else None)
                emit_exchange.in_words = in_words
                texts = ["–" if each is None else f"{each:.1f}" for each in times]
                rate = rows * 4096 * 4 / min(each for each in times[:2] if each) / 1e3
                print(f"| {rows} x 4096 | {texts[0]} | {texts[1]} | {rate:.0f} | {texts[2]} | {texts[3]} |", flush=True)


def tensor() -> None:
    limits = {"max_num_seqs": 64, "max_model_len": 2112, "max_num_batched_tokens": 2048, "num_blocks": 2400}
    found: list[list[float]] = []
    for devices in (TWO[:1], TWO):
        with opened(LLAMA_8B, devices, tensor_parallel_size=len(devices), **limits) as model:
            rates = [decode_rate(model, batch, 64, 256 if batch == 1 else 128) for batch in (1, 8, 64)]
            found.append([*rates, first_token(model, 2048)])
    print("\n| Llama-3.1-8B bf16 | one GPU | two ranks | times | goal |\n|---|---|---|---|---|")
    for what, one, two, goal in zip(("batch 1, tok/s", "batch 8", "batch 64"), *found, ("1.6", "", ""), strict=False):
        print(f"| {what} | {one:,.0f} | {two:,.0f} | {two / one:.2f} | {goal} |")
    one, two = (times[-1] for times in found)
    print(f"| first token of 2,048, ms | {one:.1f} | {two:.1f} | {one / two:.2f} | |")


def pipeline() -> None:
    """Two stages work on two micro-batches at a time, so that each step of either has ``BATCH`` sequences."""
    limits = {"max_model_len": 320, "max_num_batched_tokens": 2048}
    rates = []
    for devices in (TWO[:1], TWO):
        count = BATCH * len(devices)
        with opened(LLAMA_8B, devices, max_num_seqs=count, num_blocks=20 * count, **limits) as model:
            rates.append(decode_rate(model, count, 128, 128, 1))
        what = f"{count} sequences, {len(devices)} stages"
        print(f"| {what} | {rates[-1]:,.0f} tok/s | {rates[-1] / rates[0]:.2f} | 1.8 |", flush=True)


def large() -> None:
    limits = {"max_num_seqs": 8, "max_model_len": 2048, "max_num_batched_tokens": 512, "num_blocks": 1024}
    with opened(LLAMA_70B, TWO, tensor_parallel_size=2, **limits) as model:
        for batch in (1, 8):
            print(
                f"| Llama-3.1-70B bf16, batch {batch} | {decode_rate(model, batch, 64, 64, 1):,.1f} tok/s |", flush=True
            )


PARTS = {"collectives": collectives, "tensor": tensor, "pipeline": pipeline, "large": large}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    arguments = parser.parse_args()
    print(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    for part in arguments.parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
