"""Why layers are where they are, as lines of the report: predictions by stage, the bound, reasons, what would help."""

from __future__ import annotations

from collections.abc import Iterator

from labinfer.compiler.placement_record import PlanPlacement, ServicePrediction
from labinfer.compiler.plan import Plan
from labinfer.render.report_lines import Line, align, fact
from labinfer.units import human_bytes

MEANING = {
    "latency": "seconds of one sequence through all stages",
    "throughput": "seconds of the slowest stage or hop for a micro-batch",
    "balanced": "seconds until all micro-batches are through",
}


def placement_lines(plan: Plan, width: int) -> Iterator[Line]:
    """The part of the report on the placement; nothing for a plan that was placed by hand or evenly."""
    found = plan.placement
    if found is None:
        return
    work = ", ".join(f"{name} {number:,}" for name, number in found.workload.items())
    yield Line()
    yield Line(f"Placement: best {found.objective} for {work}", "head")
    yield from (Line(f"  {line}") for line in stage_table(plan, found))
    decode, prefill = found.decode, found.prefill
    steps = (
        f"a decode step is {decode.tokens} tokens after {decode.past:,} each, a prefill step {prefill.tokens:,} after "
        f"{prefill.past:,}"
    )
    yield from fact("predicted", steps, width)
    yield from fact("value", f"{verdict(found)} ({found.bound_kind}; {found.algorithm})", width)
    yield from fact("served", f"{found.served:.3g} sequences/s in a simulation", width)
    for device, reason in found.reasons.items():
        yield from fact(device, f"{reason} ({found.origins[device]} times)", width)
    links = [f"{name}: {origin}" for name, origin in found.origins.items() if name not in found.reasons]
    if links:
        yield from fact("links", "; ".join(links), width)
    if found.transports:
        wholes = (f"by {name} {seconds(a)} and {seconds(b)}" for name, (a, b) in found.transports.items())
        text = f"a decode and a prefill step that are alone in it take {'; '.join(wholes)}"
        yield from fact("pipeline", text, width)
    for number, way in enumerate(found.services):
        name = "instead" if number else "replicas"
        yield from fact(name, service(way, found.workload["replicas"], found.workload["rate"]), width)
    for other in found.runner_ups:
        runs = ", ".join(f"{device} {span(first, last)}" for device, first, last in other.stages)
        yield from fact("instead", f"{runs}: {seconds(other.value)}", width)
    for change in found.changes:
        yield from fact("with", f"{change.what}: {gain(found.value, change.value)}", width)


def service(way: ServicePrediction, replicas: int, rate: int) -> str:
    """How replicas serve in one way."""
    who = f"{way.prefill} of {replicas} only compute prompts" if way.prefill else f"all {replicas} do both"
    return (
        f"{who}: with {rate:,} requests a minute one takes {seconds(way.request)}, "
        f"its first token {seconds(way.first)}, a token {seconds(way.wait)}, at the longest {seconds(way.longest)}"
    )


def verdict(found: PlanPlacement) -> str:
    """The value, what it means, and how far from the best it may be."""
    gap = "no chain of stages is better" if found.gap == 0 else f"none is below {seconds(found.lower_bound)}"
    return f"{seconds(found.value)}, {MEANING[found.objective]}; {gap}"


def stage_table(plan: Plan, found: PlanPlacement) -> list[str]:
    """Stages with their bytes and predicted times; the share is that of the slowest stage."""
    head = ["device", "runs", "weights", "KV cache", "arena", "free", "decode ms", "prefill ms", "hop ms", "share"]
    rows, slowest = [head], max(stage.unit for stage in found.stages) or 1.0
    for stage, each in zip(plan.stages, found.stages, strict=True):
        memory = plan.devices[stage.device].memory
        free = "" if memory is None else human_bytes(memory - stage.bytes.total)
        sizes = map(human_bytes, (stage.bytes.weights, stage.bytes.kv_cache, stage.bytes.arena))
        times = (f"{1e3 * number:.3f}" for number in (each.decode, each.prefill, each.decode_hop))
        runs = span(*each.units) + (f", {len(stage.streamed)} streamed" if stage.streamed else "")
        rows.append([stage.device, runs, *sizes, free, *times, f"{each.unit / slowest:.0%}"])
    return align(rows, right=range(2, len(head)))


def span(first: str, last: str) -> str:
    """``start - layers.9``."""
    return first if first == last else f"{first} - {last}"


def seconds(number: float) -> str:
    """Four digits with a unit."""
    return f"{number:.4g} s" if number >= 1 else f"{1e3 * number:.4g} ms"


def gain(before: float, after: float) -> str:
    """What a change buys."""
    if after >= before * (1 - 1e-6):
        return "nothing"
    return f"{seconds(after)}, {1 - after / before:.1%} less"
