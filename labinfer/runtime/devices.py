"""The devices of this machine, and what keeps the others from being used."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from labinfer.backends.base import BACKENDS
from labinfer.errors import LabinferError
from labinfer.extras import EXTRAS, missing
from labinfer.runtime.manager import Manager


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """A device by the name that ``--devices`` takes; memory in bytes; ``remedy`` says how to make it available."""

    name: str
    available: bool
    description: str
    memory_free: int = 0
    memory_total: int = 0
    compute_share: float = 0.0
    remedy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def list_devices() -> list[DeviceReport]:
    """One report for each kind of device that labinfer knows."""
    manager = Manager()
    return [_report(kind, manager) for kind in BACKENDS]


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
