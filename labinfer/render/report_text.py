"""The report of a plan as lines of text, 80 to 120 columns wide."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from labinfer.compiler.fold import unfold_ops
from labinfer.compiler.plan import Plan, PlanOp, Stage
from labinfer.render.placement import placement_lines
from labinfer.render.report import Report, StageReport, ranges
from labinfer.render.report_lines import Line, align, fact
from labinfer.units import human_bytes, human_count

MAX_LIVE = 12


def summary_lines(plan: Plan, report: Report, width: int = 80) -> Iterator[Line]:
    """What was decided, in the space of a screen."""
    source, limits = report.source, report.limits
    yield Line(source.name, "title")
    given = f"{source.checkpoint} ({source.kind})" if source.checkpoint else "a config alone, no weights yet"
    yield from fact(
        "model", f"{source.family}, {report.num_parameters:,} parameters, {report.vocab_size:,} tokens", width
    )
    yield from fact("weights", given, width)
    yield from fact("map", " extends ".join(source.maps), width)
    yield from fact("sha256", ", ".join(f"{name} {digest[:12]}" for name, digest in source.sha256.items()), width)
    pools = f"; {count(limits.max_loras, 'adapter')} of rank {limits.max_lora_rank}" if limits.max_loras else ""
    yield from fact(
        "limits",
        f"{limits.max_model_len:,} tokens a sequence; {count(limits.max_num_seqs, 'sequence')} and "
        f"{limits.max_num_batched_tokens:,} tokens a step; {count(limits.max_logits_rows, 'row')} of logits{pools}",
        width,
    )
    yield Line()
    yield Line("Devices", "head")
    yield from (Line(f"  {line}") for line in device_table(plan))
    yield from rank_lines(plan, width)
    yield from product_lines(plan, width)


def product_lines(plan: Plan, width: int) -> Iterator[Line]:
    """How devices multiply, where there was something to choose."""
    for name, device in plan.devices.items():
        if device.activations != "exact":
            yield Line(f"  {name} rounds activations to {device.activations}: faster, and lossy")
        if device.matrix_unit:
            fewest = ", ".join(f"{format} from {count}" for format, count in device.matrix_unit.items())
            text = f"{name} multiplies many tokens at once on its matrix unit: {fewest} tokens on"
            yield from (Line(f"  {line}") for line in textwrap.wrap(text, width - 2))


def rank_lines(plan: Plan, width: int) -> Iterator[Line]:
    """How ranks share each stage, and what they exchange in a decode step of one sequence."""
    if plan.ranks == 1:
        return
    shares = " : ".join(f"{share:g}" for share in plan.tensor_split)
    yield Line(f"  each stage is run by {plan.ranks} ranks together, in shares {shares}")
    for number, group in enumerate(plan.groups):
        kinds: Counter[str] = Counter()
        sent = 0
        for op, made in unfold_ops(group[0]):
            if op.kind in ("all_reduce", "all_gather"):
                kinds[op.kind] += 1
                sent += made[op.outputs[0]].type.nbytes(1, 1)
        done = " and ".join(f"{times} x {kind}" for kind, times in kinds.items())
        text = f"stage {number}: {done} in a step, {human_bytes(sent)} for one token"
        yield from (Line(f"  {line}") for line in textwrap.wrap(text, width - 2))


def device_table(plan: Plan) -> list[str]:
    """Stages, their layers, and exact bytes by kind."""
    pools = any(stage.bytes.adapters for stage in plan.stages)
    kinds = ["weights", *(["adapters"] if pools else []), "KV cache", "arena", "step", "total"]
    rows = [["stage", "device", "layers", *kinds]]
    sizes = []
    for number, stage in enumerate(plan.stages):
        taken = stage.bytes
        weights = (taken.weights, taken.adapters) if pools else (taken.weights,)
        sizes.append((*weights, taken.kv_cache, taken.arena, taken.step + taken.tables, taken.total))
        layers = ranges(layer for block in layers_by_block(stage).values() for layer in block)
        rows.append([str(number), stage.device, layers, *map(human_bytes, sizes[-1])])
    if len(sizes) > 1:
        rows.append(["", "in all", "", *(human_bytes(sum(column)) for column in zip(*sizes, strict=True))])
    return align(rows, right=range(3, 3 + len(kinds)))


def report_lines(plan: Plan, report: Report, width: int = 80) -> Iterator[Line]:
    """The whole report but for the ops."""
    yield from summary_lines(plan, report, width)
    yield from placement_lines(plan, width)
    yield from weight_lines(report, width)
    yield from cache_lines(report, width)
    for number, stage in enumerate(report.stages):
        yield from arena_lines(f"Arena of stage {number}" if len(report.stages) > 1 else "Arena", stage, width)
    yield from work_lines(report, width)


def weight_lines(report: Report, width: int) -> Iterator[Line]:
    """Weights by stored format, and as what the devices hold them."""
    yield Line()
    size = sum(entry.bytes for entry in report.formats)
    yield Line(f"Weights: {count(report.num_weights, 'tensor')}, {human_bytes(size)} as stored", "head")
    rows = [[f.format, count(f.count, "tensor"), human_bytes(f.bytes)] for f in report.formats]
    yield from (Line(f"  {line}") for line in align(rows, right=(1, 2)))
    for held in dict.fromkeys(stage.parameters for stage in report.stages):
        names = dict.fromkeys(stage.device for stage in report.stages if stage.parameters == held)
        size = sum(stage.weights for stage in report.stages if stage.parameters == held)
        verb = "holds" if len(names) == 1 else "hold"
        text = f"{', '.join(names)} {verb} them as {held}: {human_bytes(size)}"
        yield from (Line(f"  {line}") for line in textwrap.wrap(text, width - 2))


def cache_lines(report: Report, width: int) -> Iterator[Line]:
    """What the KV cache takes for a token, for a sequence, and in all, and the blocks of each group."""
    limits, size = report.limits, report.limits.block_size
    each = [sum(sizes) for sizes in zip(*(stage.kv_cache_per_token for stage in report.stages), strict=True)]
    longest = sum(
        size * limits.blocks_needed(group, limits.max_model_len) * of_token
        for group, of_token in zip(limits.groups, each, strict=True)
    )
    yield Line()
    yield Line(f"KV cache: {human_bytes(sum(each))} a token", "head")
    texts = [f"{human_bytes(longest)} at most for a sequence of {limits.max_model_len:,} tokens"]
    for group, of_token in zip(limits.groups, each, strict=True):
        seen = "all tokens" if group.window is None else f"the last {group.window:,} tokens"
        held = f"{human_bytes(of_token * group.num_blocks * size)} in {group.num_blocks:,} blocks of {size}"
        texts.append(f"layers that see {seen}: {human_bytes(of_token)} a token, {held}")
    if swap := sum(stage.swap for stage in report.stages):
        texts.append(f"{human_bytes(swap)} of host memory for blocks that are swapped out")
    for text in texts:
        yield from (Line(f"  {line}") for line in textwrap.wrap(text, width - 2))


def arena_lines(title: str, stage: StageReport, width: int) -> Iterator[Line]:
    """How full the arena gets, against the least that is possible, and what lives there then."""
    yield Line()
    if stage.optimal:
        verdict = "the least possible (its lower bound)"
    else:
        verdict = f"{stage.arena / max(stage.lower_bound, 1) - 1:.1%} above the lower bound {stage.lower_bound:,}"
    yield Line(f"{title}: peak {stage.arena:,} bytes, {verdict}", "head")
    text = f"packing: {stage.algorithm}; fullest at {stage.peak_op}, where these live:"
    yield from (Line(f"  {line}") for line in textwrap.wrap(text, width - 2))
    live = stage.live_at_peak[:MAX_LIVE]
    rows = [[value.name, value.type, human_bytes(value.bytes)] for value in live]
    yield from (Line(f"    {line}"[:width]) for line in align(rows, right=(2,)))
    if len(stage.live_at_peak) > MAX_LIVE:
        yield Line(f"    and {len(stage.live_at_peak) - MAX_LIVE} more")


def work_lines(report: Report, width: int) -> Iterator[Line]:
    """What a token costs and what was fused."""
    cost = report.decode
    yield Line()
    yield Line("Work", "head")
    yield from fact(
        "one token",
        f"{human_count(cost.flops)}flop, {human_bytes(cost.weight_bytes)} of weights read; "
        f"at {cost.context:,} tokens of context {human_count(cost.context_flops)}flop more "
        f"and {human_bytes(cost.context_bytes)} of cache",
        width,
    )
    for number, stage in enumerate(report.stages):
        label = f"stage {number}" if len(report.stages) > 1 else "one step"
        text = f"{stage.kernels} kernel calls on {stage.device}; fused: {fused_text(stage)}"
        if stage.receives:
            text += f"; receives {', '.join(stage.receives)}"
        yield from fact(label, text, width)


def fused_text(stage: StageReport) -> str:
    """What was fused, or why nothing was."""
    if stage.fused:
        return ", ".join(f"{times} × {kind}" for kind, times in stage.fused.items())
    if stage.can_fuse:
        return "nothing"
    return f"nothing ({stage.device} runs the map op by op)"


def op_lines(plan: Plan, width: int, detail: bool = False) -> Iterator[Line]:
    """Every block as a tree of ops, with the map line of each; ``detail`` adds types, weights and attributes."""
    yield Line()
    yield Line("Ops, and the map line of each", "head")
    for stage in plan.stages:
        for block, layers in layers_by_block(stage).items():
            where = f" on {stage.device}" if len(plan.stages) > 1 else ""
            yield Line(f"  {block_title(block, layers)}{where}")
            yield from block_lines(stage.blocks[block], width, detail)


def layers_by_block(stage: Stage) -> dict[str, list[int]]:
    """The layers that each block of a stage runs for, none for one outside the layers."""
    found: dict[str, list[int]] = {}
    for entry in stage.schedule:
        first, last = entry.layers or (0, -1)
        found.setdefault(entry.block, []).extend(range(first, last + 1))
    return found


def block_title(block: str, layers: Sequence[int]) -> str:
    """``layers 0-4, 6-10 (× 10)``; the block's name when it stands in no layer."""
    if not layers:
        return block
    return f"layers {ranges(layers)} (× {len(layers)})" if len(layers) > 1 else f"layer {layers[0]}"


