"""The manager: the one place that opens devices and says who may use how much of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from labinfer.backends.base import Device, backend_class, capabilities
from labinfer.errors import DoesNotFit, UsageError
from labinfer.runtime.cores import available_cores, call_on
from labinfer.runtime.grants import Grants
from labinfer.units import human_bytes


class Memory(NamedTuple):
    """What an owner has of a device, and the quota that all owners share; in bytes."""

    granted_bytes: int
    quota_bytes: int | None


@dataclass(slots=True)
class Manager:
    """Devices by name, each opened once and shared (a flyweight), and the bytes granted on each to every owner.

    ``quotas`` bound the bytes of a device. ``shares`` (0 to 1) grant parts of the compute: to devices that compute with
    the machine's cores sets of these, in ``cores``, that no other device gets; to those with processors of their own
    (``cuda:0.0`` and ``cuda:0.1`` on the first GPU) so many of these, in ``processors``. ``claimed`` devices have their
    cores as long as something is granted there. What is granted can be seen by ``labinfer devices``.
    """

    quotas: dict[str, int] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)
    grants: Grants = field(default_factory=Grants)
    shares: dict[str, float] = field(default_factory=dict)
    cores: dict[str, list[int]] = field(default_factory=dict)
    claimed: set[str] = field(default_factory=set)
    processors: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Cut the machine, and devices with processors of their own, into the shares."""
        everything = available_cores()
        for name, share in self.shares.items():
            if not 0 < share <= 1:
                raise UsageError("device.share", f"the share of '{name}' must be above 0 and at most 1, it is {share}")
            own = capabilities(name).processors(name)
            if own is not None:
                self.processors[name] = max(1, round(share * own))
                continue
            left = self._free_cores()
            count = max(1, round(share * len(everything)))
            if count > len(left):
                message = f"'{name}' should get {count} of {len(everything)} cores, {len(left)} are left by the others"
                raise DoesNotFit("device.share", message, remedy="grant shares that make 1 together")
            self.cores[name] = left[:count]

    def device(self, name: str, threads: int | None = None) -> Device:
        """The device called ``name``, opened with ``threads`` if it is not open yet; ``DoesNotFit`` without one."""
        if name not in self.devices:
            cores, kind = self.cores.get(name, []), backend_class(name)
            granted = self.processors.get(name) or len(cores)
            if granted and threads is not None and threads > granted:
                unit, remedy = "cores", f"compile with --threads {granted}, or grant more"
                if name in self.processors:
                    unit, remedy = "processors", "compile for a smaller share, or grant more"
                message = f"'{name}' should run {threads} threads, it is granted {granted} {unit}"
                raise DoesNotFit("device.share", message, remedy=remedy)
            self.devices[name] = call_on(cores, lambda: kind(name, threads=threads or granted or None))
        return self.devices[name]

    def claim_cores(self, threads: Mapping[str, int | None]) -> None:
        """Give devices that are not open yet, and run so many threads at the same time, cores of their own.

        Where there are too few cores for that, they share all of them. Once nothing is granted on such a device any
        more it is closed, and others may have its cores.
        """
        wanted = {name: count for name, count in threads.items() if count and name not in self.cores | self.devices}
        left = self._free_cores()
        if sum(wanted.values()) <= len(left):
            for name, count in wanted.items():
                self.cores[name], left = left[:count], left[count:]
                self.claimed.add(name)

    def _free_cores(self) -> list[int]:
        taken = {core for cores in self.cores.values() for core in cores}
        return [core for core in available_cores() if core not in taken]

    def close(self) -> None:
        """Close every device that was opened, and take back what was claimed and granted."""
        for device in self.devices.values():
            device.close()
        self.devices.clear()
        self.grants.close()
        self._return_cores()

    def grant(self, owner: str, device: str, nbytes: int) -> None:
        """Promise ``owner`` so many bytes of ``device``; ``DoesNotFit`` beyond the device's quota."""
        quota, taken = self.quotas.get(device), self.grants.on(device)
        if quota is not None and taken + nbytes > quota:
            message = (
                f"'{owner}' wants {human_bytes(nbytes)} of '{device}'; "
                f"{human_bytes(quota - taken)} of its quota of {human_bytes(quota)} are left"
            )
            raise DoesNotFit("device.quota", message, remedy="grant more, or close what else runs there")
        self.grants.add(owner, device, nbytes, self.cores.get(device, []), self.processors.get(device, 0))

    def regrant(self, owner: str, wanted: Mapping[str, int]) -> None:
        """Promise ``owner`` these bytes by device instead of what it has, which it keeps if they are beyond a quota."""
        before = self.grants.given
        self.grants.given = [grant for grant in before if grant.owner != owner]
        try:
            for device, nbytes in wanted.items():
                self.grant(owner, device, nbytes)
        except DoesNotFit:
            self.grants.given = before
            self.grants.tell()
            raise

    def memory_of(self, owner: str) -> dict[str, Memory]:
        """What ``owner`` has, by device."""
        found: dict[str, int] = {}
        for grant in self.grants.given:
            if grant.owner == owner:
                found[grant.device] = found.get(grant.device, 0) + grant.nbytes
        return {device: Memory(nbytes, self.quotas.get(device)) for device, nbytes in found.items()}

    def release(self, owner: str) -> None:
        """Take back everything granted to ``owner``, and cores that were claimed for nobody else."""
        self.grants.remove(owner)
        self._return_cores()

    def _return_cores(self) -> None:
        """Close the claimed devices that nothing is granted on; their cores are free again."""
        for name in [name for name in self.claimed if not self.grants.on(name)]:
            self.claimed.remove(name)
            del self.cores[name]
            if name in self.devices:
                self.devices.pop(name).close()
