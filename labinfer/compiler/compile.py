"""The compiler, from map to plan, on one screen: lower, run the passes, place, plan each arena, write it all down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from labinfer import __version__
from labinfer.compiler.arena import ArenaPlan, aligned, plan_arena
from labinfer.compiler.blueprint import Blueprint
from labinfer.compiler.cache_groups import DeviceRoom, Room, assign_groups, block_bytes, cache_bytes, size_groups
from labinfer.compiler.fold import GRAPH_INPUTS, fold_ops, fold_states, fold_weights, natural_row
from labinfer.compiler.graph import Op, OpGraph
from labinfer.compiler.lower import lower, map_name
from labinfer.compiler.options import FUSE, CompileOptions, check_options, lora_limits
from labinfer.compiler.passes import Tracer, run_passes
from labinfer.compiler.plan import Arena, CacheGroup, Limits, Plan, PlanDevice, PlanValue, Source, Stage, StageBytes
from labinfer.compiler.ranks import join, peer_bytes, place_ranks, rank_targets
from labinfer.compiler.residency import stream_layers
from labinfer.compiler.settings import ModelSource, model_scope
from labinfer.compiler.target import Placement, Target
from labinfer.errors import DoesNotFit, InvalidFile, UsageError
from labinfer.ops.base import KernelBounds, KernelOptions, TensorType
from labinfer.ops.fusions import FUSIONS

if TYPE_CHECKING:
    from labinfer.compiler.place_by_cost import Goal, PlacedByCost


def compile_graph(
    blueprint: Blueprint,
    source: ModelSource,
    targets: Sequence[Target],
    options: CompileOptions,
    tracer: Tracer,
    rank: int = 0,
) -> OpGraph:
    """Map and configuration to the optimised op graph, of one rank where several run a stage together."""
    fuse = options.fuse
    if fuse not in FUSE:
        raise UsageError("limits.fuse", f"fuse must be one of {', '.join(FUSE)}, got {fuse!r}")
    graph = lower(blueprint, source)
    tracer.done("lower", 0, len(graph.ops), f"{len(graph.weights)} weights, {len(graph.values)} values")
    native = set.intersection(*(set(target.fusions) for target in targets))
    chosen = [fusion for fusion in FUSIONS if fuse == "all" or (fuse == "auto" and fusion.kind in native)]
    run_passes(graph, chosen, tracer, **lora_limits(options), split=options.split, rank=rank)
    return graph


def compile_plan(
    blueprint: Blueprint,
    source: ModelSource,
    targets: Sequence[Target],
    options: CompileOptions,
    checkpoint: str | None = None,
    tracer: Tracer | None = None,
    goal: Goal | None = None,
) -> Plan:
    """The plan for running ``source`` on ``targets``; raises what is wrong with the map, the model or the devices.

    With a ``goal``, costs decide which device runs which layer.
    """
    tracer = tracer or Tracer()
    check_options(options)
    targets = rank_targets([_target(target, options) for target in targets], options.split, options.threads)
    graphs = [compile_graph(blueprint, source, targets, options, tracer, rank) for rank in range(len(options.split))]
    graph, whole = graphs[0], join(graphs)
    limits, vocab_size = _limits(blueprint, source, options), _vocab_size(graph)
    limits.groups, whole.states = assign_groups(whole.states, whole.ops, limits.max_model_len)
    for each in graphs:
        each.states = {name: whole.states[name] for name in each.states}
    placed = _place_by_cost(graph, targets, limits, goal, options) if goal else None
    by_rank = [placed.placements(targets)] if placed else place_ranks(graphs, targets)
    placements = [placement for group in zip(*by_rank, strict=True) for placement in group]
    tracer.done("place", len(whole.ops), len(whole.ops), f"{len(placements)} stages")
    stages = [
        _stage(graphs[rank], by_rank[rank], number, limits, options, rank)
        for number in range(len(by_rank[0]))
        for rank in range(len(graphs))
    ]
    for stage, placement in zip(stages, placements, strict=True):
        stream_layers(stage, placement, whole, options.streamed_layers, options.stream_from)
    _size_cache(whole, placements, stages, limits, options)
    _check_memory(stages, targets)
    arena = sum(stage.arena.size for stage in stages)
    tracer.done("arena", len(whole.ops), len(whole.ops), f"{arena} bytes, {stages[0].arena.algorithm}")
    plan = Plan(
        labinfer=__version__,
        source=_source(blueprint, source, graph, checkpoint),
        limits=limits,
        vocab_size=vocab_size,
        recompute_after=_recompute_after(graph),
        tensor_split=list(options.split) if len(graphs) > 1 else [],
        devices={target.name: _device(target, whole) for target in _used(targets, placements if placed else None)},
        stages=stages,
        states=fold_states(whole.states),
        weights=fold_weights(whole.weights),
    )
    if placed and goal:
        from labinfer.compiler.explain_placement import record_placement

        record_placement(plan, placed, goal)
    tracer.done(
        "write", len(whole.ops), len(whole.ops), f"{sum(len(b) for s in stages for b in s.blocks.values())} op lines"
    )
    return plan


def _place_by_cost(
    graph: OpGraph, targets: Sequence[Target], limits: Limits, goal: Goal, options: CompileOptions
) -> PlacedByCost:
    from labinfer.compiler.place_by_cost import place_by_cost  # numpy, which other plans do without

    kept = (options.num_blocks or 0) * limits.block_size
    by_hand = options.streamed_layers > 0 or options.stream_from != "host"
    return place_by_cost(graph, targets, limits, goal, partial(_reserved, graph, limits), kept, streams=not by_hand)


def _used(targets: Sequence[Target], placements: Sequence[Placement] | None) -> list[Target]:
    """The devices that the plan lists: those that costs chose, or all that a person named."""
    return [each for each in targets if placements is None or any(placed.target is each for placed in placements)]


def _reserved(graph: OpGraph, limits: Limits, target: Target) -> int:
    """Bytes that ``target`` needs beside weights and cache, whichever layers it gets: as if it had them all."""
    whole = _stage(graph, [Placement(target, tuple(graph.ops))], 0, limits, CompileOptions(arena_effort_seconds=0))
    return whole.bytes.arena + whole.bytes.step + whole.bytes.tables


def _target(target: Target, options: CompileOptions) -> Target:
    """``target`` with the threads and the exactness asked for, if it can keep the cache as asked."""
    if options.kv_dtype not in target.kv_dtypes:
        message = f"'{target.name}' cannot keep keys and values as {options.kv_dtype}"
        raise DoesNotFit("device.kv-dtype", message, remedy=f"it can as {', '.join(target.kv_dtypes)}")
    size, multiple = options.block_size, target.block_multiple
    if isinstance(size, int) and size % multiple:
        message = f"'{target.name}' needs a block size that is a multiple of {multiple}, got {size}"
        raise UsageError("limits.block-size", message, remedy=f"--block-size {-(-size // multiple) * multiple}")
    if options.threads is not None and not (isinstance(options.threads, int) and 0 < options.threads <= 1024):
        raise UsageError("limits.range", f"threads must be a whole number from 1 to 1024, got {options.threads!r}")
    if options.activations not in target.activations:
        message = f"'{target.name}' cannot compute with {options.activations} activations"
        raise DoesNotFit("device.activations", message, remedy=f"it can with {', '.join(target.activations)}")
    chosen = KernelOptions(options.activations, target.matrix_unit(options.activations))
    return replace(target, threads=target.threads and (options.threads or target.threads), options=chosen)


def _source(blueprint: Blueprint, source: ModelSource, graph: OpGraph, checkpoint: str | None) -> Source:
    return Source(
        family=blueprint.family,
        name=graph.name,
        kind=source.kind,
        maps=[map_name(file.resolve()) for file in blueprint.files],
        checkpoint=checkpoint,
        sha256=dict(source.digests),
    )


def _device(target: Target, graph: OpGraph) -> PlanDevice:
    fusions, formats = list(target.fusions), {w.format for w in graph.weights.values() if len(w.shape) > 1}
    fewest = {name: tokens for name, tokens in sorted(target.options.matrix_unit.items()) if name in formats}
    return PlanDevice(
        kind=target.kind, memory=target.memory, parameters=target.parameters, threads=target.threads, fusions=fusions,
        activations=target.options.activations, matrix_unit=fewest, declared=target.declared,
    )  # fmt: skip


def _limits(blueprint: Blueprint, source: ModelSource, options: CompileOptions) -> Limits:
    scope = model_scope(blueprint, source)
    longest = scope["max_context"] if "max_context" in blueprint.config else 4096
    if not isinstance(longest, int) or longest < 1:
        raise InvalidFile("config.max-context", f"{source.place}: max_context is {longest!r}")
    length = options.max_model_len or min(longest, 4096)
    if length > longest:
        message = f"max_model_len {length} is beyond the model's {longest}"
        raise UsageError("limits.max-model-len", message)
    return Limits(
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        max_logits_rows=options.max_logits_rows or options.max_num_seqs,
        max_model_len=length,
        block_size=options.block_size,
        kv_dtype=options.kv_dtype,
        groups=[CacheGroup(num_blocks=1)],
        **lora_limits(options),
    )


def _vocab_size(graph: OpGraph) -> int:
    kinds = [graph.values[name] for name in graph.outputs]
    size = kinds[0].shape[-1] if kinds else None
    if not isinstance(size, int) or kinds != [TensorType(("R", size))]:
        shown = ", ".join(f"'{name}' {kind}" for name, kind in zip(graph.outputs, kinds, strict=True)) or "none"
        raise InvalidFile("map.outputs", f"a map has one output, the logits f32[R, vocab_size]; this one has {shown}")
    return size


def _recompute_after(graph: OpGraph) -> int | None:
    lengths = [getattr(part.attrs, "recompute_after", None) for op in graph.ops for part in op.primitives()]
    return min((length for length in lengths if length), default=None)


def _stage(
    graph: OpGraph,
    placements: Sequence[Placement],
    number: int,
    limits: Limits,
    options: CompileOptions,
    rank: int = 0,
) -> Stage:
    target, ops = placements[number].target, placements[number].ops
    parts = [part for op in ops for part in op.primitives()]

    def workspace(op: Op) -> int:
        weights = [graph.weights[name] for part in op.primitives() for name in part.weights.values()]
        bounds = KernelBounds(
            op.kind,
            tuple(part.attrs for part in op.primitives()),
            tuple(graph.values[name] for name in op.inputs),
            tuple((weight.format, weight.shape) for weight in weights),
            limits.max_num_batched_tokens,
            limits.max_logits_rows,
            limits.max_num_seqs,
            target.threads or 1,
            target.options,
        )
        return aligned(target.workspace(bounds))

    made = {name for part in parts for name in part.outputs}
    inputs = dict.fromkeys(n for part in parts for n in part.inputs if n not in made and n not in GRAPH_INPUTS)
    wanted = set(graph.outputs).union(n for later in placements[number + 1 :] for op in later.ops for n in op.inputs)
    outputs = [name for part in parts for name in part.outputs if name in wanted]
    arena = plan_arena(
        target.steps(ops), graph.values, list(inputs), outputs,
        limits.max_num_batched_tokens, limits.max_logits_rows, workspace, options.arena_effort_seconds,
    )  # fmt: skip

    def write(name: str) -> dict[str, Any]:
        return _value(name, graph, arena)

    def scratch(op: Op) -> tuple[int, int] | None:
        return (arena.offsets[f"{op.name}#"], workspace(op)) if f"{op.name}#" in arena.offsets else None

    schedule, blocks = fold_ops([replace(op, workspace=scratch(op)) for op in ops], write)
    return Stage(
        device=target.name,
        rank=rank,
        inputs={name: PlanValue(**write(name)) for name in inputs},
        outputs=outputs,
        schedule=schedule,
        blocks=blocks,
        arena=Arena(
            size=arena.size, lower_bound=arena.lower_bound, optimal=arena.optimal, algorithm=arena.algorithm,
            peak_op=arena.peak_op, live_at_peak=list(arena.live_at_peak),
        ),
        bytes=_bytes(graph, parts, target, limits, arena.size, len(options.split), len(placements)),
    )  # fmt: skip


def _value(name: str, graph: OpGraph, arena: ArenaPlan) -> dict[str, Any]:
    kind = graph.values[name]
    if name not in arena.windows:  # it never leaves the kernel of a fused op
        return {"type": str(kind)}
    window = arena.windows[name]
    text: dict[str, Any] = {"type": str(kind), "at": arena.offsets[window.storage] + window.offset}
    if window.row_bytes != natural_row(kind):
        text["row"] = window.row_bytes
    return text


def _bytes(
    graph: OpGraph, parts: Sequence[Op], target: Target, limits: Limits, arena: int, ranks: int, groups: int
) -> StageBytes:
    used = [graph.weights[name] for name in dict.fromkeys(name for part in parts for name in part.weights.values())]
    longest = -(-limits.max_model_len // limits.block_size) * limits.block_size
    chooses = any(name in graph.outputs for part in parts for name in part.outputs)
    tables = sum(target.tables(attrs, longest) for attrs in {part.attrs for part in parts if part.kind == "rope"})
    exchange = target.exchange(ranks) if ranks > 1 else 0
    size = {False: 0, True: 0}
    for weight in used:
        size[weight.adapter] += target.weight_bytes(weight.format, weight.shape)
    return StageBytes(
        weights=size[False],
        adapters=size[True],
        kv_cache=0,  # until _size_cache
        arena=arena,
        step=limits.step_bytes,
        peers=0 if exchange else peer_bytes(parts, graph.values, limits),
        exchange=exchange,
        tables=tables + (target.sampling(limits.max_chosen, groups) if chooses else 0),
    )


def _size_cache(
    graph: OpGraph, placements: Sequence[Placement], stages: Sequence[Stage], limits: Limits, options: CompileOptions
) -> None:
    """Give the groups their blocks, and the stages the bytes that these take."""
    states = [dict.fromkeys(p.state for op in placed.ops for p in op.primitives() if p.state) for placed in placements]
    sizes = [block_bytes(limits, [graph.states[name] for name in used]) for used in states]
    devices = []
    for target in dict.fromkeys(placed.target for placed in placements):
        own = [number for number, placed in enumerate(placements) if placed.target is target]
        left = None if target.memory is None else target.memory - sum(stages[number].bytes.total for number in own)
        devices.append(DeviceRoom([sum(each) for each in zip(*(sizes[number] for number in own), strict=True)], left))
    room = Room(options.num_blocks, options.kv_memory, ceil(options.swap_space * (1 << 30)))
    limits.groups = size_groups(limits, devices, room)
    for stage, each in zip(stages, sizes, strict=True):
        stage.bytes.kv_cache = cache_bytes((group.num_blocks for group in limits.groups), each)
        stage.bytes.swap = cache_bytes((group.swap_blocks for group in limits.groups), each)


def _check_memory(stages: Sequence[Stage], targets: Sequence[Target]) -> None:
    for target in targets:
        needed = sum(stage.bytes.total for stage in stages if stage.device == target.name)
        if target.memory is not None and needed > target.memory:
            parts = [stage.bytes for stage in stages if stage.device == target.name]
            message = (
                f"'{target.name}' would need {needed} bytes (weights {sum(b.weights for b in parts)}, "
                f"cache {sum(b.kv_cache for b in parts)}, arena {sum(b.arena for b in parts)}) and has {target.memory}"
            )
            remedy = "lower --max-model-len, --max-num-seqs or --max-num-batched-tokens, or add a device"
            raise DoesNotFit("device.memory", message, remedy=remedy)
