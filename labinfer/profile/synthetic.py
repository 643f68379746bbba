"""A checkpoint of made-up numbers, for measuring models whose weights are elsewhere: times do not depend on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from labinfer.compiler.fold import unfold_weights
from labinfer.compiler.graph import Weight
from labinfer.compiler.plan import Plan
from labinfer.ops.formats import stored_bytes
from labinfer.runtime.weights import Checkpoint
from labinfer.runtime.weights.tensor_info import TensorInfo

BYTES = np.array([sign | byte for sign in (0, 0x80) for byte in range(0x30, 0x3E)], np.uint8)
"""Any sequence of these is, in every stored format, of numbers between 1e-10 and 2 in size and of either sign."""

POOL_BYTES = 1 << 20


class SyntheticCheckpoint(Checkpoint):
    """All tensors that ``plan`` names, in the shapes and formats it says, with random content of ordinary size."""

    def __init__(self, plan: Plan) -> None:
        infos = {info.name: info for weight in unfold_weights(plan).values() for info in _tensors(weight)}
        super().__init__(Path("synthetic"), "gguf" if plan.source.kind == "gguf" else "safetensors", {}, infos.values())
        self.pool = np.random.default_rng(0).choice(BYTES, POOL_BYTES)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor: the same for all of its size."""
        return np.resize(self.pool, self.tensors[name].nbytes)

    def release(self, name: str) -> None:
        """Nothing is kept."""


def _tensors(weight: Weight) -> list[TensorInfo]:
    shape = weight.whole_shape if weight.stack is None else weight.whole_shape[1:]  # ranks cut theirs out of it
    stored = shape[::-1] if weight.transform.transpose else shape
    size = stored_bytes(weight.format, stored)
    return [TensorInfo(name, weight.format, stored, size, Path("synthetic"), 0) for name in weight.tensors()]
