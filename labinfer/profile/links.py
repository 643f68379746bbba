"""Measures the ways between devices."""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from labinfer.backends.base import Device
from labinfer.compiler.costs import LinkProfile

SMALL, LARGE = 256, 1 << 22
"""Numbers (float32) that are moved: 1 kB shows the latency, 16 MB the bandwidth."""

RUNS = 9


def measure_out(device: Device) -> LinkProfile:
    """The way from a device's memory to the host's."""
    small, large = (_seconds(device, device, count) for count in (SMALL, LARGE))
    return link_of(4 * SMALL, small, 4 * LARGE, large)


def measure_link(source: Device, target: Device) -> LinkProfile:
    """The way from one device to another in this process: out to the host, and in again."""
    small, large = (_seconds(source, target, count, both=True) for count in (SMALL, LARGE))
    return link_of(4 * SMALL, small, 4 * LARGE, large)


def link_of(few: int, few_seconds: float, many: int, many_seconds: float) -> LinkProfile:
    """The line through what ``few`` and ``many`` bytes took."""
    rate = (many - few) / max(many_seconds - few_seconds, 1e-9)
    return LinkProfile(latency=round(max(few_seconds - few / rate, 0.0), 9), bandwidth=round(rate))


def _seconds(source: Device, target: Device, count: int, both: bool = False) -> float:
    """Median seconds of moving ``count`` float32 numbers out, and in again with ``both``."""
    buffers = [(device, device.allocate(4 * count, "a measured link")) for device in (source, target)]
    here, there = (device.view(buffer, 0, (count,), "f32") for device, buffer in buffers)
    source.move_in(np.ones(count, np.float32), here)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        host = source.move_out(here)
        if both:
            target.move_in(host, there)
            target.synchronize()
        seconds.append(time.perf_counter() - start)
    for device, buffer in buffers:
        device.deallocate(buffer)
    return median(seconds)
