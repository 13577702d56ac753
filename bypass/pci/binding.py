# SPDX-License-Identifier: Apache-2.0
"""A network device's way from its kernel driver to one that hands it to a program (vfio-pci), and back.

    bind:    checks -> record -> driver_override -> leaves its driver -> the new one is asked
    unbind:  no override -> leaves the driver -> the kernel's is asked -> interface as it was -> no record

What fails in bind is followed by unbind, so that no device is left without a driver. Whoever is killed in between
leaves the record, from which `bypass nic unbind` repairs.

Sources: Documentation/ABI/testing/sysfs-bus-pci (driver_override, drivers_probe), Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bypass.errors import DeviceError
from bypass.pci import records
from bypass.pci.devices import USER_DRIVERS, Bus, Device
from bypass.pci.machine import Machine
from bypass.pci.records import Record

__all__ = ["Bound", "Given", "Taken", "bind", "hindrances", "left_behind", "take", "unbind"]

log = logging.getLogger("bypass")

MODULES = {"vfio-pci": "vfio-pci", "uio_pci_generic": "uio_pci_generic", "igb_uio": "igb_uio"}
HARMLESS = ("", "vfio-pci", "pci-stub", "pcieport", "shpchp")
"""Drivers that a device's IOMMU group may have beside vfio-pci (vfio_dev_viable() of the kernel); "": none."""
ON_KERNEL_DRIVER = ("mlx4_core", "mlx5_core")
"""Drivers on top of which DPDK's work: without them these find no device."""
INTERFACE_S, STEP_S = 10.0, 0.05


@dataclass(frozen=True, slots=True)
class Bound:
    """What bind() did. `changed`: False: it was so before. `warnings`: what is worth knowing."""

    address: str
    driver: str
    changed: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """What unbind() did: `driver` has the device again, with these interfaces. `gone`: there is no such device now."""

    address: str
    driver: str
    interfaces: tuple[str, ...]
    changed: bool
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Taken:
    """A device that a program may use. `ours`: it was taken from the kernel here, and goes back at the end."""

    address: str
    driver: str
    ours: bool
    warnings: tuple[str, ...] = ()


# ---- The three calls -----------------------------------------------------------------------------------------------
def bind(
    name: str,
    driver: str = "vfio-pci",
    *,
    force: bool = False,
    no_iommu: bool = False,
    machine: Machine | None = None,
) -> Bound:
    """Takes a device from its kernel driver, until unbind().

    Args:
        name: an interface's name, or the device's PCI address.
        driver: one of USER_DRIVERS.
        force: also a device that something depends on.
        no_iommu: vfio may go without an IOMMU: whoever has the device can then write to all memory by it.

    Raises:
        DeviceError: it is refused, with all reasons; or a step failed, and everything is as it was.
    """
    machine = machine or Machine()
    with machine.locked():
        bus = Bus(machine)
        device = bus.find(name)
        if device.driver == driver:
            return Bound(device.address, driver, False)
        if records.load(machine, device.address) is not None:
            raise DeviceError(
                f"{device.address} was not given back whole: bypass nic unbind {device.address} does it from its record"
            )
        return _bind(bus, device, driver, force, no_iommu, None)


def unbind(name: str, *, machine: Machine | None = None) -> Given:
    """Gives a device back to its kernel driver, and its interface what it had. Also repairs what a process that was
    killed left half done. Of a device that has been taken out of the machine the record is forgotten.

    Raises:
        DeviceError: a program uses it; or a step failed, and the message says how it is now.
    """
    machine = machine or Machine()
    with machine.locked():
        bus = Bus(machine)
        address = _address_of_record(machine, name)
        if address not in bus.addresses() and (record := records.load(machine, address)) is not None:
            problems = _safe_mode(machine, record)
            if problems:
                raise DeviceError(f"{address} is gone, and {problems[0]}")
            records.remove(machine, address)
            return Given(address, "", (), True, gone=True)
        device = bus.find(address)
        record = records.load(machine, device.address)
        if record is None and device.driver and not device.by_user:
            return Given(device.address, device.driver, device.interfaces, False)
        if record is not None and records.is_held(machine, record) and record.holder != _me(machine):
            raise DeviceError(
                f"{device.address} is held by process {record.holder[0] if record.holder else 0}: stop it first"
            )
        return _unbind(bus, record or Record(device.address, "", "", ""))


