# SPDX-License-Identifier: Apache-2.0
"""What an embedded stack has to learn from the kernel while it runs, carried to where it belongs.

    kernel --netlink--> KernelWatch --> stack:    addresses, next hops
                                    --> steering: local addresses, the interface's MAC
                                    --> device:   link down, MTU, gone (poll() on its sockets shows none of these)

What lives here: only this carrying. Events and questions: `netlink.py`, `nexthop.py`.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Protocol

from bypass.netlink import NETLINK_SOCK_DIAG, Change, NetlinkSocket, Watcher, steerable, tcp_connections
from bypass.nexthop import PENDING, Answer, NextHop, NextHops
from bypass.rules import Address

log = logging.getLogger("bypass")

TRIED_AGAIN = 64
"""Destinations without a way that are looked at again when routes change; the others are when the stack asks."""
STACK_ADDRESSES = 16
"""Addresses that a stack can have (MAX_ADDRS of bypass/stack/core.h)."""


class WatchedStack(Protocol):
    """The part of `bypass.core.CoreStack` that is told."""

    def addr_add(self, address: str, prefix_len: int) -> None: ...
    def addr_del(self, address: str) -> None: ...
    def nexthop_set(self, address: str, mac: bytes | None, mtu: int = 0) -> None: ...
    def nexthop_forget(self, address: str | None = None) -> None: ...


class WatchedSteering(Protocol):
    """The part of `bypass.steering.Steering` that is told."""

    def set_locals(self, addresses: Iterable[str | Address]) -> None: ...
    def set_mac(self, mac: bytes) -> None: ...


class WatchedDevice(Protocol):
    """The part of `bypass.afxdp.AfxdpDevice` that is told."""

    def health(self) -> int: ...


class KernelWatch:
    """Keeps a stack, its steering and its device in step with the kernel.

    Everything happens in update(), in the thread that calls it, with the stack's lock held. Made in the network
    namespace of the interface; it stays in that one.

    Args:
        ifname: the interface.
        core, steering, device: whom to tell.

    Raises:
        DeviceError: there is no such interface.
    """

    def __init__(
        self, ifname: str, core: WatchedStack, steering: WatchedSteering, device: WatchedDevice
    ) -> None:
        self._core = core
        self._steering = steering
        self._device = device
        self._told: dict[Address, int] = {}  # addresses of the stack, with their prefix lengths
        self._unreachable: dict[Address, None] = {}  # told so, latest last
        with ExitStack() as undo:
            self.watcher = undo.enter_context(Watcher(ifname))
            self._diag = undo.enter_context(NetlinkSocket(NETLINK_SOCK_DIAG))
            self._next_hops = NextHops(self.watcher)
            undo.callback(self._next_hops.close)
            self._tell_addresses()
            self._steering.set_mac(self.watcher.interface.mac)
            undo.pop_all()

    def fileno(self) -> int:
        """Readable when update() has something to do."""
        return self.watcher.fileno()

    def close(self) -> None:
        self._next_hops.close()
        self.watcher.close()
        self._diag.close()

    # ---- for the driver
    def resolve(self, destinations: Iterable[str]) -> None:
        """Answers what the stack wants to know. What is not known yet is told by a later update()."""
        for text in destinations:
            address = ipaddress.ip_address(text)
            answer = self._next_hops.resolve(address, time.monotonic_ns())
            if answer is not PENDING:
                self._tell_next_hop(address, answer)

    def update(self) -> int:
        """Reads events and passes them on.

        Returns:
            0, or in what state the interface is: errno.ENETDOWN (it recovers), errno.ENXIO (gone for good).
        """
        change = self.watcher.poll()
        if change:
            self._next_hops.changed(change)
        if change & Change.ADDRESSES:
            self._tell_addresses()
        if change & Change.MAC:
            self._steering.set_mac(self.watcher.interface.mac)
        if change & (Change.LINK | Change.MTU | Change.MAC | Change.GONE):
            self._device.health()  # takes over MTU and MAC
        if change & (Change.LINK | Change.ROUTES | Change.ADDRESSES) and self._unreachable:
            # The stack asks again only after two seconds, and its connections when their timers say so.
            again, self._unreachable = self._unreachable, {}
            self.resolve(str(address) for address in again)
        for address, answer in self._next_hops.update(time.monotonic_ns()).items():
            self._tell_next_hop(address, answer)
        if self.watcher.gone:
            return errno.ENXIO
        return 0 if self.watcher.interface.up else errno.ENETDOWN

    def due_ns(self) -> int | None:
        """When update() has work without an event, in time.monotonic_ns()."""
        return self._next_hops.due_ns()

    def _tell_next_hop(self, address: Address, answer: Answer | None) -> None:
        self._unreachable.pop(address, None)
        if answer is None or answer is PENDING:
            self._core.nexthop_forget(
                str(address)
            )  # what was known holds no more: the stack asks when it needs it
            return
        try:
            if isinstance(answer, NextHop):
                self._core.nexthop_set(str(address), answer.mac, answer.mtu)
            else:
                self._core.nexthop_set(str(address), None)
                self._unreachable[address] = None
                if len(self._unreachable) > TRIED_AGAIN:
                    del self._unreachable[next(iter(self._unreachable))]
        except OSError as error:
            if error.errno != errno.ENOSPC:  # its table is full of destinations in use: it asks again
                raise

    def _tell_addresses(self) -> None:
        self._steering.set_locals(steerable(self.watcher.addresses))
        wanted = self._stack_addresses()
        for address in [a for a in self._told if wanted.get(a) != self._told[a]]:
            self._core.addr_del(str(address))
            del self._told[address]
        for address, prefix_len in wanted.items():
            if address not in self._told:
                self._core.addr_add(str(address), prefix_len)
                self._told[address] = prefix_len

    def _stack_addresses(self) -> dict[Address, int]:
        """IPv4 addresses with their prefix lengths, the interface's own first."""
        index = self.watcher.interface.index
        local = [a for a in self.watcher.addresses if a.address.version == 4 and not a.address.is_loopback]
        local.sort(key=lambda a: (a.index != index, a.address.packed))
        wanted: dict[Address, int] = {}
        for a in local:
            # Of an address on another interface only the host itself is near.
            wanted.setdefault(a.address, a.prefix_len if a.index == index else 32)
        if len(wanted) > STACK_ADDRESSES:
            left_out = ", ".join(map(str, list(wanted)[STACK_ADDRESSES:]))
            log.warning("a stack has at most %d addresses; not served: %s", STACK_ADDRESSES, left_out)
        return dict(list(wanted.items())[:STACK_ADDRESSES])

    # ---- for control (bypass.control.KernelView)
    def source_for(self, destination: str) -> str:
        """The local address from which the kernel would reach it. OSError: unreachable by this interface."""
        return str(self._next_hops.source_for(ipaddress.ip_address(destination)))

    def tcp_connections(self, port: int) -> int:
        """TCP connections in any state that the kernel holds on this local port, listeners not counted."""
        return tcp_connections(self._diag, port)
