"""Tokens chosen on the GPU: the kernels of ``sample.cu`` behind a step's own, as a tape of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np
from cupy.cuda import runtime

from labinfer.backends.cuda import driver
from labinfer.backends.cuda.arguments import address, stride
from labinfer.backends.cuda.compile import Source
from labinfer.backends.cuda.layout import SAMPLE_BINS, SAMPLE_PARTS, sampling_bytes, sampling_words
from labinfer.backends.cuda.tape import Row, Runnable, Tape
from labinfer.backends.sampling import RULE, Choices, TokenSampler

if TYPE_CHECKING:
    from labinfer.backends.base import Device
    from labinfer.backends.cuda.device import CudaDevice

SAMPLER = Source("sample")
"""The kernels."""

DEPTH = 2
"""Steps of a group whose tokens may be on their way to the host."""

BLOCKS_PER_PROCESSOR = 8
"""Blocks that look at logits together: as many as a multiprocessor has room for."""


class CudaSampler(TokenSampler):
    """Chooses tokens of up to ``rows`` rows; a tape for each group, number of rows and kind of step, each a CUDA graph.

    The steps of all groups share the memory, but for the tokens made: they run one after another.
    """

    def __init__(self, device: CudaDevice, rows: int, vocab_size: int, groups: int) -> None:
        self.device, self.vocab_size = device, vocab_size
        words = sampling_words(rows, groups)
        self.buffer, self.capacity = device.allocate(sampling_bytes(rows, groups), "sampling"), words["tokens"]
        self.memory: dict[str, Any] = {}
        offset = 0
        for name, size in words.items():
            self.memory[name] = device.view(self.buffer, offset, (size,), "i32")
            offset += 4 * size
        self.made = [self.memory["made"][group * rows : (group + 1) * rows] for group in range(groups)]
        slots = groups * DEPTH + 1
        self.pinned = device.host_memory(4 * slots * rows).view(np.int32).reshape(slots, rows)
        self.events = [cupy.cuda.Event(block=False, disable_timing=True) for _ in range(slots)]
        self.slot, self.last = 0, [0] * groups  # slots of the newest step, and of each group's
        self.tapes: dict[tuple[int, int, bool, bool, int], Tape] = {}
        self.feeds: dict[tuple[int, int], driver.Launch] = {}

    def feed(self, token_ids: Any, device: Device, group: int = 0) -> None:
        """See ``TokenSampler.feed``; ``token_ids`` is the same array each time."""
        assert isinstance(device, type(self.device))
        device.use()
        key = address(token_ids), group
        if key not in self.feeds:
            blocks, arguments = -(-len(token_ids) // 256), (token_ids, len(token_ids), self.made[group])
            row = Row(SAMPLER, "feed", (blocks, 1, 1), 256, arguments)
            self.feeds[key] = device.launch(row, overlap=False)
        if device is not self.device:
            device.stream.wait_event(self.events[self.last[group]])
        self.feeds[key](device.stream.ptr)

    def choose(self, logits: Any, choices: Choices, group: int = 0) -> Callable[[], np.ndarray]:
        """Queue the choice, and the tokens' way to pinned memory."""
        device, count, bound = self.device, len(choices.rules), len(logits)
        device.use()
        rules = np.zeros(bound, RULE)  # rows that only fill the tape are greedy
        rules[:count] = choices.rules
        self.put("rules", rules.view(np.int32))
        if choices.spans is not None:
            spans = np.zeros((bound, 3), np.int32)
            spans[:count] = choices.spans
            for name, array in (("spans", spans), ("tokens", choices.tokens), ("numbers", choices.numbers)):
                self.put(name, array.reshape(-1))
        draws = bool(((rules["temperature"] != 0) & (rules["top_k"] != 1)).any())
        self.tape(logits, choices.spans is not None, draws, group)()
        self.slot = self.last[group] = (self.slot + 1) % len(self.pinned)
        made, event = self.pinned[self.slot, :count], self.events[self.slot]
        source = self.made[group].data.ptr
        runtime.memcpyAsync(made.ctypes.data, source, made.nbytes, runtime.memcpyDeviceToHost, device.stream.ptr)
        driver.record(event.ptr, device.stream.ptr)
        return partial(arrived, event, made)

    def put(self, name: str, array: np.ndarray) -> None:
        """Copy ``array``, int32, to the beginning of what is called ``name``."""
        self.device.move_in(array, self.memory[name][: len(array)])

    def tape(self, logits: Any, adjusts: bool, draws: bool, group: int) -> Tape:
        """The kernels for all rows of ``logits``."""
        key = address(logits), len(logits), adjusts, draws, group
        if key not in self.tapes:
            self.tapes[key] = Tape(self.device, self.kernels(logits, adjusts, draws, self.made[group]), [logits])
        return self.tapes[key]

    def kernels(self, logits: Any, adjusts: bool, draws: bool, made: Any) -> list[Row | Runnable]:
        """What runs where logits are changed first (``adjusts``), and where any token is drawn (``draws``)."""
        count, at = len(logits), self.memory
        whole = (logits, stride(logits), self.vocab_size)
        parts = min(SAMPLE_PARTS, -(-BLOCKS_PER_PROCESSOR * self.device.multiprocessors // count))
        extremes, sums = (at["best"], at["least"]), (at["sums"], at["counts"])
        rows: list[Row | Runnable] = []
        if adjusts:
            listed = (at["rules"], at["spans"], at["tokens"], at["numbers"], made)
            rows.append(Row(SAMPLER, "adjust", (count, 1, 1), 256, (*whole[:2], *listed)))
        rows.append(Row(SAMPLER, "extremes", (count, parts, 1), 256, (*whole, *extremes)))
        if draws:
            rows.append(Row(SAMPLER, "spread", (count, parts, 1), 512, (*whole, at["rules"], *extremes, *sums)))
        chosen = (*whole, at["rules"], parts, *extremes, *sums, made)
        rows.append(Row(SAMPLER, "pick", (count, 1, 1), SAMPLE_BINS // 2, chosen))
        return rows

    def close(self) -> None:
        """Give the memory back, once the device has done what was queued."""
        self.device.synchronize()
        self.tapes.clear()
        self.device.deallocate(self.buffer)


def arrived(event: Any, made: np.ndarray) -> np.ndarray:
    """Wait for tokens; a copy of them."""
    event.synchronize()
    return made.copy()
