"""The few vector operations that depend on the level of the CPU (see ``features``), and how functions are compiled.

numba's cache of compiled code sees neither imported modules nor globals, so the folder it lies in is named after the
sources themselves (``machine_code.cache_key``). ``njit`` and ``compile_kernel`` are the only ways of compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba.core import cgutils

from labinfer.backends.cpu.features import FORCED, HAS_HALF, LEVEL, X86
from labinfer.backends.cpu.machine_code import folder

Value = Any
"""An LLVM value inside a kernel that is being emitted."""

Function = TypeVar("Function", bound=Callable[..., Any])

if X86 and FORCED in ("avx2", "generic"):  # let LLVM use nothing above the forced level, so that a test tests it
    numba.config.CPU_NAME = {"avx2": "haswell", "generic": "x86-64"}[LEVEL]
    numba.config.CPU_FEATURES = ""


_OPTIONS = {"nogil": True, "error_model": "numpy"}


@contextmanager
def _cache_folder() -> Iterator[None]:
    """Have numba keep what is compiled inside beside our own machine code."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder())
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def njit(function: Function) -> Function:
    """Compile a module-level function (closures never hit the cache) where it is first called, and keep the result."""
    with _cache_folder():
        compiled: Function = numba.njit(cache=True, **_OPTIONS)(function)
    return compiled


def compile_kernel(function: Callable[..., Any], signature: Any) -> Any:
    """Compile a function now; numba's compile result, with the LLVM module of all that it calls."""
    dispatcher = numba.njit(**_OPTIONS)(function)
    with _cache_folder():
        dispatcher.compile(signature)
    [result] = dispatcher.overloads.values()
    return result


def specialize(template: Callable[..., Any], name: str, **names: Any) -> Any:
    """A copy of a function that finds ``names`` among its globals, under its own ``name``.

    Unlike a closure, the copy has an entry of its own in the cache of compiled code.
    """
    code, scope = template.__code__, {**template.__globals__, **names}
    copy = FunctionType(code, scope, name)
    copy.__qualname__, copy.__module__ = name, template.__module__
    return copy


# ---- vector types and the operations that depend on the level; ``b`` is an llvmlite IRBuilder

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def vector(element: Value, lanes: int) -> Value:
    """The LLVM type of ``lanes`` elements."""
    return ir.VectorType(element, lanes)


F32X16, I32X16, I16X32, I8X64 = vector(F32, 16), vector(I32, 16), vector(I16, 32), vector(I8, 64)


def pointer(b: Value, address: Value, kind: Value) -> Value:
    """An int64 address as a pointer to ``kind``.

    LLVM may split an address into two numbers and make a pointer of either. Where numba then inlines the function and
    that one turns out to be zero, a read "from null" counts as impossible and goes: the attribute says it is not.
    """
    set.add(b.function.attributes, "null_pointer_is_valid")  # llvmlite's own add() does not know it
    return b.inttoptr(address, kind.as_pointer())


def const(value: float, kind: Value = F32X16) -> Value:
    """A vector of one repeated number."""
    return ir.Constant(kind, [value] * kind.count)


def call(b: Value, name: str, result: Value, *args: Value, fast: bool = False) -> Value:
    """Call an LLVM intrinsic by name; ``fast`` lets a reduction choose its own order."""
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args, fastmath=("fast",) if fast else ())


def type_name(kind: Value) -> str:
    """How LLVM spells a vector type in the names of its intrinsics."""
    return f"v{kind.count}" + ("f32" if kind.element == F32 else f"i{kind.element.width}")


def fma(b: Value, x: Value, y: Value, z: Value) -> Value:
    """``x * y + z``, rounded once where the CPU can."""
    name = "llvm.fmuladd." if LEVEL == "generic" else "llvm.fma."
    return call(b, name + type_name(x.type), x.type, x, y, z)


def pause(b: Value) -> None:
    """Tell the CPU that this is a spinning loop."""
    if X86:
        call(b, "llvm.x86.sse2.pause", ir.VoidType())


