"""The paged KV cache: memory for every layer's keys and values, in blocks.

A block holds ``block_size`` tokens in every layer of its group; block ``b`` of a state's part is rows
``[b * block_size, ...)`` of it. Which blocks a sequence owns is ``BlockManager``'s to know. After Kwon et al. 2023,
"Efficient Memory Management for Large Language Model Serving with PagedAttention".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from labinfer.backends.base import Device
from labinfer.compiler.fold import unfold_ops, unfold_states
from labinfer.compiler.graph import State
from labinfer.compiler.plan import Limits, Plan, Stage

Block = tuple[int, int]
"""A cache group, and the number of a block there."""


class KVCache:
    """The cache arrays of one stage, in one allocation of exactly the plan's bytes.

    ``parts[state][part]`` is what kernels see, [slots, width]; ``blocks[group]`` shows the same memory as a list of
    arrays [num_blocks, block_size * width].
    """

    def __init__(self, device: Device, states: Mapping[str, State], names: Iterable[str], limits: Limits) -> None:
        chosen = [states[name] for name in names]
        self.device, size = device, limits.cache_bytes_per_number
        slots = [group.num_blocks * limits.block_size for group in limits.groups]
        self.buffer = device.allocate(sum(size * slots[state.group] * state.width for state in chosen), "kv cache")
        self.landings: dict[int, tuple[np.ndarray, list[tuple[Any, np.ndarray]]]] = {}
        self.group_of = {state.name: state.group for state in chosen}
        self.parts: dict[str, dict[str, Any]] = {}
        self.blocks: list[list[Any]] = [[] for _ in limits.groups]
        offset = 0
        for state in chosen:
            self.parts[state.name] = {}
            for part, width in state.widths.items():
                shape, group = (slots[state.group], width), limits.groups[state.group]
                self.parts[state.name][part] = device.view(self.buffer, offset, shape, limits.kv_dtype)
                shape = (group.num_blocks, limits.block_size * width)
                self.blocks[state.group].append(device.view(self.buffer, offset, shape, limits.kv_dtype))
                offset += size * slots[state.group] * width

    def copy_blocks(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copy whole blocks: (group, source, target), as ``BlockManager.writable`` returns them."""
        for group, source, target in copies:
            for array in self.blocks[group]:
                self.device.copy(array[source], array[target])

    def host_blocks(self, counts: Sequence[int]) -> list[list[np.ndarray]]:
        """Host memory for so many blocks of each group, in arrays like those of ``blocks``."""
        kinds = [(number, array) for number, arrays in enumerate(self.blocks) for array in arrays]
        sizes = [counts[number] * array.shape[1] * array.dtype.itemsize for number, array in kinds]
        memory, offset = self.device.host_memory(sum(sizes)), 0
        made: list[list[np.ndarray]] = [[] for _ in self.blocks]
        for (number, array), size in zip(kinds, sizes, strict=True):
            shape = (counts[number], array.shape[1])
            made[number].append(memory[offset : offset + size].view(array.dtype).reshape(shape))
            offset += size
        return made

    def move_out(self, group: int, blocks: Iterable[int], host: Sequence[np.ndarray], places: Iterable[int]) -> None:
        """Copy ``blocks`` of a group to ``places`` of ``host``."""
        pairs = list(zip(blocks, places, strict=True))
        arrays = zip(self.blocks[group], host, strict=True)
        self.device.move_all_out((array[block], memory[place]) for array, memory in arrays for block, place in pairs)

    def move_in(self, group: int, host: Sequence[np.ndarray], places: Iterable[int], blocks: Iterable[int]) -> None:
        """Copy ``places`` of ``host`` to ``blocks`` of a group."""
        pairs = list(zip(places, blocks, strict=True))
        arrays = zip(self.blocks[group], host, strict=True)
        self.device.move_all_in((memory[place], array[block]) for array, memory in arrays for place, block in pairs)

    def read(self, block: Block, content: np.ndarray) -> None:
        """Copy what ``block`` holds to bytes, uint8 [``block_bytes`` of its group]."""
        group, number = block
        landing, pieces = self._landing(group)
        self.device.move_all_out((array[number], piece) for array, piece in pieces)
        content[:] = landing

    def write(self, block: Block, content: np.ndarray) -> None:
        """Fill ``block`` with what ``read`` gave."""
        group, number = block
        landing, pieces = self._landing(group)
        landing[:] = content
        self.device.move_all_in((piece, array[number]) for array, piece in pieces)

    def _landing(self, group: int) -> tuple[np.ndarray, list[tuple[Any, np.ndarray]]]:
        """Host memory for a block of a group that comes or goes, and each array's piece of it."""
        if group not in self.landings:
            arrays = self.blocks[group]
            stops = np.cumsum([0, *(array.shape[1] * array.dtype.itemsize for array in arrays)]).tolist()
            memory = self.device.host_memory(stops[-1])
            pieces = [memory[start:stop] for start, stop in pairwise(stops)]
            found = [(array, piece.view(array.dtype)) for array, piece in zip(arrays, pieces, strict=True)]
            self.landings[group] = memory, found
        return self.landings[group]

    def close(self) -> None:
        """Give the memory back."""
        self.parts.clear()
        self.blocks.clear()
        self.landings.clear()
        self.device.deallocate(self.buffer)


def stage_states(stage: Stage) -> list[str]:
    """The states that a stage keeps, in the order in which its ops use them."""
    parts = (part for op, _ in unfold_ops(stage) for part in op.primitives())
    return list(dict.fromkeys(part.state for part in parts if part.state))


def block_bytes(plan: Plan) -> list[list[int]]:
    """Bytes of a block of each group in each stage: [stages][groups].

    Those of all stages one after another are the same bytes wherever the plan is cut.
    """
    states, limits = unfold_states(plan), plan.limits
    found = [[0] * len(limits.groups) for _ in plan.stages]
    for sizes, stage in zip(found, plan.stages, strict=True):
        for state in map(states.__getitem__, stage_states(stage)):
            sizes[state.group] += state.width * limits.block_size * limits.cache_bytes_per_number
    return found


def split_block(sizes: Sequence[Sequence[int]], block: Block, content: np.ndarray) -> list[np.ndarray]:
    """The bytes of ``block`` that belong to each stage, windows of ``content``; ``sizes`` are ``block_bytes``."""
    return np.split(content, np.cumsum([each[block[0]] for each in sizes])[:-1])
