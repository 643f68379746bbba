"""The writer of a tape's rows: scratch memory, and what several ops have in common."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from labinfer.backends.cuda.arguments import Turn, address, narrow_define, stride
from labinfer.backends.cuda.compile import Source
from labinfer.backends.cuda.layout import ACTIVATION_CODES, rounded
from labinfer.backends.cuda.tape import Row, Runnable
from labinfer.errors import LabinferError
from labinfer.ops.base import Call, Step

if TYPE_CHECKING:
    from labinfer.backends.cuda.device import CudaDevice


MAX_NORM = 32 << 10
"""Numbers that a block of ``norm.cu`` keeps at most."""


class Writer:
    """Writes the rows of one op; ``take`` hands out its scratch memory.

    ``narrow_output``: the format, of 16 bits, in which the op is to leave its result, where it can (then
    ``leaves_narrow``); the rows lie together in the result's memory. ``narrow_input``: its input lies so.
    """

    def __init__(
        self,
        device: CudaDevice,
        call: Call,
        sequences: int,
        narrow_input: bool = False,
        narrow_output: str | None = None,
    ) -> None:
        self.device, self.call, self.sequences = device, call, sequences
        self.narrow_input, self.narrow_output, self.leaves_narrow = narrow_input, narrow_output, False
        self.rows: list[Row | Runnable] = []
        self.kept: list[Any] = []
        self.offset = 0

    @property
    def step(self) -> Step:
        """The step batch."""
        if self.call.step is None:
            raise LabinferError("run.no-step", "this op needs a step batch")
        return self.call.step

    def take(self, nbytes: int) -> int:
        """Where so many bytes of the op's planned scratch memory begin, counted from its start."""
        left = 0 if self.call.workspace is None else self.call.workspace.nbytes
        size = rounded(nbytes)
        if self.offset + size > left:
            message = f"a kernel needs {self.offset + size} bytes of scratch, {left} were planned"
            raise LabinferError("run.workspace", message)
        self.offset += size
        return self.offset - size

    def scratch(self, nbytes: int) -> int:
        """The address of so many bytes of scratch memory."""
        return self.take(nbytes) + address(self.call.workspace)

    def array(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        """A device array, of four-byte numbers, over scratch memory."""
        start = self.take(4 * prod(shape)) // 4
        return self.call.workspace[start : start + prod(shape)].view(dtype).reshape(shape)

    def add(
        self,
        source: str,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        *arguments: Any,
        defines: Sequence[str] = (),
        shared: int = 0,
        cluster: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        """Append a row."""
        self.rows.append(Row(Source(source, tuple(defines)), kernel, grid, threads, arguments, shared, cluster))

    def each(self, source: str, kernel: str, tokens: int, width: int, *arguments: Any, defines: Sequence[str] = ()
             ) -> None:  # fmt: skip
        """A kernel with a thread for every four of ``width`` numbers of each token."""
        threads = min(256, -(-width // 128) * 32)
        self.add(source, kernel, (-(-width // (4 * threads)), tokens, 1), threads, *arguments, defines=defines)

    def copy(self, x: Any, y: Any) -> None:
        """``y = x``, unless they are one."""
        if address(x) != address(y):
            self.each("elementwise", "scale", len(x), x.shape[1], x, stride(x), y, stride(y), x.shape[1], 1.0)

    def rms_norm(self, call: Call, x: Any, y: Any, y_row: int, defines: Sequence[str] = (), rows: Any = None) -> None:
        """``rms_norm`` of each row of ``x``, or of as many at ``rows`` of it, to ``y``."""
        width, attrs = x.shape[1], call.attrs
        n = attrs.group or width
        if n > MAX_NORM:
            raise LabinferError("cuda.norm", f"rms_norm of {n} numbers: the kernel takes {MAX_NORM}")
        threads = min(512 if n <= MAX_NORM // 2 else 1024, -(-n // 128) * 32)
        grid = (len(x), width // n, 1)
        arguments = (x, stride(x), rows, call.weights.get("weight"), y, y_row, n, float(attrs.eps), float(attrs.offset))
        self.add("norm", "rms_norm", grid, threads, *arguments, defines=defines)

    def glu(self, function: str, gate: Any, up: Any, y: Any) -> None:
        """``y = function(gate) * up``."""
        n, code = y.shape[1], ACTIVATION_CODES[function]
        arguments = (gate, stride(gate), up, stride(up), y, stride(y), n, code)
        self.each("elementwise", "glu", len(y), n, *arguments)

    def result_defines(self) -> tuple[str, ...]:
        """The macro of a kernel that leaves the result as it is asked for."""
        self.leaves_narrow = self.narrow_output is not None
        return (narrow_define(self.narrow_output),) if self.narrow_output else ()

    def row_of(self, y: Any) -> int:
        """Numbers from row to row of the result."""
        return int(y.shape[1]) if self.narrow_output else stride(y)

    def turn(self, call: Call) -> tuple[Turn, int]:
        """What a rope op does, and the kernel's ``TURN``."""
        attrs, positions, step = call.attrs, call.inputs[1], call.step
        factors = call.weights.get("freq_factors")
        turn = Turn(0, address(factors), address(positions))
        turn.head_dim, turn.start, turn.half = attrs.head_dim, attrs.rotary_start, attrs.turned // 2
        turn.interleaved, turn.sequences = int(attrs.style == "interleaved"), self.sequences
        if attrs.length_dependent:
            turn.query_start, turn.total_len = address(self.step.query_start), address(self.step.total_len)
        if attrs.length_dependent and not attrs.recompute_after:
            turn.trained, turn.rotary_dim = attrs.max_position, attrs.rotary_dim or attrs.turned
            turn.theta, turn.factor = attrs.theta, attrs.scaling.factor
            return turn, 2
        length = int(positions.max()) + 1 if step is None else step.block_table.shape[1] * step.block_size
        table = self.device.rope_tables.table(attrs, length, call.weights)
        self.kept.append(table)
        turn.table, turn.length, turn.trained = address(table), length, attrs.recompute_after or 0
        return turn, int(bool(attrs.recompute_after))
