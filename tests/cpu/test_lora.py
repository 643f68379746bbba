"""``lora_add`` of the CPU backend against its reference: runs of sequences, odd sizes, windows, several threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("numba")

from labinfer.backends.cpu.device import CpuDevice
from labinfer.ops import OPS, Call, Step

NOTHING = np.zeros(0, np.int32)


def pool(device: CpuDevice, values: np.ndarray) -> Any:
    """A pool [slots, rows, columns] in the device's layout."""
    size = 4 * int(np.prod(values.shape[:-2])) * (-(-values.shape[1] // 16) * 16) * values.shape[2]
    made = device.parameter(device.allocate(size, "pool"), 0, "f32", values.shape)
    for slot, matrix in enumerate(values):
        device.store(made, np.ascontiguousarray(matrix).view(np.uint8).reshape(-1), "f32", matrix.shape, slot)
    return made


def step_of(counts: list[int], adapters: list[int]) -> Step:
    lengths = np.array(counts, np.int32)
    return Step(
        token_ids=np.zeros(sum(counts), np.int32), positions=np.zeros(sum(counts), np.int32),
        query_start=np.cumsum([0, *counts]).astype(np.int32), context_len=lengths, total_len=lengths,
        block_table=np.zeros((len(counts), 1), np.int32), slot_mapping=np.zeros(sum(counts), np.int32),
        logits_rows=NOTHING, max_num_seqs=len(counts), adapter=np.array(adapters, np.int32),
    )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("out", "into", "rank"), [(32, 48, 16), (33, 7, 1), (5, 17, 21), (130, 64, 40)])
def test_lora_add(threads: int, out: int, into: int, rank: int) -> None:
    rng = np.random.default_rng(out)
    a = rng.standard_normal((3, rank, into), np.float32)
    b = rng.standard_normal((3, out, rank), np.float32)
    device = CpuDevice("cpu", threads=threads)
    attrs = OPS["lora_add"].Attrs.model_validate({"max_loras": 3, "rank": rank})
    weights = {"a": pool(device, a), "b": pool(device, b)}
    cases: list[tuple[list[int], list[int]]] = [
        ([1], [1]), ([1], [-1]), ([9], [2]), ([1, 1, 1, 1], [0, 0, 2, 0]), ([5, 1, 70, 1, 3], [-1, 1, 1, -1, 0]),
    ]  # fmt: skip
    for counts, adapters in cases:
        step, tokens = step_of(counts, adapters), sum(counts)
        x, y = rng.standard_normal((tokens, into + 6), np.float32)[:, 3 : into + 3], rng.standard_normal((tokens, out))
        y = y.astype(np.float32)
        plain = Call(attrs, (y, x), weights={"a": a, "b": b}, step=step)
        [expected] = OPS["lora_add"].reference(plain)
        z = device.F.lora_add(y, x, step=step, **weights, max_loras=3, rank=rank)
        assert_allclose(z, expected, rtol=1e-4, atol=1e-4)
        untouched = np.repeat(adapters, counts) < 0
        assert_array_equal(z[untouched], y[untouched])
    step.adapter = None
    assert_array_equal(device.F.lora_add(y, x, step=step, **weights, max_loras=3, rank=rank), y)
    device.close()
