"""Checks what a plan says of tensor-parallel ranks: their places, the collectives they share, and their parts."""

from __future__ import annotations

from collections.abc import Iterator

from labinfer.compiler.fold import natural_row, unfold_inputs, unfold_ops
from labinfer.compiler.plan import Plan, PlanWeight, Stage
from labinfer.ops.base import dim

MAX_RANKS = 64


def verify_ranks(plan: Plan) -> Iterator[tuple[str, str]]:
    """Complaints, a code and a message each."""
    ranks = len(plan.tensor_split)
    if ranks == 1 or ranks > MAX_RANKS or len(plan.stages) % plan.ranks:
        yield "plan.ranks", f"{len(plan.stages)} stages are no groups of {ranks} ranks"
        return
    for number, stage in enumerate(plan.stages):
        if stage.rank != number % plan.ranks:
            yield "plan.ranks", f"stage {number} is rank {stage.rank}, it should be rank {number % plan.ranks}"
    for number, group in enumerate(plan.groups):
        first, *others = [collectives(stage) for stage in group]
        if any(other != first for other in others):
            yield "plan.ranks", f"the ranks of stage {number} do not run the same collectives: they would wait forever"
        alone = {plan.devices[stage.device].kind for stage in group if stage.bytes.exchange}
        if alone and any(not stage.bytes.exchange or {plan.devices[stage.device].kind} != alone for stage in group):
            yield "plan.ranks", f"the ranks of stage {number} do not exchange their parts in one way"
        for stage in group:
            if (needed := 0 if alone else exchanged(plan, stage)) != stage.bytes.peers:
                yield "plan.bytes", f"peers takes {needed} bytes, the plan says {stage.bytes.peers}"
    for line in plan.weights:
        if line.part is not None and (message := wrong_part(line)):
            yield "plan.weight", f"'{line.name}' {message}"


def collectives(stage: Stage) -> list[tuple[str, str, str]]:
    """The collectives of a stage in order: their kinds, and what makes them fit to those of other ranks."""
    return [
        (op.kind, str(op.attrs), str(made[op.outputs[0]].type))
        for whole, made in unfold_ops(stage)
        for op in whole.primitives()
        if op.kind in ("all_reduce", "all_gather")
    ]


def exchanged(plan: Plan, stage: Stage) -> int:
    """Bytes for the largest part that a rank offers, twice, each in whole cache lines."""
    slots, largest = unfold_inputs(stage), 0
    for whole, made in unfold_ops(stage):
        slots |= made
        for op in whole.primitives():
            if op.kind not in ("all_reduce", "all_gather"):
                continue
            sent = slots[op.inputs[0]].type
            row = 4 * max(getattr(op.attrs, "sizes", (natural_row(sent) // 4,)))
            rows = dim(sent.shape[0], plan.limits.max_num_batched_tokens, plan.limits.max_logits_rows)
            largest = max(largest, rows * row)
    return 2 * (-(-largest // 64) * 64)


def wrong_part(line: PlanWeight) -> str | None:
    """What is wrong with a part of a weight, if anything is."""
    part = line.part
    assert part is not None
    if part.axis >= len(line.shape) or (line.stack is not None and part.axis):
        return f"is a part along axis {part.axis}, its shape is {line.shape}"
    if any(not start < stop <= part.size for start, stop in part.runs):
        return f"is made of runs {part.runs} of {part.size}"
    count = sum(stop - start for start, stop in part.runs)
    if count != line.shape[part.axis]:
        return f"is a part of {count} along axis {part.axis}, its shape is {line.shape}"
    return None