@contextmanager
def take(
    name: str,
    driver: str = "vfio-pci",
    *,
    force: bool = False,
    no_iommu: bool = False,
    machine: Machine | None = None,
) -> Iterator[Taken]:
    """A device for this process: taken from its kernel driver, and given back at the end of the block. One that was
    bound before, by `bypass nic bind` or by hand, is used and stays as it is. One that a killed process had taken is
    taken over. The caller closes it before the block ends.

    Raises:
        DeviceError: as bind(); or another process has it. At the end: as unbind().
    """
    machine = machine or Machine()
    with machine.locked():
        bus = Bus(machine)
        taken = _take(bus, bus.find(_address_of_record(machine, name)), driver, force, no_iommu)
    try:
        yield taken
    finally:
        if taken.ours and unbind(taken.address, machine=machine).gone:
            log.warning("%s was taken out of the machine: there is nothing to give back", taken.address)


def _take(bus: Bus, device: Device, driver: str, force: bool, no_iommu: bool) -> Taken:
    machine = bus.machine
    record = records.load(machine, device.address)
    if record is not None and records.is_held(machine, record):
        raise DeviceError(f"{device.address} is held by process {record.holder[0] if record.holder else 0}")
    if device.driver == driver:
        left = record is not None and record.holder is not None  # by a process that was killed
        if record is not None and left:
            records.save(machine, replace(record, holder=_me(machine)))
        return Taken(device.address, driver, left)
    if record is not None:  # killed half way
        _unbind(bus, record)
        device = bus.read(device.address)
    bound = _bind(bus, device, driver, force, no_iommu, _me(machine))
    return Taken(device.address, driver, True, bound.warnings)


def _me(machine: Machine) -> tuple[int, int]:
    return os.getpid(), machine.started(os.getpid()) or 0


def left_behind(machine: Machine | None = None) -> list[Record]:
    """Devices that processes had taken for as long as they run, which were killed. Programs may still have them open:
    bypass-fwd outlives its broker."""
    machine = machine or Machine()
    return [r for r in records.every(machine) if r.holder is not None and not records.is_held(machine, r)]


def _address_of_record(machine: Machine, name: str) -> str:
    """The device that had an interface of this name when it was taken; else the name itself."""
    for record in records.every(machine):
        if name in (saved.name for saved in record.interfaces):
            return record.address
    return name


# ---- Why not -------------------------------------------------------------------------------------------------------
def hindrances(bus: Bus, device: Device) -> list[str]:
    """What would be lost or cut off if the device left its driver; empty: nothing that is known."""
    found = []
    for ifname in device.interfaces:
        facts = bus.machine.facts(ifname)
        if facts.default_route:
            found.append(f"{ifname} carries the default route")
        if facts.login:
            found.append(f"the login from {facts.login} comes through {ifname}")
        if facts.program is not None:
            whose = "a running bypass" if facts.program.ours else "an XDP program"
            found.append(f"{ifname} is used by {whose}: {facts.program.whose()}")
        found += [f"{lost} would be lost" for lost in bus.machine.snapshot(ifname).lost]
    if device.driver in ON_KERNEL_DRIVER:
        found.append(f"DPDK's driver for it works on top of {device.driver}: name it in the policy as it is")
    if device.driver and not device.by_user and not device.interfaces:
        found.append(
            f"{device.driver} has it without an interface here: it may be another network namespace's"
        )
    if device.vfs:
        found.append(f"its {device.vfs} virtual functions would go: {' '.join(device.functions)}")
    for other in device.neighbours:
        if other.driver not in HARMLESS and not other.bridge:
            found.append(
                f"{other.address} is in the same IOMMU group ({device.group}) and has the driver {other.driver}: "
                "vfio opens none of a group before all are taken"
            )
    return found


def _check(bus: Bus, device: Device, driver: str, force: bool, no_iommu: bool) -> list[str]:
    """Warnings. DeviceError: it is refused."""
    if driver not in USER_DRIVERS:
        raise DeviceError(f"driver {driver!r}: it is one of {', '.join(USER_DRIVERS)}")
    warnings = []
    reasons = hindrances(bus, device)
    if driver == "vfio-pci" and not device.iommu and not no_iommu:
        also = f". Also: {'; '.join(reasons)}" if reasons else ""
        raise DeviceError(_no_iommu_text(bus.machine, device) + also)
    if driver != "vfio-pci" or not device.iommu:
        warnings.append(
            f"without an IOMMU between {device.address} and memory, a program that has it can read and write everything"
        )
    if reasons and not force:
        raise DeviceError(
            f"{device.address} is refused (bypass nic bind --force does it all the same): {'; '.join(reasons)}"
        )
    return warnings + [f"forced: {reason}" for reason in reasons]


