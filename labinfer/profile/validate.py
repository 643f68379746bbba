"""Runs a plan and compares what its steps take with what the profiles of its devices say."""

from __future__ import annotations

from collections.abc import Mapping

from labinfer.compiler.costs import Costs, LinkProfile, StepShape
from labinfer.compiler.costs.plans import predict_plan
from labinfer.compiler.plan import Plan
from labinfer.profile.measure import measure_step, warm_up
from labinfer.profile.quiet import Patience
from labinfer.profile.synthetic import SyntheticCheckpoint
from labinfer.render.measured import MeasuredStep, OpTimes
from labinfer.runtime.cache import CacheOptions
from labinfer.runtime.model import Model


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
) -> list[MeasuredStep]:
    """Run ``plan`` on made-up weights, which take as long as others, at each of ``steps_of``."""
    with Model(plan, SyntheticCheckpoint(plan), cache=CacheOptions(enable_prefix_caching=False)) as model:
        warm_up(model)
        return [validate_step(model, costs, links, shape, patience) for shape in steps_of(plan)]


def validate_step(
    model: Model,
    costs: Mapping[str, Costs],
    links: Mapping[tuple[str, str], LinkProfile],
    shape: StepShape,
    patience: Patience,
) -> MeasuredStep:
    """Predict and measure one step."""
    predicted, times = predict_plan(model.plan, costs, links, shape), measure_step(model, shape, patience)
    stages = []
    for number, stage in enumerate(predicted):
        known = {op.name: seconds for op, seconds in stage.ops}
        stages.append([OpTimes(op.name, op.kind, known[op.name], took) for op, took in times.of_ops(number)])
    what = f"{shape.phase} {shape.tokens} tokens after {shape.past}"
    whole = sum(stage.total for stage in predicted)
    return MeasuredStep(what=what, predicted=whole, measured=times.whole, stages=stages)
