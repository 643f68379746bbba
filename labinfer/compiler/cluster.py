"""The cluster file: devices, the links between them, and what must run where. Read as maps are: errors have places."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from labinfer.compiler.source import Node, load_yaml, place_of
from labinfer.errors import ErrorSink, InvalidFile, Place, UsageError, did_you_mean
from labinfer.units import parse_bytes

HERE = "here"
"""The host that devices are on unless they say otherwise: this one."""

_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(ns|us|µs|ms|s)", re.ASCII)
_SCALES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def _bytes(value: object) -> object:
    try:
        return parse_bytes(value) if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError(error.message) from None


def _rate(value: object) -> object:
    return _bytes(value.removesuffix("/s")) if isinstance(value, str) else value


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _SECONDS.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"'{value}' is no time such as 50us or 1.5ms")
    return float(match[1]) * _SCALES[match[2]]


Bytes = Annotated[PositiveInt, BeforeValidator(_bytes)]
Rate = Annotated[PositiveInt, BeforeValidator(_rate)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_seconds)]


class ClusterModel(BaseModel):
    """Base of all parts of a cluster file: known keys only."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ClusterDevice(ClusterModel):
    """A device: a real one by its name (``cpu``, ``cpu:1``, ``cpu@alpha`` of host alpha), or a declared one.

    A declared device is ``like`` one of the catalogue, or one whose ``profile`` was measured elsewhere. Plans for it
    can be compiled and explained, but not run here.
    """

    threads: PositiveInt | None = Field(
        default=None, le=1024, description="threads of a CPU, or multiprocessors of a GPU"
    )
    memory: Bytes | None = Field(default=None, description="cap in bytes, or like 24GB, 16GiB")
    share: float = Field(default=1.0, gt=0, le=1, description="part of its compute that is granted")
    like: str | None = Field(default=None, description="a device of the catalogue: a100-80g")
    profile: str | None = Field(default=None, description="a profile measured elsewhere, beside this file")
    host: str = Field(default=HERE, description="the host it is on")

    @property
    def declared(self) -> bool:
        """Whether it is not here."""
        return self.like is not None or self.profile is not None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.like and self.profile:
            raise ValueError("give 'like' or 'profile', not both")
        return self


class ClusterHost(ClusterModel):
    """A machine that runs an agent; see ``labinfer cluster up``."""

    address: str = Field(
        pattern=r"^[A-Za-z0-9_.\-]{1,253}:[0-9]{1,5}$", description="where its agent listens: 10.0.0.1:7700"
    )
    ssh: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@\-]{0,252}$",
        description="how ssh reaches it, as user@name; without it the agent runs on this machine",
    )

    python: str = Field(
        default="python3",
        pattern=r"^[A-Za-z0-9_./\-]{1,1024}$",
        description="with ssh: the Python that has labinfer there",
    )

    @property
    def endpoint(self) -> tuple[str, int]:
        """Address and port."""
        name, _, port = self.address.rpartition(":")
        return name, int(port)


class ClusterLink(ClusterModel):
    """A connection of two hosts or devices, in both directions."""

    between: tuple[str, str] = Field(description="hosts or devices")
    latency: Seconds = Field(description="seconds until the first byte arrives, or like 50us")
    bandwidth: Rate = Field(description="bytes per second, or like 1.25GB/s")


class ClusterTls(ClusterModel):
    """PEM files by which all hosts encrypt what they say to each other: the same paths on each host, its own files."""

    certificate: str = Field(description="the host's certificate, which names its address; relative to this file")
    key: str = Field(description="the private key of that, which only its owner can read")
    ca: str = Field(description="the authority that has signed the certificates of all hosts")


