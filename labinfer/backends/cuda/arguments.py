"""What kernels are told: addresses, structures and macros."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_uint64
from dataclasses import dataclass
from typing import Any

from labinfer.backends.cuda.layout import CACHE_CODES, number_of, pitch
from labinfer.backends.cuda.weights import CudaWeight
from labinfer.errors import UsageError
from labinfer.ops.base import Call


def address(array: Any) -> int:
    """The address of an array's first element; 0 for None."""
    return 0 if array is None else int(array.data.ptr)


def stride(array: Any) -> int:
    """Numbers from row to row; 0 for None."""
    return 0 if array is None else int(array.strides[0]) // int(array.itemsize)


class Part(Structure):
    """``Part`` of ``few.cu``: a matrix, its bias, its result."""

    _fields_ = (("w", c_uint64), ("bias", c_uint64), ("y", c_uint64), ("y_row", c_int), ("rows", c_int))


class Parts(Structure):
    """``Parts`` of ``few.cu``."""

    _fields_ = (("p", Part * 3),)


class Turn(Structure):
    """``Turn`` of ``rope.cu``."""

    _fields_ = (
        *((name, c_uint64) for name in ("table", "freq_factors", "positions", "query_start", "total_len")),
        *((name, c_int) for name in ("head_dim", "start", "half", "interleaved", "sequences", "trained", "length")),
        *((name, c_float) for name in ("rotary_dim", "theta", "factor")),
    )


@dataclass(frozen=True, slots=True)
class Linear:
    """A product to be made: weight, bias, and where it goes."""

    weight: CudaWeight
    bias: Any
    y: Any


def runs(products: Sequence[Linear]) -> list[tuple[Linear, int]]:
    """Products of the same x as few as can be: the first of each run, and the rows of all in it.

    In a run, the weights, of 16 bits, lie one behind another, and so do the columns of the results.
    """
    found: list[tuple[Linear, int]] = []
    for each in products:
        first, rows = found[-1] if found else (each, 0)
        w, y = first.weight.address + 2 * rows * pitch(each.weight.columns), address(first.y) + 4 * rows
        if rows and (w, y, stride(first.y)) == (each.weight.address, address(each.y), stride(each.y)):
            found[-1] = first, rows + each.weight.rows
        else:
            found.append((each, each.weight.rows))
    return found


def narrow_define(format: str) -> str:
    """The macro for results in this format of 16 bits."""
    return f"NARROW={number_of(format)}"


def format_defines(format: str) -> tuple[str, ...]:
    """The macros of kernels that read weights in ``format``."""
    return (f"FORMAT={number_of(format)}", *["HALF"] * (format != "bf16"))


def cache_define(call: Call) -> str:
    """The macro for the format of a call's cache."""
    dtype = str(call.cache["k"].dtype)
    if dtype not in CACHE_CODES:
        raise UsageError("run.cache-dtype", f"a cache of {dtype} cannot be read")
    return f"CACHE={CACHE_CODES[dtype]}"
