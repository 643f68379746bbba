"""What an op is: the contract that every file in this folder fills in, and the registry they fill.

An op kind is declared once, here in ``labinfer/ops``: its operands, weights and attributes, its shape rule, what it
costs, whether it may write over an input, and a numpy reference. Compiler, backends, drawings and docs read this one
truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from labinfer.errors import InvalidFile, did_you_mean

if TYPE_CHECKING:
    import numpy as np

Dim = int | Literal["T", "R"]
"""A dimension: a number, ``T`` (tokens in this step) or ``R`` (rows of logits in this step)."""

Shape = tuple[Dim, ...]

ITEM_SIZE = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4}
"""Bytes of one element of an activation, by dtype."""


def dim(value: Dim, tokens: int, rows: int) -> int:
    """The number a dimension stands for in a step of ``tokens`` tokens and ``rows`` rows of logits."""
    return tokens if value == "T" else rows if value == "R" else int(value)


def elements(shape: Shape, tokens: int, rows: int) -> int:
    """The number of elements of ``shape`` in a step of ``tokens`` tokens and ``rows`` rows of logits."""
    count = 1
    for size in shape:
        count *= dim(size, tokens, rows)
    return count


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape and dtype of a value; activations are row-major ``[T, ...]`` or ``[R, ...]``."""

    shape: Shape
    dtype: str = "f32"

    def nbytes(self, tokens: int, rows: int) -> int:
        """Bytes in a step of ``tokens`` tokens and ``rows`` rows of logits."""
        return elements(self.shape, tokens, rows) * ITEM_SIZE[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


OVER_FIRST: Mapping[int, tuple[int, ...]] = {0: (0,)}
"""``OpSpec.inplace`` of an op whose result may be written over its first input."""

OVER_EITHER: Mapping[int, tuple[int, ...]] = {0: (0, 1)}
"""``OpSpec.inplace`` of an op whose result may be written over its first or second input."""


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """A weight operand: its name in the map and in the reference, and whether an op can do without it."""

    name: str
    optional: bool = False


class OpAttrs(BaseModel):
    """Base of every op's attributes: known names only, never changed after the map is read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, defer_build=True
    )


class ShapeMismatch(Exception):
    """Raised by a shape rule; the compiler adds the place and the producers of ``inputs`` (operand indices)."""

    def __init__(self, message: str, inputs: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.inputs = tuple(inputs)


NO_ADAPTER = -1
"""``Step.adapter`` of a sequence without an adapter."""


@dataclass(slots=True)
class Step:
    """The runtime input of one step, as the kernels see it: flat over all sequences. All arrays are int32.

    ``positions[T]``; ``query_start[S+1]`` bounds each sequence's tokens; ``context_len[S]`` counts a sequence's tokens
    up to and with this step; ``total_len[S]`` counts all its tokens known so far (prompt and generated), which
    length-dependent rope looks at; ``block_table[S, B]`` lists its cache blocks in order; ``slot_mapping[T]`` says
    where each token's keys and values go; ``logits_rows[R]`` picks the tokens whose logits are wanted. ``adapter[S]``
    is the slot of each sequence's adapter or ``NO_ADAPTER``; it is None where no sequence has one. A block holds
    ``block_size`` tokens; no step has more than ``max_num_seqs`` sequences.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    query_start: np.ndarray
    context_len: np.ndarray
    total_len: np.ndarray
    block_table: np.ndarray
    slot_mapping: np.ndarray
    logits_rows: np.ndarray
    block_size: int = 16
    max_num_seqs: int = 1
    adapter: np.ndarray | None = None


class Peers(Protocol):
    """The ranks of a tensor-parallel group as one of them sees them; all see the same memory.

    ``flags`` int64 [ranks + 1, 8] holds, a cache line each, how many collectives each rank has offered its part for,
    and last whether a rank has left. ``parts`` float32 [2, ranks, numbers] holds what the ranks offer, every other turn
    in the other half. ``turns`` int64 [workers, 8] is this rank's own: the collectives that each worker has finished.
    """

    rank: int
    ranks: int
    flags: np.ndarray
    parts: np.ndarray
    turns: np.ndarray

    def exchange(self, part: np.ndarray, columns: Sequence[int]) -> list[np.ndarray]:
        """Offer ``part``, and wait for those of all ranks: [rows, columns of the rank], which hold until the next."""


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What a plan decides about how a device computes.

    ``activations`` is ``exact``, or ``int8`` for fewer bits of them and more speed. ``matrix_unit`` gives the fewest
    tokens for which products with weights in a format run on the device's matrix unit.
    """

    activations: Literal["exact", "int8"] = "exact"
    matrix_unit: Mapping[str, int] = field(default_factory=dict, hash=False)


DEFAULT_OPTIONS = KernelOptions()


@dataclass(slots=True)
class Call:
    """One op with everything resolved to arrays: what a kernel gets.

    ``cache`` holds the op's state by part name (``k``, ``v``), each ``[slots, width]``; slot ``b * block_size + j`` is
    token ``j`` of cache block ``b``. ``workspace`` is scratch memory. A fused op has the calls of its ``parts``, where
    values that never leave the kernel are None. ``options`` are the plan's. ``rows_symbol`` is what the first dimension
    of the op's values stands for, T or R, where a program may serve steps of other sizes. ``peers`` are the ranks of a
    collective: ``Peers`` in host memory, or what the device has instead.
    """

    attrs: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...] = ()
    weights: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)
    step: Step | None = None
    workspace: Any = None
    parts: tuple[Call, ...] = ()
    options: KernelOptions = DEFAULT_OPTIONS
    rows_symbol: Dim | None = None
    peers: Any = None


@dataclass(frozen=True, slots=True)
class KernelBounds:
    """The largest call of a kernel that a plan allows: what its scratch memory is sized for.

    ``attrs`` are those of the op, or of each part of a fused one; ``weights`` are (stored format, shape) in the order
    of the parts and their slots.
    """

    kind: str
    attrs: tuple[Any, ...]
    inputs: tuple[TensorType, ...]
    weights: tuple[tuple[str, tuple[int, ...]], ...]
    tokens: int
    rows: int
    sequences: int
    threads: int
    options: KernelOptions = DEFAULT_OPTIONS


class OpSpec:
    """One op kind. A subclass in this folder declares it; ``register`` makes it known under ``kind``.

    ``inputs`` names the operands in order, ``outputs`` the results; the last ``optional_inputs`` operands may be left
    out, and an output name with a star (``*parts``) stands for as many outputs as ``infer`` returns. ``inplace`` maps
    an output index to the input indices it may be written over, when shapes are equal and the input dies there.
    ``view`` says that outputs are column windows of input 0, side by side, and no kernel runs. ``state`` says that the
    op uses the map's cache. ``inserted`` ops come from the compiler; a map cannot write them.
    """

    kind: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ("x",)
    optional_inputs: ClassVar[int] = 0
    outputs: ClassVar[tuple[str, ...]] = ("y",)
    weights: ClassVar[tuple[WeightSlot, ...]] = ()
    inplace: ClassVar[Mapping[int, tuple[int, ...]]] = {}
    view: ClassVar[bool] = False
    state: ClassVar[bool] = False
    inserted: ClassVar[bool] = False

    class Attrs(OpAttrs):
        """No attributes."""

    def infer(self, attrs: Any, inputs: Sequence[TensorType]) -> list[TensorType]:
        """Types of the outputs; raises ``ShapeMismatch`` when the inputs do not fit."""
        raise NotImplementedError

    def weight_shapes(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, tuple[int, ...]]:
        """Shape of each weight slot, in the checkpoint's row-major order."""
        return {}

    def state_widths(self, attrs: Any, inputs: Sequence[TensorType]) -> dict[str, int]:
        """For an op with ``state``: the width of each part of the cache that it reads or writes."""
        raise NotImplementedError

    def flops(self, attrs: Any, inputs: Sequence[TensorType], tokens: int, rows: int, context: int) -> int:
        """Floating point operations of one step over ``tokens`` tokens that see ``context`` tokens each."""
        return 2 * sum(elements(x.shape, tokens, rows) for x in inputs)

    def reference(self, call: Call) -> Sequence[np.ndarray]:
        """The op in plain numpy, float32: the oracle that every kernel is compared with. Returns the outputs."""
        raise NotImplementedError


OPS: dict[str, OpSpec] = {}
"""Every op kind by name, filled by ``register`` when ``labinfer.ops`` is imported."""


def register(spec: type[OpSpec]) -> type[OpSpec]:
    """Class decorator: make an op kind known under ``spec.kind``."""
    if spec.kind in OPS:
        raise ValueError(f"op '{spec.kind}' is declared twice")
    OPS[spec.kind] = spec()
    return spec


def spec_of(kind: str) -> OpSpec:
    """The declaration of ``kind``; an unknown kind is an ``InvalidFile`` error with the closest known name."""
    try:
        return OPS[kind]
    except KeyError:
        raise InvalidFile("map.unknown-op", f"there is no op '{kind}'", remedy=did_you_mean(kind, OPS)) from None


def last_dim(x: TensorType, operand: int = 0) -> int:
    """The feature size of an activation ``[T, features]``; raises ``ShapeMismatch`` when it is not a number."""
    if len(x.shape) != 2 or not isinstance(x.shape[-1], int):
        raise ShapeMismatch(f"expected an activation [T, features], got {x}", [operand])
    return x.shape[-1]


def expect_features(x: TensorType, expected: int, meaning: str, operand: int = 0) -> None:
    """Raises ``ShapeMismatch`` unless ``x`` is ``[T, expected]``; ``meaning`` says where the number comes from."""
    if (features := last_dim(x, operand)) != expected:
        raise ShapeMismatch(f"expected {expected} features ({meaning}), got {features}", [operand])
