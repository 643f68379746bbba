"""What a plan decided, gathered for a reader: sizes, costs, fusions, and the map line that every op comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from labinfer.compiler.fold import steps, unfold_inputs, unfold_ops, unfold_states, unfold_weights
from labinfer.compiler.graph import Op, Weight
from labinfer.compiler.plan import Limits, Plan, Source, Stage
from labinfer.ops import OPS
from labinfer.ops.base import TensorType
from labinfer.ops.formats import stored_bytes
from labinfer.ops.fusions import is_view


@dataclass(frozen=True, slots=True)
class FormatReport:
    """The weights that the checkpoint stores in one format."""

    format: str
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class LiveValue:
    """A value in memory when the arena is fullest."""

    name: str
    type: str
    bytes: int


@dataclass(frozen=True, slots=True)
class StageReport:
    """A stage: its device, the layers it runs, bytes by kind, and how full its arena gets.

    ``step`` is what the batch of a step takes; ``kv_cache_per_token`` is in bytes, by cache group; ``swap`` is host
    memory; ``kernels`` counts the calls of a step; ``fused`` counts fused ops by kind.
    """

    device: str
    layers: str
    parameters: str
    weights: int
    kv_cache: int
    kv_cache_per_token: tuple[int, ...]
    swap: int
    arena: int
    step: int
    total: int
    lower_bound: int
    optimal: bool
    algorithm: str
    peak_op: str
    live_at_peak: tuple[LiveValue, ...]
    kernels: int
    fused: dict[str, int]
    can_fuse: bool
    receives: tuple[str, ...]
    sends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """One token of one sequence: floating point operations and bytes read, without and with its context."""

    flops: int
    weight_bytes: int
    context: int
    context_flops: int
    context_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that ``labinfer explain`` says."""

    labinfer: str
    source: Source
    limits: Limits
    vocab_size: int
    num_parameters: int
    num_weights: int
    formats: tuple[FormatReport, ...]
    stages: tuple[StageReport, ...]
    decode: DecodeCost


@dataclass(frozen=True, slots=True)
class PlacedOp:
    """A primitive op with the types of its inputs."""

    op: Op
    inputs: tuple[TensorType, ...]


def report(plan: Plan) -> Report:
    """The report of ``plan``."""
    weights = {name: weight for name, weight in unfold_weights(plan).items() if not weight.adapter}
    placed = [list(placed_ops(stage)) for stage in plan.stages]
    stored: Counter[str] = Counter()
    for weight in weights.values():
        stored[weight.format] += stored_bytes(weight.format, weight.shape)
    counts = Counter(weight.format for weight in weights.values())
    return Report(
        labinfer=plan.labinfer,
        source=plan.source,
        limits=plan.limits,
        vocab_size=plan.vocab_size,
        num_parameters=num_parameters(plan),
        num_weights=len(weights),
        formats=tuple(FormatReport(name, counts[name], size) for name, size in stored.most_common()),
        stages=tuple(stage_report(plan, stage, ops) for stage, ops in zip(plan.stages, placed, strict=True)),
        decode=decode_cost(plan, placed, weights),
    )


def num_parameters(plan: Plan) -> int:
    """The elements of all weights; a weight that two ops share counts once."""
    own = [weight for weight in plan.weights if not weight.adapter]
    return sum(prod(w.shape) * (w.layers[1] - w.layers[0] + 1 if w.layers else 1) for w in own)


def placed_ops(stage: Stage) -> Iterable[PlacedOp]:
    """The primitive ops of ``stage`` in order."""
    known = {name: slot.type for name, slot in unfold_inputs(stage).items()}
    known |= dict.fromkeys(("token_ids", "positions"), TensorType(("T",), "i32"))
    for op, made in unfold_ops(stage):
        known |= {name: slot.type for name, slot in made.items()}
        for part in op.primitives():
            yield PlacedOp(part, tuple(known[name] for name in part.inputs))


