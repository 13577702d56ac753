# SPDX-License-Identifier: Apache-2.0
"""How an embedded stack is attached to an interface: what differs between backends, behind one protocol.

    kind: afxdp    XDP program ---> AF_XDP rings ------------------------> stack      the kernel: the same interface
    kind: dpdk     poll-mode driver ---> classifier (filter) ------------> stack      the kernel: a TAP device, or none

What lives here: opening and closing these, and what each wants now and then. What does not: the stack and the loop that
drives it (`embedded.py`), the parts themselves (`afxdp/`, `dpdk_backend/`, `steering.py`).
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Protocol

from bypass._core import lib
from bypass.core import CoreStack
from bypass.errors import BypassError, DeviceError
from bypass.hwflow.inforce import host_addresses
from bypass.policy import DpdkBackend, Policy
from bypass.steering_api import Steers
from bypass.watch import KernelWatch

__all__ = ["Attachment", "Watch", "attach"]

log = logging.getLogger("bypass")


class Watch(Protocol):
    """What a stack learns while it runs: `bypass.watch.KernelWatch`, or what stands for it."""

    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def resolve(self, destinations: Iterable[str]) -> None: ...
    def update(self) -> int: ...
    def due_ns(self) -> int | None: ...
    def source_for(self, destination: str) -> str: ...
    def tcp_connections(self, port: int) -> int: ...


class Attachment(Protocol):
    """An interface that a stack may use.

    Attributes:
        ifname: as the kernel calls it.
        steering: who decides about its packets.
        device: for counters and tools, as `bypass.status.Snapshot` wants it.
        flags: BYPASS_F_*: what of a host's work the stack does.
    """

    ifname: str
    device: Any
    flags: int

    @property
    def steering(self) -> Steers: ...
    @property
    def netdev(self) -> Any:
        """`struct bypass_netdev *` for the stack."""

    def watch(self, core: CoreStack) -> Watch:
        """Tells the stack what it has to know, from now on."""

    def tell_addresses(self) -> None:
        """The host's addresses, as they are now, to the steering: for who has no stack, and so no watch()."""

    def turn(self, now_ns: int) -> None:
        """Before each turn of the stack."""

    def news(self) -> None:
        """The kernel has told something."""

    def counters(self) -> dict[str, Any]:
        """More for `bypass stats`: counters by what they count."""

    def close(self) -> None:
        """Lets go of the interface: packets go to the kernel again. The stack's sockets are closed after it."""


def attach(policy: Policy, **options: Any) -> Attachment:
    """Opens the interface of a policy.

    Args:
        options: further arguments of `bypass.afxdp.AfxdpDevice` or `bypass.dpdk_backend.DpdkDevice`.

    Raises:
        PolicyError, PrivilegeError, DeviceError, SteeringError, ForeignProgramError.
    """
    if isinstance(policy.backend, DpdkBackend):
        return DpdkAttachment(policy, **options)
    return AfxdpAttachment(policy, **options)


