"""The data of the partition problem: a chain of layers, unequal devices, the links between them, and a workload."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from labinfer.errors import ErrorSink, UsageError, did_you_mean

MAX_LAYERS = 4096
MAX_DEVICES = 4096


class Objective(StrEnum):
    """What a plan should be best at; all are seconds, and less is better.

    ``latency``: the time of one unit of work through all stages and hops. ``throughput``: the time of the slowest stage
    or hop, which is the time between two results when all stages are busy. ``balanced``: latency plus (micro-batches
    - 1) times the slowest, the time until all micro-batches are through (the form of Alpa, OSDI 2022).
    """

    LATENCY = "latency"
    THROUGHPUT = "throughput"
    BALANCED = "balanced"


class Residency(StrEnum):
    """Where a layer's weights are while it runs: on the device, copied there for every step, or on the host, which
    then computes the layer itself."""

    RESIDENT = "resident"
    STREAMED = "streamed"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Layer:
    """One link of the chain: bytes of weights, bytes of keys and values per token, bytes per token that it hands on.

    ``fixed_bytes`` of the weights stay on the device where the layer is streamed; of a layer that cannot be, all do.
    """

    name: str
    weight_bytes: int
    kv_bytes: int = 0
    boundary_bytes: int = 0
    fixed_bytes: int = 0

    @property
    def streamed_bytes(self) -> int:
        """Bytes that are copied when the layer is streamed."""
        return self.weight_bytes - self.fixed_bytes


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """What devices of one kind cost, in seconds of a step, layer by layer.

    ``prefill`` and ``decode`` are the times of a step of each phase on the device, ``host_prefill`` and ``host_decode``
    those when its host computes the layer (empty: it cannot). ``stream_bandwidth`` is the rate in bytes/s at which
    weights are copied from the host (0: it cannot), and ``overlap`` the part of the shorter of copying and computing
    that hides in the other: 1 where copies have a way of their own, 0 where they take turns. ``math.inf`` forbids a
    layer.
    """

    name: str
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    host_prefill: tuple[float, ...] = ()
    host_decode: tuple[float, ...] = ()
    stream_bandwidth: float = 0.0
    overlap: float = 1.0


@dataclass(frozen=True, slots=True)
class Device:
    """A device of some kind; ``memory`` is its cap in bytes, of which ``reserved`` are taken (arena, context)."""

    name: str
    kind: DeviceKind
    memory: int
    reserved: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """A one-way connection: seconds until the first byte arrives, then bytes per second."""

    latency: float = 0.0
    bandwidth: float = math.inf


@dataclass(frozen=True, slots=True)
class Workload:
    """A unit of work, and how much of it is held at once.

    It is ``prefill_steps`` steps of ``prefill_tokens`` tokens and ``decode_steps`` steps of ``decode_tokens``; either
    number of steps may be a fraction. ``kv_tokens`` is the number of tokens whose keys and values every layer must be
    able to keep (sequences promised times their length), ``micro_batches`` how many units are in flight.
    """

    prefill_steps: float = 0.0
    decode_steps: float = 1.0
    prefill_tokens: int = 1
    decode_tokens: int = 1
    kv_tokens: int = 0
    micro_batches: int = 1

    @property
    def steps(self) -> float:
        """Steps of both phases; each pays the latency of every hop."""
        return self.prefill_steps + self.decode_steps

    @property
    def tokens(self) -> float:
        """Tokens of both phases; each crosses every hop."""
        return self.prefill_steps * self.prefill_tokens + self.decode_steps * self.decode_tokens


@dataclass(frozen=True, slots=True)
class Problem:
    """Which device runs which run of layers?

    ``links`` maps (from, to) to a link and ``default_link`` is every other one. ``pins`` maps layers to the device that
    must run them. ``tied_bytes`` of weights are shared by the first and the last layer, and lie once on a device that
    holds both resident. With ``ordered``, stages follow the order of ``devices``; some may still be left out.
    """

    layers: tuple[Layer, ...]
    devices: tuple[Device, ...]
    workload: Workload = Workload()
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    default_link: Link = Link()
    pins: Mapping[str, str] = field(default_factory=dict)
    tied_bytes: int = 0
    ordered: bool = False

    def link(self, source: str, target: str) -> Link:
        """The link from one device to another."""
        return self.links.get((source, target), self.default_link)

    def hop_seconds(self, source: str, target: str, layer: int) -> float:
        """Seconds of a unit of work to hand on what layer number ``layer`` computed."""
        link, work = self.link(source, target), self.workload
        return work.steps * link.latency + work.tokens * self.layers[layer].boundary_bytes / link.bandwidth


def check(problem: Problem) -> None:
    """Raise ``UsageError`` (or several at once) unless every number has a meaning and every name is known.

    Codes: ``partition.empty``, ``.too-large``, ``.duplicate``, ``.unknown``, ``.costs``, ``.number``.
    """
    sink = ErrorSink()
    for what, items, limit in (("layer", problem.layers, MAX_LAYERS), ("device", problem.devices, MAX_DEVICES)):
        if not items:
            sink.add(UsageError("partition.empty", f"the problem has no {what}"))
        if len(items) > limit:
            sink.add(UsageError("partition.too-large", f"{len(items)} {what}s; at most {limit} are planned"))
        seen: set[str] = set()
        for item in items:
            if item.name in seen:
                sink.add(UsageError("partition.duplicate", f"two {what}s are called '{item.name}'"))
            seen.add(item.name)
    sink.check()
    for message in _wrong_numbers(problem):
        sink.add(UsageError("partition.number", message))
    for kind in {id(device.kind): device.kind for device in problem.devices}.values():
        for message in _wrong_costs(kind, len(problem.layers)):
            sink.add(UsageError("partition.costs", message))
    _check_names(problem, sink)
    sink.check()


def _is_amount(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _wrong_numbers(problem: Problem) -> Iterator[str]:
    for layer in problem.layers:
        if not all(map(_is_amount, (layer.weight_bytes, layer.kv_bytes, layer.boundary_bytes, layer.fixed_bytes))):
            yield f"layer '{layer.name}' has a negative or infinite number of bytes"
        if layer.fixed_bytes > layer.weight_bytes:
            yield f"of layer '{layer.name}' more bytes stay on the device than it has"
    for device in problem.devices:
        if not all(map(_is_amount, (device.memory, device.reserved))):
            yield f"device '{device.name}' has a negative or infinite memory"
    for name, link in {
        "default": problem.default_link,
        **{f"{a} to {b}": x for (a, b), x in problem.links.items()},
    }.items():
        if not (_is_amount(link.latency) and link.bandwidth > 0):
            yield f"link '{name}' needs a latency of 0 s or more and a bandwidth above 0 B/s"
    work = problem.workload
    if not (_is_amount(work.prefill_steps) and _is_amount(work.decode_steps) and work.steps > 0):
        yield "the workload needs prefill or decode steps"
    if min(work.prefill_tokens, work.decode_tokens, work.micro_batches) < 1 or work.kv_tokens < 0:
        yield "the workload needs one token a step and one micro-batch at least, and no negative number of tokens"
    if problem.tied_bytes and len(problem.layers) == 1:
        yield "one layer cannot be tied to itself"
    if not 0 <= problem.tied_bytes <= min(problem.layers[0].weight_bytes, problem.layers[-1].weight_bytes):
        yield "the tied bytes are more than the first or the last layer has"


def _wrong_costs(kind: DeviceKind, count: int) -> Iterator[str]:
    costs = {"prefill": kind.prefill, "decode": kind.decode}
    if kind.host_prefill or kind.host_decode:
        costs |= {"host_prefill": kind.host_prefill, "host_decode": kind.host_decode}
    for name, seconds in costs.items():
        if len(seconds) != count:
            yield f"'{name}' of device kind '{kind.name}' has {len(seconds)} numbers for {count} layers"
        if not all(each >= 0 for each in seconds):  # also false for NaN
            yield f"'{name}' of device kind '{kind.name}' has a negative time"
    if not _is_amount(kind.stream_bandwidth):
        yield f"the stream bandwidth of device kind '{kind.name}' is negative or infinite"
    if not 0 <= kind.overlap <= 1:
        yield f"the overlap of device kind '{kind.name}' is not between 0 and 1"


def _check_names(problem: Problem, sink: ErrorSink) -> None:
    layers = {layer.name for layer in problem.layers}
    devices = {device.name for device in problem.devices}
    used = [(pinned, layers, "layer") for pinned in problem.pins]
    used += [(name, devices, "device") for name in problem.pins.values()]
    used += [(name, devices, "device") for pair in problem.links for name in pair]
    for name, known, what in used:
        if name not in known:
            sink.add(UsageError("partition.unknown", f"there is no {what} '{name}'", remedy=did_you_mean(name, known)))