def stage_report(plan: Plan, stage: Stage, placed: list[PlacedOp]) -> StageReport:
    """The report of one stage."""
    limits, device = plan.limits, plan.devices[stage.device]
    sizes = (limits.max_num_batched_tokens, limits.max_logits_rows)
    living = {name: LiveValue(name, str(s.type), s.type.nbytes(*sizes)) for name, s in unfold_inputs(stage).items()}
    fused: Counter[str] = Counter()
    kernels = 0
    for op, made in unfold_ops(stage):
        living |= {name: LiveValue(name, str(slot.type), slot.type.nbytes(*sizes)) for name, slot in made.items()}
        if op.workspace:
            living[f"{op.name}#"] = LiveValue(op.name, f"scratch of {op.kind}", op.workspace[1])
        fused[op.kind] += bool(op.body)
        kernels += sum(not is_view(step.kind) for step in steps(op, made))
    states = unfold_states(plan)
    used = [states[name] for name in dict.fromkeys(each.op.state for each in placed if each.op.state)]
    return StageReport(
        device=stage.device,
        layers=ranges({each.op.layer for each in placed if each.op.layer is not None}),
        parameters=device.parameters,
        weights=stage.bytes.weights,
        kv_cache=stage.bytes.kv_cache,
        kv_cache_per_token=tuple(
            limits.cache_bytes_per_number * sum(state.width for state in used if state.group == group)
            for group in range(len(limits.groups))
        ),
        swap=stage.bytes.swap,
        arena=stage.bytes.arena,
        step=stage.bytes.step + stage.bytes.tables,
        total=stage.bytes.total,
        lower_bound=stage.arena.lower_bound,
        optimal=stage.arena.optimal,
        algorithm=stage.arena.algorithm,
        peak_op=stage.arena.peak_op,
        live_at_peak=tuple(living[name] for name in stage.arena.live_at_peak if name in living),
        kernels=kernels,
        fused={kind: count for kind, count in fused.items() if count},
        can_fuse=bool(device.fusions),
        receives=tuple(stage.inputs),
        sends=tuple(stage.outputs),
    )


def decode_cost(plan: Plan, stages: list[list[PlacedOp]], weights: Mapping[str, Weight]) -> DecodeCost:
    """What one more token costs a sequence that has used its whole context."""
    context = plan.limits.max_model_len
    states = unfold_states(plan)
    flops = context_flops = weight_bytes = context_bytes = 0
    for stage, placed in zip(plan.stages, stages, strict=True):
        used = dict.fromkeys(name for each in placed for name in each.op.weights.values() if name in weights)
        stored = {name: stored_bytes(weights[name].format, weights[name].shape) for name in used}
        growth = stage.bytes.weights / max(sum(stored.values()), 1)  # the device's layout may differ from the file's
        for each in placed:
            op, spec = each.op, OPS[each.op.kind]
            alone = spec.flops(op.attrs, each.inputs, 1, 1, 1)
            flops += alone
            context_flops += spec.flops(op.attrs, each.inputs, 1, 1, context) - alone
            for name in used.keys() & op.weights.values():
                weight_bytes += int(growth * stored[name] * share_read(each, weights[name]))
            if spec.state and op.outputs and op.state:
                seen = min(context, getattr(op.attrs, "window", None) or context)
                context_bytes += plan.limits.cache_bytes_per_number * seen * states[op.state].width
    return DecodeCost(flops, weight_bytes, context, context_flops, context_bytes)


def share_read(placed: PlacedOp, weight: Weight) -> float:
    """The part of ``weight`` that one token reads: a row of an embedding, its own experts of a mixture, else all."""
    if placed.op.kind == "embedding":
        return 1 / weight.shape[0]
    if placed.op.kind == "moe":
        chosen = placed.inputs[1].shape[-1]  # ids [T, top_k]
        return int(chosen) / weight.shape[0]
    return 1.0


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7; ``-`` for none."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs) or "-"
