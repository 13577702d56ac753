# SPDX-License-Identifier: Apache-2.0
"""Shared mode on a port of DPDK: bypass-fwd has the port, the classifier says whose packets are.

    port --> bypass-fwd: classifier --> applications
                             `--> TAP of the policy's `interface` name --> kernel

With `exception: none` that TAP is in a network namespace of its own, without a name: the kernel there answers ARP and
ping, and says next hops, for all applications; nothing of this host can be reached by the port.

The broker makes the classifier's memory and the TAP, in its network namespace, and hands both to bypass-fwd, in which
they live on: a successor goes on with them, and the death of bypass-fwd takes the port and the TAP away. What does not
live here: the classifier (bypass.dpdk_backend.steering), the port (bypass.dpdk_backend.eal, and the plug-in).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from ipaddress import IPv4Address
from typing import Any

from bypass import netns
from bypass.broker.interface import DeviceView
from bypass.broker.ports import PortsSite
from bypass.broker.takeover import Left
from bypass.dpdk_backend import eal, link_counters, tap
from bypass.dpdk_backend.flows import REST, Refused, put_flows
from bypass.dpdk_backend.steering import SoftSteering, kernel_flows
from bypass.dpdk_backend.taken import device_taken
from bypass.errors import BypassError, DeviceError, PrivilegeError
from bypass.fwd import ForwarderError, LinkState
from bypass.hwflow.inforce import host_addresses
from bypass.netlink import TcpFlow
from bypass.policy import DpdkBackend, Policy
from bypass.rss import Queue
from bypass.rules import Address

log = logging.getLogger("bypass.broker")

LINK_CODES = {"up": 0, "down": errno.ENETDOWN, "gone": errno.ENXIO}


NAMESPACE = "steering.namespace"
"""Item of bypass-fwd, which goes with what is attached: the namespace of the TAP, where that is apart."""


def _namespace(policy: Policy, left: Left | None) -> int:
    """For the TAP alone. DeviceError, PrivilegeError."""
    if left is not None:
        return left.forwarder.get(NAMESPACE).fds[0]
    try:
        return netns.unnamed()
    except OSError as e:
        kind = PrivilegeError if e.errno == errno.EPERM else DeviceError
        raise kind(f"{policy.path}: exception: none takes a network namespace, and there is none: {e}") from e


class DpdkSite(PortsSite):
    """A port that a driver of DPDK has."""

    steering: SoftSteering
    without_fwd = "its port and the kernel's device of it are gone"

    def __init__(self, policy: Policy, name: str = "", left: Left | None = None) -> None:
        self._link_code = 0  # of the port
        self._tap = self._namespace = -1
        self.apart = policy.dpdk.exception == "none"
        with ExitStack() as undo:
            # First: its interface may have the name that the TAP gets.
            undo.enter_context(device_taken(policy.dpdk))
            if self.apart:
                self._namespace = _namespace(policy, left)
                undo.callback(os.close, self._namespace)
            if left is None:
                # Before bypass-fwd is started: a second broker finds the name taken.
                with self.kernel():
                    self._tap = tap.open_tap(policy)
            try:
                self._taken = ExitStack()  # close() is called where the port cannot be opened
                super().__init__(policy, name, left)
            finally:
                if self._tap >= 0:
                    os.close(self._tap)  # bypass-fwd has it
                    self._tap = -1
            self._taken = undo.pop_all()

    def kernel(self) -> AbstractContextManager[None]:
        return netns.entered_fd(self._namespace) if self.apart else nullcontext()

    def _steer(self, policy: Policy, left: Left | None) -> SoftSteering:
        attached = left.attached if left else None
        return SoftSteering(policy, policy.interface, left=attached, kernel_flows=self._kernel_flows)

    def _kernel_flows(self, port: int) -> list[TcpFlow]:
        with self.kernel():
            return list(kernel_flows(port))

    def _view(self) -> DeviceView:
        return _PortView(self)

    def _counters(self) -> dict[str, dict[str, int]]:
        try:
            counted = self.forwarder.dpdk_stats(0)
            port = self.forwarder.dpdk_xstats() or counted["port"]
        except ForwarderError:
            return {}  # it has just ended, and so does the broker
        state = link_counters(self._link_code == 0, counted["link"]["speed_mbps"])
        return {"link": state, "filter": counted["filter"], "exception": counted["kernel"], "port": port}

    def _open_device(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        b = self.policy.dpdk
        about = self.forwarder.dpdk_open(
            eal.port_config(b),
            eal.eal_arguments(b),
            self.steering.endpoints_fd,
            self._tap,
            vlan=b.vlan or 0,
            rate=b.exception_rate,
        )
        with self.kernel():
            tap.dress(self.policy, about["mac"], about["mtu"])
        if self.apart:
            self.forwarder.put(NAMESPACE, fds=[self._namespace])
        return about, tuple(range(about["queues"]))

    def _opened(self, about: Mapping[str, Any], queues: tuple[int, ...]) -> None:
        super()._opened(about, queues)
        self.device_mode, self.device_reason = "dpdk", f"{about['driver']}, bypass-fwd has the port"
        self.watch.update()  # what the device was dressed with
        self.hardware = put_flows(self.policy, self._host_addresses(), self._put_flows)

    def _host_addresses(self) -> list[Address]:
        with self.kernel():
            return host_addresses()

    # ---- rules of the port's hardware (docs/hardware.md)
    def _put_flows(self, flows: Any, rest: int) -> Refused | None:
        try:
            refused = self.forwarder.dpdk_flows(flows, rest)
        except OSError as e:
            raise DeviceError(f"bypass-fwd: {e.strerror}") from e
        return None if refused is None else Refused(*refused)

    def swap(self, policy: Policy) -> None:
        """Where rules are required and those of the new policy are refused, the old ones are put on again."""
        old = self.policy
        try:
            hardware = put_flows(policy, self._host_addresses(), self._put_flows)
            super().swap(policy)
        except BaseException:
            put_flows(old, self._host_addresses(), self._put_flows)
            raise
        self.hardware = hardware

    def prepare(self, policy: Policy) -> None:
        old, new = self.policy.dpdk, policy.backend
        if isinstance(new, DpdkBackend) and (new.addresses, new.routes) != (old.addresses, old.routes):
            there = "change them there (`ip address`, `ip route`), and leave these as they were; or "
            raise BypassError(
                f"{policy.path}: addresses and routes are given to {self.ifname} when the broker starts: "
                f"{'' if self.apart else there}start anew"
            )
        super().prepare(policy)

    def arrival(self, proto: int, local: tuple[IPv4Address, int], remote: tuple[IPv4Address, int]) -> Queue:
        if len(self.queues) == 1:
            return Queue(0, "the only one")
        if self.hardware is not None and self.hardware.rules:
            rule = self.decide(proto, local, remote)
            if rule is None or rule.action != "steer":
                return Queue(REST, "the port's rules keep on it what is not steered")
            if len(self.queues) == 2:
                return Queue(REST + 1, f"a rule of the port sends what '{rule.name}' steers there")
        return Queue(None, "the port's driver spreads flows over its queues by a key of its own")

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._taken.close()  # bypass-fwd has ended

    # ---- the port's link, beside the TAP's
    def _state(self, code: int) -> int:
        return max(code, self._link_code, key=list(LINK_CODES.values()).index)

    def _port_link(self, link: LinkState) -> None:
        before, self._link_code = self._link_code, LINK_CODES[link.state]
        if link.state == "up" and (link.mac, link.mtu) != (self._about["mac"], self._about["mtu"]):
            self._changed(link)
        if self._link_code != before:
            self.health()

    def health(self) -> int:
        with self.kernel():
            tap.keep_within(self.policy, self.watch.watcher.interface.mtu, self._about["mtu"])
        return super().health()

    def _changed(self, link: LinkState) -> None:
        """The port has another MAC address or MTU, and so has the kernel's device of it, of which all others hear."""
        was = self._about["mtu"]
        self._about = {**self._about, "mac": link.mac, "mtu": link.mtu}
        self.holder.tell(device=self._about | {"mac": link.mac.hex(), "numbers": list(self.queues)})
        self.steering.change_mac(link.mac)
        try:
            with self.kernel():
                tap.follow(self.policy, link.mac, link.mtu, was)  # the kernel tells: then set_mac()
            self.trouble = ""
        except BypassError as e:
            self.trouble = f"the port's MAC address is {link.mac.hex(':')}, its MTU {link.mtu}: {e}"
            log.error("%s", self.trouble)


class _PortView(DeviceView):
    _site: DpdkSite

    @property
    def xdp_mode(self) -> str:
        return ""  # there is none

    def _reason(self) -> str:
        reason = super()._reason()
        with suppress(ForwarderError):  # it has just ended, and so does the broker
            reason += f", woken by {self._site.forwarder.dpdk_wake()}"
        return reason

    def statistics(self) -> dict[int, dict[str, int]]:
        found = {}
        with suppress(ForwarderError):  # it has just ended, and so does the broker
            for queue in self._site.queues:
                found[queue] = self._site.forwarder.dpdk_stats(queue)["queue"]
        return found
