"""Puts a ``lora_add`` after every linear op that adapters can target, with pools for its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from labinfer.compiler.graph import LORA_A, LORA_B, Op, OpGraph, Transform, Weight
from labinfer.ops import OPS


def insert_lora(graph: OpGraph, max_loras: int, rank: int) -> str:
    """Adapt every linear op over the tokens of a step (not the head, which sees the wanted rows alone).

    The value that the map names is the adapted one; what the linear op makes is called ``.base``. Runs before fusion,
    so that a fused op never hides the two ends of an adapter.
    """
    attrs = OPS["lora_add"].Attrs.model_validate({"max_loras": max_loras, "rank": rank})
    result: list[Op] = []
    for op in graph.ops:
        modules = graph.modules.get(op.weights.get("weight", ""))
        if op.kind != "linear" or modules is None or graph.values[op.inputs[0]].shape[0] != "T":
            result.append(op)
            continue
        [name], base = op.outputs, f"{op.name}.base"
        graph.values[base] = graph.values[name]
        pools = pools_for(modules, op.weights["weight"], graph.weights, max_loras, rank)
        graph.weights.update({pool.name: pool for pool in pools.values()})
        weights = {slot: pool.name for slot, pool in pools.items()}
        result.append(replace(op, name=base, outputs=(base,)))
        result.append(replace(op, kind="lora_add", inputs=(base, op.inputs[0]), attrs=attrs, weights=weights))
    count = len(result) - len(graph.ops)
    graph.ops = result
    return f"{count} x lora_add"


def pools_for(
    module: Weight, weight: str, weights: Mapping[str, Weight], max_loras: int, rank: int
) -> dict[str, Weight]:
    """The pools of both matrices of every adapter for ``weight``, which the Hugging Face model holds as ``module``."""
    out_features, in_features = weights[weight].shape
    name = module.tensor.removesuffix(".weight")
    fix = Transform(module.transform.rows, module.transform.order)  # adapters are [out, in], however the weight lies
    return {
        "a": Weight(
            f"{weight}.lora_a", (max_loras, rank, in_features), "f32", f"{name}{LORA_A}", adapter=True
        ),
        "b": Weight(
            f"{weight}.lora_b", (max_loras, out_features, rank), "f32", f"{name}{LORA_B}", None, fix, adapter=True
        ),
    }  # fmt: skip
