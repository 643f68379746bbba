"""What the stages of a pipeline did and when, as a trace for Perfetto and chrome://tracing: a track a stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def render_steps(times: np.ndarray, devices: Sequence[str]) -> str:
    """The trace as JSON, an event a line; ``times`` [steps, stages, 2] are seconds at which steps began and ended."""
    start = float(times.min()) if times.size else 0.0
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "tid": stage, "name": "thread_name", "args": {"name": f"stage {stage} ({device})"}}
        for stage, device in enumerate(devices)
    ]
    for step, spans in enumerate((times - start) * 1e6):
        for stage, (began, ended) in enumerate(spans.tolist()):
            slice_ = {"ph": "X", "pid": 0, "tid": stage, "name": f"step {step}", "cat": "step"}
            events.append({**slice_, "ts": round(began, 1), "dur": round(ended - began, 1)})
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    return f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n'
