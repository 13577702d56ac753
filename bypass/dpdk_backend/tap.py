# SPDX-License-Identifier: Apache-2.0
"""The kernel's device of a DPDK port: a TAP device of the name that the policy gives, with the port's MAC and MTU.

What lives here: making it, and dressing it with what the policy says. What does not: its frames (exception.c).

With `backend.vlan` the TAP carries frames as they are on the wire, so the kernel gets a VLAN device on top of it: that
one has the policy's name and addresses, the TAP a name made from it. All of it goes when the descriptor is closed.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from bypass import status
from bypass._core import ffi, lib
from bypass.errors import DeviceError, NameTakenError, PrivilegeError
from bypass.nic import driver_of
from bypass.offloop import off_loop
from bypass.policy import DpdkBackend, Policy

log = logging.getLogger("bypass")

MAX_NAME = 15  # IFNAMSIZ without the zero
BELOW = "-p"
NAMES = "`interface` of a dpdk policy names the one made for the kernel"


def tap_name(policy: Policy) -> str:
    """Of the TAP device itself: `interface`, or below it where that is the VLAN's."""
    if policy.dpdk.vlan is None:
        return policy.interface
    return policy.interface.encode()[: MAX_NAME - len(BELOW)].decode(errors="ignore") + BELOW


def open_tap(policy: Policy) -> int:
    """Makes the TAP device, down, in the network namespace of the calling thread.

    Returns:
        Its descriptor, without blocking; the device goes with the last duplicate of it.

    Raises:
        NameTakenError: by another device.
        DeviceError: there are no TAP devices.
        PrivilegeError: CAP_NET_ADMIN is missing.
    """
    if _is_port_itself(policy):
        raise DeviceError(
            f"{policy.interface} is the kernel's interface of {policy.dpdk.device}: "
            f"bypass nic bind {policy.interface} takes it from there, and frees the name"
        )
    if policy.dpdk.vlan is not None and policy.interface in _names():
        raise _taken(policy, f"{policy.interface}: a device of this name exists: {NAMES}")
    path, config = ffi.new("struct exception_path *"), ffi.new("struct exception_config *")
    error = ffi.new("struct exception_error *")
    config.name = tap_name(policy).encode()
    if lib.exception_open(path, config, error) == 0:
        return int(path.fd)
    text = ffi.string(error.text).decode(errors="replace")
    if error.err == errno.EBUSY:
        raise _taken(policy, text)
    raise (PrivilegeError if error.err in (errno.EPERM, errno.EACCES) else DeviceError)(text)


def _is_port_itself(policy: Policy) -> bool:
    """Whether the name is taken by the very device that the policy is about (virtio's is below its PCI device)."""
    address = policy.dpdk.device.partition(",")[0]
    place = Path(f"/sys/class/net/{policy.interface}/device").resolve().parts
    return ":" in address and any(part.endswith(address) for part in place)


def _taken(policy: Policy, otherwise: str) -> NameTakenError:
    """By whom, where that is a port of bypass: who removed its device would take the kernel off that port."""
    name = policy.interface
    if driver_of(tap_name(policy)) != "tun":
        return NameTakenError(otherwise, False)
    pids = ", ".join(str(instance.pid) for instance in status.instances(name))
    text = (
        f"{name}: process {pids} serves it already: end that first, a broker by `bypass down`, or give `interface` "
        "another name"
        if pids
        else f"{name}: a device of this name exists, which a program holds: {NAMES}; end that program, or choose "
        "another name"
    )
    return NameTakenError(text, True)


def _names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