class AfxdpAttachment:
    """AF_XDP sockets beside the kernel. The kernel answers ARP and ping; resets of live flows are the stack's alone."""

    flags: int = lib.BYPASS_F_RST

    def __init__(self, policy: Policy, **options: Any) -> None:
        from bypass.afxdp import AfxdpDevice, interface_queues
        from bypass.doctor import choose_mode
        from bypass.hwflow.interface import InterfaceRules
        from bypass.steering import Steering

        self.ifname = policy.interface
        self._queue_trouble = ""  # said already
        with ExitStack() as undo:
            generic = (
                choose_mode(self.ifname, policy.afxdp.mode)[0] == "skb"
            )  # also where the driver has no native XDP
            self.steering = Steering(
                policy,
                self.ifname,
                queues=interface_queues(self.ifname),
                mode="skb" if generic else "native",
            )
            undo.callback(self.steering.close)
            # Behind the program, which drivers begin their queues anew for; before sockets, whose queues they decide.
            self.rules = InterfaceRules(policy)
            undo.callback(self.rules.close)
            b = self.rules.backend
            self.device = AfxdpDevice(
                self.ifname,
                queues="all" if b.queues is None else b.queues,
                mode=b.mode,
                ring_size=b.ring_size,
                frames=b.frames,
                frame_size=b.frame_size,
                **options,
            )
            undo.callback(self.device.close)
            self.device.hardware = self.rules.in_force
            for queue, fd in self.device.fds.items():
                self.steering.set_socket(0, queue, fd)
            undo.pop_all()

    @property
    def netdev(self) -> Any:
        return self.device.netdev

    def watch(self, core: CoreStack) -> Watch:
        return KernelWatch(self.ifname, core, self.steering, self.device)

    def tell_addresses(self) -> None:
        self.steering.set_locals(host_addresses())

    def turn(self, now_ns: int) -> None:
        return

    def news(self) -> None:
        """`ethtool -L`: live TCP of a queue without socket is dropped. It takes the carrier away for a moment; where
        that went, a device may have forgotten its rules."""
        self.rules.check(time.monotonic_ns())
        try:
            new = self.device.take_new_queues()
            for queue, fd in new.items():
                self.steering.set_socket(0, queue, fd)
            if new:
                # A veth runs no XDP on queues that appear below an attached program, until one is attached anew.
                self.steering.attach_anew()
                log.warning("%s has got queues, which are served from now on: %s", self.ifname, [*new])
        except BypassError as e:
            if str(e) != self._queue_trouble:
                log.error("%s", e)
            self._queue_trouble = str(e)

    def counters(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        with ExitStack() as end:
            end.callback(self.rules.close)
            end.callback(self.device.close)
            end.callback(self.steering.close)


class DpdkAttachment:
    """A whole port: whatever is not the stack's goes to the kernel by a TAP device, or there is no kernel."""

    def __init__(self, policy: Policy, **options: Any) -> None:
        from bypass.dpdk_backend import DpdkDevice
        from bypass.dpdk_backend.filter import ExceptionPath, FilterDevice
        from bypass.dpdk_backend.flows import put_flows
        from bypass.dpdk_backend.steering import SoftSteering
        from bypass.dpdk_backend.taken import device_taken
        from bypass.dpdk_backend.tap import open_tap

        self.policy, self.ifname = policy, policy.interface
        b = policy.dpdk
        self.exception: ExceptionPath | None = None
        self.flags = lib.BYPASS_F_RST
        self._taken = ExitStack()
        with ExitStack() as undo:
            undo.callback(self._taken.close)
            self._taken.enter_context(device_taken(b))  # its interface may have the name that the TAP gets
            if b.exception == "tap":  # early: it fails at once where the name is taken
                self.exception = ExceptionPath(open_tap(policy), b.exception_rate)
                undo.callback(self.exception.close)
            else:
                self.flags |= lib.BYPASS_F_ARP | lib.BYPASS_F_PING
            self.device = DpdkDevice(self.ifname, b, **options)
            undo.callback(self.device.close)
            self.steering = SoftSteering(policy, self.ifname)
            undo.callback(self.steering.close)
            self.filter = FilterDevice(self.device.netdev, self.steering.classifier, self.exception, b.vlan)
            undo.callback(self.filter.close)
            if self.exception is not None:
                self.dress()
            addresses = host_addresses() if self.exception is not None else self.own_addresses()
            self.device.hardware = put_flows(policy, addresses, self.device.put_flows)
            undo.pop_all()

    def dress(self) -> None:
        """The kernel's device gets the port's MAC address and MTU."""
        from bypass.dpdk_backend.tap import dress

        dress(self.policy, self.mac, self.mtu)

    def changed(self, was_mtu: int) -> None:
        """The port has another MAC address or MTU."""
        from bypass.dpdk_backend.tap import follow

        self.filter.refresh()
        if self.exception is None:
            self.steering.set_mac(self.mac)
            return
        self.steering.change_mac(self.mac)
        try:
            follow(self.policy, self.mac, self.mtu, was_mtu)  # the kernel tells: then set_mac()
        except DeviceError as e:
            log.error("the port's MAC address is %s, its MTU %d: %s", self.mac.hex(":"), self.mtu, e)

    @property
    def mac(self) -> bytes:
        return bytes(self.device.netdev.mac)

    @property
    def mtu(self) -> int:
        return int(self.device.netdev.mtu)

    @property
    def netdev(self) -> Any:
        return self.filter.dev

    def watch(self, core: CoreStack) -> Watch:
        return PortWatch(self, core) if self.exception is not None else AloneWatch(self, core)

    def tell_addresses(self) -> None:
        self.steering.set_mac(self.mac)
        self.steering.set_locals(self.own_addresses() if self.exception is None else host_addresses())

    def own_addresses(self) -> list[ipaddress.IPv4Address]:
        """Where there is no kernel."""
        return [a.ip for a in self.policy.dpdk.addresses if isinstance(a, ipaddress.IPv4Interface)]

    def turn(self, now_ns: int) -> None:
        self.filter.now(now_ns)

    def news(self) -> None:
        return

    def counters(self) -> dict[str, Any]:
        from bypass.dpdk_backend import link_counters

        about = self.device.about()
        found = {
            "link": link_counters(about.link_up, about.speed_mbps),
            "filter": self.filter.counters(),
        }
        if self.exception is not None:
            found["exception"] = self.exception.counters()
        return found | {"port": dict(self.device.extended_statistics())}

    def close(self) -> None:
        with ExitStack() as end:
            end.callback(self._taken.close)
            if self.exception is not None:
                end.callback(self.exception.close)
            end.callback(self.device.close)
            end.callback(self.steering.close)
            end.callback(self.filter.close)


class _Look:
    """Looks at a port now and then: nobody tells when its link, MTU or MAC address changes."""

    def __init__(self, port: DpdkAttachment) -> None:
        self._port = port
        self._every_ns = port.policy.dpdk.link_poll_ms * 1_000_000
        self.due_ns = 0
        self.state = 0
        self._is = (port.mac, port.mtu)

    def look(self, now_ns: int) -> int:
        """0, ENETDOWN or ENXIO."""
        if now_ns < self.due_ns:
            return self.state
        self.due_ns = now_ns + self._every_ns
        port, was = self._port, self.state
        self.state = port.device.health()
        if self.state != was and port.exception is not None and self.state != errno.ENXIO:
            port.exception.set_carrier(self.state == 0)
        if (port.mac, port.mtu) != self._is:
            (_, was), self._is = self._is, (port.mac, port.mtu)
            port.changed(was)
        return self.state


class PortWatch(KernelWatch):
    """A DPDK port with a TAP device: the kernel tells about addresses and next hops, the port about its link."""

    def __init__(self, port: DpdkAttachment, core: CoreStack) -> None:
        self._port, self._look = port, _Look(port)
        super().__init__(port.ifname, core, port.steering, self)

    def health(self) -> int:
        """The TAP has changed, and the port has not (bypass.watch.WatchedDevice)."""
        from bypass.dpdk_backend.tap import keep_within

        keep_within(self._port.policy, self.watcher.interface.mtu, self._port.mtu)
        return 0

    def update(self) -> int:
        state = self._look.look(time.monotonic_ns())
        found = super().update()
        return state or found

    def due_ns(self) -> int | None:
        due = super().due_ns()
        return self._look.due_ns if due is None else min(due, self._look.due_ns)


class AloneWatch:
    """A DPDK port without a kernel: the stack has the policy's addresses, and asks for next hops itself (ARP)."""

    def __init__(self, port: DpdkAttachment, core: CoreStack) -> None:
        b = port.policy.dpdk
        self._port, self._core, self._mtu = port, core, port.mtu
        self._look = _Look(port)
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # never readable
        self._addresses = [a for a in b.addresses if isinstance(a, ipaddress.IPv4Interface)]
        for address in self._addresses:
            core.addr_add(str(address.ip), address.network.prefixlen)
        for _, via in b.routes:
            core.gateway_set(str(via))
        port.tell_addresses()

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)

    def resolve(self, destinations: Iterable[str]) -> None:
        return

    def update(self) -> int:
        state = self._look.look(time.monotonic_ns())
        if self._port.mtu != self._mtu:
            self._mtu = self._port.mtu
            self._core.nexthop_forget()  # of each it keeps the MTU that it had: it asks anew
        return state

    def due_ns(self) -> int | None:
        return self._look.due_ns

    def source_for(self, destination: str) -> str:
        """As a host chooses: the address whose subnet has the destination, else the first."""
        to = ipaddress.ip_address(destination)
        return str(next((a.ip for a in self._addresses if to in a.network), self._addresses[0].ip))

    def tcp_connections(self, port: int) -> int:
        return 0
