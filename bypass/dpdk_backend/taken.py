# SPDX-License-Identifier: Apache-2.0
"""A PCI device that a policy names and the kernel still has: taken for as long as the port is open, and given back.

What lives here: whether that is for us to do. How it is done, and what speaks against it: `bypass.pci`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bypass.policy_backend import DpdkBackend

if TYPE_CHECKING:
    from bypass.pci.machine import Machine

__all__ = ["device_taken"]


@contextmanager
def device_taken(backend: DpdkBackend, machine: Machine | None = None) -> Iterator[bool]:
    """The policy's device is with vfio-pci until the end of the block, where the port has to be closed.

    A device that is with a driver for programs already (`bypass nic bind`, or by hand) stays as it is, and so does one
    whose kernel driver DPDK works on top of. One that a killed program had taken is taken over, and goes back to the
    kernel at the end. A virtual device, and the members of a bond, are nobody's.

    Yields:
        Whether it goes back to the kernel at the end.

    Raises:
        DeviceError: there is no such device, something depends on it (the default route, a login, ...), or another
            program has it. At the end: it cannot be given back.
    """
    from bypass.pci.binding import ON_KERNEL_DRIVER, take
    from bypass.pci.devices import ADDRESS, Bus
    from bypass.pci.records import load

    name = backend.device.partition(",")[0].removeprefix("pci:")
    if not ADDRESS.fullmatch(name.lower()):
        yield False
        return
    bus = Bus(machine)
    device = bus.find(name)
    left = load(bus.machine, device.address)
    if device.driver in ON_KERNEL_DRIVER or (device.by_user and (left is None or left.holder is None)):
        yield False
        return
    with take(device.address, machine=bus.machine) as taken:
        yield taken.ours
