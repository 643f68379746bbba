"""The manager: the one place that opens devices and says who may use how much of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from labinfer.backends.base import Device, backend_class
from labinfer.errors import DoesNotFit


@dataclass(slots=True)
class Manager:
    """Devices by name, each opened once and shared (a flyweight), and the bytes granted on each to every owner."""

    quotas: dict[str, int] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)
    grants: dict[str, dict[str, int]] = field(default_factory=dict)
    cores: dict[str, list[int]] = field(default_factory=dict)

    def device(self, name: str, threads: int | None = None) -> Device:
        """The device called ``name``, opened with ``threads`` if it is not open yet; ``DoesNotFit`` without one."""
        if name not in self.devices:
            self.devices[name] = backend_class(name)(name, threads=threads)
        return self.devices[name]

    def close(self) -> None:
        """Close every device that was opened."""
        for device in self.devices.values():
            device.close()
        self.devices.clear()

    def grant(self, owner: str, device: str, nbytes: int) -> None:
        """Promise ``owner`` so many bytes of ``device``; ``DoesNotFit`` beyond the device's quota."""
        granted = self.grants.setdefault(device, {})
        quota, taken = self.quotas.get(device), sum(granted.values())
        if quota is not None and taken + nbytes > quota:
            message = f"'{owner}' wants {nbytes} bytes of '{device}'; {quota - taken} of its quota of {quota} are left"
            raise DoesNotFit("device.quota", message)
        granted[owner] = granted.get(owner, 0) + nbytes

    def release(self, owner: str) -> None:
        """Take back everything granted to ``owner``."""
        for granted in self.grants.values():
            granted.pop(owner, None)
