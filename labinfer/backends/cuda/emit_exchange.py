"""From collectives to rows of the tape: see ``kernels/exchange.cu``."""

from __future__ import annotations

from ctypes import Structure, c_int, c_uint64
from itertools import accumulate
from typing import Any

from labinfer.backends.cuda.arguments import address, stride
from labinfer.backends.cuda.emitter import Emitter
from labinfer.backends.cuda.layout import (
    EXCHANGE_BLOCKS,
    EXCHANGE_FEW,
    EXCHANGE_PIECE,
    MAX_RANKS,
    exchange_bytes,
)
from labinfer.backends.cuda.peers import CudaPeers
from labinfer.errors import LabinferError
from labinfer.ops.base import Call


class Own(Structure):
    """``Own`` of ``exchange.cu``."""

    _fields_ = (("x", c_uint64), *((name, c_int) for name in ("x_row", "own", "rows", "n")))


class Sum(Structure):
    """``Sum`` of ``exchange.cu``."""

    _fields_ = (
        *((name, c_uint64) for name in ("residual", "y")),
        *((name, c_int) for name in ("residual_row", "y_row", "n")),
    )


class Join(Structure):
    """``Join`` of ``exchange.cu``."""

    _fields_ = (("y", c_uint64), ("y_row", c_int), ("starts", c_int * (MAX_RANKS + 1)))


def exchange_defines(ranks: int) -> tuple[str, ...]:
    """The macros of ``exchange.cu``."""
    sizes = (f"FEW={EXCHANGE_FEW}", f"BLOCKS={EXCHANGE_BLOCKS}", f"PIECE={EXCHANGE_PIECE}")
    return (f"RANKS={ranks}", *sizes, f"BYTES={exchange_bytes(ranks)}")


def in_words(fours: int) -> bool:
    """Whether a part of so many fours of numbers travels in words, for which there is room and which are quicker."""
    return fours <= EXCHANGE_FEW


def all_reduce(e: Emitter, call: Call) -> None:
    """``y``: the sum of all ranks' ``x``."""
    _sum(e, call, None)


def all_reduce_add(e: Emitter, call: Call) -> None:
    """``y``: the sum of all ranks' ``x``, and ``residual``."""
    _sum(e, call.parts[0], call.inputs[-1])


def _sum(e: Emitter, reduce: Call, residual: Any) -> None:
    x, y = reduce.inputs[0], e.call.outputs[0]
    n = int(x.shape[1])
    _exchange(e, "all_reduce", x, n, Sum(address(residual), address(y), stride(residual), stride(y), n))


def all_gather(e: Emitter, call: Call) -> None:
    """``y``: the columns of all ranks' ``x`` side by side."""
    x, y, sizes = call.inputs[0], call.outputs[0], call.attrs.sizes
    starts = tuple(accumulate(sizes, initial=0))
    join = Join(address(y), stride(y), (c_int * (MAX_RANKS + 1))(*starts))
    _exchange(e, "all_gather", x, max(sizes), join)


def _exchange(e: Emitter, kernel: str, x: Any, n: int, result: Structure) -> None:
    """Rows of ``x``, of which the widest rank has ``n`` columns, by words for few and by pieces for many."""
    peers = e.call.peers
    if not isinstance(peers, CudaPeers):
        raise LabinferError("run.no-ranks", "a collective needs the ranks of a group")
    rows, columns = x.shape
    fours = -(-n // 4)
    own = Own(address(x), stride(x), columns, rows, n)
    arguments, defines = (peers.argument, own, result), exchange_defines(peers.ranks)
    if in_words(rows * fours):
        threads = min(256, -(-fours // 32) * 32)
        e.add("exchange", f"{kernel}_few", (-(-fours // threads), rows, 1), threads, *arguments, defines=defines)
        return
    blocks = min(EXCHANGE_BLOCKS, -(-rows * fours // EXCHANGE_PIECE))
    e.add("exchange", f"{kernel}_many", (blocks, 1, 1), EXCHANGE_PIECE, *arguments, defines=defines)