@off_loop
def follow(policy: Policy, mac: bytes, mtu: int, was: int) -> None:
    """The port has another MAC address or MTU, and the device gets it too. Its neighbours are told (RFC 5227 3). An MTU
    below the port's, which somebody has set, stays.

    Args:
        was: the port's MTU before.

    Raises:
        DeviceError: the kernel refuses it.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    names = dict.fromkeys((tap_name(policy), policy.interface))  # the VLAN's is on top
    name = ""
    try:
        with IPRoute() as ip:
            for name in names:
                _announces(name)
                index = _index(ip, name)
                has = _mtu(ip, index)
                wanted = mtu if has == was else min(has, mtu)
                ip.link("set", index=index, address=mac.hex(":"), mtu=wanted)
    except NetlinkError as e:
        raise DeviceError(
            f"{name}: the kernel refuses the port's address or MTU: {os.strerror(e.code)}"
        ) from e


def keep_within(policy: Policy, has: int, mtu: int) -> None:
    """Of a device that somebody gave the MTU `has`: more than the port's is set back, and the log tells of it."""
    if has <= mtu:
        return
    name = policy.interface
    try:
        limit(policy, mtu)
        log.warning("%s: an MTU of %d is more than its port's, which it has again: %d", name, has, mtu)
    except DeviceError as e:
        log.error("%s: an MTU of %d is more than its port's, %d, and stays: %s", name, has, mtu, e)


@off_loop
def limit(policy: Policy, mtu: int) -> None:
    """The device has no larger MTU than this: what the kernel sends would be lost in its port.

    Raises:
        DeviceError: the kernel refuses it.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as ip:
            for name in dict.fromkeys((policy.interface, tap_name(policy))):
                index = _index(ip, name)
                if _mtu(ip, index) > mtu:
                    ip.link("set", index=index, mtu=mtu)
    except NetlinkError as e:
        raise DeviceError(
            f"{policy.interface}: the kernel refuses the port's MTU, {mtu}: {os.strerror(e.code)}"
        ) from e


def _mtu(ip: Any, index: int) -> int:
    return int(ip.link("get", index=index)[0].get_attr("IFLA_MTU"))


def _announces(name: str) -> None:
    """The kernel sends ARP requests for its own addresses when the MAC address changes (ip-sysctl.rst)."""
    with suppress(OSError):  # read-only in a container: neighbours find out when they ask again
        Path(f"/proc/sys/net/ipv4/conf/{name}/arp_notify").write_text("1")


@off_loop
def dress(policy: Policy, mac: bytes, mtu: int) -> None:
    """Gives the device MAC address and MTU of the port, and what the policy says; sets it up. May be repeated.

    Raises:
        DeviceError: the kernel refuses something.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    backend = policy.dpdk
    what = tap_name(policy)
    try:
        with IPRoute() as ip:
            index = _index(ip, what)
            ip.link("set", index=index, address=mac.hex(":"), mtu=mtu, state="up")
            if backend.vlan is not None:
                what = f"{policy.interface} (VLAN {backend.vlan})"
                index = _vlan_device(ip, policy.interface, index, backend.vlan)
                ip.link("set", index=index, mtu=mtu, state="up")
            what = policy.interface
            _addresses(ip, index, backend)
    except NetlinkError as e:
        raise DeviceError(f"{what}: the kernel refuses what the policy says: {os.strerror(e.code)}") from e


def _index(ip: Any, name: str) -> int:
    found = ip.link_lookup(ifname=name)
    if not found:
        raise DeviceError(f"{name}: there is no such interface any more")
    return int(found[0])


def _vlan_device(ip: Any, name: str, below: int, vlan: int) -> int:
    from pyroute2.netlink.exceptions import NetlinkError

    if not ip.link_lookup(ifname=name):
        try:
            ip.link("add", ifname=name, kind="vlan", link=below, vlan_id=vlan)
        except NetlinkError as e:
            if e.code != errno.EOPNOTSUPP:
                raise
            raise DeviceError(
                f"{name}: the kernel has no VLAN devices, which backend.vlan needs for the exception path: "
                "modprobe 8021q, or exception: none"
            ) from e
    return _index(ip, name)


def _addresses(ip: Any, index: int, backend: DpdkBackend) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    for address in backend.addresses:
        try:
            ip.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
        except NetlinkError as e:
            if e.code != errno.EEXIST:
                raise
    for to, via in backend.routes:
        ip.route("replace", dst=str(to), gateway=str(via), oif=index)