def dpbusd(b: Value, total: Value, unsigned: Value, signed: Value) -> Value:
    """``total`` int32 x 16 plus dot products of 4 neighbouring bytes, ``unsigned`` with ``signed`` (as int32 x 16).

    Exact as long as the signed bytes are within ``DIGIT_MAX[1]``.
    """
    if LEVEL == "avx512vnni":
        return call(b, "llvm.x86.avx512.vpdpbusd.512", I32X16, total, unsigned, signed)
    pairs = _pairs_avx2(b, unsigned, signed) if LEVEL == "avx2" else _pairs_generic(b, unsigned, signed)
    return b.add(total, pairs)


def _pairs_avx2(b: Value, unsigned: Value, signed: Value) -> Value:
    halves = []
    for half in (0, 1):
        lanes = ir.Constant(vector(I32, 8), list(range(8 * half, 8 * half + 8)))
        u, s = (b.shuffle_vector(v, v, lanes) for v in (unsigned, signed))
        u, s = (b.bitcast(v, vector(I8, 32)) for v in (u, s))
        words = call(b, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), u, s)
        halves.append(call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), words, const(1, vector(I16, 16))))
    return b.shuffle_vector(*halves, ir.Constant(I32X16, list(range(16))))


def dot_words(b: Value, total: Value, words: Value, pair: Value) -> Value:
    """``total`` int32 x 16 plus dot products of 2 neighbouring int16, ``words`` with ``pair`` (as int32 x 16)."""
    if LEVEL == "avx2":
        halves = []
        for half in (0, 1):
            lanes = ir.Constant(vector(I32, 8), list(range(8 * half, 8 * half + 8)))
            w, p = (b.bitcast(b.shuffle_vector(v, v, lanes), vector(I16, 16)) for v in (words, pair))
            halves.append(call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), w, p))
        return b.add(total, b.shuffle_vector(*halves, ir.Constant(I32X16, list(range(16)))))
    sixteen = const(16, I32X16)
    low = b.mul(*(b.ashr(b.shl(v, sixteen), sixteen) for v in (words, pair)))
    return b.add(total, b.add(low, b.mul(*(b.ashr(v, sixteen) for v in (words, pair)))))


def as_it_is(b: Value, v: Value) -> Value:
    """int32 x 16 as it is, which with AVX2 the compiler computes before anything that comes after it in the source.

    It would rather load everything first and add up last, and has no registers for that.
    """
    if LEVEL != "avx2":
        return v
    eight, halves = vector(I32, 8), []
    for half in (0, 1):
        lanes = ir.Constant(eight, list(range(8 * half, 8 * half + 8)))
        part = b.shuffle_vector(v, v, lanes)
        halves.append(b.asm(ir.FunctionType(eight, [eight]), "", "=x,0,~{memory}", [part], True))
    return b.shuffle_vector(*halves, ir.Constant(I32X16, list(range(16))))


def _pairs_generic(b: Value, unsigned: Value, signed: Value) -> Value:
    eight, sixteen = const(8, I16X32), const(16, I32X16)
    u, s = b.bitcast(unsigned, I16X32), b.bitcast(signed, I16X32)
    even = b.mul(b.and_(u, const(255, I16X32)), b.ashr(b.shl(s, eight), eight))
    words = b.bitcast(b.add(even, b.mul(b.lshr(u, eight), b.ashr(s, eight))), I32X16)
    return b.add(b.ashr(b.shl(words, sixteen), sixteen), b.ashr(words, sixteen))


# ---- matrix tiles (AMX): eight registers of 16 rows of 64 bytes, named by number

_TILE_BF16 = "llvm.x86.tdpbf16ps"


def _tiles(b: Value, name: str, *args: Value) -> None:
    call(b, f"llvm.x86.{name}", ir.VoidType(), *args)


def _tile(number: int) -> Value:
    return ir.Constant(I8, number)


def tile_config(b: Value, at: Value) -> None:
    """Set the sizes of all tiles from the 64 bytes at ``at`` and clear them."""
    _tiles(b, "ldtilecfg", pointer(b, at, I8))


