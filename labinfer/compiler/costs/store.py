"""Profiles on disk: one file for each device, named after what its times depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labinfer.compiler.costs.table import DeviceProfile, Fingerprint, Hosts, LinkProfile, Links, load_profile
from labinfer.files import atomic_write
from labinfer.home import cache_dir


def profile_path(device: Fingerprint) -> Path:
    """Where the profile of a device with this fingerprint lies."""
    digest = hashlib.sha256(json.dumps(device.model_dump(), sort_keys=True).encode()).hexdigest()
    return cache_dir() / "profiles" / f"{device.kind}-{digest[:12]}.json"


def stored_profile(fingerprint: Mapping[str, Any]) -> DeviceProfile:
    """What was measured so far on a device; an empty profile before anything was."""
    device = Fingerprint(**fingerprint)
    path = profile_path(device)
    return load_profile(path) if path.exists() else DeviceProfile(device=device)


def store_profile(profile: DeviceProfile) -> Path:
    """Keep a profile; returns where."""
    path = profile_path(profile.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(profile.dump().encode())
    return path


def links_path() -> Path:
    """Where the links between the devices of this machine lie."""
    return cache_dir() / "profiles" / "links.json"


def stored_links() -> Links:
    """The links that were measured so far, by the kinds of device at both ends."""
    try:
        return Links.model_validate(json.loads(links_path().read_text("utf-8")))
    except (OSError, ValueError):  # none yet, or damaged: they are measured in a moment
        return Links()


def stored_link(source: str, target: str) -> LinkProfile | None:
    """The link from one device of this machine to another; None before it was measured."""
    return stored_links().links.get(link_name(source, target))


def store_link(source: str, target: str, link: LinkProfile) -> None:
    """Keep what was measured between two devices."""
    found = stored_links()
    found.links[link_name(source, target)] = link
    store_links(found)


def store_links(found: Links) -> None:
    """Keep all that is known of links."""
    links_path().parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(links_path()) as stream:
        stream.write((found.model_dump_json(indent=1, exclude_defaults=True) + "\n").encode())


def link_name(source: str, target: str) -> str:
    """``cpu to cpu``: devices of a kind are connected alike."""
    return " to ".join(name.partition(":")[0] for name in (source, target))


def hosts_path() -> Path:
    """Where it is kept what was measured on other hosts."""
    return cache_dir() / "profiles" / "hosts.json"


def stored_hosts() -> Hosts:
    """What was measured on other hosts so far."""
    try:
        return Hosts.model_validate(json.loads(hosts_path().read_text("utf-8")))
    except (OSError, ValueError):  # nothing yet, or damaged
        return Hosts()


def store_hosts(found: Hosts) -> None:
    """Keep all that was measured on other hosts."""
    hosts_path().parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(hosts_path()) as stream:
        stream.write((found.model_dump_json(indent=1, exclude_defaults=True) + "\n").encode())


def at_host(device: str, address: str) -> str:
    """What the device of a cluster file is called by the address of its host's agent."""
    return f"{device.partition('@')[0]}@{address}"


def link_of_hosts(one: str, other: str) -> str:
    """What the way between two hosts is called by the addresses of their agents."""
    return " and ".join(sorted((one, other)))
