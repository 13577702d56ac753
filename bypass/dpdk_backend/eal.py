# SPDX-License-Identifier: Apache-2.0
"""DPDK's environment (EAL) from a policy: its arguments, and starting it once in the process.

What lives here: pure translation of `backend` into EAL's arguments and a port's configuration, and the loaded plug-in.
What does not: ports (`DpdkDevice`).

Every policy of a process that says the same about `eal` gives the same arguments, whatever its device is: no device is
named here, ports are plugged in later.

Source: DPDK's EAL parameters, https://doc.dpdk.org/guides-22.11/linux_gsg/linux_eal_parameters.html.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from bypass._core import ffi, lib
from bypass.errors import DeviceError, PrivilegeError

if TYPE_CHECKING:
    from bypass.policy_backend import DpdkBackend, EalOptions

__all__ = ["eal_arguments", "load_plugin", "plugin_version", "port_config", "start_eal"]

NO_PCI_DEVICE = "0000:00:00.0"  # a host bridge: allowing it alone keeps EAL off all NICs until one is named
PLAIN_MEMORY = 512 << 20  # bytes of address space without hugepages; used only as far as it is needed
MIB = 1 << 20


def eal_arguments(backend: DpdkBackend) -> list[str]:
    """The arguments that EAL is started with; the first one is a name."""
    eal = backend.eal
    cpus = eal.lcores if eal.lcores is not None else (min(os.sched_getaffinity(0)),)
    args = ["bypass", "-l", ",".join(map(str, cpus)), "--no-telemetry", "-a", NO_PCI_DEVICE]
    args += _memory(eal)
    if eal.vfio_intr is not None:
        args += ["--vfio-intr", eal.vfio_intr]
    if eal.drivers is not None:
        args += ["-d", eal.drivers]
    members = set(_members(backend.device))
    for device in eal.devices:
        if device.partition(",")[0] not in members:
            args += ["--vdev", device]
    return args


def _memory(eal: EalOptions) -> list[str]:
    """No files in either case. `--in-memory` is for hugepages only; they are taken as they are needed."""
    if eal.hugepages:
        return ["--in-memory"] if eal.memory is None else ["--in-memory", "-m", str(_mib(eal.memory))]
    return ["--no-huge", "--no-shconf", "-m", str(_mib(eal.memory or PLAIN_MEMORY))]


def _mib(size: int) -> int:
    return -(-size // MIB)


def _members(device: str) -> list[str]:
    """Names behind `slave=` in the arguments of a bonding device."""
    return re.findall(r",slave=([^,()]+)", device)


def port_config(backend: DpdkBackend, *, rx_csum_trust: bool = False) -> dict[str, Any]:
    """The fields of `struct dpdk_config` (plugin.h) for a policy's port."""
    device = backend.device
    for other in backend.eal.devices:  # members of a bond are opened, watched and closed with it
        name = other.partition(",")[0]
        device = re.sub(rf",slave={re.escape(name)}(?=,|$)", lambda _, o=other: f",slave=({o})", device)  # type: ignore[misc]
    flags = lib.DPDK_F_NO_OFFLOADS if backend.offloads == "none" else 0
    flags |= {"auto": 0, "required": lib.DPDK_F_RX_INTERRUPTS, "none": lib.DPDK_F_NO_RX_INTERRUPTS}[
        backend.rx_interrupts
    ]
    return {
        "device": device.encode(),
        "queues": backend.queues,
        "ring_size": backend.ring_size,
        "frames": backend.default_frames(),
        "frame_size": backend.frame_size,
        "mtu": backend.mtu or 0,
        "idle_us": backend.idle_us,
        "vlan": backend.vlan or 0,
        "link_poll_ms": backend.link_poll_ms,
        "flags": flags | (lib.DPDK_F_RX_CSUM_TRUST if rx_csum_trust else 0),
    }


def load_plugin() -> Any:
    """The plug-in's table, `struct dpdk_plugin` of plugin.h.

    Raises:
        DeviceError: it is not there, or DPDK's libraries are not; says which packages to install.
    """
    error = ffi.new("struct dpdk_error *")
    table = lib.dpdk_load(ffi.NULL, error)
    if table == ffi.NULL:
        raise explain(error)
    return table


def plugin_version() -> str:
    """DPDK's name and version, such as 'DPDK 22.11.11'. DeviceError: there is no plug-in."""
    return str(ffi.string(load_plugin().version).decode())


def start_eal(backend: DpdkBackend) -> Any:
    """Starts EAL unless it runs already in this process. The calling thread keeps its CPU affinity.

    Set BYPASS_DPDK_LOG in the environment for DPDK's own messages on standard error.

    Returns:
        The plug-in's table.

    Raises:
        DeviceError: no plug-in, no hugepages, or EAL runs with other arguments.
        PrivilegeError: DPDK may not.
    """
    table = load_plugin()
    args = [ffi.new("char[]", a.encode()) for a in eal_arguments(backend)]
    error = ffi.new("struct dpdk_error *")
    if table.start(len(args), ffi.new("const char *[]", args), ffi.NULL, error) < 0:
        raise explain(error)
    return table


def explain(error: Any) -> DeviceError | PrivilegeError:
    """The exception for a `struct dpdk_error`."""
    import errno

    kind = PrivilegeError if error.err in (errno.EPERM, errno.EACCES) else DeviceError
    return kind(ffi.string(error.text).decode(errors="replace"))
