"""Overhead of the interpreter's loop: what a step costs beyond its kernel calls, per op.

Runs the real tape of a model with every kernel replaced by one that does nothing, against a bare Python loop that calls
the same thing as often. Prints the ceiling (the bare loop) beside ours; the bar is 0.5 microseconds per op.

    python benchmarks/interpreter.py [MODEL] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import labinfer
from labinfer.llm import LLM
from labinfer.ops.fusions import is_view
from labinfer.runtime.batch import part_of

BAR = 0.5
"""Microseconds per op beyond its kernel call."""

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 28, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}  # fmt: skip
"""A 28-layer model so small that only the interpreter is left to measure."""


def small_model(folder: Path) -> Path:
    """A random checkpoint of ``CONFIG`` in ``folder``."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    plan = labinfer.compile(folder / "config.json")
    tensors = {
        line.tensor.replace("{i}", str(layer)): np.full(line.shape, 0.01, np.float32)
        for line in plan.weights
        for layer in (range(line.layers[0], line.layers[1] + 1) if line.layers else [0])
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def nothing(call: Any) -> None:
    """A kernel that does nothing."""


def best_microseconds(run: Callable[[], object], seconds: float) -> float:
    """The shortest of many runs within ``seconds``, in microseconds."""
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best * 1e6


def measure(model: LLM, seconds: float) -> dict[str, float]:
    """Microseconds of one decode step's loop and of a bare loop, of the whole step, and per op."""
    [interpreter] = model.interpreters
    device = interpreter.device
    device.F.kernels = dict.fromkeys(device.F.kernels, nothing)
    interpreter.tapes.clear()  # loading has bound one to the real kernels
    part = part_of(model.batch.add([1]), 1, 1)
    model.batch.grow(part)
    step = model.batch.step(part)
    tape = interpreter.prepare(step)
    calls = [bound.call for bound in tape.bound if not is_view(bound.op.kind)]

    def bare() -> None:
        for call in calls:
            nothing(call)

    loops = {"bare": bare, "ours": lambda: tape.program(1, 1), "step": lambda: interpreter.run(step, {})}
    timed = {name: best_microseconds(run, seconds) for name, run in loops.items()}
    overhead = (timed["ours"] - timed["bare"]) / len(calls)
    beyond = (timed["step"] - timed["bare"]) / len(calls)
    return {"ops": len(calls), **timed, "overhead_per_op": overhead, "step_overhead_per_op": beyond}


def main() -> int:
    """Measure, print, and exit 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", help="anything labinfer.load takes; a tiny 28-layer llama without it")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        labinfer.load(options.model or small_model(Path(folder)), devices="reference") as model,
    ):
        found = measure(model, options.seconds)
        name = model.plan.source.name if options.model else "tiny llama, 28 layers"
    print(f"{name}: {found['ops']:.0f} ops in a decode step, kernels that do nothing")
    print(f"  ceiling: bare Python loop   {found['bare']:8.1f} us")
    print(f"  ours: the tape's loop       {found['ours']:8.1f} us   {found['overhead_per_op']:6.3f} us/op more")
    print(f"  ours: the whole step        {found['step']:8.1f} us   {found['step_overhead_per_op']:6.3f} us/op more")
    passed = found["step_overhead_per_op"] <= BAR
    print(f"  bar: {BAR} us/op: {'kept' if passed else 'MISSED'}")
    if options.json:
        options.json.write_text(json.dumps(found | {"bar": BAR, "passed": passed}, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
