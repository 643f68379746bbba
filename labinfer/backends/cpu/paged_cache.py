"""How keys and values lie in the paged cache on this backend, and the kernel that writes them there.

A part of a state is ``slots x width`` elements, cut into blocks of ``block_size`` slots (a multiple of 16). In a block,

* values, and both parts of a latent cache, are rows ``[block_size, width]``: summing values reads whole rows;
* the keys of ``attention`` are panels ``[width, block_size]``: 16 neighbouring positions are a vector, so a score needs
  no sum across lanes.

Elements are float32, bf16 or float16; kernels widen them to float32 in registers.
"""

from __future__ import annotations

from labinfer.backends.cpu import isa
from labinfer.backends.cpu.elementwise import pieces
from labinfer.backends.cpu.isa import F32, F32X16, I16, I32, Value, const, njit, vector
from labinfer.backends.cpu.simd import Emit, i32p, kernel

CACHE_DTYPES = {"f32": 0, "bf16": 1, "f16": 2}
"""The number that stands for the cache's dtype on a tape."""

POSITIONS = 16
"""Positions side by side in a key panel; a block holds a whole number of them."""


@njit
def element_size(dtype: int) -> int:
    """Bytes of one element of the cache."""
    return 4 if dtype == 0 else 2


def widen(e: Emit, dtype: str, address: Value, mask: Value | None = None) -> Value:
    """Sixteen elements of the cache as float32; only the lanes of ``mask`` are touched."""
    if dtype == "f32":
        return e.load(address) if mask is None else e.load_masked(address, mask)
    half = vector(I16, 16)
    bits = e.load(address, half) if mask is None else e.load_masked(address, mask, half)
    if dtype == "f16":
        return isa.widen_half(e.b, bits)
    return e.b.bitcast(e.b.shl(e.b.zext(bits, isa.I32X16), const(16, isa.I32X16)), F32X16)


def narrow(e: Emit, dtype: str, value: Value) -> Value:
    """float32 lanes as the bits of the cache's elements, to nearest even."""
    if dtype == "f32":
        return e.b.bitcast(value, vector(I32, value.type.count))
    return e.bf16_bits(value) if dtype == "bf16" else isa.narrow_half(e.b, value)


def _write_row(e: Emit, dtype: Value, x: Value, y: Value, n: Value) -> None:
    for name, code in CACHE_DTYPES.items():
        with e.when(e.b.icmp_signed("==", dtype, e.i(code))):
            for piece in pieces(e, n):
                bits = narrow(e, name, piece.load(x))
                at = e.add(y, piece.at if name == "f32" else e.b.ashr(piece.at, e.i(1)))
                if piece.mask is None:
                    e.store(bits, at)
                else:
                    e.store_masked(bits, at, piece.mask)


def _write_column(e: Emit, dtype: Value, x: Value, y: Value, n: Value, stride: Value) -> None:
    whole, rest = e.b.ashr(n, e.i(4)), e.b.and_(n, e.i(15))
    for name, code in CACHE_DTYPES.items():
        with e.when(e.b.icmp_signed("==", dtype, e.i(code))):
            with e.loop(whole) as k:
                bits = narrow(e, name, e.load(e.add(x, e.mul(k, 64))))
                for lane in range(16):
                    at = e.add(y, e.mul(e.add(e.mul(k, 16), lane), stride))
                    e.store(e.b.extract_element(bits, e.b.trunc(e.i(lane), I32)), at)
            with e.loop(rest) as k:
                i = e.add(e.mul(whole, 16), k)
                bits = narrow(e, name, e.load(e.add(x, e.mul(i, 4)), vector(F32, 1)))
                e.store(bits, e.add(y, e.mul(i, stride)))


def _read_row(e: Emit, dtype: Value, x: Value, y: Value, n: Value) -> None:
    for name, code in CACHE_DTYPES.items():
        with e.when(e.b.icmp_signed("==", dtype, e.i(code))):
            for piece in pieces(e, n):
                at = e.add(x, piece.at if name == "f32" else e.b.ashr(piece.at, e.i(1)))
                piece.store(widen(e, name, at, piece.mask), y)


write_row = kernel(_write_row)
"""``n`` float32 of ``x`` into neighbouring elements of the cache."""
write_column = kernel(_write_column)
"""``n`` float32 of ``x`` into elements of the cache ``stride`` bytes apart."""
read_row = kernel(_read_row)
"""``n`` neighbouring elements of the cache as float32 ``y``."""


@njit
def write_token(x: int, cache: int, width: int, panels: int, dtype: int, block_size: int, slot: int) -> None:
    """One token's ``width`` float32 at ``x`` into ``slot`` of the part at ``cache``, as a row or across key panels."""
    size = element_size(dtype)
    if panels:
        block, position = slot // block_size, slot % block_size
        at = cache + (block * width * block_size + position) * size
        write_column(dtype, x, at, width, block_size * size)
    else:
        write_row(dtype, x, cache + slot * width * size, width)


@njit
def kv_write(
    x: int,
    x_stride: int,
    cache: int,
    width: int,
    panels: int,
    dtype: int,
    block_size: int,
    slots: int,
    start: int,
    stop: int,
) -> None:
    """``cache[slots[t]] = x[t]`` for tokens [start, stop), one part of a state; ``slots`` int32 is ``slot_mapping``.

    ``panels`` 1 for the keys of ``attention``, 0 for its values and for both parts of a latent cache.
    """
    mapping = i32p(slots)
    for t in range(start, stop):
        write_token(x + 4 * t * x_stride, cache, width, panels, dtype, block_size, mapping[t])
