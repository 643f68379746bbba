"""What differs between two plans, as a reader would say it: limits, devices, who runs what, bytes, predictions, ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from labinfer.compiler.fold import unfold_ops, unfold_weights
from labinfer.compiler.plan import Plan, Stage
from labinfer.render.report import ranges


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that two plans say differently; None where one says nothing of it."""

    what: str
    before: Any
    after: Any


def differences(before: Plan, after: Plan) -> list[Difference]:
    """Everything that differs between two plans, but for offsets within arenas; empty for plans that do the same."""
    one, other = facts(before), facts(after)
    names = dict.fromkeys([*one, *other])
    return [Difference(name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)]


def facts(plan: Plan) -> dict[str, Any]:
    """What a plan says, by name, in the order of its file."""
    data = plan.model_dump(mode="json", exclude_defaults=True, include={"source", "limits", "devices", "placement"})
    found = dict(flat(data))
    for number, stage in enumerate(plan.stages):
        found |= {f"stage {number}: {name}": value for name, value in stage_facts(stage).items()}
    weights = unfold_weights(plan).values()
    for name, count in Counter(weight.format for weight in weights).items():
        found[f"weights in {name}"] = count
    return found


def stage_facts(stage: Stage) -> dict[str, Any]:
    """Device, layers, bytes, and calls of a stage by kind."""
    ops = [op for op, _ in unfold_ops(stage)]
    layers = {op.layer for op in ops if op.layer is not None}
    calls = {f"calls of {kind}": count for kind, count in Counter(op.kind for op in ops).items()}
    sizes = {f"bytes of {name}": size for name, size in stage.bytes.model_dump().items()}
    return {"device": stage.device, "layers": ranges(layers), **sizes, **calls}


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names; lists stay whole."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
