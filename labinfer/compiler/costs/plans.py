"""What the stages of a plan cost, from the text of the plan and the profiles of its devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from labinfer.compiler.costs.predict import Costs, StepShape
from labinfer.compiler.costs.signature import Signer
from labinfer.compiler.costs.table import LinkProfile
from labinfer.compiler.fold import GRAPH_INPUTS, steps, unfold_inputs, unfold_ops, unfold_states, unfold_weights
from labinfer.compiler.graph import Op
from labinfer.compiler.plan import Plan, Stage
from labinfer.ops.base import TensorType
from labinfer.ops.fusions import is_view


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds of a stage in a step: of each op that runs, of what is beside them, of waiting for streamed layers, of
    handing on the ``nbytes`` that it made."""

    ops: tuple[tuple[Op, float], ...]
    overhead: float
    hop: float
    nbytes: int
    streaming: float = 0.0

    @property
    def seconds(self) -> float:
        """All but the hop."""
        return sum(each for _, each in self.ops) + self.overhead + self.streaming

    @property
    def total(self) -> float:
        """All of it."""
        return self.seconds + self.hop


@dataclass(frozen=True, slots=True)
class PipelineCost:
    """Seconds of a step in a pipeline: of each stage while it computes, and of all that is around and between them."""

    stages: tuple[float, ...]
    around: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.stages) + self.around


def stage_signer(plan: Plan, stage: Stage) -> Signer:
    """Writes the signatures of a stage's ops."""
    types = dict.fromkeys(GRAPH_INPUTS, TensorType(("T",), "i32"))
    types |= {name: slot.type for name, slot in unfold_inputs(stage).items()}
    for _, made in unfold_ops(stage):
        types |= {name: slot.type for name, slot in made.items()}
    options = plan.devices[stage.device].options
    return Signer(types, unfold_weights(plan), unfold_states(plan), plan.limits, options)


def stage_ops(stage: Stage) -> list[Op]:
    """The ops that run, fused ones whole or in parts as the plan has them; no views."""
    return [step for op, made in unfold_ops(stage) for step in steps(op, made) if not is_view(step.kind)]


def predict_plan(
    plan: Plan, costs: Mapping[str, Costs], links: Mapping[tuple[str, str], LinkProfile], step: StepShape
) -> list[StageCost]:
    """What each stage takes in a step of this size; ``costs`` are by device, ``links`` by the devices at both ends."""
    found = []
    for number, stage in enumerate(plan.stages):
        known, signer = costs[stage.device], stage_signer(plan, stage)
        ops = tuple((op, known.op_seconds(signer, op, step)) for op in stage_ops(stage))
        nbytes = sum(signer.types[name].nbytes(step.tokens, step.rows) for name in stage.outputs)
        following = plan.stages[number + 1].device if number + 1 < len(plan.stages) else None
        link = known.out if following is None else links[stage.device, following]
        hop, overhead = link.seconds(nbytes) if link else 0.0, known.overhead_seconds(step)
        computing = sum(seconds for _, seconds in ops) + overhead
        streaming = known.stream.added(computing, stage.bytes.host) if known.stream else 0.0
        found.append(StageCost(ops, overhead, hop, nbytes, streaming))
    return found


def predict_pipeline(
    plan: Plan,
    stages: Sequence[StageCost],
    costs: Mapping[str, Costs],
    transport: LinkProfile,
    step: StepShape,
) -> PipelineCost:
    """What a step of this size, whose ``stages`` are predicted, takes in a pipeline where no other is on its way.

    Stages get ready while the one before computes, and stream layers with no core beside their own.
    """
    spans = []
    for stage, cost in zip(plan.stages, stages, strict=True):
        known = costs[stage.device].pipeline
        streamed = stage.bytes.host / known.streamed if known and known.streamed else cost.streaming
        spans.append(sum(seconds for _, seconds in cost.ops) + streamed)
    first = costs[plan.stages[0].device].pipeline
    around = first.around.seconds(step.phase, step.tokens, 0) if first else 0.0
    return PipelineCost(tuple(spans), around + sum(transport.seconds(cost.nbytes) for cost in stages[:-1]))
