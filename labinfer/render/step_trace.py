"""What the stages of a pipeline did and when, as a trace for Perfetto and chrome://tracing: a track a stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def render_steps(tracks: Mapping[str, np.ndarray]) -> str:
    """The trace as JSON, an event a line; ``tracks`` are by name the seconds [steps, 2] when steps began and ended."""
    start = min((float(spans.min()) for spans in tracks.values() if spans.size), default=0.0)
    events: list[dict[str, Any]] = []
    for track, (name, spans) in enumerate(tracks.items()):
        here = {"pid": 0, "tid": track}
        events.append({"ph": "M", **here, "name": "thread_name", "args": {"name": name}})
        for step, (began, ended) in enumerate(((spans - start) * 1e6).tolist()):
            times = {"ts": round(began, 1), "dur": round(ended - began, 1)}
            events.append({"ph": "X", **here, "name": f"step {step}", "cat": "step", **times})
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    return f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n'
