"""How fast the CPU backend's linear kernels stream weights and multiply, beside what the machine does in the same run.

    python benchmarks/cpu_linear.py                      # every format, a few shapes, 1 and 2 threads
    python benchmarks/cpu_linear.py --formats q4_1 bf16 --shapes 3072x576 --tokens 1 8 512

Up to 16 tokens (decode): GB/s of packed weights, walking through copies far larger than the caches, and the percentage
of a plain read of the same bytes by as many threads, measured in turn with it. More tokens (prefill): billions of
multiply-adds a second, and the percentage of the peak of the instruction that does them, two a cycle and core assumed
at the clock that a chain of additions shows. Rounds take milliseconds; the best and the median are printed, as other
load on the machine can only make a round slower.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from labinfer.backends.cpu import isa
from labinfer.backends.cpu.features import LEVEL
from labinfer.backends.cpu.layout import (
    PANEL_FORMATS,
    PANEL_ROWS,
    activation_bytes,
    packed_bytes,
    product_kernel,
)
from labinfer.backends.cpu.linear import linear
from labinfer.backends.cpu.machine_code import address
from labinfer.backends.cpu.packed_weight import pack
from labinfer.backends.cpu.quantize import quantize_row
from labinfer.backends.cpu.simd import Emit, fetch_add, flag_get, kernel, pause
from labinfer.ops.formats import stored_bytes

WORKING_SET, ROUND_BYTES, ROUND_MACS = 256 << 20, 24 << 20, 2e8
ROUNDS = 40


def _read(e: Emit, at: Any, nbytes: Any, out: Any) -> None:
    sums = [e.var(e.const(0.0)) for _ in range(4)]
    with e.loop(e.b.udiv(nbytes, e.i(256))) as k:
        for j, total in enumerate(sums):
            total.set(e.b.fadd(total.get(), e.load(e.add(at, e.mul(k, 256), 64 * j))))
    for j, total in enumerate(sums):
        e.store(total.get(), e.add(out, 64 * j))


def _count(e: Emit, n: Any, out: Any) -> None:
    total = e.var(e.const(1.0))
    with e.loop(n):
        for _ in range(16):
            total.set(e.fma(total.get(), total.get(), total.get()))
    e.store(total.get(), out)


read, chain = kernel(_read), kernel(_count)


@isa.njit
def meet(sync: int, threads: int) -> None:
    """Wait until all threads are here."""
    fetch_add(sync, 1)
    while flag_get(sync) < threads:
        pause()


@isa.njit
def read_part(sync: int, threads: int, at: int, nbytes: int, out: int) -> None:
    meet(sync, threads)
    read(at, nbytes, out)
    meet(sync + 64, threads)


@isa.njit
def multiply(
    sync: int, threads: int, code: int, w: int, copies: int, size: int, columns: int, x: int, stride: int, y: int,
    rows: int, tokens: int, g0: int, g1: int,
) -> None:  # fmt: skip
    meet(sync, threads)
    for c in range(copies):
        linear(code, w + c * size, columns, x, stride, y, rows, tokens, g0, g1, rows, 0, 0)
    meet(sync + 64, threads)


@isa.njit
def quantize_all(form: int, x: int, columns: int, tokens: int, out: int, stride: int) -> None:
    for t in range(tokens):
        quantize_row(form, x + t * columns * 4, columns, out, stride, t)


@isa.njit
def additions(n: int, out: int) -> None:
    chain(n, out)


def aligned(nbytes: int) -> np.ndarray:
    """uint8 [nbytes] that begins at a huge page."""
    raw = np.zeros(nbytes + (1 << 21), np.uint8)
    start = -raw.ctypes.data % (1 << 21)
    return raw[start : start + nbytes]


def seconds(work: Callable[[int, int], None], threads: int) -> float:
    """Time for ``work(thread, sync)`` on all threads together; the calling one is the first, and starts the others."""
    sync = aligned(128).view(np.int64)
    others = [threading.Thread(target=work, args=(i, sync.ctypes.data)) for i in range(1, threads)]
    for thread in others:
        thread.start()
    while sync[0] < threads - 1:
        time.sleep(0)
    start = time.perf_counter()
    work(0, sync.ctypes.data)
    elapsed = time.perf_counter() - start
    for thread in others:
        thread.join()
    return elapsed


def clock() -> float:
    """Cycles a second, from additions that wait for each other (four cycles each on today's CPUs)."""
    out = aligned(64)
    additions(1, out.ctypes.data)
    best = 1e9
    for _ in range(ROUNDS):
        start = time.perf_counter()
        additions(10_000, out.ctypes.data)
        best = min(best, time.perf_counter() - start)
    return 160_000 * 4 / best


@dataclass
class Case:
    """A product to measure: a weight's format and shape, tokens, threads, digits of the activations."""

    format: str
    rows: int
    columns: int
    tokens: int
    threads: int
    digits: int

    def run(self, cycles: float) -> str:
        """One line of the table."""
        size = packed_bytes(self.format, self.rows, self.columns)
        macs = self.rows * self.columns * self.tokens
        streaming = self.tokens <= 16
        copies = max(1, ROUND_BYTES // size if streaming else int(ROUND_MACS / macs))
        parts = max(1, WORKING_SET // (copies * size)) if streaming else 1
        weights = self.weights(size, copies * parts if streaming else 1)
        product = self.product(weights, copies, size if streaming else 0)
        sink = aligned(4096 * self.threads)
        mine, plain = [], []
        for i in range(-1, ROUNDS):
            at = weights.ctypes.data + i % parts * copies * size
            share = copies * size // self.threads

            def plain_read(thread: int, sync: int, at: int = at, share: int = share) -> None:
                read_part(sync, self.threads, at + thread * share, share, sink.ctypes.data + 4096 * thread)

            mine.append(seconds(lambda thread, sync, at=at: product(at, thread, sync), self.threads))
            plain.append(seconds(plain_read, self.threads) if streaming else 1.0)
        best, middle = min(mine[1:]), median(mine[1:])
        rate = macs * copies / 1e9
        head = f"{self.format:5} {self.rows:6}x{self.columns:<5} tokens {self.tokens:4} threads {self.threads} "
        if not streaming:
            peak = cycles * 2 * self.threads * (64 / self.digits if PANEL_FORMATS[self.format].quantized else 16) / 1e9
            percent = 100 * rate / best / peak
            return f"{head} {rate / best:6.1f} (median {rate / middle:6.1f}) GMAC/s, {percent:3.0f} % of peak"
        moved, reads = copies * size / 1e9, (min(plain[1:]), median(plain[1:]))
        return (
            f"{head} {moved / best:5.1f} (median {moved / middle:5.1f}) GB/s, plain read {moved / reads[0]:5.1f} "
            f"({moved / reads[1]:5.1f}): {100 * reads[0] / best:3.0f} % ({100 * reads[1] / middle:3.0f} %)"
        )

    def weights(self, size: int, copies: int) -> np.ndarray:
        """Copies of a packed weight with random quants and small scales."""
        raw = np.random.default_rng(0).integers(0, 256, stored_bytes(self.format, (self.rows, self.columns)), np.uint8)
        raw &= 0x3B  # no NaN or infinity, wherever a float16 or bf16 happens to be
        many = aligned(size * copies)
        pack(self.format, raw, self.rows, self.columns, many[:size])
        many.reshape(copies, size)[1:] = many[:size]
        return many

    def product(self, weights: np.ndarray, copies: int, step: int) -> Callable[[int, int, int], None]:
        """The function (address of the weights, thread, sync) to be timed."""
        x = np.random.default_rng(1).standard_normal((self.tokens, self.columns), dtype=np.float32)
        form = self.digits if PANEL_FORMATS[self.format].quantized else 0
        stride = activation_bytes(form, self.columns)
        activations, y = aligned(self.tokens * stride), aligned(self.tokens * self.rows * 4)
        quantize_all(form, x.ctypes.data, self.columns, self.tokens, activations.ctypes.data, stride)
        code, panels = address(product_kernel(self.format, form)), -(-self.rows // PANEL_ROWS)

        def product(at: int, thread: int, sync: int) -> None:
            g0, g1 = panels * thread // self.threads, panels * (thread + 1) // self.threads
            multiply(
                sync, self.threads, code, at, copies, step, self.columns, activations.ctypes.data, stride,
                y.ctypes.data, self.rows, self.tokens, g0, g1,
            )  # fmt: skip

        return product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(PANEL_FORMATS), choices=list(PANEL_FORMATS))
    parser.add_argument("--shapes", nargs="+", default=["3072x512", "512x1536", "49152x512"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--digits", type=int, default=2, choices=[1, 2])
    options = parser.parse_args()
    cycles = clock()
    print(f"{LEVEL}, {options.digits} digits, {cycles / 1e9:.2f} GHz")
    for format in options.formats:
        for shape in options.shapes:
            rows, columns = map(int, shape.split("x"))
            for tokens in options.tokens:
                if tokens > 16 and rows > 16384:
                    continue  # a vocabulary: prefill multiplies only the last token with it
                for threads in options.threads:
                    print(Case(format, rows, columns, tokens, threads, options.digits).run(cycles), flush=True)


if __name__ == "__main__":
    main()
