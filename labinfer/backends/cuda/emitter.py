"""The writer of products: which kernels make them, from few tokens to many."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int, c_uint64
from functools import cached_property
from typing import Any

from labinfer.backends.cuda.arguments import (
    Linear,
    Part,
    Parts,
    address,
    format_defines,
    narrow_define,
    runs,
    stride,
)
from labinfer.backends.cuda.cublas import Blas, Product
from labinfer.backends.cuda.layout import (
    ACTIVATION_CODES,
    BATCH_ROWS,
    CUBLAS_BYTES,
    STREAM_CHUNK,
    batch_split,
    batch_stage_bytes,
    batch_stages,
    batch_tokens,
    few_row_bytes,
    few_tokens,
    fits_batch,
    fits_few,
    fits_stream,
    pitch,
    stream_blocks,
    stream_slots,
    stream_tile_bytes,
    stream_x_bytes,
)
from labinfer.backends.cuda.weights import CudaWeight
from labinfer.backends.cuda.workspace import narrow_bytes
from labinfer.backends.cuda.writer import Writer
from labinfer.ops.base import Call


class BatchParameters(Structure):
    """``Parameters`` of ``batch.cu``."""

    _fields_ = (
        *((name, c_uint64) for name in ("x", "w", "up", "residual", "y")),
        *((name, c_int) for name in ("tokens", "rows", "columns", "residual_row", "y_row", "function")),
    )


class Emitter(Writer):
    """Writes the rows of one op, products among them."""

    def linear(
        self,
        x: Any,
        products: Sequence[Linear],
        norm: Call | None = None,
        residual: Any = None,
        rows: Any = None,
    ) -> None:
        """``y = x @ w.T + bias`` for each product; x normed first; with ``residual``, which is added, there is one.

        With ``rows``, x is normed, and its rows, as many as it has, are those of the memory where it begins.
        """
        by_format: dict[str, list[Linear]] = {}
        for product in products:
            by_format.setdefault(product.weight.format, []).append(product)
        for format in [format for format, group in by_format.items() if self.is_few(group, x)]:
            group = by_format.pop(format)
            if rows is None or self.is_streamed(group, x, 16):
                self.few(x, group, norm, residual, rows=rows)
            else:
                self.few(self.normed(x, norm, rows), group, None, residual)
        normed = x if all(map(self.is_large, by_format)) else self.normed(x, norm, rows)
        for format, group in by_format.items():
            if self.is_large(format):
                self.large(x, format, group, norm, residual, rows)
            else:
                for each in group:
                    self.tiles(normed, each.weight, each.bias, each.y, residual)

    def normed(self, x: Any, norm: Call | None, rows: Any = None) -> Any:
        """x, or with ``norm`` a normed copy of it, or of its ``rows``."""
        if norm is None:
            return x
        made = self.array(x.shape)
        self.rms_norm(norm, x, made, stride(made), rows=rows)
        return made

    def is_few(self, products: Sequence[Linear], x: Any, width: int = 16) -> bool:
        """Whether products of one format go through a kernel for few tokens, in tiles of ``width`` of their rows."""
        return self.is_streamed(products, x, width) or fits_few(products[0].weight.format, *x.shape)

    def is_streamed(self, products: Sequence[Linear], x: Any, width: int) -> bool:
        """Whether that is the kernel whose weights come by bulk copies."""
        weight = products[0].weight
        whole = fits_stream(weight.format, len(x), weight.columns) and not any(p.weight.rows % width for p in products)
        return self.device.bulk_copies and whole and stride(x) % 4 == 0 and address(x) % 16 == 0

    def few(
        self,
        x: Any,
        products: Sequence[Linear],
        norm: Call | None,
        residual: Any,
        function: str | None = None,
        rows: Any = None,
    ) -> None:
        """Up to three products for few tokens in one launch; with ``function``, the two of a gated unit."""
        weight, x_row = products[0].weight, x.shape[1] if self.narrow_input else stride(x)
        tokens, width = few_tokens(len(x)), 8 if function else 16
        tiles = sum(-(-each.weight.rows // width) for each in products[: 1 if function else 3])
        parts = [
            Part(each.weight.address, address(each.bias), address(each.y), stride(each.y), each.weight.rows)
            for each in products
        ]
        defines = (f"TOKENS={tokens}", *["NORM"] * bool(norm), *["ADD"] * (residual is not None))
        if function:
            defines += ("GLU", *self.result_defines())
            parts[0].y_row = self.row_of(products[0].y)
        gain, eps, offset = (norm.weights.get("weight"), norm.attrs.eps, norm.attrs.offset) if norm else (None, 0, 0)
        arguments = (
            x, x_row, len(x), weight.columns, gain, float(eps), float(offset), residual, stride(residual),
            ACTIVATION_CODES[function] if function else 0, tiles, Parts((Part * 3)(*parts)),
        )  # fmt: skip
        if self.is_streamed(products, x, width):
            chosen = () if rows is None else ("ROWS",)
            self.stream(weight, tokens, tiles, bool(norm), (*defines, *chosen), (*arguments, *[rows] * len(chosen)))
            return
        processors = self.device.multiprocessors
        share = next((n for n in (1, 2, 4) if tiles * n >= 12 * processors), 8)  # warps for a tile
        self.add(
            "few", "few", (min(-(-tiles * share // 8), 2 * processors), 1, 1), 256, *arguments,
            defines=(*format_defines(weight.format), *defines, f"TILE_WARPS={share}"),
            shared=tokens * few_row_bytes(weight.columns),
        )  # fmt: skip

    def stream(
        self,
        weight: CudaWeight,
        tokens: int,
        tiles: int,
        normed: bool,
        defines: Sequence[str],
        arguments: Sequence[Any],
    ) -> None:
        """The same with weights that come by bulk copies; a cluster shares a tile where there are too few of them."""
        processors, plain = self.device.multiprocessors, weight.format in ("f16", "bf16")
        cluster = 2 if tiles <= processors and weight.columns > STREAM_CHUNK and not normed else 1
        resident = stream_blocks(weight.format, tokens, cluster)
        waits = plain and tokens > 2 and tiles <= 8 * processors  # measured: blocks that wait are worth it
        blocks = cluster * tiles if cluster > 1 else min(tiles, (4 if waits else resident) * processors)
        pieces = -(-tiles * cluster // blocks) * -(-weight.columns // (STREAM_CHUNK * cluster))
        slots = stream_slots(weight.format, tokens, weight.columns, pieces)
        form = ("HALF",) * (weight.format == "f16") if plain else (*format_defines(weight.format), "STAGED")
        form += ("NARROW_INPUT",) * self.narrow_input
        self.add(
            "stream", "stream", (blocks, 1, 1), 256, *arguments, cluster=(cluster, 1, 1),
            defines=(*form, *defines, f"CLUSTER={cluster}", f"BLOCKS={resident}", f"SLOTS={slots}"),
            shared=slots * stream_tile_bytes(weight.format, weight.columns) + stream_x_bytes(tokens),
        )  # fmt: skip

    def large(
        self, x: Any, format: str, products: Sequence[Linear], norm: Call | None, residual: Any, rows: Any = None
    ) -> None:
        """Products from activations in 16 bits, the largest by cuBLAS."""
        at = self.narrowed(x, format, norm, rows)
        for first, count in runs(products):
            w, y = first.weight, first.y
            if self.is_batch(len(x), count, w.columns):
                self.batch(at, len(x), w, count, y, stride(y), residual)
                continue
            if residual is not None:
                self.copy(residual, y)
            product = Product(len(x), count, pitch(w.columns), format, accumulate=residual is not None)
            self.rows.append(self.blas.bind(product, at, w.address, address(y), stride(y), self.blas_scratch))
        for each in products:
            if each.bias is not None:
                arguments = (each.y, stride(each.y), each.bias, each.weight.rows)
                self.each("elementwise", "add_bias", len(x), each.weight.rows, *arguments)

    def large_glu(self, x: Any, gate: CudaWeight, up: CudaWeight, norm: Call, function: str, y: Any) -> None:
        """A gated unit; with cuBLAS, numbers have 16 bits between its two products and the activation."""
        at, format = self.narrowed(x, gate.format, norm), gate.format
        if self.is_batch(len(x), 2 * gate.rows, gate.columns):
            self.batch(at, len(x), gate, gate.rows, y, self.row_of(y), up=up, function=function)
            return
        workspace = self.blas_scratch
        made, row = self.scratch(4 * len(x) * gate.rows), 2 * gate.rows
        behind = gate.address + 2 * gate.rows * pitch(gate.columns) == up.address
        product = Product(len(x), row if behind else gate.rows, pitch(gate.columns), format, out=format)
        self.rows.append(self.blas.bind(product, at, gate.address, made, row, workspace))
        if not behind:
            self.rows.append(self.blas.bind(product, at, up.address, made + 2 * gate.rows, row, workspace))
        half = ["HALF"] * (format == "f16")
        arguments = (c_uint64(made), y, self.row_of(y), gate.rows, ACTIVATION_CODES[function])
        grid = (-(-gate.rows // 2048), len(x), 1)
        self.add("elementwise", "narrow_glu", grid, 256, *arguments, defines=(*half, *self.result_defines()))

    def is_batch(self, tokens: int, rows: int, columns: int) -> bool:
        """Whether a product with plain weights, of more than few tokens, is made by ``batch.cu``."""
        if self.device.blas is None:
            return True
        return self.device.clusters and fits_batch(tokens, self.sequences, rows, columns)

    def batch(
        self,
        x: int,
        tokens: int,
        w: CudaWeight,
        rows: int,
        y: Any,
        y_row: int,
        residual: Any = None,
        up: CudaWeight | None = None,
        function: str | None = None,
    ) -> None:
        """``rows`` of ``w`` times x, in 16 bits at an address; with ``up`` a gated unit, which leaves the result."""
        wide, stages, columns = batch_tokens(tokens), batch_stages(batch_tokens(tokens)), pitch(w.columns)
        tiles, blocks = -(-rows // (BATCH_ROWS // 2 if up else BATCH_ROWS)), -(-tokens // wide)
        split = batch_split(tiles * blocks, columns, self.device.multiprocessors) if self.device.clusters else 1
        gated = () if up is None else ("GLU", *self.result_defines())
        parameters = BatchParameters(
            x, w.address, up.address if up else 0, address(residual), address(y), tokens, rows, columns,
            stride(residual), y_row, ACTIVATION_CODES[function] if function else 0,
        )  # fmt: skip
        half = ["HALF"] * (w.format == "f16")
        cluster = [f"CLUSTER={split}"] * (split > 1)
        defines = (f"BATCH={wide}", f"STAGES={stages}", *cluster, *half, *gated)
        self.add(
            "batch", "batch", (blocks, tiles, split), 128, parameters, defines=defines, cluster=(1, 1, split),
            shared=stages * batch_stage_bytes(wide),
        )  # fmt: skip

    @cached_property
    def blas_scratch(self) -> int:
        """The address of cuBLAS's own scratch memory, which all products of the op share."""
        return self.scratch(CUBLAS_BYTES)

    @property
    def blas(self) -> Blas:
        """cuBLAS, where there is one."""
        assert self.device.blas is not None
        return self.device.blas

    def is_large(self, format: str) -> bool:
        """Whether products of many tokens with weights in ``format`` are of activations in 16 bits."""
        return format in ("f16", "bf16")

    def narrowed(self, x: Any, format: str, norm: Call | None, rows: Any = None) -> int:
        """The address of rows of ``x``, normed, in 16 bits."""
        if self.narrow_input:
            return address(x)
        tokens, columns = x.shape
        at, row = self.scratch(narrow_bytes(tokens, columns)), pitch(columns)
        if norm:
            self.rms_norm(norm, x, c_uint64(at), row, (narrow_define(format),), rows)
        else:
            half = ["HALF"] * (format == "f16")
            self.each("elementwise", "narrow", tokens, row, x, stride(x), c_uint64(at), columns, row, defines=half)
        return at

    def takes_narrow(self) -> str | None:
        """The 16-bit format in which the op's product could take its input, as it multiplies it; else None."""
        product = self.call.parts[0] if self.call.parts else self.call
        weight, x = product.weights["weight"], product.inputs[0]
        if len(self.call.inputs) > 1 and address(self.call.inputs[-1]) == address(x):  # the residual as well
            return None
        products = [Linear(weight, None, None)]
        if self.is_streamed(products, x, 16):
            return "bf16" if weight.format == "bf16" else "f16"
        few = self.is_few(products, x)
        return weight.format if not few and self.is_large(weight.format) else None

    def tiles(
        self,
        x: Any,
        w: CudaWeight,
        bias: Any,
        y: Any,
        residual: Any = None,
        experts: tuple[Any, Any, int] | None = None,
    ) -> None:
        """A product of any number of tokens with weights in blocks or float32, or with those of experts.

        ``experts``: bounds, the order of x's rows (or None) and their number, for a stack of matrices; see ``moe.cu``.
        """
        plain = w.format == "f32"
        size = 32 if plain else 64
        bounds, order, count = experts or (None, None, 0)
        blocks = min(len(y), len(y) // size + count) if experts else -(-len(y) // size)
        defines = (*(() if plain else format_defines(w.format)), *["EXPERTS"] * bool(experts))
        self.add(
            "plain" if plain else "tiles", "plain" if plain else "tiles", (-(-w.rows // size), blocks, 1),
            256 if plain else 128, x, stride(x), len(y), w.columns, w.memory, w.rows, bias, residual,
            stride(residual), y, stride(y), c_uint64(w.nbytes), bounds, order, count, defines=defines,
        )  # fmt: skip
