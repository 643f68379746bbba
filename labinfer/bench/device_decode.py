"""Decoding that a CUDA device does by itself, set up from a model: what its kernels can do without the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from labinfer.backends.cuda.device import CudaDevice
from labinfer.backends.cuda.greedy import GreedyDecode
from labinfer.errors import UsageError
from labinfer.runtime.batch import Part
from labinfer.runtime.model import Model


def decode_on_device(model: Model, rows: Sequence[int], count: int) -> GreedyDecode:
    """``count`` greedy steps, ready to run, for rows of the model's batch with one token each left to compute.

    The model must lie on one CUDA device; its batch is not told of the tokens made.
    """
    [interpreter] = model.interpreters
    if not isinstance(interpreter.device, CudaDevice):
        raise UsageError("bench.device", f"'{interpreter.device.name}' does not decode by itself")
    batch, chosen = model.batch, np.asarray(rows)
    lengths, ones = batch.num_tokens[chosen], np.ones(len(chosen), np.int32)
    if batch.blocks.grow(chosen, lengths + count) is not None:
        raise UsageError("run.cache-full", f"no cache blocks are left for {count} tokens of {len(chosen)} sequences")
    step = batch.step(Part(chosen, ones, ones, 0 * ones, True))
    tables = batch.blocks.block_tables(chosen, int(lengths.max()) + count)
    interpreter.step_memory.load(replace(step, block_tables=tables))
    bound, values = interpreter.resolve(len(chosen), len(chosen))
    calls = [(each.kernel, each.call) for each in bound if each.kernel is not None]
    logits = values[interpreter.stage.outputs[-1]]
    return GreedyDecode(interpreter.device, calls, logits, interpreter.step_memory.steps, count)
