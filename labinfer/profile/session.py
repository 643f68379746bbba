"""Profiles of the devices of this machine for one model: what is not known yet is measured and kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

from labinfer.api import compile_options, read_model
from labinfer.backends.base import fingerprint
from labinfer.compiler.cluster import read_cluster
from labinfer.compiler.compile import compile_plan
from labinfer.compiler.costs import DeviceProfile, LinkProfile, PipelineProfile
from labinfer.compiler.costs.plans import stage_ops, stage_signer
from labinfer.compiler.costs.store import (
    store_link,
    store_links,
    store_profile,
    stored_link,
    stored_links,
    stored_profile,
)
from labinfer.compiler.fold import layer_matrices, unfold_weights
from labinfer.compiler.plan import Plan
from labinfer.compiler.target import Target
from labinfer.errors import DoesNotFit
from labinfer.placing import cluster_target, measured_there
from labinfer.profile.grid import Grid, grid_for
from labinfer.profile.hops import measure_hop
from labinfer.profile.links import measure_link
from labinfer.profile.measure import measure_device
from labinfer.profile.pipeline import measure_around
from labinfer.profile.quiet import Patience
from labinfer.profile.sample import layer_ops, sampled
from labinfer.profile.streaming import measure_stage_streaming, measure_streaming, own_cores
from labinfer.progress import Progress
from labinfer.runtime.cores import call_on
from labinfer.runtime.manager import Manager
from labinfer.runtime.pipeline.transport import TRANSPORTS
from labinfer.targets import real_target
from labinfer.units import human_bytes

SIGNED_OPTIONS = (
    "weights", "config", "block_size", "kv_dtype", "activations", "fuse", "max_num_batched_tokens", "max_num_seqs"
)  # fmt: skip
"""Options of a compile that decide which ops there are, or how large steps get."""

SEQUENCES = 16
"""Sequences of the largest decode step that is measured, unless more are asked for."""


def profile_device(
    model: str | Path,
    name: str,
    threads: int | None,
    progress: Progress,
    patience: Patience,
    *,
    quick: bool = False,
    again: bool = False,
    **options: Any,
) -> DeviceProfile:
    """The profile of device ``name`` with every op of ``model``; measures those it lacks (all with ``again``).

    ``quick`` measures fewer sizes of steps. ``options`` are the compiler's. What was measured is kept on disk.
    """
    options["threads"] = threads
    options["max_num_seqs"] = max(options.get("max_num_seqs") or 0, SEQUENCES)
    options.pop("max_model_len", None)
    plan = compile_for(model, name, **options)
    device, limits = plan.devices[name], plan.limits
    stored = stored_profile(fingerprint(name, device.threads))
    bounds = limits.max_num_batched_tokens, limits.max_num_seqs, limits.max_model_len
    grid = grid_for(quick, *bounds, device.matrix_unit.values())
    if not again and is_known(stored, plan, quick, grid):
        return stored
    options["num_blocks"] = blocks_for(grid, limits.block_size)
    layers = len(layer_ops(plan.stages[0]))
    resident, some, streamed = (
        sampled(compile_for(model, name, streamed_layers=n, **options)) for n in (0, -(-layers // 3), layers)
    )
    check_memory(resident, streamed)
    fresh = measure_device(resident, grid, quick, patience, progress)
    fresh.pipeline = PipelineProfile(around=measure_around(resident, grid, patience))
    if streamed.stages[0].streamed:
        fresh.stream = measure_streaming(resident, streamed, patience)
        if cores := own_cores(resident):
            fresh.pipeline.streamed = call_on(cores, lambda: measure_stage_streaming(resident, some, patience))
    fresh.ops = {**stored.ops, **fresh.ops}
    store_profile(fresh)
    return fresh


def compile_for(
    model: str | Path,
    name: str,
    *,
    weights: str | Path | None = None,
    config: str | Path | None = None,
    fusions: Collection[str] | None = None,
    **options: Any,
) -> Plan:
    """The plan for the whole model on one device, with no other ``fusions`` than these, if any are given."""
    blueprint, source, checkpoint = read_model(model, weights, config)
    target = real_target(name)
    target = replace(target, threads=target.threads or options.get("threads"))  # some of a GPU's processors
    if fusions is not None:
        target = replace(target, fusions=tuple(kind for kind in target.fusions if kind in fusions))
    return compile_plan(blueprint, source, [target], compile_options(options), checkpoint)


def profile_cluster(
    model: str | Path,
    cluster: str | Path,
    progress: Progress,
    patience: Patience,
    *,
    quick: bool = False,
    again: bool = False,
    **options: Any,
) -> dict[str, DeviceProfile]:
    """Profiles of the devices of a cluster file that are here, for the ops of ``model``, and the links between them.

    Devices of other hosts that have measured them are left out, of others this machine's are borrowed.
    """
    file = read_cluster(cluster)
    targets = [cluster_target(file, name, device) for name, device in file.devices.items()]
    real = {each.name: each.threads for each in targets if each.declared is None and not measured_there(file, each)}
    known = signed_options(targets, options)
    found = {
        name: profile_device(model, name, threads, progress, patience, quick=quick, again=again, **known)
        for name, threads in real.items()
    }
    if again or any(stored_link(*pair) is None for pair in permutations(real, 2)):
        profile_links(real)
    profile_hops(again)
    return found


def signed_options(targets: Sequence[Target], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that decide which ops a plan over ``targets`` has, or how large steps get."""
    known = {name: options[name] for name in SIGNED_OPTIONS if options.get(name) is not None}
    fusions = set.intersection(*(set(target.fusions) for target in targets))  # a plan has those of all
    return {**known, "fusions": sorted(fusions)}