def block_lines(ops: Sequence[PlanOp], width: int, detail: bool) -> Iterator[Line]:
    """The ops of a block, indented by the blocks of the map that they stand in."""
    path: list[str] = []
    for op in ops:
        steps = [step for step in inner_name(op.name).split(".") if not step.isdigit()][:-1]  # h.2 is a second h
        for depth, step in enumerate(steps):
            if path[: depth + 1] != steps[: depth + 1]:
                yield Line(f"    {'  ' * depth}{step}")
        path = steps
        yield from one_op(op, "    " + "  " * len(steps), steps, width, detail)


def inner_name(name: str) -> str:
    """``attn.out`` for ``layers.{i}.attn.out``."""
    return name.partition("{i}.")[2] or name


def one_op(op: PlanOp, indent: str, steps: Sequence[str], width: int, detail: bool) -> Iterator[Line]:
    """``q = linear(attn_in)`` and the map line, with the parts of a fused op under it."""
    prefix = ".".join([*steps, ""]) if steps else ""
    outputs = [inner_name(name).removeprefix(prefix) for name in op.out]
    inputs = ", ".join(inner_name(name).removeprefix(prefix) for name in op.inputs)
    head = f"{', '.join(outputs)} = " if outputs else ""
    left = f"{indent}{head}{op.op}({inputs})"
    origin = op.origin.rpartition(":")[0]
    room = width - len(origin) - 1
    shown = left if len(left) <= room else left[: room - 1] + "…"
    yield Line(f"{shown.ljust(room)} {origin}" if origin else shown)
    if detail and (op.cost or not op.body):
        yield from (
            Line(f"{indent}    {text}") for text in textwrap.wrap(op_detail(op), max(width - len(indent) - 4, 40))
        )
    for part in op.body:
        yield from one_op(part, indent + "  ", steps, width, detail)


