"""``linear``: y = x @ weight.T + bias for packed weights of every format, and the gated unit of two of them.

There is one kernel for each (format, digits) and, for many tokens on a matrix unit, each (format, parts) of
``matrix_unit``. They are called by address: the driver knows nothing of formats, and what no
model uses is never compiled. Threads share a product by panels.

Error against float64 for the same dequantized weight. Plain formats: that of a float32 sum. Two digits: an activation
is off by at most half a step, ``2**-15`` of the greatest of its 32 neighbours, so a result by
``2**-15 * sum(greatest * abs(w))``; as the errors have both signs, less than 2e-4 of max |y| is left. One digit: 128
times as much, 256 times at levels without VNNI.
"""

from __future__ import annotations

from typing import Any

from numba import types

from labinfer.backends.cpu.elementwise import glu_row
from labinfer.backends.cpu.features import LEVEL
from labinfer.backends.cpu.isa import Value, njit, specialize
from labinfer.backends.cpu.layout import MAX_GLU_CHUNK, PANEL_ROWS, VECTOR_CHUNK, panel_format
from labinfer.backends.cpu.simd import Emit, kernel
from labinfer.backends.cpu.tiles import tile

SIXTEEN_REGISTERS = {"bf16": (2, 1), "f16": (3, 1)}
"""Tokens of the larger tiles of 16-bit weights, which keep two sums a token, where there are 16 vector registers."""

PAIR_TOKENS = 32
"""From so many tokens on, float32 takes two panels at once: a third fewer loads, but a worse stream of weights."""

SCRATCH_FLOATS = 2 * PANEL_ROWS * MAX_GLU_CHUNK
"""What ``linear_glu`` keeps on the stack, and so how many panels go through gate and up at once."""

# What the body below finds among its globals; ``specialize`` gives each kernel its own.
tile_pair: Any = None
tile_many: Any = None
tile_some: Any = None
tile_one: Any = None
block_columns, block_bytes, paired = 1, 1, False
many, some = 8, 4


def _linear(w, columns, x, x_stride, y, y_stride, tokens, g0, g1, rows, bias, mode):  # type: ignore[no-untyped-def]
    """Panels ``g0`` .. ``g1`` - 1 for all tokens: in chunks of tokens, panel by panel, tile by tile."""
    blocks = (columns + block_columns - 1) // block_columns
    size = (blocks * block_bytes + 63) // 64 * 64
    row = y_stride * 4
    for start in range(0, tokens, VECTOR_CHUNK):
        end = min(start + VECTOR_CHUNK, tokens)
        g = g0
        while g < g1:
            width = 2 if paired and end - start >= PAIR_TOKENS and g + 2 <= g1 else 1
            done = start
            if width == 2:
                b = bias + g * 64 if bias else 0
                while done + many <= end:
                    tile_pair(
                        w + g * size, size, blocks, x + done * x_stride, x_stride,
                        y + g * 64 + done * row, row, rows - g * 16, b, mode,
                    )  # fmt: skip
                    done += many
            for p in range(g, g + width):
                panel, out, left, t = w + p * size, y + p * 64, rows - p * 16, done
                b = bias + p * 64 if bias else 0
                while t + many <= end:
                    tile_many(panel, size, blocks, x + t * x_stride, x_stride, out + t * row, row, left, b, mode)
                    t += many
                while t + some <= end:
                    tile_some(panel, size, blocks, x + t * x_stride, x_stride, out + t * row, row, left, b, mode)
                    t += some
                while t < end:
                    tile_one(panel, size, blocks, x + t * x_stride, x_stride, out + t * row, row, left, b, mode)
                    t += 1
            g += width


LINEAR = types.void(*[types.int64] * 12)


def linear_kernel(format: str, digits: int) -> Any:
    """The kernel ``linear/FORMAT/DIGITS``, to be compiled with the signature ``LINEAR``.

    The larger tiles have as many tokens as have room for their sums in the vector registers.
    """
    layout = panel_format(format)
    many, some = (8, 4) if LEVEL == "avx512vnni" else SIXTEEN_REGISTERS.get(format, (4, 2))
    return specialize(
        _linear,
        f"linear_{format}_{digits}",
        tile_pair=tile(format, digits, many, 2),
        tile_many=tile(format, digits, many),
        tile_some=tile(format, digits, some),
        tile_one=tile(format, digits, 1),
        many=many,
        some=some,
        block_columns=layout.columns,
        block_bytes=layout.bytes,
        paired=format == "f32" and LEVEL == "avx512vnni",
    )


def _emit_linear(e: Emit, code: Value, w: Value, columns: Value, x: Value, x_stride: Value, y: Value, y_stride: Value,
                 tokens: Value, g0: Value, g1: Value, rows: Value, bias: Value, mode: Value) -> None:  # fmt: skip
    e.call_at(code, w, columns, x, x_stride, y, y_stride, tokens, g0, g1, rows, bias, mode)


linear = kernel(_emit_linear)
"""``y[t] (+)= W x[t] + bias`` in rows ``16 * g0`` to ``16 * g1`` of W [rows, columns], for ``tokens`` rows of x.

``code`` is the address of ``linear_kernel`` or ``matrix_unit.matrix_kernel``, ``w`` the packed weight, ``x`` the first
activation row (``quantize.quantize_row``), ``x_stride`` the bytes from one to the next; rows of ``y`` are ``y_stride``
floats apart; ``bias`` is an address or 0. ``mode`` is 0 or ACCUMULATE. Nothing beyond ``rows`` is written. For
compiled functions.
"""


def _emit_scratch(e: Emit) -> Value:
    return e.stack(4 * SCRATCH_FLOATS)


_scratch = kernel(_emit_scratch, types.int64)


@njit
def linear_glu(
    gate_code: int, gate: int, gate_bias: int, up_code: int, up: int, up_bias: int, columns: int, x: int, x_stride: int,
    y: int, y_stride: int, tokens: int, g0: int, g1: int, rows: int, function: int, chunk: int,
) -> None:  # fmt: skip
    """``y = function(gate x) * up x`` with one of ``tape.ACTIVATION_CODES``, up to ``chunk`` tokens at once.

    The rest is as in ``linear``.
    """
    scratch = _scratch()  # what up gives for a few panels, beside what gate has put into y
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        width = SCRATCH_FLOATS // (2 * PANEL_ROWS * count) * 2
        rows_x, rows_y = x + start * x_stride, y + start * y_stride * 4
        for g in range(g0, g1, width):
            end = min(g + width, g1)
            stride = (end - g) * PANEL_ROWS
            linear(gate_code, gate, columns, rows_x, x_stride, rows_y, y_stride, count, g, end, rows, gate_bias, 0)
            linear(up_code, up, columns, rows_x, x_stride, scratch - g * 64, stride, count, g, end, rows, up_bias, 0)
            for t in range(count):
                out = rows_y + t * y_stride * 4 + g * 64
                glu_row(function, out, scratch + t * stride * 4, out, min(end * PANEL_ROWS, rows) - g * PANEL_ROWS)