def _no_iommu_text(machine: Machine, device: Device) -> str:
    line = machine.read(machine.proc / "cmdline")
    asked = "intel_iommu=on" in line or "amd_iommu=on" in line
    how = (
        "the kernel was told to use one: switch on VT-d or AMD-Vi in the firmware, or give the guest a virtual IOMMU"
        if asked
        else "boot with intel_iommu=on (AMD's needs no word), and switch on VT-d or AMD-Vi in the firmware"
    )
    return (
        f"{device.address} has no IOMMU, which vfio-pci needs: {how}; or bypass nic bind --no-iommu (unsafe) "
        "where whoever gets the device may write to all memory"
    )


# ---- The steps -----------------------------------------------------------------------------------------------------
def _bind(
    bus: Bus, device: Device, driver: str, force: bool, no_iommu: bool, holder: tuple[int, int] | None
) -> Bound:
    machine = bus.machine
    warnings = _check(bus, device, driver, force, no_iommu)
    _load(machine, driver)
    unsafe = _unsafe_mode(machine) if driver == "vfio-pci" and not device.iommu else None
    try:
        interfaces = tuple(machine.snapshot(i) for i in device.interfaces)
    except OSError as error:
        raise DeviceError(f"{device.address}: its interface cannot be read: {error.strerror}") from error
    record = Record(device.address, device.driver, device.override, driver, unsafe == "N", holder, interfaces)
    records.save(machine, record)
    try:
        if unsafe == "N":
            machine.write(_unsafe_path(machine), "Y")
        _hand_over(bus, device.address, driver)
    except BaseException as error:
        reason = f"{device.address} was not bound to {driver}: {getattr(error, 'strerror', '') or error}"
        try:
            _unbind(bus, record)
        except DeviceError as worse:
            raise DeviceError(f"{reason}; and then: {worse}") from error
        if not isinstance(error, OSError):
            raise
        raise DeviceError(f"{reason}; it is {device.driver or 'without a driver'} as before") from error
    return Bound(device.address, driver, True, tuple(warnings))


def _load(machine: Machine, driver: str) -> None:
    """The driver is there afterwards. DeviceError."""
    folder = machine.sys / "bus/pci/drivers" / driver
    if folder.exists():
        return
    try:
        machine.load_module(MODULES[driver])
    except OSError as error:
        raise DeviceError(f"the driver {driver} is not there: {error.strerror or error}") from error
    if not folder.exists():
        raise DeviceError(f"the module {MODULES[driver]} is loaded, but there is no PCI driver {driver}")


def _unsafe_path(machine: Machine) -> Path:
    return machine.sys / "module/vfio/parameters/enable_unsafe_noiommu_mode"


def _unsafe_mode(machine: Machine) -> str:
    """ "Y" or "N". DeviceError: this kernel has no such mode."""
    value = machine.read(_unsafe_path(machine))
    if value not in ("Y", "N"):
        raise DeviceError("this kernel's vfio has no unsafe mode (CONFIG_VFIO_NOIOMMU): an IOMMU is needed")
    return value


def _hand_over(bus: Bus, address: str, driver: str) -> None:
    """The device leaves its driver, and `driver` gets it. OSError: it has not."""
    machine, at = bus.machine, bus.folder / address
    machine.write(at / "driver_override", driver)
    if machine.target(at / "driver"):
        machine.write(at / "driver/unbind", address)
    machine.write(machine.sys / "bus/pci/drivers_probe", address)
    # A probe that fails is told to the kernel's log, not to us.
    if machine.target(at / "driver") != driver:
        raise OSError(f"{driver} did not take it (dmesg may tell why)")


