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
    from labinfer.backends.cuda.device import CudaDevice

SLOTS = 4
"""Steps whose tokens may be on their way to the host."""

BLOCKS_PER_PROCESSOR = 8
"""Blocks that look at logits together: as many as a multiprocessor has room for."""


class CudaSampler(TokenSampler):
    """Chooses tokens of up to ``rows`` rows; a tape for each number of rows and kind of step, replayed as a graph."""

    def __init__(self, device: CudaDevice, rows: int, vocab_size: int) -> None:
        self.device, self.vocab_size, self.source = device, vocab_size, Source("sample")
        words = sampling_words(rows)
        self.buffer, self.capacity = device.allocate(sampling_bytes(rows), "sampling"), words["tokens"]
        self.memory: dict[str, Any] = {}
        offset = 0
        for name, size in words.items():
            self.memory[name] = device.view(self.buffer, offset, (size,), "i32")
            offset += 4 * size
        self.pinned = device.host_memory(4 * SLOTS * rows).view(np.int32).reshape(SLOTS, rows)
        self.events = [cupy.cuda.Event(block=False, disable_timing=True) for _ in range(SLOTS)]
        self.slot = 0
        self.tapes: dict[tuple[int, int, bool, bool], Tape] = {}
        self.fed: tuple[int, driver.Launch] | None = None

    def feed(self, token_ids: Any) -> None:
        """Fill in tokens of the last step; ``token_ids`` is the same array each time."""
        if self.fed is None or self.fed[0] != address(token_ids):
            blocks, arguments = -(-len(token_ids) // 256), (token_ids, len(token_ids), self.memory["made"])
            row = Row(self.source, "feed", (blocks, 1, 1), 256, arguments)
            self.fed = address(token_ids), self.device.launch(row, overlap=False)
        self.fed[1](self.device.stream.ptr)

    def choose(self, logits: Any, choices: Choices) -> Callable[[], np.ndarray]:
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
        self.tape(logits, choices.spans is not None, draws)()
        self.slot = (self.slot + 1) % SLOTS
        made, event = self.pinned[self.slot, :count], self.events[self.slot]
        source = self.memory["made"].data.ptr
        runtime.memcpyAsync(made.ctypes.data, source, made.nbytes, runtime.memcpyDeviceToHost, device.stream.ptr)
        driver.record(event.ptr, device.stream.ptr)
        return partial(arrived, event, made)

    def put(self, name: str, array: np.ndarray) -> None:
        """Copy ``array``, int32, to the beginning of what is called ``name``."""
        self.device.move_in(array, self.memory[name][: len(array)])

    def tape(self, logits: Any, adjusts: bool, draws: bool) -> Tape:
        """The kernels for all rows of ``logits``."""
        key = address(logits), len(logits), adjusts, draws
        if key not in self.tapes:
            self.tapes[key] = Tape(self.device, self.kernels(logits, adjusts, draws), [logits])
        return self.tapes[key]

    def kernels(self, logits: Any, adjusts: bool, draws: bool) -> list[Row | Runnable]:
        """What runs where logits are changed first (``adjusts``), and where any token is drawn (``draws``)."""
        count, at = len(logits), self.memory
        whole = (logits, stride(logits), self.vocab_size)
        parts = min(SAMPLE_PARTS, -(-BLOCKS_PER_PROCESSOR * self.device.multiprocessors // count))
        extremes, sums = (at["best"], at["least"]), (at["sums"], at["counts"])
        rows: list[Row | Runnable] = []
        if adjusts:
            listed = (at["rules"], at["spans"], at["tokens"], at["numbers"], at["made"])
            rows.append(Row(self.source, "adjust", (count, 1, 1), 256, (*whole[:2], *listed)))
        rows.append(Row(self.source, "extremes", (count, parts, 1), 256, (*whole, *extremes)))
        if draws:
            rows.append(Row(self.source, "spread", (count, parts, 1), 512, (*whole, at["rules"], *extremes, *sums)))
        chosen = (*whole, at["rules"], parts, *extremes, *sums, at["made"])
        rows.append(Row(self.source, "pick", (count, 1, 1), SAMPLE_BINS // 2, chosen))
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
