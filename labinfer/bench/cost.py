"""What a step costs by the plan: bytes that must be read, floating point operations."""

from __future__ import annotations

from labinfer.compiler.fold import unfold_states, unfold_weights
from labinfer.compiler.plan import Plan
from labinfer.ops import OPS
from labinfer.ops.formats import stored_bytes
from labinfer.render.report import placed_ops, share_read


def decode_bytes(plan: Plan, batch: int, context: float) -> int:
    """Bytes that a step reads for ``batch`` sequences of ``context`` tokens each: weights, keys and values.

    A weight is read once for all sequences. Of a mixture's experts, and of an embedding's rows, so many count as
    ``batch`` independent choices hit on average.
    """
    weights, states = unfold_weights(plan), unfold_states(plan)
    size = plan.limits.cache_bytes_per_number
    total = 0.0
    for stage in plan.stages:
        placed, read = list(placed_ops(stage)), dict[str, float]()
        for each in placed:
            for name in (name for name in each.op.weights.values() if not weights[name].adapter):
                share = 1 - (1 - share_read(each, weights[name])) ** batch
                read[name] = min(1.0, read.get(name, 0.0) + share)
            if each.op.kind in ("attention", "mla_attention") and each.op.state:
                seen = min(context, getattr(each.op.attrs, "window", None) or context)
                total += size * batch * seen * states[each.op.state].width
        stored = {name: stored_bytes(weights[name].format, weights[name].shape) for name in read}
        growth = stage.bytes.weights / max(sum(stored.values()), 1)  # the device's layout may differ from the file's
        total += growth * sum(stored[name] * share for name, share in read.items())
    return round(total)


def prefill_flops(plan: Plan, tokens: int) -> int:
    """Floating point operations of a prompt of ``tokens`` tokens; a token sees half of them on average."""
    return sum(
        OPS[each.op.kind].flops(each.op.attrs, each.inputs, tokens, 1, (tokens + 1) // 2)
        for stage in plan.stages
        for each in placed_ops(stage)
    )
