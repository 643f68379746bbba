"""What the cache costs: its books in a decode step, and moving blocks to host memory and disk and back.

Books: microseconds of ``grow`` and ``commit`` in a pure decode step, on average and where no row crosses a block's end.
Moves: bytes a second of a swap out, a swap in and a copy on write of one model's blocks beside numpy's copy of as much
memory, and what computing the same tokens again would take.

    python benchmarks/cache.py [MODEL] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from labinfer.compiler.plan import CacheGroup, Limits
from labinfer.llm import LLM
from labinfer.runtime.batch import part_of
from labinfer.runtime.block_manager import BlockManager

ROWS = (1, 256, 4096)
WINDOWS: dict[str, tuple[int | None, ...]] = {"one group": (None,), "two groups": (None, 512)}


def books(rows: int, windows: tuple[int | None, ...]) -> dict[str, float]:
    """Microseconds of the books in a decode step of ``rows`` rows."""
    groups = [CacheGroup(window=window, num_blocks=rows * 128) for window in windows]
    limits = Limits(
        max_num_batched_tokens=4096, max_num_seqs=rows, max_logits_rows=rows, max_model_len=2048, block_size=16,
        groups=groups,
    )  # fmt: skip
    blocks, random = BlockManager(limits), np.random.default_rng(0)
    tokens = random.integers(0, 50_000, (rows, 2048), np.int32)
    lengths, chosen = (
        random.integers(32, 256, rows).astype(np.int32),
        np.array([blocks.open_row() for _ in range(rows)]),
    )
    for row, length in zip(chosen.tolist(), lengths.tolist(), strict=True):
        blocks.attach(row, tokens[row, :length])
    blocks.grow(chosen, lengths)
    blocks.commit(chosen, lengths, tokens)
    every, quiet = [], []
    for _ in range(320):
        lengths += 1
        started = time.perf_counter()
        blocks.grow(chosen, lengths)
        blocks.commit(chosen, lengths, tokens)
        middle = time.perf_counter()
        blocks.grow(chosen, lengths)
        blocks.commit(chosen, lengths, tokens)
        every.append(middle - started)
        quiet.append(time.perf_counter() - middle)
    return {"average": 1e6 * float(np.mean(every)), "median": 1e6 * median(every), "quiet": 1e6 * median(quiet)}


def best(run: Callable[[], Any], rounds: int = 5) -> float:
    """The shortest of several runs, in seconds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def prefill(model: LLM, tokens: list[int]) -> int:
    """A row with ``tokens`` computed, all of them."""
    row, chunk = model.batch.add(tokens), model.plan.limits.max_num_batched_tokens
    for first in range(0, len(tokens), chunk):
        size = min(chunk, len(tokens) - first)
        model.compute(part_of(row, size, int(first + size == len(tokens))))
    return row


def moves(name: str, folder: Path, count: int) -> dict[str, float]:
    """Seconds and bytes of moving the blocks of ``count`` tokens."""
    limits = {"max_model_len": count, "max_num_seqs": 4, "swap_space": 1}
    with LLM(name, cold_folder=folder, **limits) as model:
        swap, tokens = model.cache.swap, np.random.default_rng(0).integers(0, model.vocab_size, count).tolist()
        assert swap is not None
        row = prefill(model, tokens)
        model.batch.remove(row)
        started = time.perf_counter()
        row = prefill(model, tokens)
        recompute = time.perf_counter() - started
        blocks = [model.blocks.held(row, number) for number in range(len(model.blocks.groups))]
        nbytes = sum(held * size for held, size in zip(blocks, swap.pool.block_bytes, strict=True))
        out, back = [], []
        for _ in range(5):
            started = time.perf_counter()
            handle = swap.swap_out(row)
            assert handle is not None
            middle = time.perf_counter()
            assert swap.swap_in(handle, row)
            out.append(middle - started)
            back.append(time.perf_counter() - middle)
        source = np.ones(nbytes, np.uint8)
        target = np.zeros_like(source)
        copies = [(0, block, int(model.blocks.groups[0].take(1)[0])) for block in range(8)]
        found = {"bytes": nbytes, "recompute": recompute, "out": min(out), "in": min(back)}
        found["copy"] = best(lambda: np.copyto(target, source))
        found["copy_on_write"] = best(lambda: model.cache.copy_blocks(copies)) / 8
        behind, content = model.cache.disk, swap.pool.content(0, 0)
        assert behind is not None
        keys = [bytes([key]) * 16 for key in range(32)]
        found["disk_hand_over"] = best(lambda: behind.put(0, keys.pop(), content))
        written = keys[-1]
        found["disk_put"] = best(lambda: behind.store.put(0, keys.pop(), content))
        found["disk_get"] = best(lambda: behind.store.get(0, written, content))
        return found | {"block_bytes": swap.pool.block_bytes[0], "estimate": swap.seconds(row)}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", help="anything labinfer.load takes; only the books without it")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens whose blocks are moved")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name, windows in WINDOWS.items():
        for rows in ROWS:
            took = found[f"{name}, {rows}"] = books(rows, windows)
            print(f"{name}, {rows:4d} rows: {took['average']:7.1f} us a decode step, {took['quiet']:6.1f} quiet")
    if options.model:
        with tempfile.TemporaryDirectory() as folder:
            took = found["moves"] = moves(options.model, Path(folder), options.tokens)
        size = took["bytes"]
        print(f"{options.tokens} tokens, {size / 1e6:.1f} MB:")
        for name in ("copy", "out", "in"):
            print(f"  {name:5s} {1e3 * took[name]:8.2f} ms {size / took[name] / 1e9:6.2f} GB/s")
        print(
            f"  computing them again {1e3 * took['recompute']:8.1f} ms; swap estimated at {1e3 * took['estimate']:.1f}"
        )
        print(f"  a block of {took['block_bytes']:,} bytes: copied {1e6 * took['copy_on_write']:.0f} us,", end=" ")
        print(f"given to the writer {1e6 * took['disk_hand_over']:.0f} us,", end=" ")
        print(f"to disk {1e6 * took['disk_put']:.0f} us, from disk {1e6 * took['disk_get']:.0f} us")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