def is_known(profile: DeviceProfile, plan: Plan, quick: bool, grid: Grid) -> bool:
    """Whether ``profile`` has times for every op of ``plan``, at steps as large, and as many of them as asked for."""
    (stage,) = plan.stages
    signer = stage_signer(plan, stage)
    for op in stage_ops(stage):
        table = profile.ops.get(signer.signature(op))
        largest = max(grid.decode) if signer.axis(op) == "rows" else max(grid.prefill)
        if table is None or (table.quick and not quick) or table.most_tokens() < largest:
            return False
    matrices = layer_matrices(stage_ops(stage), unfold_weights(plan))
    known = profile.overhead.step and profile.pipeline is not None
    return bool(known) and (profile.stream is not None or not matrices)


def blocks_for(grid: Grid, block_size: int) -> int:
    """Cache blocks that the largest step of ``grid`` needs."""
    return max(s.sequences * -(-(s.past + s.tokens // s.sequences) // block_size) for s in grid.steps())


def check_memory(plan: Plan, streamed: Plan) -> None:
    """Raise ``DoesNotFit`` where the machine has too little memory free to run the layers that are measured, those that
    stay and those that are ``streamed`` at the same time."""
    ((name, device),) = plan.devices.items()
    manager = Manager()
    try:
        free, _ = manager.device(name, device.threads).memory()
    finally:
        manager.close()
    needed = plan.stages[0].bytes.total + streamed.stages[0].bytes.total
    if needed > free:
        message = f"measuring '{plan.source.name}' on '{name}' takes {human_bytes(needed)} of {human_bytes(free)} free"
        raise DoesNotFit("profile.memory", message, remedy="end other programs, or lower --max-num-seqs")


def profile_links(devices: Mapping[str, int | None]) -> dict[tuple[str, str], LinkProfile]:
    """The way between any two of ``devices`` (name, threads) in this process; measured now, and kept."""
    manager = Manager()
    try:
        opened = {name: manager.device(name, threads) for name, threads in devices.items()}
        found = {(a, b): measure_link(opened[a], opened[b]) for a, b in permutations(opened, 2)}
    finally:
        manager.close()
    for pair, link in found.items():
        store_link(*pair, link)
    return found


def profile_hops(again: bool = False) -> dict[str, LinkProfile]:
    """Hops between stages of a pipeline on this machine, by transport; those that are not known (all with ``again``)
    are measured and kept."""
    found = stored_links()
    missing = [transport for transport in TRANSPORTS if again or transport not in found.transports]
    if missing:
        found.transports |= {transport: measure_hop(transport) for transport in missing}
        store_links(found)
    return found.transports


def profile_plan(
    plan: Plan,
    model: str | Path,
    progress: Progress,
    patience: Patience,
    *,
    weights: str | Path | None = None,
    quick: bool = False,
    again: bool = False,
) -> dict[str, DeviceProfile]:
    """Profiles of the devices of ``plan`` that are here, for the ops of ``model``, which it was compiled from."""
    limits = plan.limits
    options: dict[str, Any] = {
        "weights": weights,
        "fusions": set.intersection(*(set(each.fusions) for each in plan.devices.values())),
        "quick": quick,
        "again": again,
        "block_size": limits.block_size,
        "kv_dtype": limits.kv_dtype,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_num_seqs": limits.max_num_seqs,
    }
    return {
        name: profile_device(model, name, device.threads, progress, patience, activations=device.activations, **options)
        for name, device in plan.devices.items()
        if device.declared is None
    }
