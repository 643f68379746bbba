"""The plan as a trace for Perfetto and chrome://tracing: a process a stage, a slice an op, a counter of live bytes.

Each step that was predicted or measured is there, one below the other, from time 0 on. Where no time is known, a slice
is as long as the op's work: a microsecond stands for 10^6 flops or 10^6 bytes moved, whichever takes longer; the file
says so. Source: "Trace Event Format" (Google, 2016).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from labinfer.render.arena_map import arena_map
from labinfer.render.drawing import Drawing, Node
from labinfer.render.timeline import Timeline, timelines

WORK_PER_MICROSECOND = 1_000_000
SHORTEST = 0.1
"""Microseconds of an op that neither computes nor moves anything, such as a view."""

UNIT = "1 µs = 10^6 flops or 10^6 bytes moved, whichever is more, at the plan's bounds: predicted work, not time"


TIME = "seconds as predicted or measured"


def render_perfetto(drawing: Drawing) -> str:
    """The trace as JSON, an event a line. Stages run one after another; a flow arrow stands for each transfer."""
    events: list[dict[str, Any]] = []
    lines: Sequence[Timeline | None] = timelines(drawing) or [None]
    for number, line in enumerate(lines):
        first, now = number * len(drawing.plan.stages), 0.0
        for stage in range(len(drawing.plan.stages)):
            pid = first + stage
            title = f"{line.title if line else 'predicted'}: {drawing.device(stage)} (stage {stage})"
            events += _names(pid, title)
            if stage:
                events.append(_flow("f", pid, now, pid))
            now = _stage(drawing, stage, pid, line, now, events)
            if stage + 1 < len(drawing.plan.stages):
                events.append(_flow("s", pid, now - SHORTEST / 2, pid + 1))
                now += 1e6 * line.hops[stage] if line and line.hops else 0.0
    unit = TIME if lines[0] else UNIT
    about = {"model": drawing.plan.source.name, "labinfer": drawing.plan.labinfer, "unit": unit}
    head = json.dumps(about, ensure_ascii=False)
    text = ",\n".join(json.dumps(event, ensure_ascii=False, separators=(",", ":")) for event in events)
    return f'{{"displayTimeUnit":"ms","otherData":{head},"traceEvents":[\n{text}\n]}}\n'


def _names(pid: int, title: str) -> list[dict[str, Any]]:
    process = {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": title}}
    order = {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    thread = {"ph": "M", "pid": pid, "tid": 0, "name": "thread_name", "args": {"name": "ops"}}
    layers = {"ph": "M", "pid": pid, "tid": 1, "name": "thread_name", "args": {"name": "layers"}}
    return [process, order, thread, layers]


def _stage(
    drawing: Drawing, stage: int, pid: int, line: Timeline | None, now: float, events: list[dict[str, Any]]
) -> float:
    """Add the slices and counters of a stage that starts at ``now``; returns when it ends."""
    arena, step = arena_map(drawing, stage), 0
    for instance in drawing.instances:
        if instance.stage != stage:
            continue
        start = now
        for op, node in drawing.nodes(instance):
            live = max(arena.live[step : step + len(op.primitives())], default=0)
            step += len(op.primitives())
            events.append({"ph": "C", "pid": pid, "name": "arena", "ts": round(now, 3), "args": {"live bytes": live}})
            length = duration(node) if line is None else 1e6 * line.of(op)
            facts = {"name": op.name, "flops": node.cost.flops, "bytes": node.cost.moved, "origin": str(op.origin)}
            slice_ = {"ph": "X", "pid": pid, "tid": 0, "name": op.kind, "cat": node.category}
            events.append({**slice_, "ts": round(now, 3), "dur": round(length, 3), "args": facts})
            now += length
        if instance.layer is not None:
            slice_ = {"ph": "X", "pid": pid, "tid": 1, "name": f"layer {instance.layer}", "cat": "layer"}
            events.append({**slice_, "ts": round(start, 3), "dur": round(now - start, 3)})
    events.append({"ph": "C", "pid": pid, "name": "arena", "ts": round(now, 3), "args": {"live bytes": 0}})
    return now


def duration(node: Node) -> float:
    """Predicted work of an op in the trace's microseconds."""
    return max(SHORTEST, node.cost.flops / WORK_PER_MICROSECOND, node.cost.moved / WORK_PER_MICROSECOND)


def _flow(phase: str, pid: int, at: float, number: int) -> dict[str, Any]:
    event = {
        "ph": phase,
        "pid": pid,
        "tid": 0,
        "id": number,
        "name": "transfer",
        "cat": "transfer",
        "ts": round(at, 3),
    }
    return event | ({"bp": "e"} if phase == "f" else {})
