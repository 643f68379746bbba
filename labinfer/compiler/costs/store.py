"""Profiles on disk: one file for each device, named after what its times depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labinfer.compiler.costs.table import DeviceProfile, load_profile
from labinfer.files import atomic_write
from labinfer.home import cache_dir


def profile_path(fingerprint: Mapping[str, Any]) -> Path:
    """Where the profile of a device with this fingerprint lies."""
    digest = hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()
    return cache_dir() / "profiles" / f"{fingerprint['kind']}-{digest[:12]}.json"


def stored_profile(fingerprint: Mapping[str, Any]) -> DeviceProfile:
    """What was measured so far on a device; an empty profile before anything was."""
    path = profile_path(fingerprint)
    return load_profile(path) if path.exists() else DeviceProfile(device=dict(fingerprint))


def store_profile(profile: DeviceProfile) -> Path:
    """Keep a profile; returns where."""
    path = profile_path(profile.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(profile.dump().encode())
    return path
