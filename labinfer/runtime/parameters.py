"""Loads weights of a stage from a checkpoint into an allocation on its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from labinfer.backends.base import Device, capabilities
from labinfer.compiler.graph import Part, Transform, Weight
from labinfer.errors import WeightsError
from labinfer.ops.formats import FORMATS
from labinfer.runtime.variables import Parameter
from labinfer.runtime.weights import Checkpoint

Progress = Callable[[int], None]
"""Called with the bytes just read from the checkpoint."""


class Parameters:
    """Weights in one allocation on ``device``, in its own layout.

    Each is a ``Parameter``. Their arrays exist at once, zero; ``load_parameters`` fills all but the pools of adapters.
    """

    def __init__(self, label: str, used: Sequence[Weight], device: Device) -> None:
        self.device = device
        weight_bytes = capabilities(device.name).weight_bytes
        sizes = [weight_bytes(weight.format, weight.shape) for weight in used]
        self.buffer = device.allocate(sum(sizes), label)
        self.by_name: dict[str, Parameter] = {}
        offset = 0
        for weight, size in zip(used, sizes, strict=True):
            array = device.parameter(self.buffer, offset, weight.format, weight.shape)
            self.by_name[weight.name] = Parameter(weight.name, device.name, weight, array)
            offset += size

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What they are."""
        return tuple(each.weight for each in self.by_name.values())

    def arrays(self) -> dict[str, Any]:
        """The device array of every weight."""
        return {name: parameter.array for name, parameter in self.by_name.items()}

    def close(self) -> None:
        """Give the memory back."""
        self.by_name.clear()
        self.device.deallocate(self.buffer)


def load_parameters(
    chosen: Sequence[Parameters], checkpoint: Checkpoint, device: Device, progress: Progress, vectors: bool
) -> None:
    """Read the vectors among ``chosen``, or everything else, with as many threads as ``device`` takes."""
    listed = [each for some in chosen for each in some.by_name.values() if not each.weight.adapter]
    wanted = [each for each in listed if (len(each.weight.shape) == 1) == vectors]
    with ThreadPoolExecutor(device.loaders) as pool:  # reading and packing hold no GIL
        for _ in pool.map(lambda each: read_weight(each, checkpoint, device, progress), wanted):
            pass


def read_weight(parameter: Parameter, checkpoint: Checkpoint, device: Device, progress: Progress) -> None:
    """Fill the array of ``parameter``; a tensor that differs from the plan is an error."""
    for index, name in enumerate(parameter.weight.tensors()):
        stored = store_tensor(parameter, index, checkpoint, checkpoint.raw, device)
        checkpoint.release(name)
        progress(stored)


def store_tensor(
    parameter: Parameter, index: int, checkpoint: Checkpoint, raw: Callable[[str], np.ndarray], device: Device
) -> int:
    """Fill ``parameter`` from its tensor number ``index``, whose stored bytes ``raw`` gives by its name.

    Returns how many bytes of it were used.
    """
    weight, name = parameter.weight, parameter.weight.tensors()[index]
    info = checkpoint.tensors.get(name)
    shape, whole = (size if weight.stack is None else size[1:] for size in (weight.shape, weight.whole_shape))
    stored = whole[::-1] if weight.transform.transpose else whole
    if info is None or info.shape != stored or info.format != weight.format:
        found = "is missing" if info is None else f"is {info.format}{list(info.shape)}"
        message = f"tensor '{name}' of {checkpoint.path} {found}, the plan says {weight.format}{list(stored)}"
        raise WeightsError("weights.changed", message, remedy="compile the plan again")
    part = weight.part if weight.stack is None else None  # of a stack, a part is some of its tensors
    used = transformed(raw(name), info.format, info.shape, weight.transform, part)
    device.store(parameter.array, used, info.format, shape, None if weight.stack is None else index)
    return used.nbytes


def transformed(
    raw: np.ndarray, format: str, shape: tuple[int, ...], transform: Transform, part: Part | None = None
) -> np.ndarray:
    """The stored bytes of a tensor of ``shape``, its rows regrouped and axes transposed as ``transform`` says, or only
    of a ``part`` of the result: no other byte is read.

    Rows of a block format keep their blocks; only plain numbers can be transposed.
    """
    if not transform and part is None:
        return raw
    block = FORMATS[format]
    if transform.transpose and block.block_size > 1:
        raise WeightsError("weights.transpose", f"a tensor stored as {format} cannot be transposed")
    rows = raw.reshape(shape[0], -1, block.block_bytes)
    if transform.transpose:
        rows = rows.swapaxes(0, 1)
    if transform.rows:
        order = np.arange(len(rows)).reshape(transform.rows).transpose(transform.order).reshape(-1)
        rows = rows[order] if part is None or part.axis else rows[order[part.indices()]]
    elif part is not None and part.axis == 0:
        rows = np.concatenate([rows[start:stop] for start, stop in part.runs])
    if part is not None and part.axis:
        size = block.block_size
        rows = np.concatenate([rows[:, start // size : stop // size] for start, stop in part.runs], axis=1)
    return np.ascontiguousarray(rows).reshape(-1)
