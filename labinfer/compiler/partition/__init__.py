"""Which device runs which layers: plans with a proof of optimality or a stated gap (see ``partition``)."""

from labinfer.compiler.partition.problem import (
    Device,
    DeviceKind,
    Layer,
    Link,
    Objective,
    Problem,
    Residency,
    Workload,
)
from labinfer.compiler.partition.result import Partition, Stage, verify
from labinfer.compiler.partition.solve import partition

__all__ = [
    "Device",
    "DeviceKind",
    "Layer",
    "Link",
    "Objective",
    "Partition",
    "Problem",
    "Residency",
    "Stage",
    "Workload",
    "partition",
    "verify",
]
