"""Measurements of what a plan has decided: how busy its devices are, what goes between them, and whether steps take as
long as was predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from labinfer.compiler.fold import unfold_inputs
from labinfer.compiler.plan import Plan
from labinfer.llm import LLM


def plan_families(model: LLM, labels: Sequence[str], own: Sequence[str]) -> Iterator[Any]:
    """The families that Prometheus reads; each sample has ``labels`` with the values ``own``."""
    plan, engine = model.plan, model.engine
    memory = GaugeMetricFamily("labinfer:device_bytes", "memory of a device", labels=(*labels, "device", "use"))
    for stage in plan.stages:
        for use, nbytes in stage.bytes.model_dump().items():
            memory.add_metric([*own, stage.device, use], nbytes)
    yield memory
    text = "seconds for which steps kept a device busy"
    busy = CounterMetricFamily("labinfer:device_busy_seconds", text, labels=(*labels, "device"))
    for device in dict.fromkeys(stage.device for stage in plan.stages):
        busy.add_metric([*own, device], model.device_seconds.get(device, 0.0))
    yield busy
    text = "bytes of values, from the device that made them to one that reads them"
    sent = CounterMetricFamily("labinfer:transfer_bytes", text, labels=(*labels, "src", "dst"))
    for (source, target), nbytes in transfers(plan, engine.num_tokens).items():
        sent.add_metric([*own, source, target], nbytes)
    yield sent
    for name, seconds in (("predicted", predicted(model)), ("measured", measured(model))):
        text = f"a step of the size that the plan was made for, {name}"
        family = GaugeMetricFamily(f"labinfer:plan_{name}_step_seconds", text, labels=(*labels, "phase"))
        for phase, value in seconds.items():
            family.add_metric([*own, phase], value)
        yield family


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
        "prefill": None if costs.per_token is None else costs.per_token * placement.prefill.tokens,
    }
    return {phase: seconds for phase, seconds in found.items() if seconds is not None}
