"""``linear``: y = x @ weight.T + bias for packed weights of every format, and the gated unit of two of them.

One compiled function for each (format, digits); it is compiled, or taken from the cache, when ``linear_code`` first asks
for it, and called by its address: neither the driver nor its cache knows about formats, and nothing that no model uses is
ever compiled. Threads share a product by panels.

Error against float64 for the same dequantized weight: plain formats that of a float32 sum. Two digits: an activation is
off by at most half a step of 1 / (128 * DIGIT_MAX) of its block's greatest, so a row is off by at most ``2**-15`` (VNNI) or
``2**-14`` times ``sum(block greatest * sum(abs(w)))``; errors of both signs cancel, which leaves less than 2e-4 of max |y|.
One digit: 128 times (or 64 times) that.
"""

from __future__ import annotations

from typing import Any

from numba import types

from labinfer.backends.cpu import isa
from labinfer.backends.cpu.isa import I64, Value, ir
from labinfer.backends.cpu.layout import activation_digits, panel_format
from labinfer.backends.cpu.simd import Emit, kernel
from labinfer.backends.cpu.tiles import tile

CHUNK = 64
"""Tokens that meet a panel while it is in the L1 cache."""

# What the body below finds among its globals; ``specialize`` gives each kernel its own.
tile_pair: Any = None
tile_8: Any = None
tile_4: Any = None
tile_1: Any = None
block_columns, block_bytes, paired = 1, 1, False


def _linear(w, columns, x, x_stride, y, y_stride, tokens, g0, g1, rows, bias, mode):  # type: ignore[no-untyped-def]
    """Panels ``g0`` .. ``g1`` - 1 for all tokens: in chunks of tokens, panel by panel, tile by tile."""
    blocks = (columns + block_columns - 1) // block_columns
    size = (blocks * block_bytes + 63) // 64 * 64
    row = y_stride * 4
    for start in range(0, tokens, CHUNK):
        end = min(start + CHUNK, tokens)
        g = g0
        while g < g1:
            width = 2 if paired and g + 2 <= g1 else 1
            done = start
            if width == 2:
                b = bias + g * 64 if bias else 0
                while done + 8 <= end:
                    tile_pair(
                        w + g * size, size, blocks, x + done * x_stride, x_stride,
                        y + g * 64 + done * row, row, rows - g * 16, b, mode,
                    )  # fmt: skip
                    done += 8
            for p in range(g, g + width):
                panel, out, left, t = w + p * size, y + p * 64, rows - p * 16, done
                b = bias + p * 64 if bias else 0
                while t + 8 <= end:
                    tile_8(panel, size, blocks, x + t * x_stride, x_stride, out + t * row, row, left, b, mode)
                    t += 8
                while t + 4 <= end:
                    tile_4(panel, size, blocks, x + t * x_stride, x_stride, out + t * row, row, left, b, mode)
                    t += 4
                while t < end:
                    tile_1(panel, size, blocks, x + t * x_stride, x_stride, out + t * row, row, left, b, mode)
                    t += 1
            g += width


_SIGNATURE = types.void(*[types.int64] * 12)
_codes: dict[tuple[str, int], Any] = {}


def linear_code(format: str, digits: int = 2) -> int:
    """The code that ``linear`` takes for a weight in ``format``: the address of its kernel, compiled now if it must be."""
    key = format, activation_digits(format, digits)
    if key not in _codes:
        layout = panel_format(format)
        body = isa.specialize(
            _linear,
            f"linear_{format}_{key[1]}",
            tile_pair=tile(*key, 8, 2),
            tile_8=tile(*key, 8),
            tile_4=tile(*key, 4),
            tile_1=tile(*key, 1),
            block_columns=layout.columns,
            block_bytes=layout.bytes,
            paired=not layout.quantized,
        )
        _codes[key] = isa.cfunc(_SIGNATURE, body)
    return int(_codes[key].address)


def _call(e: Emit, code: Value, *args: Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [I64] * len(args))
    e.b.call(e.b.inttoptr(code, kind.as_pointer()), args)


def _emit_linear(e: Emit, code: Value, w: Value, columns: Value, x: Value, x_stride: Value, y: Value, y_stride: Value,
                 tokens: Value, g0: Value, g1: Value, rows: Value, bias: Value, mode: Value) -> None:  # fmt: skip
    _call(e, code, w, columns, x, x_stride, y, y_stride, tokens, g0, g1, rows, bias, mode)


linear = kernel(_emit_linear)
