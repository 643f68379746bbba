"""Measurements of what a plan has decided: how busy its devices are, what goes between them, and whether steps take as
long as was predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from labinfer.compiler.fold import unfold_inputs
from labinfer.compiler.plan import Plan
from labinfer.llm import LLM

LABELS = ("model_name", "engine")
"""What every sample of an engine says."""

FAMILIES = {
    "labinfer:device_bytes": (GaugeMetricFamily, "memory of a device", ("device", "use")),
    "labinfer:device_busy_seconds": (CounterMetricFamily, "seconds for which steps kept a device busy", ("device",)),
    "labinfer:transfer_bytes": (
        CounterMetricFamily,
        "bytes of values, from the device that made them to one that reads them",
        ("src", "dst"),
    ),
    "labinfer:plan_predicted_step_seconds": (
        GaugeMetricFamily,
        "a step of the size that the plan was made for, predicted",
        ("phase",),
    ),
    "labinfer:plan_measured_step_seconds": (
        GaugeMetricFamily,
        "a step of the size that the plan was made for, measured",
        ("phase",),
    ),
}


def plan_families(models: Sequence[LLM], name: str) -> Iterator[Any]:
    """The families that Prometheus reads, of the replicas of the model that is served as ``name``."""
    families = {
        family: kind(family, text, labels=(*LABELS, *labels)) for family, (kind, text, labels) in FAMILIES.items()
    }
    for number, model in enumerate(models):
        for family, values in plan_values(model).items():
            for labels, value in values.items():
                families[family].add_metric([name, str(number), *labels], value)
    yield from families.values()


def plan_values(model: LLM) -> dict[str, Mapping[Any, float]]:
    """What each family says of a model, by its labels."""
    plan = model.plan
    memory = {(stage.device, use): size for stage in plan.stages for use, size in stage.bytes.model_dump().items()}
    seconds = {(stage.device,): model.device_seconds.get(stage.device, 0.0) for stage in plan.stages}
    return {
        "labinfer:device_bytes": memory,
        "labinfer:device_busy_seconds": seconds,
        "labinfer:transfer_bytes": transfers(plan, model.engine.num_tokens),
        "labinfer:plan_predicted_step_seconds": {(phase,): value for phase, value in predicted(model).items()},
        "labinfer:plan_measured_step_seconds": {(phase,): value for phase, value in measured(model).items()},
    }


def transfers(plan: Plan, tokens: int) -> dict[tuple[str, str], int]:
    """Bytes that ``tokens`` computed tokens have sent from stage to stage, by the names of the devices."""
    maker, found = dict[str, str](), dict[tuple[str, str], int]()
    for stage, *_ in plan.groups:
        for name, slot in unfold_inputs(stage).items():
            link = maker[name], stage.device
            found[link] = found.get(link, 0) + slot.type.nbytes(tokens, 0)
        maker.update(dict.fromkeys(stage.outputs, stage.device))
    return found


def predicted(model: LLM) -> dict[str, float]:
    """Seconds of a step by phase, as the plan has them; of the slowest stage where they are a pipeline.

    Nothing for a plan that was not placed by cost.
    """
    placement, whole = model.plan.placement, max if model.pipeline is not None else sum
    if placement is None:
        return {}
    phases = {phase: [getattr(stage, phase) for stage in placement.stages] for phase in ("decode", "prefill")}
    return {phase: float(whole(seconds)) for phase, seconds in phases.items()}


def measured(model: LLM) -> dict[str, float]:
    """Seconds of the same steps as they are here of late, as far as such steps have run."""
    placement, costs = model.plan.placement, model.engine.costs
    if placement is None:
        return {}
    found = {
        "decode": costs.decode.get(placement.decode.sequences.bit_length()),
        "prefill": None if costs.alone.per_token is None else costs.alone.per_token * placement.prefill.tokens,
    }
    return {phase: seconds for phase, seconds in found.items() if seconds is not None}
