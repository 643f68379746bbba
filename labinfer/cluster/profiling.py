"""Profiles of the hosts of a cluster file, which all measure at the same time, and of the ways between them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from labinfer.api import read_model
from labinfer.cluster.agents import hosts_of
from labinfer.cluster.checkpoints import provide
from labinfer.cluster.control import ANSWER_SECONDS, Control, open_control
from labinfer.cluster.token import credentials_of
from labinfer.compiler.cluster import Cluster
from labinfer.compiler.costs import DeviceProfile, LinkProfile
from labinfer.compiler.costs.store import at_host, link_of_hosts, store_hosts, store_profile, stored_hosts
from labinfer.compiler.target import Target
from labinfer.errors import LabinferError, UsageError
from labinfer.placing import cluster_target
from labinfer.profile.hops import LARGE, SMALL
from labinfer.profile.links import link_of
from labinfer.profile.session import signed_options
from labinfer.progress import Progress
from labinfer.runtime.pipeline.transport import ChannelClosed, Credentials


def profile_hosts(
    model: str | Path,
    file: str | Path,
    progress: Progress,
    *,
    token_file: Path | None = None,
    quick: bool = False,
    again: bool = False,
    **options: Any,
) -> dict[str, DeviceProfile]:
    """Profiles of the devices of a cluster ``file`` with hosts, for the ops of ``model``; agents must run.

    Each host measures what it has not measured yet (all with ``again``), all hosts at the same time. What they found is
    kept here too, and so are the links that the file does not give. What goes wrong on one host stops the others.
    """
    cluster = hosts_of(file)
    credentials = credentials_of(cluster, token_file)
    targets = [cluster_target(cluster, name, device) for name, device in cluster.devices.items()]
    _, _, checkpoint = read_model(model, options.pop("weights", None))
    if checkpoint is None:
        message = "hosts measure a model that has weights"
        raise UsageError("profile.model", message, remedy="give a model directory or file, or --weights")
    orders = {"quick": quick, "again": again, **signed_options(targets, options)}
    with ExitStack() as opened:
        controls = {name: connected(cluster, name, credentials, opened) for name in cluster.hosts}

        def measure(name: str) -> dict[str, DeviceProfile]:
            here = [each for each in targets if each.declared is None and cluster.host_of(each.name) == name]
            path = provide(controls[name].ask, Path(checkpoint)) if here else ""
            return {each.name: device_profile(controls[name], each, path, orders, progress) for each in here}

        with ThreadPoolExecutor(len(controls)) as pool:
            measuring = [pool.submit(measure, name) for name in controls]
            try:
                for each in as_completed(measuring):
                    each.result()
            except BaseException:
                for control in controls.values():
                    control.close()  # so that the others stop, and nobody waits for them
                raise
        found = {name: profile for each in measuring for name, profile in each.result().items()}
        keep_profiles(cluster, found)
        measure_links(cluster, controls, again, progress)
    return found


def connected(cluster: Cluster, name: str, credentials: Credentials, opened: ExitStack) -> Control:
    """A connection to the agent of a host."""
    host = cluster.hosts[name]
    try:
        control = open_control(host.endpoint, credentials)
    except ChannelClosed as error:
        remedy = f"start it: labinfer cluster up {cluster.file}"
        raise LabinferError("cluster.agent", f"the agent of '{name}' does not answer: {error}", remedy=remedy) from None
    opened.callback(control.release)
    return control


def device_profile(
    control: Control, target: Target, path: str, orders: Mapping[str, Any], progress: Progress
) -> DeviceProfile:
    """Have a host measure one of its devices."""
    order = {"model": path, "name": target.name, "threads": target.threads, **orders}
    try:
        control.say(do="profile", order=order)
        while True:
            message, _ = control.hear(ANSWER_SECONDS)
            if "progress" in message:
                progress(*message["progress"])
            elif "profile" in message:
                return DeviceProfile.model_validate(message["profile"])
            else:
                raise LabinferError("profile.host", f"'{target.name}' was not measured: {message.get('error')}")
    except ChannelClosed as error:
        raise LabinferError("profile.host", f"'{target.name}' was not measured: {error}") from None
    except ValidationError:
        raise LabinferError("profile.host", f"'{target.name}' sent what is no profile") from None


def keep_profiles(cluster: Cluster, found: Mapping[str, DeviceProfile]) -> None:
    """Keep what hosts have measured, and whose it is."""
    known = stored_hosts()
    for name, profile in found.items():
        store_profile(profile)
        known.devices[at_host(name, cluster.hosts[cluster.host_of(name)].address)] = profile.device
    store_hosts(known)


def measure_links(cluster: Cluster, controls: Mapping[str, Control], again: bool, progress: Progress) -> None:
    """Measure the ways between hosts that the file does not give and that are not known, or all of these."""
    given = [set(link.between) for link in cluster.links]
    known, address = stored_hosts(), {name: host.address for name, host in cluster.hosts.items()}
    pairs = [
        (one, other)
        for one, other in combinations(controls, 2)
        if {one, other} not in given and (again or link_of_hosts(address[one], address[other]) not in known.links)
    ]
    done = 0
    for together in rounds(pairs):
        with ThreadPoolExecutor(len(together)) as pool:
            links = list(pool.map(lambda pair: measure_hop(cluster, controls, *pair), together))
        for (one, other), link in zip(together, links, strict=True):
            known.links[link_of_hosts(address[one], address[other])] = link
        done += len(together)
        progress("measuring links between hosts", done, len(pairs))
    store_hosts(known)


def rounds(pairs: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """All ``pairs``, in rounds in which each host has one way to measure at most."""
    left = list(pairs)
    while left:
        busy, together = set[str](), list[tuple[str, str]]()
        for pair in left:
            if not busy.intersection(pair):
                busy.update(pair)
                together.append(pair)
        left = [pair for pair in left if pair not in together]
        yield together


def measure_hop(cluster: Cluster, controls: Mapping[str, Control], one: str, other: str) -> LinkProfile:
    """The way between two hosts, there and back halved: frames as stages send them, sealed."""

    def seconds(size: int) -> float:
        channel = secrets.token_hex(8)
        controls[other].say(do="echo", channel=channel, size=size)
        answer = controls[one].ask(do="hops", channel=channel, size=size, address=cluster.hosts[other].endpoint)
        return median(map(float, answer["seconds"]))

    try:
        return link_of(SMALL, seconds(SMALL), LARGE, seconds(LARGE))
    except (ChannelClosed, LabinferError) as error:
        message = f"the way from '{one}' to '{other}' could not be measured: {error}"
        raise LabinferError("profile.hop", message, remedy="give it in the cluster file, under 'links:'") from None
