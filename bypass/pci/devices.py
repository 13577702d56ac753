# SPDX-License-Identifier: Apache-2.0
"""Network devices of the PCI bus: what they are, which driver has them, who shares their IOMMU group.

What lives here: reading sysfs. What does not: changing anything (`binding.py`, `vf.py`).

Sources: Documentation/ABI/testing/sysfs-bus-pci and sysfs-kernel-iommu_groups of the kernel; pci.ids(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bypass.errors import DeviceError
from bypass.pci.machine import Machine

__all__ = ["Bus", "Device", "Neighbour", "Other"]

ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
NETWORK_CLASS, BRIDGE_CLASS = 0x02, 0x06
NO_IOMMU_GROUP = "vfio-noiommu"  # what vfio calls the groups that it makes where there is no IOMMU
USER_DRIVERS = ("vfio-pci", "uio_pci_generic", "igb_uio")
"""Drivers that hand a device to a program."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another device of an IOMMU group. A bridge's driver is no hindrance to vfio."""

    address: str
    driver: str
    bridge: bool


@dataclass(frozen=True, slots=True)
class Device:
    """A network device of the PCI bus.

    Attributes:
        address: domain:bus:device.function, as in sysfs.
        name: vendor and device in words where pci.ids is there; else "".
        driver: "" when none has it.
        override: the only driver that may take it; "" when any may.
        interfaces: its interfaces in this network namespace.
        states: of them, in the same order: up, down, ...
        group: number of its IOMMU group; "" without an IOMMU.
        unsafe_group: vfio made the group, there is no IOMMU.
        neighbours: the other devices of the group.
        numa: node; None when it belongs to none.
        vfs, max_vfs: virtual functions that it has, and may have.
        functions: their addresses.
        parent: of a virtual function: the address of its device.
    """

    address: str
    vendor: int
    device: int
    name: str
    driver: str
    override: str
    interfaces: tuple[str, ...]
    states: tuple[str, ...]
    group: str
    unsafe_group: bool
    neighbours: tuple[Neighbour, ...]
    numa: int | None
    vfs: int
    max_vfs: int
    functions: tuple[str, ...]
    parent: str

    @property
    def iommu(self) -> bool:
        """Its memory accesses are checked."""
        return bool(self.group) and not self.unsafe_group

    @property
    def by_user(self) -> bool:
        """A program may have it, the kernel has not."""
        return self.driver in USER_DRIVERS


@dataclass(frozen=True, slots=True)
class Other:
    """A network interface of a device that is on another bus."""

    interface: str
    bus: str
    device: str
    driver: str
    state: str