def _unbind(bus: Bus, record: Record) -> Given:
    machine, address = bus.machine, record.address
    device = bus.read(address)
    if device.by_user:
        refuse_in_use(machine, device)
    before = device.driver
    if not device.driver or device.by_user or device.driver != record.driver:
        try:
            _to_kernel(bus, record)
        except OSError as error:
            now = bus.read(address).driver
            if before and not now:
                now = _try_again(bus, address, before)
            raise DeviceError(
                f"{address} was not given back to {record.driver or 'the kernel'}: {error.strerror or error}; "
                f"it is with {now or 'no driver'} now: mend the cause, then bypass nic unbind {address}"
            ) from error
    elif device.override != record.override:
        try:
            machine.write(bus.folder / address / "driver_override", f"{record.override}\n")
        except OSError as error:
            raise DeviceError(
                f"{address}: its driver_override {device.override} stays: {error.strerror}: "
                f"bypass nic unbind {address} tries again"
            ) from error
    problems = _restore_interfaces(bus, record) + _safe_mode(machine, record)
    if problems:
        raise DeviceError(
            f"{address} is with {bus.read(address).driver} again, but not everything came back: {'; '.join(problems)}. "
            f"The record stays; bypass nic unbind {address} tries again"
        )
    records.remove(machine, address)
    given = bus.read(address)
    return Given(address, given.driver, given.interfaces, True)


def _safe_mode(machine: Machine, record: Record) -> list[str]:
    """vfio's unsafe mode goes with the last device that needed it. Problems, in words."""
    others = (r for r in records.every(machine) if r.address != record.address)
    if record.noiommu and not any(other.noiommu for other in others):
        try:
            machine.write(_unsafe_path(machine), "N")
        except OSError as error:
            return [f"vfio's unsafe mode stays on: {error.strerror}"]
    return []


def refuse_in_use(machine: Machine, device: Device) -> None:
    """vfio's unbind waits, in the kernel and for ever, until programs let go. DeviceError: one has the device."""
    paths = {f"/dev/vfio/{device.group}", f"/dev/vfio/noiommu-{device.group}"} if device.group else set()
    at = machine.sys / "bus/pci/devices" / device.address
    paths |= {f"/dev/{p.name}" for p in (at / "uio").glob("uio*")}
    paths |= {f"/dev/vfio/devices/{p.name}" for p in (at / "vfio-dev").glob("vfio*")}
    holders = machine.holders(paths)
    if holders:
        who = ", ".join(f"{name} ({pid})" for pid, name in sorted(holders.items()))
        raise DeviceError(f"{device.address} is in use by {who}: stop it first")


def _to_kernel(bus: Bus, record: Record) -> None:
    """OSError: no driver, or another than it had."""
    machine, at = bus.machine, bus.folder / record.address
    machine.write(at / "driver_override", f"{record.override}\n")  # an empty line takes it off
    if machine.target(at / "driver"):
        machine.write(at / "driver/unbind", record.address)
    if not record.driver and record.to:
        return  # it had none
    machine.write(machine.sys / "bus/pci/drivers_probe", record.address)
    has = machine.target(at / "driver")
    if record.driver and has != record.driver:
        if not has and (machine.sys / "bus/pci/drivers" / record.driver).exists():
            machine.write(machine.sys / "bus/pci/drivers" / record.driver / "bind", record.address)
            has = machine.target(at / "driver")
        if has != record.driver:
            raise OSError(f"{has or 'no driver'} took it")
    if not has:
        raise OSError("no driver of the kernel took it")


def _try_again(bus: Bus, address: str, driver: str) -> str:
    """Back to the user's driver, since the kernel's did not take it: better than none. The driver it has then."""
    with suppress(OSError):  # the caller tells the first failure, and which driver it has now
        _hand_over(bus, address, driver)
    return bus.read(address).driver


def _restore_interfaces(bus: Bus, record: Record) -> list[str]:
    """Problems, in words."""
    machine, address = bus.machine, record.address
    waited = 0.0
    while len(bus.interfaces(address)) < len(record.interfaces) and waited < INTERFACE_S:
        machine.sleep(STEP_S)
        waited += STEP_S
    machine.settle()
    there = {
        i: machine.read(machine.sys / "class/net" / i / "dev_port") or "0" for i in bus.interfaces(address)
    }
    problems = []
    for saved in record.interfaces:
        now = (
            saved.name
            if saved.name in there
            else next((i for i, port in there.items() if int(port) == saved.port), "")
        )
        if not now:
            problems.append(f"{saved.name}: the driver made no interface in {INTERFACE_S:.0f} s")
            continue
        del there[now]
        try:
            problems += [f"{saved.name}: {p}" for p in machine.restore(saved, now)]
        except OSError as error:
            problems.append(f"{saved.name}: {error.strerror or error}")
    return problems
