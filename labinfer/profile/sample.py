"""A plan of fewer layers, for measuring models that are larger than the device: every kind of layer is still there.

What an op takes depends on its signature, not on which of many equal layers it stands in. Weights must still be more
than caches hold, so as many layers are kept as take some bytes, and the first of each other kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from labinfer.backends.base import capabilities
from labinfer.compiler.costs.plans import stage_signer
from labinfer.compiler.fold import layer_matrices, unfold_ops, unfold_weights
from labinfer.compiler.graph import Op, layer_of
from labinfer.compiler.plan import Entry, Plan, Stage

SAMPLE_BYTES = 1_000_000_000
"""Bytes of weights that are kept: more than the largest cache of a CPU or GPU."""


def sampled(plan: Plan, most_bytes: int = SAMPLE_BYTES) -> Plan:
    """``plan`` (of one stage) with so few layers that their weights take some ``most_bytes``; itself if they do not.

    What it computes means nothing: a layer that follows one left out reads what the last one before it made.
    """
    (stage,) = plan.stages
    layers = layer_ops(stage)
    kept = kept_layers(plan, layers, most_bytes)
    if len(kept) == len(layers):
        return plan
    entries = sampled_schedule(stage, kept)
    known = capabilities(stage.device)
    part = stage.model_copy(update={"schedule": entries})
    weights = unfold_weights(plan)
    ops = [op for op, _ in unfold_ops(part)]
    used = {name for op in ops for each in op.primitives() for name in each.weights.values()}
    part.streamed, matrices = [layer for layer in stage.streamed if layer in kept], layer_matrices(ops, weights)
    streamed = {weight.name for layer in part.streamed for weight in matrices[layer]}

    def size(names: Iterable[str]) -> int:
        return sum(known.weight_bytes(weights[name].format, weights[name].shape) for name in names)

    sizes = {
        "weights": size(used - streamed),
        "host": size(streamed),
        "kv_cache": stage.bytes.kv_cache * len(kept) // len(layers),
    }
    part.bytes = stage.bytes.model_copy(update=sizes)
    return plan.model_copy(update={"stages": [part]})


def layer_ops(stage: Stage) -> dict[int, list[Op]]:
    """The ops of each layer, in order."""
    found: dict[int, list[Op]] = {}
    for op, _ in unfold_ops(stage):
        if op.layer is not None:
            found.setdefault(op.layer, []).append(op)
    return found


def kept_layers(plan: Plan, layers: Mapping[int, Sequence[Op]], most_bytes: int) -> list[int]:
    """The first layers, until their weights take ``most_bytes``, and the first of each kind that is not among them."""
    (stage,) = plan.stages
    signer, weights = stage_signer(plan, stage), unfold_weights(plan)
    weight_bytes = capabilities(stage.device).weight_bytes
    kept, kinds, taken = [], set(), 0
    for layer, ops in layers.items():
        kind = tuple(signer.signature(op) for op in ops)
        if taken < most_bytes or kind not in kinds:
            kept.append(layer)
            kinds.add(kind)
            names = [name for op in ops for part in op.primitives() for name in part.weights.values()]
            taken += sum(weight_bytes(weights[name].format, weights[name].shape) for name in names)
    return kept


def sampled_schedule(stage: Stage, kept: Sequence[int]) -> list[Entry]:
    """The schedule without other layers; a value of one that is left out is that of the last layer before it."""
    before = {layer: max((each for each in kept if each <= layer), default=kept[0]) for layer in layer_ops(stage)}
    entries = []
    for entry in stage.schedule:
        received = dict(entry.receives)
        first, last = entry.layers or (0, 0)
        for layer in range(first, last + 1):
            if entry.layers is None or layer in kept:
                renamed = {label: _renamed(name, before) for label, name in received.items()}
                span = None if entry.layers is None else (layer, layer)
                entries.append(Entry(block=entry.block, layers=span, receives=renamed))
            for label, name in entry.next.items():
                received[label] = received[label] if name is None else name.replace("{i}", str(layer))
    return entries


def _renamed(name: str, before: Mapping[int, int]) -> str:
    where = layer_of(name)
    if where is None:
        return name
    prefix, layer = where
    return name.replace(f"{prefix}.{layer}.", f"{prefix}.{before[layer]}.", 1)
