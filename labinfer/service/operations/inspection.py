"""/metrics and /labinfer/v1/...: what the service is and does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from math import isfinite
from typing import Any

import numpy as np

from labinfer.compiler.plan import Plan
from labinfer.render.step_trace import render_steps
from labinfer.runtime.model import Model
from labinfer.service.call import Call, Reply
from labinfer.service.errors import ApiError
from labinfer.service.metrics import CONTENT_TYPE, joined_text
from labinfer.service.plan_metrics import measured, predicted, transfers


async def metrics(call: Call) -> Any:
    """Measurements for Prometheus."""
    found = [each.metrics for each in call.services.all]
    for each in found:
        each.count_steps()
    return Reply(joined_text(found), CONTENT_TYPE)


async def plan(call: Call) -> Any:
    """The plan that is run, without the path of its checkpoint."""
    found = call.service.model.plan.model_dump(mode="json", by_alias=True, exclude_none=True)
    found["source"].pop("checkpoint", None)
    found["source"]["maps"] = [name.rpartition("/")[2] for name in found["source"]["maps"]]
    return found


async def devices(call: Call) -> Any:
    """Where the model lies: devices, layers, memory, and how full the cache is.

    Of the ``tokens`` that were computed each takes so much over ``links``. ``hosts`` are those of a cluster, ``starts``
    the last ones of stages there. ``plan_steps`` are seconds of the steps that a placement by cost was made for, as
    predicted and as they are.
    """
    service = call.service
    model, schedulers = service.model, [engine.scheduler for engine in service.engines]
    groups = [
        {"window": group.window, "num_blocks": len(service.models) * group.num_blocks, "free_blocks": sum(free)}
        for group, *free in zip(model.plan.limits.groups, *(free_blocks(each) for each in service.models), strict=True)
    ]
    return {
        "model": service.name,
        "stages": [stage for number, each in enumerate(service.models) for stage in stages(each, number)],
        "links": links(model.plan),
        "tokens": sum(engine.num_tokens for engine in service.engines),
        **fleets(service.models),
        "cache": {
            "usage": sum(each.blocks.usage for each in service.models) / len(service.models),
            "block_size": model.plan.limits.block_size, "groups": groups,
        },
        "limits": {"max_num_seqs": model.plan.limits.max_num_seqs, "max_model_len": model.max_len},
        "running": sum(len(each.running) for each in schedulers),
        "waiting": sum(len(each.waiting) for each in schedulers),
        "plan_steps": {"predicted": predicted(model), "measured": measured(model)},
    }  # fmt: skip


def free_blocks(model: Model) -> list[int]:
    """Free blocks of each group of the cache."""
    return [group.num_free for group in model.blocks.groups]


def stages(model: Model, replica: int) -> list[dict[str, Any]]:
    """Where the model lies: what each device has of it, and on which host that is."""
    found = []
    for stage, here in zip_longest(model.plan.stages, model.interpreters):  # none is here if others run the stages
        ranges = [entry.layers for entry in stage.schedule if entry.layers is not None]
        layers = [min(first for first, _ in ranges), max(last for _, last in ranges)] if ranges else None
        arena = {"size": stage.arena.size, "lower_bound": stage.arena.lower_bound, "optimal": stage.arena.optimal}
        found.append(
            {
                "device": stage.device,
                "host": stage.device.partition("@")[2] or None,
                "replica": replica,
                "description": here.device.describe() if here else "in another process",
                "compute_share": here.device.compute_share if here else None,
                "layers": layers,
                "bytes": stage.bytes.model_dump(),
                "arena": arena,
            }
        )
    return found


def links(plan: Plan) -> list[dict[str, Any]]:
    """Bytes that each token takes from stage to stage."""
    found = transfers(plan, 1).items()
    return [{"source": source, "target": target, "bytes_per_token": nbytes} for (source, target), nbytes in found]


def fleets(models: Sequence[Model]) -> dict[str, list[dict[str, Any]]]:
    """The hosts of a cluster, and the last starts of stages there."""
    reports = [model.fleet.report() for model in models if model.fleet is not None]
    return {
        "hosts": [asdict(host) for report in reports for host in report.hosts],
        "starts": [asdict(start) for report in reports for start in report.starts],
    }


async def trace(call: Call) -> Any:
    """The last steps, oldest first; ``?after=T`` gives those that ended after ``T``, a ``time`` of an earlier answer.

    ``predicted_seconds`` is what a step of its size should have taken, by those before it. ``?format=perfetto`` gives
    what each stage of a pipeline did and when instead, on all hosts, by this machine's clock.
    """
    if (form := call.query("format") or "json") != "json":
        return stages_trace(call.service.models, form)
    text = call.query("after") or "-inf"
    try:
        after = float(text)
    except ValueError:
        after = float("nan")
    if not isfinite(after) and text != "-inf":
        raise ApiError(400, "after: give a time in seconds", param="after", code="invalid_value")
    steps = [
        {**each._asdict(), "replica": number}
        for number, engine in enumerate(call.service.engines)
        for each in list(engine.stats)
        if each.time > after
    ]
    return {"now": time.perf_counter(), "steps": sorted(steps, key=lambda step: step["time"])}


def stages_trace(models: Sequence[Model], form: str) -> Reply:
    """The last steps of all stages as a trace that Perfetto shows."""
    if form != "perfetto":
        raise ApiError(400, "format: json or perfetto", param="format", code="invalid_value")
    tracks: dict[str, np.ndarray] = {}
    for number, model in enumerate(models):
        if model.pipeline is not None:
            spans, groups = list(model.pipeline.spans), model.pipeline.plan.groups
            times = np.array(spans).reshape(-1, len(groups), 2)
            replica = f"replica {number}, " if len(models) > 1 else ""
            tracks |= {f"{replica}stage {at} ({each[0].device})": times[:, at] for at, each in enumerate(groups)}
    return Reply(render_steps(tracks).encode())


async def startup(call: Call) -> Any:
    """How long each phase of the start took, in seconds."""
    return {"phases": call.service.startup, "uptime_seconds": time.time() - call.service.created}
