"""The devices of this machine, and what keeps the others from being used."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from labinfer.backends.base import BACKENDS
from labinfer.errors import LabinferError
from labinfer.extras import EXTRAS, missing
from labinfer.runtime.grants import Grant, all_grants
from labinfer.runtime.manager import Manager


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """A device by the name that ``--devices`` takes; memory in bytes; ``remedy`` says how to make it available.

    ``granted`` is what models in all processes were promised of it, and of its numbered ones such as ``cpu:1``.
    """

    name: str
    available: bool
    description: str
    memory_free: int = 0
    memory_total: int = 0
    compute_share: float = 0.0
    remedy: str | None = None
    granted: list[Grant] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def list_devices() -> list[DeviceReport]:
    """One report for each kind of device that labinfer knows."""
    manager, granted = Manager(), all_grants()
    reports = [_report(kind, manager) for kind in BACKENDS]
    return [
        replace(report, granted=[each for each in granted if each.device.partition(":")[0] == report.name])
        for report in reports
    ]


def _report(kind: str, manager: Manager) -> DeviceReport:
    try:
        device = manager.device(kind)
        free, total = device.memory()
        return DeviceReport(kind, True, device.describe(), free, total, device.compute_share)
    except ModuleNotFoundError as problem:
        module = (problem.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        error = missing(module)
    except LabinferError as problem:
        error = problem
    return DeviceReport(kind, False, error.message, remedy=error.remedy)