class Bus:
    """The PCI bus of a machine."""

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()
        self.folder = self.machine.sys / "bus/pci/devices"
        self._names: dict[tuple[int, int], str] | None = None

    def addresses(self) -> list[str]:
        """Of all devices, not only of network."""
        try:
            return sorted(p.name for p in self.folder.iterdir())
        except OSError:
            return []

    def network(self) -> list[Device]:
        """The network devices, by address."""
        return [self.read(a) for a in self.addresses() if self._class(a) >> 16 == NETWORK_CLASS]

    def find(self, name: str) -> Device:
        """By address (with or without its domain) or by the name of an interface.

        Raises:
            DeviceError: there is no such device, or it is not one of network; the message lists those that are.
        """
        matched = ADDRESS.fullmatch(name.lower())
        if matched:
            address = f"{matched[1] or '0000'}:{matched[2]}:{matched[3]}.{matched[4]}"
        else:
            address = self._address_of(name)
        if address not in self.addresses():
            there = ", ".join(self._called(d) for d in self.network()) or "none"
            raise DeviceError(f"no PCI device {name!r} here; network devices: {there}")
        if self._class(address) >> 16 != NETWORK_CLASS:
            raise DeviceError(f"{address} is no network device (its class is {self._class(address):06x})")
        return self.read(address)

    def read(self, address: str) -> Device:
        """Of a device that is there."""
        m, at = self.machine, self.folder / address
        interfaces = self.interfaces(address)
        group = m.target(at / "iommu_group")
        kind = m.read(m.sys / "kernel/iommu_groups" / group / "name") if group else ""
        vendor, device = (int(m.read(at / f) or "0", 16) for f in ("vendor", "device"))
        numa = int(m.read(at / "numa_node") or "-1")
        override = m.read(at / "driver_override")
        return Device(
            address=address,
            vendor=vendor,
            device=device,
            name=self.names().get((vendor, device), ""),
            driver=m.target(at / "driver"),
            override="" if override == "(null)" else override,
            interfaces=interfaces,
            states=tuple(m.read(m.sys / "class/net" / i / "operstate") or "unknown" for i in interfaces),
            group=group,
            unsafe_group=kind == NO_IOMMU_GROUP,
            neighbours=self._neighbours(address, group),
            numa=numa if numa >= 0 else None,
            vfs=int(m.read(at / "sriov_numvfs") or "0"),
            max_vfs=int(m.read(at / "sriov_totalvfs") or "0"),
            functions=self.functions(address),
            parent=m.target(at / "physfn"),
        )

    def functions(self, address: str) -> tuple[str, ...]:
        """The addresses of a device's virtual functions, by number."""
        links = sorted((self.folder / address).glob("virtfn*"), key=lambda p: int(p.name[len("virtfn") :]))
        return tuple(self.machine.target(link) for link in links)

    def interfaces(self, address: str) -> tuple[str, ...]:
        """In this network namespace; a virtio device has another device in between."""
        at = self.folder / address
        return tuple(sorted(p.name for pattern in ("net/*", "virtio*/net/*") for p in at.glob(pattern)))

    def others(self) -> list[Other]:
        """Interfaces of devices that are on other buses (USB, a platform's, virtio without PCI)."""
        m, found = self.machine, []
        ours = {name for a in self.addresses() for name in self.interfaces(a)}
        for folder in sorted((m.sys / "class/net").glob("*")):
            if folder.name in ours or not (folder / "device").exists():
                continue  # without a device: a veth, a bridge
            found.append(
                Other(
                    folder.name,
                    m.target(folder / "device/subsystem") or "unknown",
                    m.target(folder / "device"),
                    m.target(folder / "device/driver"),
                    m.read(folder / "operstate") or "unknown",
                )
            )
        return found

    # ---- Inside ------------------------------------------------------------------------------------------------
    def _class(self, address: str) -> int:
        return int(self.machine.read(self.folder / address / "class") or "0", 16)

    def _address_of(self, ifname: str) -> str:
        if "/" in ifname or ifname in ("", ".", ".."):
            return ""
        device = (self.machine.sys / "class/net" / ifname / "device").resolve()
        return next((p.name for p in (device, *device.parents) if ADDRESS.fullmatch(p.name)), "")

    def _called(self, device: Device) -> str:
        return f"{device.address} ({', '.join(device.interfaces) or device.driver or 'no driver'})"

    def _neighbours(self, address: str, group: str) -> tuple[Neighbour, ...]:
        if not group:
            return ()
        folder = self.machine.sys / "kernel/iommu_groups" / group / "devices"
        return tuple(
            Neighbour(
                p.name,
                self.machine.target(self.folder / p.name / "driver"),
                self._class(p.name) >> 16 == BRIDGE_CLASS,
            )
            for p in sorted(folder.glob("*"))
            if p.name != address
        )

    def names(self) -> dict[tuple[int, int], str]:
        """(vendor, device) -> words, of the network devices here; read once."""
        if self._names is None:
            wanted = {
                (
                    int(self.machine.read(at / "vendor") or "0", 16),
                    int(self.machine.read(at / "device") or "0", 16),
                )
                for at in (self.folder / a for a in self.addresses())
            }
            file = next((f for f in self.machine.pci_ids if f.exists()), None)
            self._names = read_names(file, wanted) if file else {}
        return self._names


def read_names(file: Path, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """Names from a pci.ids file: vendors at the margin, their devices behind one tab (behind two: subsystems)."""
    found: dict[tuple[int, int], str] = {}
    vendor, vendor_name = -1, ""
    for line in file.read_text(errors="replace").splitlines():
        if line.startswith("C "):
            break  # classes follow
        m = re.match(r"(\t?)([0-9a-f]{4}) +(.*)", line)
        if m is None:
            continue
        if not m[1]:
            vendor, vendor_name = int(m[2], 16), m[3]
        elif (vendor, int(m[2], 16)) in wanted:
            found[vendor, int(m[2], 16)] = f"{vendor_name} {m[3]}"
    return found