def op_detail(op: PlanOp) -> str:
    """Types and offsets of the results, weights, state and attributes of an op."""
    facts = [value.type if value.at is None else f"{value.type} at {value.at:,}" for value in op.out.values()]
    facts += [f"{slot} {inner_name(name)}" for slot, name in op.weights.items()]
    facts += [f"state {inner_name(op.state)}"] if op.state else []
    facts += [f"{name} {value}" for name, value in op.attrs.items()]
    if op.cost:
        decode, prefill = (1e6 * seconds for seconds in op.cost)
        facts.append(f"predicted {decode:.3g} µs in a decode step, {prefill:.4g} µs in a prefill step")
    return "; ".join(facts)


def value_lines(plan: Plan, width: int) -> Iterator[Line]:
    """Every value by name, as ``--tap`` takes it, with its type and its place in the arena."""
    yield Line()
    yield Line("Values ({i} is a layer)", "head")
    for number, stage in enumerate(plan.stages):
        rows = []
        for block, layers in layers_by_block(stage).items():
            where = ranges(layers) if layers else ""
            parts = [part for op in stage.blocks[block] for part in op.body or [op]]
            placed = [item for part in parts for item in part.out.items() if item[1].at is not None]
            rows += [[name, value.type, f"{value.at:,}", where] for name, value in placed]
        lines = align([["name", "type", "offset", "layers"], *rows], right=(2,))
        if len(plan.stages) > 1:
            yield Line(f"  stage {number} on {stage.device}")
        yield from (Line(f"  {line}") for line in lines)


def count(number: int, noun: str) -> str:
    """``1 sequence``, ``8 sequences``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
