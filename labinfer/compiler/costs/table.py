"""Measured times of ops by the size of the step, and the file that holds those of one device.

Times are not lines: they have steps where a kernel changes its way (a matrix unit, a chunk that leaves a cache). So a
table keeps what was measured, and is read by linear interpolation between neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from labinfer.errors import ErrorSink, InvalidFile, Place

PROFILE_VERSION = 1
MAX_PROFILE_BYTES = 16_000_000

Point = tuple[NonNegativeInt, NonNegativeInt, NonNegativeFloat, NonNegativeFloat]
"""Tokens (or rows of logits) of the step, tokens that each sequence had before it, seconds, and the spread of these:
the median distance from the median."""

Origin = Literal["measured", "borrowed", "derived"]
"""How times are known: measured on this very device, on another one of its kind, or derived from a specification."""


class Record(BaseModel):
    """Base of all parts of a profile: known keys only."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class CostTable(Record):
    """Times of one op. Ops that read the cache have points for ``decode`` (each sequence gets one token) and for
    ``prefill`` (one sequence gets them all). Others have points in ``step``: for them the number of tokens counts, and
    what was read of the cache only by what it drives out of the processor's caches."""

    decode: list[Point] = Field(default=[], description="each of so many sequences gets a token")
    prefill: list[Point] = Field(default=[], description="one sequence gets so many tokens")
    step: list[Point] = Field(default=[], description="so many tokens (or rows of logits), of whatever sequences")
    quick: bool = Field(default=False, description="whether few points were measured")

    def seconds(self, phase: Literal["decode", "prefill", "step"], tokens: int, past: int) -> float:
        """The time for ``tokens`` tokens of sequences that had ``past`` tokens before."""
        by_tokens = self._by_tokens[phase]
        if phase == "step":  # no more is driven out than all
            return interpolate([(count, interpolate(row, min(past, row[-1][0]))) for count, row in by_tokens], tokens)
        return interpolate([(count, interpolate(row, past)) for count, row in by_tokens], tokens)

    @cached_property
    def _by_tokens(self) -> Mapping[str, Sequence[tuple[int, Sequence[tuple[int, float]]]]]:
        found = {}
        for phase in ("decode", "prefill", "step"):
            rows: dict[int, dict[int, float]] = {}
            for tokens, past, seconds, _ in sorted(getattr(self, phase)):
                rows.setdefault(tokens, {})[past] = seconds
            found[phase] = [(tokens, list(row.items())) for tokens, row in rows.items()]
        return found

    def most_tokens(self) -> int:
        """The largest step that was measured."""
        return max((point[0] for point in [*self.decode, *self.prefill, *self.step]), default=0)


def interpolate(points: Sequence[tuple[int, float]], x: float) -> float:
    """Linear between neighbours of ``points`` (sorted); constant before the first, the last slope goes on after the
    last, unless it falls. 0 without points."""
    if not points:
        return 0.0
    if x <= points[0][0]:
        return points[0][1]
    at = next((number for number, point in enumerate(points) if x <= point[0]), len(points) - 1)
    if at == 0:
        return points[0][1]
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    slope = (y1 - y0) / (x1 - x0)
    return y1 + (max(slope, 0.0) if x > x1 else slope) * (x - x1)


class LinkProfile(Record):
    """A way between two devices: seconds until the first byte is there, then bytes per second."""

    latency: NonNegativeFloat = Field(description="seconds")
    bandwidth: PositiveFloat = Field(description="bytes per second")
    origin: Origin = Field(default="measured", description="how the numbers are known")

    def seconds(self, nbytes: int) -> float:
        """The time that so many bytes take."""
        return self.latency + nbytes / self.bandwidth


class StreamProfile(Record):
    """How layers are streamed from the host to a device: bytes per second, and how much of the shorter of copying and
    computing hides behind the other."""

    bandwidth: PositiveFloat = Field(description="bytes per second")
    overlap: float = Field(ge=0, le=1, description="1 where copies have a way of their own, 0 where they take turns")

    def added(self, computing: float, nbytes: int) -> float:
        """Seconds by which copying so many bytes lengthens a step of ``computing`` seconds."""
        copying = nbytes / self.bandwidth
        return copying - self.overlap * min(computing, copying)


