"""A plan made again with the same limits, for requests that run already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from labinfer.api import compile_options, read_model
from labinfer.compiler.compile import compile_plan
from labinfer.compiler.plan import Limits, Plan, PlanDevice
from labinfer.errors import LabinferError, UsageError
from labinfer.home import graphs_dir
from labinfer.targets import real_target


def pinned(limits: Limits | None) -> dict[str, Any]:
    """Options that give another plan the same limits, which the requests that run were admitted by."""
    if limits is None:
        return {}
    names = ("max_num_batched_tokens", "max_num_seqs", "max_logits_rows", "max_model_len", "block_size", "kv_dtype")
    blocks = max(group.num_blocks for group in limits.groups)
    return {**{name: getattr(limits, name) for name in names}, "num_blocks": blocks, "kv_memory": None}


def with_layers(plan: Plan, counts: Sequence[int], weights: Path) -> Plan:
    """``plan`` with so many layers on the device of each stage, which compute as before; see ``check_movable``."""
    blueprint, source, checkpoint = read_model(graphs_dir() / plan.source.maps[0], weights)
    targets, first = [], 0
    for stage, count in zip(plan.stages, counts, strict=True):
        device, layers = plan.devices[stage.device], (first, first + count - 1)
        given = replace(real_target(stage.device), threads=device.threads, memory=device.memory, layers=layers)
        targets.append(replace(given, matrix_unit=partial(as_before, device)))
        first += count
    options = {**pinned(plan.limits), "activations": plan.devices[plan.stages[0].device].activations}
    return compile_plan(blueprint, source, targets, compile_options(options), checkpoint)


def as_before(device: PlanDevice, activations: str) -> Mapping[str, int]:
    """Where the matrix unit of a device pays, as its plan says: another would round otherwise."""
    return device.matrix_unit


def check_movable(plan: Plan, weights: Path) -> None:
    """Raise ``UsageError`` for a plan that ``with_layers`` does not make again."""
    try:
        again = with_layers(plan, [len(stage.layers) for stage in plan.stages], weights)
    except LabinferError:
        again = None
    if again is None or essence(again) != essence(plan):
        message = "layers of this plan cannot be moved: it was not made by naming devices alone"
        remedy = "compile it without ranks, pins, streamed layers, a cluster file, --swap-space and --fuse"
        raise UsageError("rebalance.plan", message, remedy=remedy)


def essence(plan: Plan) -> list[Any]:
    """What computes what in a plan, however its arenas are packed."""
    devices = [plan.devices[stage.device] for stage in plan.stages]
    schedules = [[stage.device, stage.schedule, stage.streamed, stage.bytes.weights] for stage in plan.stages]
    ops = [[(name, op.op, op.cost) for name in stage.blocks for op in stage.blocks[name]] for stage in plan.stages]
    return [plan.limits, plan.weights, plan.states, devices, schedules, ops]
