# SPDX-License-Identifier: Apache-2.0
"""Virtual functions of a network device (SR-IOV): how many, and what the device lets them do.

Sources: Documentation/PCI/pci-iov-howto.rst; IFLA_VFINFO_LIST of rtnetlink (linux/if_link.h).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bypass.errors import DeviceError
from bypass.pci import records
from bypass.pci.binding import refuse_in_use
from bypass.pci.devices import Bus, Device
from bypass.pci.machine import Machine, VfSettings

__all__ = ["Functions", "VfSettings", "set_functions", "why_kept"]


@dataclass(frozen=True, slots=True)
class Functions:
    """What set_functions() did. `addresses`: of the functions that there are now. `warnings`: what was forced."""

    address: str
    before: int
    addresses: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def set_functions(
    name: str,
    number: int,
    settings: VfSettings | None = None,
    *,
    force: bool = False,
    machine: Machine | None = None,
) -> Functions:
    """Gives a device so many virtual functions, and each of them the settings.

    The kernel changes a number only by way of none, so another number than before makes all of them anew.

    Args:
        name: of the interface, or the device's PCI address.
        number: 0 removes them.
        settings: for each function; `mac` is the first one's, those that follow count upwards.
        force: also when functions are in use, unless a program has one open.

    Raises:
        DeviceError: it is refused, with all reasons; or a step failed, and the number is what it was.
    """
    machine = machine or Machine()
    with machine.locked():
        bus = Bus(machine)
        device = bus.find(name)
        if not device.max_vfs:
            raise DeviceError(
                f"{device.address} has no virtual functions (SR-IOV), or they are off in the firmware"
            )
        if number > device.max_vfs:
            raise DeviceError(f"{device.address} may have {device.max_vfs} virtual functions, not {number}")
        if settings is not None and number and not device.interfaces:
            raise DeviceError(
                f"{device.address} has no interface here by which its functions could be set up"
            )
        wanted = [replace(settings, mac=mac_plus(settings.mac, i)) for i in range(number)] if settings else []
        warnings = _make(bus, device, number, force) if number != device.vfs else []
        try:
            _set_up(bus, device, wanted, number == device.vfs)
        except OSError as error:
            if number != device.vfs:
                _write(bus, device, 0)
                if device.vfs:
                    _write(bus, device, device.vfs)
            raise DeviceError(
                f"{device.address}: its functions were not set up: {error.strerror or error}; "
                f"there are {device.vfs} as before"
            ) from error
        return Functions(device.address, device.vfs, bus.functions(device.address), tuple(warnings))


def _make(bus: Bus, device: Device, number: int, force: bool) -> list[str]:
    """The number of functions is changed. Warnings. DeviceError."""
    reasons = []
    for address in device.functions:
        function = bus.read(address)
        if function.by_user:
            refuse_in_use(bus.machine, function)
        reasons += why_kept(bus, function)
    if reasons and not force:
        raise DeviceError(
            f"the virtual functions of {device.address} stay (--force removes them all the same): {'; '.join(reasons)}"
        )
    try:
        if device.vfs:
            _write(bus, device, 0)
        if number:
            _write(bus, device, number)
    except OSError as error:
        if device.vfs and not int(bus.machine.read(bus.folder / device.address / "sriov_numvfs") or "0"):
            try:
                _write(bus, device, device.vfs)
            except OSError as worse:
                raise DeviceError(
                    f"{device.address} gets no {number} virtual functions: {error.strerror}; "
                    f"and the {device.vfs} that it had are gone: {worse.strerror}"
                ) from error
        raise DeviceError(
            f"{device.address} gets no {number} virtual functions: {error.strerror}; there are {device.vfs} as before"
        ) from error
    for address in device.functions:
        records.remove(bus.machine, address)
    return [f"forced: {reason}" for reason in reasons]


def why_kept(bus: Bus, function: Device) -> list[str]:
    """What hinders the removal of a function; empty: nothing uses it, as far as can be seen."""
    found = []
    if records.load(bus.machine, function.address) is not None:
        found.append(
            f"{function.address} was bound to {function.driver}: bypass nic unbind {function.address} first"
        )
    elif function.by_user:
        found.append(f"{function.address} has the driver {function.driver}: somebody means to use it")
    elif function.driver and not function.interfaces:
        found.append(f"{function.address} has no interface here: it may be another network namespace's")
    for ifname in function.interfaces:
        facts = bus.machine.facts(ifname)
        saved = bus.machine.snapshot(ifname)
        used = [
            text
            for text, so in (
                ("carries the default route", facts.default_route),
                (f"carries the login from {facts.login}", bool(facts.login)),
                ("has an XDP program", facts.program is not None),
                (f"has {', '.join(i.text for i in saved.addresses)}", bool(saved.addresses)),
                (f"belongs to {saved.master}", bool(saved.master)),
            )
            if so
        ]
        if used:
            found.append(f"{ifname} ({function.address}) {' and '.join(used)}")
    return found


def _write(bus: Bus, device: Device, number: int) -> None:
    bus.machine.write(bus.folder / device.address / "sriov_numvfs", str(number))


def _set_up(bus: Bus, device: Device, wanted: list[VfSettings], were_there: bool) -> None:
    """OSError: and functions that were there are as they were."""
    if not wanted:
        return
    ifname = device.interfaces[0]
    before = bus.machine.vf_settings(ifname) if were_there else {}
    for vf, settings in enumerate(wanted):
        try:
            bus.machine.set_vf(ifname, vf, settings)
        except OSError:
            for done in range(vf + 1):
                if done in before:
                    bus.machine.set_vf(ifname, done, before[done])
            raise


def mac_plus(mac: str, number: int) -> str:
    """The MAC address that follows after `number` steps; "" stays so. DeviceError: it would be no host's."""
    if not mac:
        return ""
    value = int(mac.replace(":", ""), 16) + number
    if value >> 48 or value >> 40 & 1:
        raise DeviceError(f"{mac} + {number} is no MAC address of a host")
    return value.to_bytes(6, "big").hex(":")
