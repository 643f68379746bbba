"""The ranks of a tensor-parallel group: how many, what share each has, on which devices, and what they exchange."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from labinfer.compiler.graph import Op, OpGraph
from labinfer.compiler.plan import Limits
from labinfer.compiler.shares import apportion
from labinfer.compiler.target import Placement, Target, place
from labinfer.errors import UsageError
from labinfer.ops.base import TensorType

MAX_RANKS = 64

LINE = 64
"""Bytes of a cache line."""


def tensor_split(size: Any, shares: Any) -> tuple[float, ...]:
    """The shares of all ranks: of ``size`` equal ones, or ``shares``, a list or a text such as ``3,1``."""
    if shares is None:
        if not isinstance(size, int) or not 1 <= size <= MAX_RANKS:
            message = f"tensor_parallel_size must be a whole number from 1 to {MAX_RANKS}, got {size!r}"
            raise UsageError("limits.range", message)
        return (1.0,) * size
    try:
        listed = shares.split(",") if isinstance(shares, str) else list(shares)
        found = tuple(float(each) for each in listed)
    except (TypeError, ValueError):
        found = ()
    if not found or len(found) > MAX_RANKS or not all(isfinite(each) and 0 < each <= 1e9 for each in found):
        message = f"tensor_split must be up to {MAX_RANKS} numbers above 0, such as 3,1; got {shares!r:.60}"
        raise UsageError("limits.tensor-split", message)
    if size not in (1, len(found)):
        message = f"tensor_split has {len(found)} shares, tensor_parallel_size is {size}"
        raise UsageError("limits.tensor-split", message, remedy="give one of them")
    return found


def rank_targets(targets: Sequence[Target], split: Sequence[float], given_threads: int | None) -> list[Target]:
    """``targets`` with the threads that each gets: its share of the processor's, unless a number was given."""
    if len(split) == 1:
        return list(targets)
    if len(targets) % len(split):
        message = f"{len(targets)} devices cannot run stages of {len(split)} ranks each"
        raise UsageError("device.list", message, remedy=f"name {len(split)} devices for each stage")
    for first in range(0, len(targets), len(split)):
        group = targets[first : first + len(split)]
        if len({target.kind for target in group}) > 1 and any(target.exchange(len(split)) for target in group):
            message = f"{' and '.join(target.name for target in group)} cannot exchange parts of what they compute"
            raise UsageError("device.ranks", message, remedy="let devices of one kind be the ranks of a stage")
    found = []
    for number, target in enumerate(targets):
        threads = target.threads
        if threads and not given_threads:
            threads = apportion(max(threads, len(split)), split, "threads")[number % len(split)]
        found.append(replace(target, threads=threads))
    return found


def join(graphs: Sequence[OpGraph]) -> OpGraph:
    """The graphs of all ranks as one list of ops, weights and states; a single graph as it is."""
    if len(graphs) == 1:
        return graphs[0]
    whole = OpGraph(graphs[0].name, graphs[0].inputs, graphs[0].outputs, [op for graph in graphs for op in graph.ops])
    for graph in graphs:
        whole.weights.update(graph.weights)
        whole.states.update(graph.states)
    return whole


def place_ranks(graphs: Sequence[OpGraph], targets: Sequence[Target]) -> list[list[Placement]]:
    """The stages of each rank: the same layers for all ranks, cut as those of the first are."""
    ranks = len(graphs)
    lead = place(graphs[0], targets[::ranks])
    found = [lead]
    for rank, graph in enumerate(graphs[1:], 1):
        own = []
        for target, placement in zip(targets[rank::ranks], lead, strict=False):
            layers = [op.layer for op in placement.ops if op.layer is not None]
            own.append(replace(target, layers=(min(layers), max(layers)) if layers and len(lead) > 1 else None))
        named = {target.name: target for target in targets}
        found.append([Placement(named[each.target.name], each.ops) for each in place(graph, own)])
    return found


def peer_bytes(ops: Iterable[Op], values: Mapping[str, TensorType], limits: Limits) -> int:
    """Host memory in which the others read what a rank offers: its largest part, twice, in whole cache lines.

    All ranks of a group have equally much, whatever their shares.
    """
    largest = 0
    for op in ops:
        if op.kind in ("all_reduce", "all_gather"):
            [sent] = [values[name] for name in op.inputs]
            columns = max(getattr(op.attrs, "sizes", sent.shape[1:]))
            sent = TensorType((sent.shape[0], columns), sent.dtype)
            largest = max(largest, sent.nbytes(limits.max_num_batched_tokens, limits.max_logits_rows))
    return 2 * -(-largest // LINE) * LINE
