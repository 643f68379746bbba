"""The writer of a tape's rows: scratch memory, activation rows, products, and what several ops have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from labinfer.backends.cpu.features import has_matrix_unit
from labinfer.backends.cpu.layout import activation_bytes, activation_form, activations_bytes, product_kernel
from labinfer.backends.cpu.packed_weight import PackedWeight
from labinfer.backends.cpu.tape import Argument, Count, Row
from labinfer.backends.cpu.workspace import BLOCK_MULTIPLE
from labinfer.errors import LabinferError, UsageError
from labinfer.ops.base import Call, Step

if TYPE_CHECKING:
    from labinfer.backends.cpu.device import CpuDevice


def address(array: Any) -> int:
    """The address of an array's first element; 0 for None."""
    return 0 if array is None else int(array.__array_interface__["data"][0])


def stride(array: Any) -> int:
    """Floats from row to row."""
    return int(array.strides[0]) // 4


def cache_dtype(call: Call) -> int:
    """The cache's dtype, as ``paged_cache.CACHE_DTYPES`` numbers it; a block of it must be whole key panels."""
    if call.step is not None and call.step.block_size % BLOCK_MULTIPLE:
        message = f"the block size {call.step.block_size} is not a multiple of {BLOCK_MULTIPLE}"
        raise UsageError("limits.block-size", message, remedy="compile the plan again")
    return {4: 0, 2: 1}[call.cache["k"].itemsize] + int(call.cache["k"].dtype == np.float16)


class ActivationRows(NamedTuple):
    """Activation rows in a ``form`` (see ``layout.activation_form``): where they are, and bytes from row to row."""

    form: int
    address: int
    nbytes: int