class PipelineProfile(Record):
    """What differs for a device that runs a stage of a pipeline: what a step takes ``around`` the stages if this is the
    first, and, where the stage keeps to its own cores, by how much layers lengthen it that are streamed from the host.
    """

    around: CostTable = Field(default=CostTable(), description="what a step takes beside its stages and hops")
    streamed: PositiveFloat | None = Field(
        default=None, description="bytes per second of streamed layers, on own cores"
    )


class Links(Record):
    """A file of links between the devices of a machine, by the kinds at both ends: ``cpu to cpu``; and of the hops of
    its pipelines by transport."""

    labinfer_links: Literal[1] = Field(default=1, description="version of this format")
    links: dict[str, LinkProfile] = Field(default={}, description="links by name")
    transports: dict[str, LinkProfile] = Field(default={}, description="hops between stages by transport")


class Fingerprint(Record):
    """What times depend on; see ``backends.base.fingerprint``."""

    kind: str = Field(description="kind of device: its backend")
    machine: str = Field(description="processor it runs on")
    threads: PositiveInt | None = Field(default=None, le=1024, description="threads, where that means something")
    kernels: str = Field(description="version of its kernels")


class Hosts(Record):
    """A file of what was measured on other hosts: whose profile each device has (``cpu@10.0.0.1:7700``, by the address
    of its agent), and the ways between hosts (``10.0.0.1:7700 and 10.0.0.2:7700``)."""

    labinfer_hosts: Literal[1] = Field(default=1, description="version of this format")
    devices: dict[str, Fingerprint] = Field(default={}, description="what the times of a device depend on")
    links: dict[str, LinkProfile] = Field(default={}, description="ways between hosts, in both directions")


class DeviceProfile(Record):
    """What ops cost on one device: a file that can be read, kept and handed on.

    ``ops`` has a table for each signature;
    ``overhead`` is what a stage takes beside its ops, ``out`` the way from the device to the host, ``stream`` the way
    of streamed layers from the host, ``pipeline`` what differs for a stage of a pipeline.
    """

    labinfer_profile: Literal[1] = Field(default=1, description="version of this format")
    device: Fingerprint = Field(description="what the times depend on")
    ops: dict[str, CostTable] = Field(default={}, description="times by the signature of an op")
    overhead: CostTable = Field(default=CostTable(), description="what a step takes beside its ops")
    out: LinkProfile | None = Field(default=None, description="from the device's memory to the host's")
    stream: StreamProfile | None = Field(default=None, description="layers from the host's memory, in every step")
    pipeline: PipelineProfile | None = Field(default=None, description="what differs in a pipeline")

    def dump(self) -> str:
        """The profile as JSON text, an op and a phase a line."""
        from labinfer.compiler.plan_json import compact_json

        return compact_json(self.model_dump(mode="json", exclude_defaults=True) | {"labinfer_profile": 1}) + "\n"


def load_profile(path: Path | str) -> DeviceProfile:
    """Read a profile; every fault is an ``InvalidFile`` that names the file and the field."""
    place = Place(str(path))
    try:
        if Path(path).stat().st_size > MAX_PROFILE_BYTES:
            raise InvalidFile("profile.too-large", "the file is too large for a profile", place=place)
        return DeviceProfile.model_validate(json.loads(Path(path).read_text("utf-8")))
    except FileNotFoundError:
        raise InvalidFile("profile.missing", "no such profile", place=place) from None
    except ValidationError as failure:
        sink = ErrorSink()
        for each in failure.errors(include_url=False)[:20]:
            where = ".".join(map(str, each["loc"])) or "the file"
            sink.add(InvalidFile("profile.schema", f"{where}: {each['msg']}", place=place))
        sink.check()
        raise AssertionError("unreachable: a validation error has details") from failure
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidFile("profile.json", f"cannot be read as JSON: {error}", place=place) from None
