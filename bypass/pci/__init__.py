# SPDX-License-Identifier: Apache-2.0
"""Network devices of the PCI bus and who drives them.

    devices.py   which there are: driver, interface, IOMMU group (reads sysfs)
    binding.py   from the kernel's driver to a program's, and back: bind(), unbind(), take()
    network.py   what an interface had (addresses, routes, ...), put back when its driver has returned
    records.py   the file from which a device is given back when its process was killed
    vf.py        virtual functions (SR-IOV)
    machine.py   where all of this is read and written

A program that wants a device for as long as it runs:

    with bypass.pci.take("eth1") as taken:      # "0000:03:00.0" does as well
        ...                                     # taken.address goes to the driver; close the device before the end
"""

from __future__ import annotations

from bypass.pci.binding import Bound, Given, Taken, bind, left_behind, take, unbind
from bypass.pci.devices import Bus, Device
from bypass.pci.machine import VfSettings
from bypass.pci.vf import Functions, set_functions

__all__ = [
    "Bound",
    "Bus",
    "Device",
    "Functions",
    "Given",
    "Taken",
    "VfSettings",
    "bind",
    "left_behind",
    "set_functions",
    "take",
    "unbind",
]
