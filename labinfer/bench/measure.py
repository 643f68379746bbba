"""Times of prefill and decode by the engine, as of llama-bench: random prompts, decode from an empty cache."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence as Listing
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

import numpy as np

from labinfer.bench.ceiling import float32_flops, read_bandwidth
from labinfer.bench.cost import decode_bytes, prefill_flops
from labinfer.bench.memory import peak_rss
from labinfer.compiler.plan import Plan
from labinfer.errors import UsageError
from labinfer.runtime.model import Model
from labinfer.runtime.request import Request
from labinfer.runtime.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """A thing to measure: a prompt of ``tokens`` tokens, or ``tokens`` new tokens of each of ``batch`` sequences."""

    kind: Literal["prefill", "decode"]
    tokens: int
    batch: int = 1

    @property
    def name(self) -> str:
        """Its name in results: ``decode 128 x 8``."""
        return f"{self.kind} {self.tokens} x {self.batch}"


def plan_tests(prompt_lengths: Listing[int], decode_lengths: Listing[int], batch: Listing[int]) -> list[Workload]:
    """The tests in the order they are shown."""
    prefills = [Workload("prefill", length) for length in prompt_lengths]
    return [*prefills, *(Workload("decode", length, size) for length in decode_lengths for size in batch)]


def limits(tests: Listing[Workload], block_size: int = 16) -> dict[str, int]:
    """Compiler options that give ``tests`` enough room: each of their sequences a block more than their tokens."""
    tests = [replace(test, tokens=test.tokens + block_size) for test in tests]
    batch = max(test.batch for test in tests)
    return {
        "max_num_seqs": batch,
        "max_logits_rows": batch,
        "max_model_len": max(test.tokens for test in tests),
        "block_size": block_size,
        "num_blocks": max(test.batch * -(-test.tokens // block_size) for test in tests),
    }


def check_room(plan: Plan, tests: Listing[Workload]) -> None:
    """Raise ``UsageError`` for a test that the limits of ``plan`` have no room for."""
    bounds = plan.limits
    for test in tests:
        tokens = test.tokens + 1  # those of the prompt and of the answer
        blocks = [bounds.blocks_needed(group, *[tokens] * test.batch) for group in bounds.groups]
        short = any(count > group.num_blocks for count, group in zip(blocks, bounds.groups, strict=True))
        batch = min(bounds.max_num_seqs, bounds.max_logits_rows, bounds.max_num_batched_tokens)
        if tokens > bounds.max_model_len or test.batch > batch or short:
            message = f"the plan has no room for {test.kind} of {test.tokens} tokens, {test.batch} at once"
            raise UsageError("bench.plan-limits", message, remedy="give the model, or compile with larger limits")


def run_test(model: Model, test: Workload) -> list[float]:
    """Seconds of each step of ``test``, by the model's engine; of several in one call, each has its part."""
    made, prompt = (1, test.tokens) if test.kind == "prefill" else (test.tokens, 1)
    params = SamplingParams(temperature=0, max_tokens=made, ignore_eos=True, detokenize=False)
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=(test.batch, prompt))
    salt, engine = uuid.uuid4().hex, model.engine  # nothing is cached that was measured before
    requests, told = [Request(row, params, cache_salt=salt) for row in tokens.tolist()], [time.perf_counter()]
    if model.pipeline is not None:  # whose steps may be of some sequences only
        requests[-1].listener = lambda sequence: told.append(time.perf_counter())
    engine.finish([engine.add(request) for request in requests])
    ended = time.perf_counter()
    for failed in (request.error for request in requests if request.error):
        raise failed
    if model.pipeline is not None:
        return np.diff(told[: made + 1]).tolist()
    steps = [step for step in engine.stats if step.time > told[0]]
    times, counts = [told[0], *(step.time for step in steps[:-1]), ended], [step.num_steps for step in steps]
    seconds: list[float] = np.repeat(np.diff(times) / counts, counts).tolist()
    return seconds


def weight_memory(model: Model) -> list[np.ndarray]:
    """The weights as they lie in this process's memory, as bytes; empty where a device keeps them elsewhere."""
    memory = [part.buffer.memory for part in model.parameters]
    return memory if all(isinstance(array, np.ndarray) for array in memory) else []


def measure(model: Model, tests: Listing[Workload], repeat: int) -> dict[str, Any]:
    """Run ``tests`` ``repeat`` times, each round beside a read of the weights; the results as plain data."""
    check_room(model.plan, tests)
    for test in tests:  # binds the tapes and compiles their kernels
        run_test(model, test if test.kind == "prefill" else Workload("decode", min(8, test.tokens), test.batch))
    memory, threads = weight_memory(model), num_threads(model.plan)
    rounds: list[list[list[float]]] = []
    bandwidths = []
    for _ in range(repeat):
        rounds.append([run_test(model, test) for test in tests])
        if memory:
            bandwidths.append(read_bandwidth(memory, threads))
    peak = peak_rss()
    machine = {
        "threads": threads,
        "read_bytes_per_second": median(bandwidths) if bandwidths else None,
        "float32_flops_per_second": float32_flops() if memory else None,
        "load_average": os.getloadavg()[0],
    }
    results = []
    for number, test in enumerate(tests):
        times = [each[number] for each in rounds]
        found: dict[str, Any] = {"name": test.name, "kind": test.kind, "tokens": test.tokens, "batch": test.batch}
        found["tokens_per_second"] = test.tokens * test.batch / median(map(sum, times))
        if test.kind == "prefill":
            found |= prefill_figures(model.plan, test, times, machine["float32_flops_per_second"])
        else:
            found |= decode_figures(model.plan, test, times, bandwidths)
        results.append(found)
    return {"machine": machine, "peak_rss_bytes": peak, "tests": results}


def prefill_figures(plan: Plan, test: Workload, times: list[list[float]], ceiling: float | None) -> dict[str, Any]:
    """Medians over rounds of a prefill; ``ceiling`` is the machine's rate of float32 operations."""
    seconds = median(map(sum, times))
    rate = prefill_flops(plan, test.tokens) / seconds
    share = ceiling and rate / ceiling
    return {"time_to_first_token_seconds": seconds, "flops_per_second": rate, "share_of_ceiling": share}


def decode_figures(plan: Plan, test: Workload, times: list[list[float]], bandwidths: list[float]) -> dict[str, Any]:
    """Medians over rounds of a decode, quantiles over all its steps.

    The share of the machine's read bandwidth is that within a round: on a shared machine it changes by the minute.
    """
    nbytes = decode_bytes(plan, test.batch, (test.tokens + 1) / 2)
    read = nbytes * test.tokens
    shares = [read / sum(each) / bandwidth for each, bandwidth in zip(times, bandwidths, strict=False)]  # one a round
    p50, p99 = np.percentile([step for each in times for step in each], [50, 99]).tolist()
    return {
        "inter_token_p50_seconds": p50,
        "inter_token_p99_seconds": p99,
        "bytes_per_step": nbytes,
        "bytes_per_token": nbytes / test.batch,
        "bytes_per_second": read / median(map(sum, times)),
        "share_of_ceiling": median(shares) if shares else None,
    }


def num_threads(plan: Plan) -> int:
    """Threads that the plan's devices compute with; where a plan does not say, those the process may use."""
    from labinfer.backends.cpu.machine import default_threads

    return max((device.threads or 0 for device in plan.devices.values()), default=0) or default_threads()
