"""Runs a plan and compares what its steps take with what the profiles of its devices say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from labinfer.compiler.costs import Costs, LinkProfile, StepShape
from labinfer.compiler.costs.plans import predict_plan
from labinfer.compiler.plan import Plan
from labinfer.profile.measure import fill_caches, measure_step
from labinfer.profile.quiet import Patience
from labinfer.profile.synthetic import SyntheticCheckpoint
from labinfer.runtime.cache import CacheOptions
from labinfer.runtime.model import Model


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds, predicted and measured, of something that ``count`` times happens in a step."""

    what: str
    count: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """By what part the prediction is too high."""
        return self.predicted / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True, slots=True)
class ValidatedStep:
    """One size of a step: the whole, each stage's ops together, and the ops of a kind in a stage."""

    shape: StepShape
    whole: Comparison
    stages: list[Comparison]
    ops: list[Comparison]


def steps_of(plan: Plan) -> list[StepShape]:
    """Steps to try within the plan's bounds: decodes of one and of all sequences early and late, and prefills."""
    limits = plan.limits
    longest, most = limits.max_sequence_len, min(limits.max_num_seqs, limits.max_num_batched_tokens)
    chunk = min(limits.max_num_batched_tokens, longest)
    room = min(group.num_blocks for group in limits.groups) // most * limits.block_size
    shapes = [StepShape.decode(1, past) for past in (16, longest // 4, longest // 2)]
    shapes += [StepShape.decode(most, past) for past in (16, room // 4, room // 2)]
    shapes += [StepShape.prefill(tokens, past) for tokens, past in ((chunk // 2, 0), (chunk, 0), (chunk // 2, chunk))]
    return list(dict.fromkeys(s for s in shapes if s.past + s.tokens // s.sequences <= longest and s.tokens > 0))


def validate_plan(
    plan: Plan,
    costs: Mapping[str, Costs],
    links: Mapping[tuple[str, str], LinkProfile],
    patience: Patience,
) -> list[ValidatedStep]:
    """Run ``plan`` on made-up weights, which take as long as others, at each of ``steps_of``."""
    with Model(plan, SyntheticCheckpoint(plan), cache=CacheOptions(enable_prefix_caching=False)) as model:
        fill_caches(model)
        return [validate_step(model, costs, links, shape, patience) for shape in steps_of(plan)]


def validate_step(
    model: Model,
    costs: Mapping[str, Costs],
    links: Mapping[tuple[str, str], LinkProfile],
    shape: StepShape,
    patience: Patience,
) -> ValidatedStep:
    """Predict and measure one step."""
    predicted, times = predict_plan(model.plan, costs, links, shape), measure_step(model, shape, patience)
    name = f"{shape.phase} {shape.tokens} tokens after {shape.past}"
    whole = Comparison(name, 1, sum(stage.total for stage in predicted), times.whole)
    stages, ops = [], []
    for number, stage in enumerate(predicted):
        measured = times.of_ops(number)
        device = model.plan.stages[number].device
        known = {op.name: seconds for op, seconds in stage.ops}
        sums = sum(known.values()), sum(seconds for _, seconds in measured)
        stages.append(Comparison(f"stage {number} on {device}", 1, *sums))
        kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for op, seconds in measured:
            kinds[op.kind].append((known[op.name], seconds))
        for kind, pairs in kinds.items():
            sums = sum(each for each, _ in pairs), sum(each for _, each in pairs)
            ops.append(Comparison(f"{kind} in stage {number}", len(pairs), *sums))
    return ValidatedStep(shape, whole, stages, ops)
