"""A small vector emitter: a kernel is a Python function that emits LLVM vector code.

Unrolling is a Python loop, addresses are plain int64 numbers of bytes, accumulators are ``Var`` stack slots which LLVM
keeps in registers. ``kernel`` turns such a function into a numba intrinsic that compiled functions call::

    def _scale(e, x, n, factor):
        with e.loop(n) as k:
            at = e.add(x, e.mul(k, 64))
            e.store(e.b.fmul(e.load(at), e.splat(factor)), at)

    scale = kernel(_scale, floats=("factor",))   # in an njit function: scale(address, vectors, 2.0)

Vectors are 16 lanes unless a type is given. The second half of the file is scalar access by address, and the atomics a
spin barrier needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from labinfer.backends.cpu import isa
from labinfer.backends.cpu.isa import F32, F32X16, I8, I16, I32, I64, Value, const, vector

_ROUNDER = 1.5 * 2.0**23  # adding it drops the fraction of a float32 below 2**22, to nearest even
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


class Emit:
    """Emits code at the builder ``b``, which serves directly for what is not wrapped here (fadd, and_, select ...)."""

    def __init__(self, b: Value) -> None:
        self.b = b

    # ---- addresses and counters (int64)

    def i(self, x: Value) -> Value:
        """A Python int as int64; anything else as it is."""
        return ir.Constant(I64, x) if isinstance(x, int) else x

    def add(self, *terms: Value) -> Value:
        """The sum of addresses, values and Python ints."""
        total = self.i(terms[0])
        for term in terms[1:]:
            if not (isinstance(term, int) and term == 0):
                total = self.b.add(total, self.i(term))
        return total

    def mul(self, x: Value, y: Value) -> Value:
        """The product of two int64."""
        return self.b.mul(self.i(x), self.i(y))

    # ---- memory

    def pointer(self, address: Value, kind: Value) -> Value:
        """The address as a pointer to ``kind``."""
        return isa.pointer(self.b, self.i(address), kind)

    def load(self, address: Value, kind: Value = F32X16, align: int = 1) -> Value:
        """The vector or scalar at ``address``."""
        value = self.b.load(self.pointer(address, kind), typ=kind)
        value.align = align
        return value

    def store(self, value: Value, address: Value, align: int = 1) -> None:
        """Write a vector or scalar to ``address``."""
        self.b.store(value, self.pointer(address, value.type)).align = align

    def first_lanes(self, count: Value, lanes: int = 16) -> Value:
        """The mask of lanes below ``count`` (int64)."""
        numbers = vector(I32, lanes)
        return self.b.icmp_signed(
            "<", ir.Constant(numbers, list(range(lanes))), self.splat(self.b.trunc(self.i(count), I32), lanes)
        )

    def load_masked(self, address: Value, mask: Value, kind: Value = F32X16) -> Value:
        """``load`` that touches only the lanes of ``mask``; the others are zero."""
        zero = ir.Constant(kind, None)
        name = f"llvm.masked.load.{isa.type_name(kind)}.p0"
        return isa.call(self.b, name, kind, self.pointer(address, kind), ir.Constant(I32, 1), mask, zero)

    def store_masked(self, value: Value, address: Value, mask: Value) -> None:
        """``store`` that touches only the lanes of ``mask``."""
        name = f"llvm.masked.store.{isa.type_name(value.type)}.p0"
        isa.call(self.b, name, ir.VoidType(), value, self.pointer(address, value.type), ir.Constant(I32, 1), mask)

    def prefetch(self, address: Value, to_write: bool = False) -> None:
        """Ask for the cache line at ``address``, which need not exist: to read, in the L2 cache, or to write."""
        hints = [ir.Constant(I32, hint) for hint in ((1, 3, 1) if to_write else (0, 2, 1))]
        isa.call(self.b, "llvm.prefetch.p0", ir.VoidType(), self.pointer(address, I8), *hints)

    def splat(self, scalar: Value, lanes: int = 16) -> Value:
        """``scalar`` in every lane."""
        undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
        one = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, undefined, const(0, vector(I32, lanes)))

    def bcast(self, address: Value, kind: Value = F32, lanes: int = 16) -> Value:
        """The scalar at ``address`` in every lane."""
        return self.splat(self.load(address, kind), lanes)

    def load_f16(self, address: Value, lanes: int = 16) -> Value:
        """float16 in memory as float32."""
        return isa.widen_half(self.b, self.load(address, vector(I16, lanes)))

    def load_bf16(self, address: Value, lanes: int = 16) -> Value:
        """bf16 in memory as float32."""
        wide = vector(I32, lanes)
        bits = self.b.zext(self.load(address, vector(I16, lanes)), wide)
        return self.b.bitcast(self.b.shl(bits, const(16, wide)), vector(F32, lanes))

    def bf16_bits(self, value: Value) -> Value:
        """float32 as bf16 bits (int16), to nearest even; NaN stays NaN."""
        wide = vector(I32, value.type.count)
        bits = self.b.bitcast(value, wide)
        odd = self.b.and_(self.b.lshr(bits, const(16, wide)), const(1, wide))
        rounded = self.b.add(bits, self.b.add(odd, const(0x7FFF, wide)))
        bits = self.b.select(self.b.fcmp_unordered("uno", value, value), const(0x7FC00000, wide), rounded)
        return self.b.trunc(self.b.lshr(bits, const(16, wide)), vector(I16, value.type.count))

    # ---- arithmetic

    def const(self, value: float, kind: Value = F32X16) -> Value:
        """A vector of one repeated number."""
        return const(value, kind)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """``x * y + z``."""
        return isa.fma(self.b, x, y, z)

    def dpbusd(self, total: Value, unsigned: Value, signed: Value) -> Value:
        """int32 x 16 ``total`` plus dot products of 4 bytes, unsigned with signed (see ``isa.dpbusd``)."""
        return isa.dpbusd(self.b, total, unsigned, signed)

    def max(self, x: Value, y: Value) -> Value:
        """The greater of each lane; a NaN in ``y`` stays."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def min(self, x: Value, y: Value) -> Value:
        """The smaller of each lane; a NaN in ``y`` stays."""
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def abs(self, x: Value) -> Value:
        """The size of each lane."""
        bits = vector(I32, x.type.count)
        return self.b.bitcast(self.b.and_(self.b.bitcast(x, bits), const(0x7FFFFFFF, bits)), x.type)

    def round(self, x: Value) -> Value:
        """The nearest whole number below 2**22 in size, still float32."""
        rounder = const(_ROUNDER, x.type)
        return self.b.fsub(self.b.fadd(x, rounder), rounder)

    def sum(self, v: Value) -> Value:
        """The sum of the lanes, a scalar."""
        if v.type.element == F32:
            zero = ir.Constant(F32, 0.0)
            return isa.call(self.b, f"llvm.vector.reduce.fadd.{isa.type_name(v.type)}", F32, zero, v, fast=True)
        return isa.call(self.b, f"llvm.vector.reduce.add.{isa.type_name(v.type)}", v.type.element, v)

    def hmax(self, v: Value) -> Value:
        """The greatest lane, a scalar; NaN lanes do not count."""
        if v.type.element == F32:
            return isa.call(self.b, f"llvm.vector.reduce.fmax.{isa.type_name(v.type)}", F32, v)
        return isa.call(self.b, f"llvm.vector.reduce.smax.{isa.type_name(v.type)}", v.type.element, v)

    def exp(self, x: Value, least: float = -87.0) -> Value:
        """e**x within 2e-7 relative, for x cut to [least, 88] (Cephes ``expf``); NaN stays NaN."""
        b, kind = self.b, x.type
        whole = vector(I32, kind.count)
        x = self.min(const(88.0, kind), self.max(const(least, kind), x))
        n = self.round(b.fmul(x, const(1.4426950408889634, kind)))
        r = self.fma(n, const(2.12194440e-4, kind), self.fma(n, const(-0.693359375, kind), x))
        p = const(_EXP[0], kind)
        for coefficient in _EXP[1:]:
            p = self.fma(p, r, const(coefficient, kind))
        p = self.fma(p, b.fmul(r, r), b.fadd(r, const(1.0, kind)))
        exponent = b.add(b.fptosi(n, whole), const(127, whole))
        return b.fmul(p, b.bitcast(b.shl(exponent, const(23, whole)), kind))

    def sigmoid(self, x: Value) -> Value:
        """``1 / (1 + exp(-x))``."""
        one = const(1.0, x.type)
        return self.b.fdiv(one, self.b.fadd(one, self.exp(self.b.fneg(x))))

    def tanh(self, x: Value) -> Value:
        """Hyperbolic tangent within 3e-7 relative (Cephes ``tanhf``: a polynomial near 0, else by ``exp``)."""
        b, kind = self.b, x.type
        z = b.fmul(x, x)
        p = const(_TANH[0], kind)
        for coefficient in _TANH[1:]:
            p = self.fma(p, z, const(coefficient, kind))
        near = self.fma(b.fmul(p, z), x, x)
        far = b.fsub(b.fmul(const(2.0, kind), self.sigmoid(b.fmul(const(2.0, kind), x))), const(1.0, kind))
        return b.select(b.fcmp_ordered("<", self.abs(x), const(0.625, kind)), near, far)

    def normal_cdf(self, x: Value) -> Value:
        """The normal distribution function within 2e-7 (Abramowitz & Stegun 7.1.26), as exact GELU needs it."""
        b, kind = self.b, x.type
        one, z = const(1.0, kind), b.fmul(self.abs(x), const(0.7071067811865476, kind))
        t = b.fdiv(one, self.fma(z, const(0.3275911, kind), one))
        p = const(_ERFC[0], kind)
        for coefficient in _ERFC[1:]:
            p = self.fma(p, t, const(coefficient, kind))
        tail = b.fmul(b.fmul(b.fmul(p, t), const(0.5, kind)), self.exp(b.fneg(b.fmul(z, z))))
        return b.select(b.fcmp_ordered("<", x, const(0.0, kind)), tail, b.fsub(one, tail))

    # ---- control

    def stack(self, nbytes: int) -> Value:
        """The address of so many bytes that live as long as the function runs, at a multiple of 64."""
        return self.b.ptrtoint(cgutils.alloca_once(self.b, F32X16, size=nbytes // 64), I64)

    def var(self, init: Value) -> Var:
        """A variable that starts as ``init``."""
        return Var(self.b, init)

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        """Emit the body of a loop over 0 .. ``count`` - 1; gives the index (int64)."""
        with cgutils.for_range(self.b, self.i(count)) as turn:
            yield turn.index

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Emit what runs only if ``condition`` (a bit) holds."""
        with self.b.if_then(condition):
            yield

    def call_at(self, code: Value, *args: Value) -> None:
        """Call the compiled function at address ``code`` (see ``isa.cfunc``) with int64 arguments."""
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(args))
        self.b.call(self.b.inttoptr(code, kind.as_pointer()), args)


class Var:
    """A variable of a kernel, such as an accumulator."""

    def __init__(self, b: Value, init: Value) -> None:
        self.b, self.slot = b, cgutils.alloca_once(b, init.type)
        self.set(init)

    def get(self) -> Value:
        """The value now."""
        return self.b.load(self.slot, typ=self.slot.type.pointee if hasattr(self.slot.type, "pointee") else None)

    def set(self, value: Value) -> None:
        """Give it a new value."""
        self.b.store(value, self.slot)


def kernel(emit: Callable[..., Value], returns: Any = types.void, floats: Sequence[str] = ()) -> Any:
    """A numba intrinsic from an emitter function ``emit(e, ...)``.

    Every argument is int64 (addresses, sizes), but those named in ``floats`` are float32. ``returns`` is the numba type
    of the value ``emit`` returns.
    """
    names = list(inspect.signature(emit).parameters)[1:]
    signature = returns(*[types.float32 if name in floats else types.int64 for name in names])

    def codegen(context: Any, b: Value, _signature: Any, args: Sequence[Value]) -> Value:
        result = emit(Emit(b), *args)
        return context.get_dummy_value() if returns is types.void else result

    def define(typingctx: Any, *args: Any) -> Any:
        return signature, codegen

    define.__name__ = define.__qualname__ = emit.__name__
    named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("typingctx", *names)]
    define.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]  # numba binds arguments by it
    return intrinsic(define)


# ---- scalar access by address: element ``i`` of the array at ``p``


def _scalar(kind: Value, numba_type: Any) -> tuple[Any, Any]:
    """The intrinsics that read and write one element of an array of ``kind``."""
    size = kind.width // 8 if isinstance(kind, ir.IntType) else 4

    def read(e: Emit, p: Value, i: Value) -> Value:
        return e.load(e.add(p, e.mul(i, size)), kind)

    def codegen(context: Any, b: Value, _signature: Any, args: Sequence[Value]) -> Value:
        e = Emit(b)
        e.store(args[2], e.add(args[0], e.mul(args[1], size)))
        return context.get_dummy_value()

    def write(typingctx: Any, p: Any, i: Any, value: Any) -> Any:
        return types.void(types.int64, types.int64, numba_type), codegen

    return kernel(read, numba_type), intrinsic(write)


ldi, sti = _scalar(I64, types.int64)
ldi32, sti32 = _scalar(I32, types.int32)
ldu8, stu8 = _scalar(I8, types.uint8)
ldf, stf = _scalar(F32, types.float32)


def _pointer(kind: Value, numba_type: Any) -> Any:
    """The intrinsic that turns an address into a pointer that can be indexed like an array."""

    def cast(typingctx: Any, p: Any) -> Any:
        return types.CPointer(numba_type)(types.int64), lambda _c, b, _s, args: isa.pointer(b, args[0], kind)

    return intrinsic(cast)


f32p, i64p = _pointer(F32, types.float32), _pointer(I64, types.int64)
f64p = _pointer(ir.DoubleType(), types.float64)
i32p, u16p, u8p = _pointer(I32, types.int32), _pointer(I16, types.uint16), _pointer(I8, types.uint8)


# ---- atomics on int64, the way to wait, and the clock


def _flag_set(e: Emit, p: Value, value: Value) -> None:
    e.b.store_atomic(value, e.pointer(p, I64), "release", 8)


def _flag_get(e: Emit, p: Value) -> Value:
    return e.b.load_atomic(e.pointer(p, I64), "acquire", 8, typ=I64)


def _fetch_add(e: Emit, p: Value, value: Value) -> Value:
    return e.b.atomic_rmw("add", e.pointer(p, I64), value, "acq_rel")


def _pause(e: Emit) -> None:
    isa.pause(e.b)


def _cycles(e: Emit) -> Value:
    return isa.call(e.b, "llvm.readcyclecounter", I64)


cycles = kernel(_cycles, types.int64)
flag_set = kernel(_flag_set)
flag_get = kernel(_flag_get, types.int64)
fetch_add = kernel(_fetch_add, types.int64)
pause = kernel(_pause)
sched_yield = types.ExternalFunction("sched_yield", types.int32())
usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
