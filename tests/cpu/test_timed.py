"""Steps with a clock between their ops: the same results, and times that add up."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("numba")

import labinfer
from labinfer.backends.cpu.device import CpuDevice
from labinfer.runtime.batch import part_of
from tests.tiny import GOLDEN


@pytest.mark.alone
def test_clocked_steps_compute_the_same_and_take_no_longer_than_they_last() -> None:
    with labinfer.load(GOLDEN / "llama-llama3", devices="cpu", max_model_len=64) as model:
        row = model.batch.add(list(range(3, 13)))
        part = part_of(row, 10, 1)
        model.batch.grow(part)
        batch = model.batch.step(part)
        expected = model.run(batch).copy()
        (interpreter,) = model.interpreters
        assert isinstance(interpreter.device, CpuDevice)
        bound, values = interpreter.resolve(10, 1)
        listed = [(each.kernel, each.call) for each in bound if each.kernel is not None]
        run = interpreter.device.timed(listed)
        values["logits"][:] = 0
        start = time.perf_counter()
        seconds = run()
        elapsed = time.perf_counter() - start
        np.testing.assert_array_equal(values["logits"], expected)
    assert len(seconds) == len(listed)
    assert min(seconds) > 0
    assert sum(seconds) < 1.01 * elapsed + 1e-4
