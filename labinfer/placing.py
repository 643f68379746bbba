"""A cluster file as the compiler takes it: its devices as targets, what they cost, and the links between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from labinfer.backends.base import BACKENDS, capabilities, fingerprint, local_name
from labinfer.compiler.cluster import Cluster, ClusterDevice, read_cluster
from labinfer.compiler.costs import Costs, DeviceProfile, LinkProfile, Measured, load_profile
from labinfer.compiler.costs.roofline import Roofline, specification
from labinfer.compiler.costs.store import (
    at_host,
    link_of_hosts,
    stored_hosts,
    stored_link,
    stored_links,
    stored_profile,
)
from labinfer.compiler.partition import Objective
from labinfer.compiler.place_by_cost import Goal, Pin
from labinfer.compiler.target import Target
from labinfer.compiler.workload import Workload, parse_workload
from labinfer.errors import InvalidFile, UsageError, did_you_mean
from labinfer.ops.base import KernelBounds
from labinfer.ops.formats import stored_bytes
from labinfer.ops.fusions import FUSIONS
from labinfer.targets import real_target

LOCAL_LINK = LinkProfile(latency=20e-6, bandwidth=5e9, origin="derived")
"""Between devices of one host, where nothing was measured."""

REMOTE_LINK = LinkProfile(latency=100e-6, bandwidth=1.25e9, origin="derived")
"""Between hosts that the file gives no link for: 10 Gbit/s Ethernet."""


def cluster_goal(path: Path | str, objective: str, workload: str) -> tuple[list[Target], Goal]:
    """The devices of the cluster file at ``path``, real and declared, and what a placement over them is for."""
    cluster = read_cluster(path)
    targets = [cluster_target(cluster, name, device) for name, device in cluster.devices.items()]
    return targets, goal_of(cluster, targets, objective, parse_workload(workload))


def cluster_target(cluster: Cluster, name: str, device: ClusterDevice) -> Target:
    """One device; an unknown one is told with its place in the file."""
    place = cluster.place("devices", name)
    if device.like is not None:
        spec = specification(device.like, cluster.place("devices", name, "like"))
        return Target(
            name, device.like, "stored", stored_bytes, tuple(fusion.kind for fusion in FUSIONS), no_workspace,
            ("f32", "bf16", "f16"), no_tables, None, memory=device.memory or spec.memory, declared=f"like {spec.name}",
        )  # fmt: skip
    profile = foreign_profile(cluster, name)
    kind = profile.device.kind if profile else local_name(name).partition(":")[0]
    if kind not in BACKENDS:
        remedy = did_you_mean(kind, BACKENDS) or f"real devices: {', '.join(BACKENDS)}; declare others with 'like'"
        raise InvalidFile("cluster.device", f"there is no device '{name}'", place=place, remedy=remedy)
    target = real_target(kind if profile else name)
    threads = profile.device.threads if profile else device.threads or shared_threads(target, device.share)
    declared = f"as measured elsewhere, {device.profile}" if profile else None
    return replace(target, name=name, threads=threads, memory=device.memory, declared=declared)


def shared_threads(target: Target, share: float) -> int | None:
    """The threads of a share of a CPU, or the processors of one of a GPU; None for a whole GPU."""
    whole = target.threads or (capabilities(target.name).processors(target.name) if share < 1 else None)
    return whole and max(1, round(whole * share))


def no_workspace(bounds: KernelBounds) -> int:
    """A specification says nothing of scratch memory."""
    return 0


def no_tables(attrs: object, max_model_len: int) -> int:
    """A specification says nothing of tables."""
    return 0


def foreign_profile(cluster: Cluster, name: str) -> DeviceProfile | None:
    """The profile that a device names, which lies beside the cluster file or below; None if it names none."""
    file = cluster.devices[name].profile
    if file is None:
        return None
    if Path(file).is_absolute() or ".." in Path(file).parts:
        place = cluster.place("devices", name, "profile")
        raise InvalidFile("cluster.profile", f"'{file}' does not lie beside the cluster file", place=place)
    return load_profile(cluster.file.parent / file)


def goal_of(cluster: Cluster, targets: Sequence[Target], objective: str, workload: Workload) -> Goal:
    """What a placement over ``cluster`` should be best at, with all that is known of its devices and links."""
    if objective not in list(Objective):
        remedy = did_you_mean(objective, list(Objective)) or f"objectives: {', '.join(Objective)}"
        raise UsageError("placement.objective", f"there is no objective '{objective}'", remedy=remedy)
    return Goal(
        objective=Objective(objective),
        workload=workload,
        costs={target.name: device_costs(cluster, target) for target in targets},
        links={pair: link_between(cluster, *pair) for pair in permutations(cluster.devices, 2)},
        pins=[Pin(pattern, name, cluster.place("pins", pattern)) for pattern, name in cluster.pins.items()],
        transports={} if any(target.declared for target in targets) else transports_of(cluster),
    )


def transports_of(cluster: Cluster) -> dict[str, LinkProfile]:
    """Hops of a pipeline by transport as measured here; none where ``cluster`` has devices of several hosts."""
    return stored_links().transports if len({cluster.host_of(name) for name in cluster.devices}) == 1 else {}


def device_costs(cluster: Cluster, target: Target) -> Costs:
    """Measured on this very device, borrowed from a file or, for another host, from here, or derived."""
    device = cluster.devices[target.name]
    if device.like is not None:
        return Roofline(specification(device.like), device.share)
    profile = foreign_profile(cluster, target.name)
    if profile is not None:
        return Measured(profile, "borrowed")
    if (measured := measured_there(cluster, target)) is not None:
        return Measured(measured)
    here = cluster.host_of(target.name) not in cluster.hosts
    return Measured(stored_profile(fingerprint(target.name, target.threads)), "measured" if here else "borrowed")


def measured_there(cluster: Cluster, target: Target) -> DeviceProfile | None:
    """What the host of a device has measured on it, with as many threads; None if it has not."""
    host = cluster.hosts.get(cluster.host_of(target.name))
    device = None if host is None else stored_hosts().devices.get(at_host(target.name, host.address))
    if device is None or device.threads != target.threads:
        return None
    return stored_profile(device.model_dump())


def link_between(cluster: Cluster, source: str, target: str) -> LinkProfile:
    """The link that the file gives for two devices, or for their hosts; else what was measured, or an assumption."""
    one, other = cluster.devices[source], cluster.devices[target]
    hosts = cluster.host_of(source), cluster.host_of(target)
    for ends in ({source, target}, set(hosts)):
        for link in reversed(cluster.links):
            if set(link.between) == ends:
                return LinkProfile(latency=link.latency, bandwidth=link.bandwidth, origin="derived")
    if hosts[0] != hosts[1]:
        addresses = [cluster.hosts[name].address for name in hosts if name in cluster.hosts]
        measured = stored_hosts().links.get(link_of_hosts(*addresses)) if len(addresses) == 2 else None
        return measured or REMOTE_LINK
    if one.declared or other.declared:
        return LOCAL_LINK
    return stored_link(source, target) or LOCAL_LINK