def tile_release(b: Value) -> None:
    """Give the tiles back, so that a switch of threads has nothing to save."""
    _tiles(b, "tilerelease")


def tile_zero(b: Value, tile: int) -> None:
    """All zero."""
    _tiles(b, "tilezero", _tile(tile))


def tile_load(b: Value, tile: int, at: Value, stride: Value) -> None:
    """The rows that begin at ``at``, ``stride`` bytes apart."""
    _tiles(b, "tileloadd64", _tile(tile), pointer(b, at, I8), stride)


def tile_store(b: Value, tile: int, at: Value, stride: Value) -> None:
    """Write the rows to memory from ``at`` on, ``stride`` bytes apart."""
    _tiles(b, "tilestored64", _tile(tile), pointer(b, at, I8), stride)


def tile_dpbf16(b: Value, total: int, x: int, y: int) -> None:
    """``total[i, j] += sum over k of x[i, k] * y[k, j]``, bf16 products in float32; ``y`` has its rows in pairs."""
    _tiles(b, "tdpbf16ps", _tile(total), _tile(x), _tile(y))


def permute_bytes(b: Value, table: Value, index: Value) -> Value:
    """``table[index]`` for 64 bytes each; the upper two bits of an index do not count. Needs AVX-512 VBMI."""
    return call(b, "llvm.x86.avx512.permvar.qi.512", I8X64, table, index)


def bf16_low(b: Value, pairs: Value) -> Value:
    """The lower bf16 of each int32 lane as float32."""
    return b.bitcast(b.shl(pairs, const(16, I32X16)), F32X16)


def bf16_high(b: Value, pairs: Value) -> Value:
    """The upper bf16 of each int32 lane as float32."""
    return b.bitcast(b.and_(pairs, const(-65536, I32X16)), F32X16)


def widen_half(b: Value, v: Value) -> Value:
    """float16 (as int16 x n) to float32 x n, exactly."""
    lanes = v.type.count
    f, i = vector(F32, lanes), vector(I32, lanes)
    if HAS_HALF:
        return b.fpext(b.bitcast(v, vector(F16, lanes)), f)
    w = b.zext(v, i)
    sign = b.shl(b.and_(w, const(0x8000, i)), const(16, i))
    bits = b.shl(b.and_(w, const(0x7FFF, i)), const(13, i))
    scaled = b.fmul(b.bitcast(bits, f), const(2.0**112, f))  # moves the exponent's bias, subnormals too
    special = b.or_(b.bitcast(scaled, i), const(0x7F800000, i))  # infinity and NaN
    finite = b.icmp_signed("<", bits, const(0x7C00 << 13, i))
    return b.bitcast(b.or_(sign, b.select(finite, b.bitcast(scaled, i), special)), f)


def narrow_half(b: Value, v: Value) -> Value:
    """float32 x n to float16 (as int16 x n), to nearest even."""
    lanes = v.type.count
    f, i, h = vector(F32, lanes), vector(I32, lanes), vector(I16, lanes)
    if HAS_HALF:
        return b.bitcast(b.fptrunc(v, vector(F16, lanes)), h)
    bits = b.bitcast(v, i)
    sign = b.lshr(b.and_(bits, const(-(2**31), i)), const(16, i))
    size = b.and_(bits, const(0x7FFFFFFF, i))
    # Subnormal: adding 0.5 puts the rounded mantissa at the bottom of the word.
    small = b.sub(b.bitcast(b.fadd(b.bitcast(size, f), const(0.5, f)), i), const(0x3F000000, i))
    odd = b.and_(b.lshr(size, const(13, i)), const(1, i))
    normal = b.lshr(b.add(b.add(size, const(0xFFF - (112 << 23), i)), odd), const(13, i))
    result = b.select(b.icmp_signed("<", size, const(113 << 23, i)), small, normal)
    result = b.select(
        b.icmp_signed(">=", size, const(0x477FF000, i)), const(0x7C00, i), result
    )  # beyond 65520: infinity
    result = b.select(b.icmp_signed(">", size, const(0x7F800000, i)), const(0x7E00, i), result)
    return b.trunc(b.or_(result, sign), h)
