"""The plan: everything that was decided, as one readable JSON file that ``labinfer run`` only interprets.

A stage is what one device runs. Its ops stand in *blocks* (a block is written once however many layers repeat it) and
its
*schedule* says in which order, for which layers. Names in a block may hold ``{i}``, the layer; ``$h`` is a value that
the block receives. ``at`` is a byte offset in the device's one arena.
"""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from labinfer.compiler.placement_record import PlanModel, PlanPlacement
from labinfer.compiler.plan_json import compact_json, no_duplicates
from labinfer.errors import Errors, InvalidFile, Place
from labinfer.ops.base import ITEM_SIZE, Dim, KernelOptions, TensorType

SCHEMA_VERSION = 1
MAX_PLAN_BYTES = 4_000_000
"""A folded plan takes some 20 kB; a bound keeps a hostile one from taking time and memory."""


class CacheGroup(PlanModel):
    """The blocks of those layers whose attention sees the same window; what the window has passed is given back."""

    window: PositiveInt | None = Field(
        default=None, description="tokens that attention sees, the newest included; all of them without one"
    )
    num_blocks: PositiveInt = Field(description="blocks of the cache")
    swap_blocks: NonNegativeInt = Field(default=0, description="blocks of host memory for what is swapped out")


class Limits(PlanModel):
    """Upper bounds the plan holds for: tokens and sequences of a step, rows of logits, tokens of a sequence."""

    max_num_batched_tokens: PositiveInt = Field(description="tokens of a step: the bound of `T`")
    max_num_seqs: PositiveInt = Field(description="sequences of a step")
    max_logits_rows: PositiveInt = Field(description="rows of logits of a step: the bound of `R`")
    max_model_len: PositiveInt = Field(description="tokens of a sequence, prompt and answer")
    block_size: PositiveInt = Field(description="tokens in a cache block")
    kv_dtype: Literal["f32", "bf16", "f16"] = Field(default="f32", description="format of keys and values in the cache")
    groups: list[CacheGroup] = Field(
        min_length=1, max_length=64, description="blocks of the cache: for layers that see all first, then by window"
    )
    max_loras: NonNegativeInt = Field(default=0, description="LoRA adapters that a step may use; 0: no room for any")
    max_lora_rank: NonNegativeInt = Field(default=0, description="greatest rank of an adapter")

    @property
    def cache_bytes_per_number(self) -> int:
        """Bytes of one number in the KV cache."""
        return ITEM_SIZE[self.kv_dtype]

    def blocks_needed(self, group: CacheGroup, *lengths: int, times: int = 1) -> int:
        """Blocks of ``group`` that sequences of ``lengths`` tokens, ``times`` over, own together at most at one time.

        Where there is a window, these are its blocks, wherever in a block it begins, and those of one step's tokens.
        """
        everything, count = times * sum(-(-length // self.block_size) for length in lengths), times * len(lengths)
        if group.window is None:
            return everything
        tokens = count * (group.window + self.block_size - 2) + self.max_num_batched_tokens
        return min(everything, count + tokens // self.block_size)

    @property
    def max_sequence_len(self) -> int:
        """Tokens of the longest sequence that the plan and its cache hold."""
        bounds = [
            group.num_blocks * self.block_size
            for group in self.groups
            if self.blocks_needed(group, self.max_model_len) > group.num_blocks
        ]
        return min([self.max_model_len, *bounds])

    @property
    def max_chosen(self) -> int:
        """Tokens that a step makes at most."""
        return min(self.max_num_seqs, self.max_logits_rows)

    @property
    def step_shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays that a step's groups share, at these bounds, all int32 (see ``labinfer.ops.base.Step``)."""
        tokens, sequences = self.max_num_batched_tokens, self.max_num_seqs
        return {
            "token_ids": (tokens,),
            "positions": (tokens,),
            "query_start": (sequences + 1,),
            "context_len": (sequences,),
            "total_len": (sequences,),
            "logits_rows": (self.max_logits_rows,),
            **({"adapter": (sequences,)} if self.max_loras else {}),
        }

    @property
    def group_shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays of a step that each cache group has of its own."""
        return {
            "block_table": (self.max_num_seqs, -(-self.max_model_len // self.block_size)),
            "slot_mapping": (self.max_num_batched_tokens,),
        }

    @property
    def step_bytes(self) -> int:
        """Bytes of a step batch at these bounds."""
        shared, own = (
            sum(4 * prod(shape) for shape in shapes.values()) for shapes in (self.step_shapes, self.group_shapes)
        )
        return shared + own * len(self.groups)


class Source(PlanModel):
    """What the plan was made from, with sha256 digests; ``checkpoint`` is None when it was made without weights."""

    family: str = Field(description="family of the map")
    name: str = Field(description="name of the model")
    kind: Literal["hf", "gguf"] = Field(description="whose names the checkpoint uses: safetensors (`hf`) or `gguf`")
    maps: list[str] = Field(description="map files, nearest first; shipped ones by name, others by path")
    checkpoint: str | None = Field(default=None, description="path of the weights")
    sha256: dict[str, str] = Field(
        default_factory=dict, description="digests of `map`, `config` and `weights` (the tensor table, not the data)"
    )


class PlanValue(PlanModel):
    """A value: its type (``f32[T, 2048]``), its byte offset in the arena, and its row pitch in bytes when it is a
    window.

    ``at`` is None for a value that lives only inside the kernel of a fused op.
    """

    type: str = Field(description="dtype and shape")
    at: NonNegativeInt | None = Field(default=None, description="byte offset in the arena")
    row: PositiveInt | None = Field(default=None, description="bytes from row to row, when more than a row's own")


class PlanOp(PlanModel):
    """One op; a fused op lists the primitive ops it stands for in ``body``.

    ``workspace`` is the scratch memory of its kernel: byte offset in the arena, and bytes.
    """

    name: str = Field(description="name of the op: that of its first result")
    op: str = Field(description="kind")
    inputs: list[str] = Field(alias="in", description="operands")
    out: dict[str, PlanValue] = Field(default_factory=dict, description="results")
    weights: dict[str, str] = Field(default_factory=dict, description="weight slot, and the weight in it")
    attrs: dict[str, Any] = Field(default_factory=dict, description="attributes that differ from the default")
    state: str | None = Field(default=None, description="state it uses")
    origin: str = Field(default="", description="map file, line and column")
    workspace: tuple[NonNegativeInt, PositiveInt] | None = Field(
        default=None, description="scratch memory: byte offset in the arena, and bytes"
    )
    cost: tuple[NonNegativeFloat, NonNegativeFloat] | None = Field(
        default=None, description="predicted seconds in a decode step and in a prefill step of the workload"
    )
    body: list[PlanOp] = Field(default_factory=list, description="parts of a fused op")


class Entry(PlanModel):
    """A line of the schedule: a block, the layers it runs for, and the values it receives in the first of them.

    In each further layer a received value is the ``next`` one (made in the layer before), or the same where it is None.
    """

    block: str = Field(description="block to run")
    layers: tuple[NonNegativeInt, NonNegativeInt] | None = Field(
        default=None, description="first and last layer it runs for"
    )
    receives: dict[str, str] = Field(
        default_factory=dict, description="`$name` in the block, and the value it stands for in the first of the layers"
    )
    next: dict[str, str | None] = Field(
        default_factory=dict, description="`$name`, and the value it stands for in each further layer"
    )


class Arena(PlanModel):
    """The activation arena of a stage, in bytes, and how good its packing is."""

    size: NonNegativeInt = Field(description="bytes of the arena")
    lower_bound: NonNegativeInt = Field(
        description="bytes that no arena can do without: the largest sum of values alive at one time"
    )
    optimal: bool = Field(description="whether no smaller arena exists")
    algorithm: str = Field(description="what found the packing")
    peak_op: str = Field(description="op at which most is alive")
    live_at_peak: list[str] = Field(description="values alive there")


class StageBytes(PlanModel):
    """Exact bytes the stage takes on its device; ``step`` is the step batch, ``tables`` constants such as
    rope's and what the device chooses tokens with.

    ``swap``, ``host`` and ``peers`` lie in host memory and do not count as the device's.
    """

    weights: NonNegativeInt = Field(description="weights in the device's layout")
    kv_cache: NonNegativeInt = Field(description="the cache")
    arena: NonNegativeInt = Field(description="the arena")
    step: NonNegativeInt = Field(description="the inputs of a step")
    tables: NonNegativeInt = Field(
        default=0, description="constants that ops share, such as rope's cosines, and memory to choose tokens with"
    )
    window: NonNegativeInt = Field(default=0, description="slots that streamed layers are copied into in turn")
    host: NonNegativeInt = Field(default=0, description="host memory for the weights of streamed layers")
    swap: NonNegativeInt = Field(default=0, description="host memory for cache blocks that are swapped out")
    adapters: NonNegativeInt = Field(default=0, description="pools of LoRA adapters")
    peers: NonNegativeInt = Field(default=0, description="host memory in which other ranks read this one's parts")
    exchange: NonNegativeInt = Field(
        default=0, description="memory of the device itself to which other ranks write their parts, instead of `peers`"
    )

    @property
    def total(self) -> int:
        """All of it on the device."""
        own = self.weights + self.kv_cache + self.arena + self.step + self.tables + self.adapters + self.window
        return own + self.exchange


class Stage(PlanModel):
    """What one device runs: received values, sent values, blocks, their schedule, and memory.

    The ranks of a tensor-parallel group, which run one stage of the model together, follow one another.
    """

    device: str = Field(description="name of the device")
    rank: NonNegativeInt = Field(default=0, description="its place among the ranks of `tensor_split`")
    inputs: dict[str, PlanValue] = Field(default_factory=dict, description="values received from earlier stages")
    outputs: list[str] = Field(description="values sent to later stages; of the last stage, the logits")
    schedule: list[Entry] = Field(description="which blocks run, in order")
    blocks: dict[str, list[PlanOp]] = Field(description="ops by block")
    streamed: list[NonNegativeInt] = Field(
        default_factory=list, description="layers whose matrices are copied to the device when they are needed"
    )
    streamed_from: Literal["host", "disk"] = Field(default="host", description="where streamed layers are kept")
    arena: Arena = Field(description="the arena and how good its packing is")
    bytes: StageBytes = Field(description="memory")

    @property
    def layers(self) -> set[int]:
        """The layers that it runs."""
        spans = [entry.layers for entry in self.schedule if entry.layers is not None]
        return {layer for first, last in spans for layer in range(first, last + 1)}


class PlanPart(PlanModel):
    """What a rank has of a weight; see ``labinfer.compiler.graph.Part``."""

    axis: Literal[0, 1] = Field(description="0: rows, as transformed; 1: columns")
    size: PositiveInt = Field(description="rows or columns of the whole")
    runs: list[tuple[NonNegativeInt, PositiveInt]] = Field(min_length=1, description="runs of them, [start, stop)")


class PlanWeight(PlanModel):
    """A weight, or the same weight of several ``layers``; see ``labinfer.compiler.graph.Weight`` for the fields."""

    name: str = Field(description="name, with `{i}` for the layer")
    layers: tuple[NonNegativeInt, NonNegativeInt] | None = Field(default=None, description="first and last layer")
    shape: list[PositiveInt] = Field(description="shape as ops see it")
    format: str = Field(description="stored format")
    tensor: str = Field(description="tensor in the checkpoint, with `{i}` and, in a stack, `{e}`")
    stack: PositiveInt | None = Field(default=None, description="tensors stacked along the first axis")
    rows: list[PositiveInt] = Field(default_factory=list, description="transform: sizes of the first axis")
    order: list[NonNegativeInt] = Field(default_factory=list, description="transform: permutation of those axes")
    transpose: bool = Field(default=False, description="transform: both axes swapped")
    adapter: bool = Field(default=False, description="a pool, filled at run time: `tensor` is the name in an adapter")
    part: PlanPart | None = Field(default=None, description="what of the tensors it is, where ranks share them out")


class PlanState(PlanModel):
    """What the cache keeps per token, for each part; for one name or for several ``layers``."""

    name: str = Field(description="name, with `{i}` for the layer")
    layers: tuple[NonNegativeInt, NonNegativeInt] | None = Field(default=None, description="first and last layer")
    widths: dict[str, PositiveInt] = Field(description="numbers per token, by part")
    group: NonNegativeInt = Field(default=0, description="whose blocks of `limits.groups` hold it")


class PlanDevice(PlanModel):
    """A device: ``memory`` is its cap in bytes, ``parameters`` the layout of weights, ``threads`` how many it uses.

    ``activations`` and ``matrix_unit`` are how it computes (see ``options``). One that is ``declared`` is not here.
    """

    kind: str = Field(description="backend")
    memory: PositiveInt | None = Field(default=None, description="cap in bytes")
    parameters: str = Field(description="layout that weights take there")
    threads: PositiveInt | None = Field(default=None, description="threads it uses")
    declared: str | None = Field(default=None, description="of one that is not here, what it is said to be")
    fusions: list[str] = Field(default_factory=list, description="fused ops it has kernels for")
    activations: Literal["exact", "int8"] = Field(
        default="exact", description="bits of activations in products: about 16, or 8 for speed"
    )
    matrix_unit: dict[str, PositiveInt] = Field(
        default_factory=dict,
        description="fewest tokens for which products with weights in a format run on its matrix unit",
    )

    @property
    def options(self) -> KernelOptions:
        """How its kernels compute."""
        return KernelOptions(self.activations, self.matrix_unit)


class Plan(PlanModel):
    """A whole plan.json."""

    schema_version: Literal[1] = Field(default=1, description="version of this format")
    labinfer: str = Field(description="version that wrote it")
    source: Source = Field(description="what it was made from")
    limits: Limits = Field(description="upper bounds it holds for")
    vocab_size: PositiveInt = Field(description="columns of the logits")
    recompute_after: PositiveInt | None = Field(
        default=None, description="tokens beyond which cached keys of a sequence no longer hold (longrope)"
    )
    devices: dict[str, PlanDevice] = Field(description="devices by name")
    tensor_split: list[PositiveFloat] = Field(
        default_factory=list, description="shares of the ranks that run each stage together, if there are several"
    )
    stages: list[Stage] = Field(description="what each device runs, in order")
    placement: PlanPlacement | None = Field(default=None, description="why layers are where they are, if by cost")
    states: list[PlanState] = Field(description="what the cache keeps")
    weights: list[PlanWeight] = Field(description="weights and the tensors they are read from")

    @property
    def ranks(self) -> int:
        """Devices that run a stage together, each a part of it."""
        return max(1, len(self.tensor_split))

    @property
    def groups(self) -> list[list[Stage]]:
        """The ranks of each stage of the model, in order."""
        return [self.stages[start : start + self.ranks] for start in range(0, len(self.stages), self.ranks)]

    def dump(self) -> str:
        """The plan as JSON text: sorted by meaning, one op a line, ends with a newline."""
        data = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return compact_json({"schema_version": SCHEMA_VERSION, **data}) + "\n"


def load_plan(path: Path | str) -> Plan:
    """Read and check a plan file; every fault is an ``InvalidFile`` that names the file and the field.

    The arena is verified again, since plans are edited by hand.
    """
    from labinfer.compiler.verify_plan import verify_plan

    path = Path(path)
    plan = _parse(path)
    verify_plan(plan, str(path))
    return plan


def _parse(path: Path) -> Plan:
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            message = f"{path.stat().st_size} bytes is too large for a plan"
            raise InvalidFile("plan.too-large", message, place=Place(str(path)))
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=no_duplicates)
    except FileNotFoundError:
        raise InvalidFile("plan.missing", "no such plan file", place=Place(str(path))) from None
    except json.JSONDecodeError as error:
        lines = error.doc.splitlines()
        text = lines[error.lineno - 1] if error.lineno <= len(lines) else None
        place = Place(str(path), error.lineno, error.colno, text)
        raise InvalidFile("plan.json", f"not JSON: {error.msg}", place=place) from None
    except (OSError, RecursionError, ValueError) as error:  # ValueError: not UTF-8, a key twice, a number without end
        raise InvalidFile("plan.unreadable", f"cannot read the plan: {error}", place=Place(str(path))) from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise InvalidFile("plan.schema", "this is not a labinfer plan", place=Place(str(path)))
    if data["schema_version"] != SCHEMA_VERSION:
        message = f"plan has schema version {data['schema_version']!r}, this labinfer reads {SCHEMA_VERSION}"
        raise InvalidFile("plan.version", message, place=Place(str(path)), remedy="compile it again")
    try:
        return Plan.model_validate(data)
    except ValidationError as failure:
        details = failure.errors(include_url=False)[:20]
        raise Errors(
            InvalidFile("plan.schema", f"{'.'.join(map(str, d['loc']))}: {d['msg']}", place=Place(str(path)))
            for d in details
        ) from None


SYMBOLS: dict[str, Literal["T", "R"]] = {"T": "T", "R": "R"}
_TYPE = re.compile(r"^(?P<dtype>\w+)\[(?P<shape>[TR\d, ]*)\]$")


def parse_type(text: str) -> TensorType:
    """``f32[T, 2048]`` as a TensorType; raises ValueError on anything else."""
    match = _TYPE.match(text)
    if match is None or match["dtype"] not in ITEM_SIZE:
        raise ValueError(f"'{text}' is not a type such as f32[T, 2048]")
    dims: list[Dim] = []
    for part in match["shape"].split(","):
        part = part.strip()
        if part in SYMBOLS:
            dims.append(SYMBOLS[part])
        elif part.isdigit() and 0 < int(part) < 1 << 40:
            dims.append(int(part))
        else:
            raise ValueError(f"'{text}' has a dimension '{part}' that is neither T, R nor a positive number")
    return TensorType(tuple(dims), match["dtype"])