class Emitter:
    """Writes the rows of one op; ``take`` hands out its scratch memory."""

    def __init__(self, device: CpuDevice, call: Call) -> None:
        self.device, self.call, self.rows = device, call, list[Row]()
        self.kept: list[np.ndarray] = []
        self.scratch = address(call.workspace)
        self.left = 0 if call.workspace is None else call.workspace.nbytes
        self.options = call.options if has_matrix_unit() else replace(call.options, matrix_unit={})

    @property
    def step(self) -> Step:
        """The step batch."""
        if self.call.step is None:
            raise LabinferError("run.no-step", "this op needs a step batch")
        return self.call.step

    def take(self, nbytes: int) -> int:
        """The address of so many bytes of the op's planned scratch memory."""
        size = -(-nbytes // 64) * 64
        if size > self.left:
            raise LabinferError("run.workspace", f"a kernel needs {size} bytes of scratch, {self.left} were planned")
        self.scratch, self.left = self.scratch + size, self.left - size
        return self.scratch - size

    def take_array(self, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array over the op's scratch memory."""
        count, start = prod(shape), self.take(4 * prod(shape)) - address(self.call.workspace)
        array: np.ndarray = self.call.workspace.view(np.float32)[start // 4 : start // 4 + count].reshape(shape)
        return array

    def count(self, x: Any) -> Argument:
        """The rows of ``x``, which are so many to each row of the op's values, in a step of any size."""
        symbol, values = self.call.rows_symbol, self.call.outputs or self.call.inputs
        return Count(symbol, len(x) // len(values[0]), len(x)) if symbol and len(x) else len(x)

    def add(self, step: str, *arguments: Argument, then_wait: bool = True) -> None:
        """Append a row."""
        self.rows.append(Row(step, arguments, then_wait))

    def form(self, format: str, x: Any) -> int:
        """How rows of ``x`` lie when they meet a weight in ``format`` (see ``layout.activation_form``)."""
        return activation_form(format, x.shape[1], len(x), self.options)

    def take_rows(self, form: int, x: Any) -> ActivationRows:
        """Scratch memory for rows of ``x`` in ``form``."""
        return ActivationRows(form, self.take(activations_bytes(form, *x.shape)), activation_bytes(form, x.shape[1]))

    def activations(self, x: Any, forms: Iterable[int]) -> dict[int, ActivationRows]:
        """Rows of ``x`` in each of ``forms``."""
        found: dict[int, ActivationRows] = {}
        for form in dict.fromkeys(forms):
            if form == 0 and x.shape[1] % 2 == 0:
                found[0] = ActivationRows(0, address(x), x.strides[0])
            else:
                rows = found[form] = self.take_rows(form, x)
                self.add(
                    "quantize_step", self.count(x), form, address(x), stride(x), x.shape[1], rows.address, rows.nbytes
                )
        return found

    def product(
        self, x: ActivationRows, w: PackedWeight, y: Any, bias: Any, mode: int, then_wait: bool = True,
        before: int = 0, total: int = 0,
    ) -> None:  # fmt: skip
        """``y (+)= x @ w.T + bias``; ``w`` lies ``before`` bytes into ``total`` ones that workers share as one."""
        self.add(
            "linear_step", product_kernel(w.format, x.form), w.address, w.columns, x.address, x.nbytes,
            address(y), stride(y), self.count(y), w.panels, w.rows, address(bias), mode, w.nbytes // w.panels,
            before, total or w.nbytes, then_wait=then_wait,
        )  # fmt: skip

    def experts(self, x: ActivationRows, w: PackedWeight, y: Any, bounds: int, experts: int, then_wait: bool) -> None:
        """Each expert's rows of the activations by its own matrix of the stack ``w``."""
        self.add(
            "experts_step", product_kernel(w.format, x.form), w.address, w.nbytes, w.columns, x.address,
            x.nbytes, address(y), stride(y), bounds, experts, w.panels, w.rows, then_wait=then_wait,
        )  # fmt: skip

    def offer(self, call: Call) -> tuple[int, ...]:
        """Offer the input of a collective to the other ranks; what a ``Group`` is made of."""
        x, peers = call.inputs[0], call.peers
        if peers is None or len(peers.turns) < self.device.threads:
            raise LabinferError("run.no-peers", "a collective needs the other ranks of its group")
        group = (
            peers.rank, peers.ranks, address(peers.flags), address(peers.parts), peers.parts.strides[1],
            address(peers.turns),
        )  # fmt: skip
        self.add("offer_step", self.count(x), address(x), stride(x), x.shape[1], *group)
        return group

    def linear(self, call: Call, x: Any, y: Any, mode: int = 0) -> None:
        """One linear op on float32 rows."""
        w = call.weights["weight"]
        [rows] = self.activations(x, [self.form(w.format, x)]).values()
        self.product(rows, w, y, call.weights.get("bias"), mode)

    def normed(self, call: Call, x: Any, forms: Iterable[int]) -> dict[int, ActivationRows]:
        """``rms_norm`` of ``x`` straight into activation rows of each of ``forms``."""
        columns = x.shape[1]
        normed = self.take_array(x.shape)
        weight, eps, offset = address(call.weights.get("weight")), float(call.attrs.eps), float(call.attrs.offset)
        first, *others = sorted(set(forms), key=lambda form: form == 0)
        if first == 0:
            self.add(
                "rms_norm_step", self.count(x), address(x), stride(x), weight, address(normed), columns, columns,
                columns, eps, offset,
            )  # fmt: skip
            return self.activations(normed, [0])
        rows = self.take_rows(first, x)
        self.add(
            "norm_quantize_step", self.count(x), first, address(x), stride(x), columns, rows.address, rows.nbytes,
            weight, address(normed), columns, eps, offset,
        )  # fmt: skip
        return {first: rows} | self.activations(normed, others)

    def turn(self, call: Call, positions: Any) -> tuple[int, int, int, int, int, int]:
        """What a rope op does: table, rows, head_dim, rotary_start, half, interleaved."""
        attrs = call.attrs
        geometry = attrs.head_dim, attrs.rotary_start, attrs.turned // 2, int(attrs.style == "interleaved")
        if attrs.length_dependent and not attrs.recompute_after:
            return *self.dynamic_table(call, positions), *geometry
        step = self.call.step
        length = int(positions.max()) + 1 if step is None else step.block_table.shape[1] * step.block_size
        tables = self.device.rope_tables.table(attrs, length, call.weights)
        self.kept.append(tables)
        rows = address(positions)
        if attrs.recompute_after:
            rows = self.take(4 * len(positions))
            self.add(
                "longrope_rows_step", address(self.step.query_start), address(self.step.total_len),
                address(positions), attrs.recompute_after, length, rows,
            )  # fmt: skip
        return address(tables), rows, *geometry

    def dynamic_table(self, call: Call, positions: Any) -> tuple[int, int]:
        """Table and rows of a rope whose angles depend on the length of each sequence, filled in every step."""
        attrs, count = call.attrs, len(positions)
        table, rows = self.take(8 * count * (attrs.turned // 2)), self.take(4 * count)
        self.add(
            "dynamic_table_step", address(self.step.query_start), address(self.step.total_len), address(positions),
            address(call.weights.get("freq_factors")), attrs.rotary_dim or attrs.turned, attrs.turned // 2, table, rows,
            attrs.max_position, float(attrs.theta), float(attrs.scaling.factor),
        )  # fmt: skip
        return table, rows
