"""Time of one layer's attention on the CPU backend, beside what the bytes and the arithmetic allow.

    python benchmarks/cpu_attention.py [--heads 9 --kv-heads 3 --head-dim 64] [--context 500] [--prompt 512]

Each figure is the least of many runs: the machine may be busy. Beside it stands, from the same process, the time that a
copy moves as many bytes as the keys and values seen, or that ``numpy.matmul`` takes for as many multiplications.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from labinfer.backends.cpu import attention as cpu
from labinfer.backends.cpu.features import LEVEL
from labinfer.backends.cpu.paged_cache import CACHE_DTYPES
from labinfer.backends.cpu.workspace import attention_partials_bytes, attention_scratch

BLOCK_SIZE = 16


@numba.njit(nogil=True)
def repeat(times, q, q_stride, y, y_stride, heads, pages, batch, partials, workspace, start, stop):
    for _ in range(times):
        cpu.attention(q, q_stride, y, y_stride, heads, pages, batch, partials, workspace, start, stop)


def aligned(nbytes: int) -> np.ndarray:
    raw = np.zeros(nbytes + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + nbytes]


def least(run: Callable[[], Any], seconds: float = 1.0) -> float:
    """Milliseconds of the fastest of the runs that fit in ``seconds``."""
    run()  # compiles
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def layer_ms(heads: cpu.Heads, context: int, tokens: int, dtype: str, threads: int, layers: int) -> float:
    """Milliseconds per layer for ``tokens`` tokens at the end of ``context``; each layer has a cache of its own."""
    rng, blocks = np.random.default_rng(0), -(-context // BLOCK_SIZE)
    size = 4 if dtype == "f32" else 2
    widths = (heads.num_kv_heads * heads.head_dim, heads.num_kv_heads * heads.v_head_dim)
    caches = [[aligned(blocks * BLOCK_SIZE * w * size) for w in widths] for _ in range(layers)]
    table = rng.permutation(blocks).astype(np.int32)
    q = rng.standard_normal((tokens, heads.num_heads * heads.head_dim)).astype(np.float32)
    y = np.empty((tokens, heads.num_heads * heads.v_head_dim), np.float32)
    start, length = np.array([0, tokens], np.int32), np.array([context], np.int32)
    batch = cpu.Batch(1, start.ctypes.data, length.ctypes.data, table.ctypes.data, blocks)
    partials = aligned(attention_partials_bytes(heads.num_heads, heads.v_head_dim, 1))
    spaces = [
        aligned(attention_scratch(heads.num_heads // heads.num_kv_heads, heads.head_dim, heads.v_head_dim))
        for _ in range(threads)
    ]
    cost, times = cpu.attention_cost(heads, batch), max(1, 64 // tokens)

    def work(thread: int) -> None:
        first, last = cost * thread // threads, cost * (thread + 1) // threads
        for k, v in caches:
            pages = cpu.Pages(k.ctypes.data, v.ctypes.data, CACHE_DTYPES[dtype], BLOCK_SIZE)
            rows = (q.ctypes.data, q.shape[1], y.ctypes.data, y.shape[1])
            memory = (partials.ctypes.data, spaces[thread].ctypes.data)
            repeat(times, *rows, heads, pages, batch, *memory, first, last)

    with ThreadPoolExecutor(threads) as pool:
        return least(lambda: list(pool.map(work, range(threads)))) / layers / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "heads": 9,
        "kv-heads": 3,
        "head-dim": 64,
        "context": 500,
        "prompt": 512,
        "threads": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    heads = cpu.Heads(args.heads, args.kv_heads, args.head_dim, args.head_dim, args.head_dim**-0.5, 0, 0.0)
    side = 1024
    a, b = (np.ones((side, side), np.float32) for _ in range(2))
    flops = 2 * side**3 / least(lambda: a @ b)
    print(f"{LEVEL}, {args.heads} heads, {args.kv_heads} of keys, head_dim {args.head_dim}, {args.threads} threads")
    for dtype in CACHE_DTYPES:
        size = 4 if dtype == "f32" else 2
        nbytes = 2 * args.context * args.kv_heads * args.head_dim * size
        source, target = (np.ones(nbytes // 2, np.uint8) for _ in range(2))  # a copy moves each byte twice
        decode = layer_ms(heads, args.context, 1, dtype, args.threads, 8)
        copy = least(lambda s=source, t=target: np.copyto(t, s), 0.2)
        print(f"decode at {args.context}, {dtype}: {decode:.4f} ms, copy {copy:.4f} ms ({nbytes / 1e6:.2f} MB)")
        prefill = layer_ms(heads, args.prompt, args.prompt, dtype, args.threads, 2)
        work = 2 * args.prompt * (args.prompt + 1) * args.heads * args.head_dim
        print(
            f"prefill {args.prompt}, {dtype}: {prefill:.3f} ms, matmul {work / flops:.3f} ms ({work / 1e6:.0f} MFLOP)"
        )


if __name__ == "__main__":
    main()
