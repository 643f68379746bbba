"""What the partitioner decided, and how far from optimal it may be."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from labinfer.compiler.partition.problem import Objective, Problem, Residency
from labinfer.errors import DoesNotFit


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers ``start`` to ``stop`` - 1 on one device, with the residency of each."""

    device: str
    start: int
    stop: int
    residencies: tuple[Residency, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """What a stage takes: seconds of a unit of work, and of one step of each phase; seconds to hand the unit on (0 for
    the last stage); bytes on the device."""

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    hop_seconds: float
    weight_bytes: int
    kv_bytes: int
    buffer_bytes: int


@dataclass(frozen=True, slots=True)
class Partition:
    """A plan of stages, with a certificate.

    ``value`` is the objective in seconds, ``lower_bound`` a value that no chain is below. ``bound_kind`` says how that
    is known, ``algorithm`` what found the plan, ``seconds`` how long both took. ``latency`` and ``bottleneck`` are the
    plan's values of these objectives. ``loads`` has one entry a stage.
    """

    objective: Objective
    value: float
    lower_bound: float
    bound_kind: str
    algorithm: str
    stages: tuple[Stage, ...]
    loads: tuple[Load, ...]
    latency: float
    bottleneck: float
    seconds: float

    @property
    def gap(self) -> float:
        """By what part of its value the plan may be worse than the best; 0 means that it is optimal."""
        return max(0.0, 1 - self.lower_bound / self.value) if self.value > 0 else 0.0

    def to_json(self) -> dict[str, object]:
        """The plan as plain data."""
        return {**asdict(self), "gap": self.gap}


def verify(problem: Problem, stages: tuple[Stage, ...]) -> tuple[Load, ...]:
    """The load of every stage, computed from the problem alone; shares no code with the search.

    Raises ``DoesNotFit`` (``partition.invalid``) unless each layer runs once, each device at most once, pins and order
    are kept, and every stage fits the memory of its device.
    """
    devices = {device.name: position for position, device in enumerate(problem.devices)}
    positions = [devices[stage.device] for stage in stages]
    cuts = [0, *(stage.stop for stage in stages)]
    if cuts[-1] != len(problem.layers) or any(stage.start != cut for stage, cut in zip(stages, cuts, strict=False)):
        raise DoesNotFit("partition.invalid", "the stages do not cover the layers once and in order")
    if len(set(positions)) < len(positions) or (problem.ordered and positions != sorted(positions)):
        raise DoesNotFit("partition.invalid", "a device has two stages, or they are not in the order asked for")
    loads = []
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        hop = problem.hop_seconds(stage.device, following.device, stage.stop - 1) if following else 0.0
        loads.append(_load(problem, stage, devices[stage.device], hop))
    return tuple(loads)


def _load(problem: Problem, stage: Stage, position: int, hop: float) -> Load:
    device, work = problem.devices[position], problem.workload
    kind, prefill, decode, copies = device.kind, 0.0, 0.0, 0.0
    weights = cache = buffer = 0
    for number, residency in zip(range(stage.start, stage.stop), stage.residencies, strict=True):
        layer = problem.layers[number]
        if problem.pins.get(layer.name, device.name) != device.name:
            raise DoesNotFit("partition.invalid", f"'{layer.name}' is pinned elsewhere than to '{device.name}'")
        on_host = residency is Residency.HOST
        prefill += (kind.host_prefill if on_host else kind.prefill)[number]
        decode += (kind.host_decode if on_host else kind.decode)[number]
        if residency is Residency.STREAMED:
            copies += layer.streamed_bytes / kind.stream_bandwidth
            buffer = max(buffer, 2 * layer.streamed_bytes)
        if not on_host:
            weights += layer.weight_bytes if residency is Residency.RESIDENT else layer.fixed_bytes
        cache += 0 if on_host else layer.kv_bytes * work.kv_tokens
    ends = (stage.residencies[0], stage.residencies[-1])
    if stage.stop - stage.start == len(problem.layers) and ends == (Residency.RESIDENT, Residency.RESIDENT):
        weights -= problem.tied_bytes
    if weights + cache + buffer + device.reserved > device.memory:
        raise DoesNotFit("partition.invalid", f"the stage on '{device.name}' does not fit its memory")
    prefill, decode = (each + copies - kind.overlap * min(each, copies) for each in (prefill, decode))
    phases = ((work.prefill_steps, prefill), (work.decode_steps, decode))
    seconds = sum(steps * each for steps, each in phases if steps)
    return Load(seconds, prefill, decode, hop, weights, cache, buffer)
