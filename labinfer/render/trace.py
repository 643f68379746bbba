"""The plan as a trace for Perfetto and chrome://tracing: a process a stage, a slice an op, a counter of live bytes.

Until costs are measured there is no time in a plan. A slice is as long as the op's work: a microsecond stands for 10^6
flops or 10^6 bytes moved, whichever takes longer; the file says so. Source: "Trace Event Format" (Google, 2016).
"""

from __future__ import annotations

import json
from typing import Any

from labinfer.render.arena_map import arena_map
from labinfer.render.drawing import Drawing, Node

WORK_PER_MICROSECOND = 1_000_000
SHORTEST = 0.1
"""Microseconds of an op that neither computes nor moves anything, such as a view."""

UNIT = "1 µs = 10^6 flops or 10^6 bytes moved, whichever is more, at the plan's bounds: predicted work, not time"


def render_perfetto(drawing: Drawing) -> str:
    """The trace as JSON, an event a line. Stages run one after another; a flow arrow stands for each transfer."""
    events: list[dict[str, Any]] = []
    now = 0.0
    for stage in range(len(drawing.plan.stages)):
        events += _names(drawing, stage)
        if stage:
            events.append(_flow("f", stage, now))
        now = _stage(drawing, stage, now, events)
        if stage + 1 < len(drawing.plan.stages):
            events.append(_flow("s", stage, now - SHORTEST / 2, stage + 1))
    about = {"model": drawing.plan.source.name, "labinfer": drawing.plan.labinfer, "unit": UNIT}
    lines = ",\n".join(json.dumps(event, ensure_ascii=False, separators=(",", ":")) for event in events)
    return (
        f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about, ensure_ascii=False)},"traceEvents":[\n{lines}\n]}}\n'
    )


def _names(drawing: Drawing, stage: int) -> list[dict[str, Any]]:
    process = {
        "ph": "M",
        "pid": stage,
        "name": "process_name",
        "args": {"name": f"predicted: {drawing.device(stage)} (stage {stage})"},
    }
    order = {"ph": "M", "pid": stage, "name": "process_sort_index", "args": {"sort_index": stage}}
    thread = {"ph": "M", "pid": stage, "tid": 0, "name": "thread_name", "args": {"name": "ops"}}
    layers = {"ph": "M", "pid": stage, "tid": 1, "name": "thread_name", "args": {"name": "layers"}}
    return [process, order, thread, layers]


def _stage(drawing: Drawing, stage: int, now: float, events: list[dict[str, Any]]) -> float:
    """Add the slices and counters of a stage that starts at ``now``; returns when it ends."""
    arena, step = arena_map(drawing, stage), 0
    for instance in drawing.instances:
        if instance.stage != stage:
            continue
        start = now
        for op, node in drawing.nodes(instance):
            live = max(arena.live[step : step + len(op.primitives())], default=0)
            step += len(op.primitives())
            events.append({"ph": "C", "pid": stage, "name": "arena", "ts": round(now, 3), "args": {"live bytes": live}})
            length = duration(node)
            facts = {"name": op.name, "flops": node.cost.flops, "bytes": node.cost.moved, "origin": str(op.origin)}
            slice_ = {"ph": "X", "pid": stage, "tid": 0, "name": op.kind, "cat": node.category}
            events.append({**slice_, "ts": round(now, 3), "dur": round(length, 3), "args": facts})
            now += length
        if instance.layer is not None:
            slice_ = {"ph": "X", "pid": stage, "tid": 1, "name": f"layer {instance.layer}", "cat": "layer"}
            events.append({**slice_, "ts": round(start, 3), "dur": round(now - start, 3)})
    events.append({"ph": "C", "pid": stage, "name": "arena", "ts": round(now, 3), "args": {"live bytes": 0}})
    return now


def duration(node: Node) -> float:
    """Predicted work of an op in the trace's microseconds."""
    return max(SHORTEST, node.cost.flops / WORK_PER_MICROSECOND, node.cost.moved / WORK_PER_MICROSECOND)


def _flow(phase: str, stage: int, at: float, to: int | None = None) -> dict[str, Any]:
    event = {
        "ph": phase,
        "pid": stage,
        "tid": 0,
        "id": stage if to is None else to,
        "name": "transfer",
        "cat": "transfer",
        "ts": round(at, 3),
    }
    return event | ({"bp": "e"} if phase == "f" else {})
