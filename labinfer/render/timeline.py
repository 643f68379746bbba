"""What is drawn along a time axis: predicted and measured steps of a plan, or its work where no time is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from labinfer.compiler.graph import Op
from labinfer.render.drawing import Drawing


@dataclass(frozen=True, slots=True)
class Timeline:
    """A step: its title, the seconds of each op by name, and those of the hop after each stage."""

    title: str
    seconds: Mapping[str, float]
    hops: tuple[float, ...] = ()

    def of(self, op: Op) -> float:
        """Seconds of an op; of a fused one that is run in parts, of all of them."""
        if op.name in self.seconds:
            return self.seconds[op.name]
        return sum(self.seconds.get(part.name, 0.0) for part in op.body)


def timelines(drawing: Drawing) -> list[Timeline]:
    """Measured steps beside what was predicted of them, or the predictions of the plan; none without either."""
    if drawing.measured:
        found = []
        for step in drawing.measured:
            ops = [op for stage in step.stages for op in stage]
            found.append(Timeline(f"{step.what}, predicted", {op.name: op.predicted for op in ops}))
            found.append(Timeline(f"{step.what}, measured", {op.name: op.measured for op in ops}))
        return found
    placement = drawing.plan.placement
    if placement is None:
        return []
    decode, prefill = {}, {}
    for instance in drawing.instances:
        for op in instance.ops:
            decode[op.name], prefill[op.name] = op.cost or (0.0, 0.0)
    stages = placement.stages
    return [
        Timeline("decode, predicted", decode, tuple(stage.decode_hop for stage in stages)),
        Timeline("prefill, predicted", prefill, tuple(stage.prefill_hop for stage in stages)),
    ]