class Cluster(ClusterModel):
    """A whole cluster file."""

    devices: dict[str, ClusterDevice] = Field(min_length=1, max_length=4096, description="devices by name")
    hosts: dict[str, ClusterHost] = Field(
        default={}, max_length=4096, description="hosts whose devices run stages, by name"
    )
    links: list[ClusterLink] = Field(default=[], description="the nearest one given counts: of devices, then of hosts")
    tls: ClusterTls | None = Field(default=None, description="certificates, to encrypt what hosts say to each other")
    pins: dict[str, str] = Field(
        default={},
        description="layers by name (`start`, `layers.0`, `layers.1?`, `end`), and the device that must run them",
    )
    _node: Node
    _file: Path

    def host_of(self, device: str) -> str:
        """The host of ``device``: what stands behind the @ of its name, else what is said of it."""
        return device.partition("@")[2] or self.devices[device].host

    def over(self, hosts: Collection[str]) -> Cluster:
        """As if there were no devices but those of ``hosts``."""
        devices = {name: device for name, device in self.devices.items() if self.host_of(name) in hosts}
        pins = {pattern: name for pattern, name in self.pins.items() if name in devices}
        return self.model_copy(update={"devices": devices, "pins": pins})

    def place(self, *path: str | int) -> Place:
        """Where an element stands: ``place("devices", "gpu")``."""
        return place_of(self._node, path)

    @property
    def file(self) -> Path:
        """The file it was read from."""
        return self._file


def read_cluster(path: Path | str) -> Cluster:
    """Read a cluster file; all its errors are raised together as ``InvalidFile`` with file, line and column."""
    node, sink = load_yaml(path), ErrorSink()
    try:
        cluster = Cluster.model_validate(node.plain())
    except ValidationError as failure:
        for detail in failure.errors(include_url=False):
            sink.add(_schema_error(node, detail))
        sink.check()
        raise AssertionError("unreachable: a validation error has details") from failure
    cluster._node, cluster._file = node, Path(path)
    for error in _unknown_names(cluster):
        sink.add(error)
    sink.check()
    return cluster


def _schema_error(node: Node, detail: Any) -> InvalidFile:
    place, where = place_of(node, detail["loc"]), ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        known = {
            name
            for each in (Cluster, ClusterDevice, ClusterHost, ClusterLink, ClusterTls)
            for name in each.model_fields
        }
        remedy = did_you_mean(str(detail["loc"][-1]), known)
        return InvalidFile("cluster.unknown-key", f"unknown key '{where}'", place=place, remedy=remedy)
    return InvalidFile("cluster.schema", f"{where or 'the file'}: {detail['msg']}", place=place)


def _unknown_names(cluster: Cluster) -> list[InvalidFile]:
    """Links and pins that name nothing of the file."""
    hosts = {*map(cluster.host_of, cluster.devices), HERE}
    known = {*cluster.devices, *hosts}
    named: list[tuple[tuple[str | int, ...], str, set[str]]] = []
    named += [(("links", n), end, known) for n, link in enumerate(cluster.links) for end in link.between]
    named += [(("pins", pattern), name, set(cluster.devices)) for pattern, name in cluster.pins.items()]
    if cluster.hosts:
        named += [(("devices", name), cluster.host_of(name), set(cluster.hosts)) for name in cluster.devices]
    return [
        InvalidFile(
            "cluster.unknown-name", f"there is no device or host '{name}'", place=cluster.place(*path),
            remedy=did_you_mean(name, among),
        )
        for path, name, among in named
        if name not in among
    ]  # fmt: skip


def cluster_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a cluster file; sizes, rates and times may be texts with a unit."""
    schema = Cluster.model_json_schema()
    device, link = (schema["$defs"][name]["properties"] for name in ("ClusterDevice", "ClusterLink"))
    for fields, name in ((device, "memory"), (link, "latency"), (link, "bandwidth")):
        about = {"description": fields[name]["description"]}
        fields[name] = {**about, "type": ["string", "number"]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "LABInfer cluster file"}
    return {**head, **{key: value for key, value in schema.items() if key != "title"}}
