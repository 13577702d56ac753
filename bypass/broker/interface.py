# SPDX-License-Identifier: Apache-2.0
"""A site on an interface: steering, live entries, what the kernel tells.

What lives here: what all interfaces have in common, whatever moves their packets and whoever has them. What does not:
AF_XDP (afxdp.py), one application alone (direct.py), several (ports.py).
"""

from __future__ import annotations

import errno
import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from ipaddress import IPv4Address
from typing import Any

from bypass._core import lib
from bypass.access import Quota
from bypass.broker.apps import App, Lease
from bypass.broker.holder import Holder
from bypass.broker.site import Nobody, Site
from bypass.broker.takeover import Left
from bypass.broker.users import Access, User
from bypass.errors import BypassError
from bypass.fwd import ForwarderError, LinkState, PortCut, QueuesAdded
from bypass.grants import Grants, Key, LiveEntries
from bypass.hwflow.inforce import InForce
from bypass.policy import Policy
from bypass.rules import Rule
from bypass.status import Snapshot, StatusServer
from bypass.steering_api import Steers
from bypass.watch import KernelWatch

log = logging.getLogger("bypass.broker")

FIXED = ("interface", "mode", "backend")
"""What of a policy cannot change under a running broker, nor under a successor."""


class DeviceView:
    """What `bypass flows` and `bypass stats` tell of the device (bypass.status.Snapshot)."""

    def __init__(self, site: InterfaceSite) -> None:
        self._site = site
        self.ifname = site.ifname

    @property
    def mode(self) -> str:
        return self._site.device_mode or "no"

    @property
    def xdp_mode(self) -> str:
        return self._site.steering.mode

    @property
    def mode_reason(self) -> str:
        return "; ".join(filter(None, (self._reason(), self._site.ails())))

    def _reason(self) -> str:
        return self._site.device_reason or "no application has the interface"

    @property
    def hardware(self) -> InForce | None:
        return self._site.hardware

    @property
    def queue_numbers(self) -> tuple[int, ...]:
        return self._site.queues

    def statistics(self) -> dict[int, dict[str, int]]:
        """What is counted for each queue by somebody who is believed."""
        return {}


class InterfaceSite(Site):
    """What all interfaces have in common.

    bypass-fwd holds what outlives the broker (holder.py). When it is killed the broker ends: all is the kernel's again.

    Args:
        policy: in force from now on.
        name: of the broker's socket, where a successor will listen; empty: there is none, the broker is private.
        left: what a killed broker has left on the interface, to go on with.

    Raises:
        PrivilegeError, DeviceError, SteeringError, ForeignProgramError, PolicyError: as their parts.
    """

    # The kernel answers ARP and ping; resets of live flows are the stack's alone.
    flags: int = lib.BYPASS_F_RST
    blocks = True
    hardware: InForce | None = None  # what the device does of the policy by rules of its own

    def __init__(self, policy: Policy, name: str = "", left: Left | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.access = Access(policy)
        self.cpus, self.numa = policy.cpus, policy.numa
        self.ifname = policy.interface
        self.options = policy.stack
        self.congestion = policy.congestion
        self.device_mode, self.device_reason = "", ""
        self.policy_path = policy.path
        self._link = 0
        self.told = Nobody()
        with ExitStack() as undo:
            self.steering: Steers = self._steer(policy, left)
            undo.callback(self.steering.close)
            with self.kernel():
                self.watch = KernelWatch(self.ifname, self, self.steering, self)
            undo.callback(self.watch.close)
            self.entries = LiveEntries(self.steering, self.watch)
            told = Snapshot(self.steering, self._view(), name="broker", more=self._counters)
            self.status = StatusServer(self.ifname, told)
            undo.callback(self.status.close)
            about: dict[str, Any] = {"socket": name, "device": left.about.get("device") if left else None}
            about |= {"policy": {key: repr(getattr(policy, key)) for key in FIXED}}
            self.holder = Holder(
                self.steering, policy.stack.spin_us, about if name else None, left.forwarder if left else None
            )
            undo.pop_all()

    @abstractmethod
    def _steer(self, policy: Policy, left: Left | None) -> Steers:
        """What decides about packets."""

    @abstractmethod
    def _view(self) -> DeviceView:
        """What tools are told of the device."""

    def kernel(self) -> AbstractContextManager[None]:
        """In it the calling thread is in the network namespace in which the kernel has the interface."""
        return nullcontext()

    def _counters(self) -> dict[str, dict[str, int]]:
        """More for `bypass stats`, by what they count."""
        return {}

    def grants(self, user: User) -> Grants:
        return Grants(self.policy, self.access.permits(user))

    def prepare(self, policy: Policy) -> None:
        old = self.policy
        for what in FIXED:
            if getattr(old, what) != getattr(policy, what):
                raise BypassError(
                    f"{policy.path}: {what} is not what it was, which takes a new start: `bypass down --drain`, "
                    f"`bypass up -c {policy.path}`"
                )
        self.steering.prepare(policy)

    def swap(self, policy: Policy) -> None:
        access = Access(policy)
        self.steering.swap(policy)
        self.policy, self.access, self.policy_path = policy, access, policy.path
        self.options, self.congestion = policy.stack, policy.congestion
        self.cpus, self.numa = policy.cpus, policy.numa

    def decide(
        self, proto: int, local: tuple[IPv4Address, int], remote: tuple[IPv4Address, int]
    ) -> Rule | None:
        return self.policy.compiled.decide(proto, local[0], local[1], remote[0], remote[1])

    def quota(self, user: User) -> Quota:
        return self.access.quota(user)

    # ---- live entries
    def use(self, key: Key, owner: int) -> None:
        known = key in self.entries
        live = self.entries.use(key, owner)
        if not known:
            self.holder.live(owner, live.entry)

    def unuse(self, key: Key) -> None:
        live = self.entries[key]
        if self.entries.unuse(key):
            with suppress(ForwarderError):
                self.holder.not_live(live.owner, live.entry)
            self.entries.remove(key)

    def joined(self, owner: int, pidfd: int) -> None:
        self.holder.joined(owner, pidfd)

    # ---- what a successor goes on with
    def keep(self, app: App) -> None:
        self.holder.keep(app, self._kept())

    def _kept(self) -> dict[str, Any]:
        """What a successor has to know of an application's device."""
        return {"queues": self.queues, "mode": self.device_mode, "reason": self.device_reason}

    def leased(self, app: App, lease: Lease) -> None:
        self.holder.leased(app.number, lease)

    def released(self, app: App, lease: Lease) -> None:
        self.holder.released(app.number, lease.number)

    def keeper(self) -> int:
        return self.holder.forwarder.pid

    def _go_on(self, left: Left) -> None:
        """With the applications of a killed broker. What was being leased when it was killed no program knows."""
        for app, _ in left.apps:
            entries: dict[int, None] = {}
            for lease in list(app.leases.values()):
                live = self.entries.go_on(lease.key, app.number)
                if live is None:
                    self._never_live(app, lease)
                    continue
                entries[live.entry] = None
                self._is_live(app, lease, live.entry)
            self.holder.go_on(app.number, list(entries))
        known = {live.entry for live in self.entries}
        for entry in [entry for entry in self.steering.entries() if entry not in known]:
            self.steering.remove_endpoint(entry)
        self.left = [app for app, _ in left.apps]

    def _never_live(self, app: App, lease: Lease) -> None:
        del app.leases[lease.number]
        self.released(app, lease)
        if lease.shadow is not None:
            lease.shadow.sock.close()

    def _is_live(self, app: App, lease: Lease, entry: int) -> None:
        return

    def source_for(self, destination: str) -> str:
        return self.watch.source_for(destination)

    # ---- what the kernel tells (bypass.watch.WatchedStack, WatchedDevice)
    def addr_add(self, address: str, prefix_len: int) -> None:
        self.addresses[address] = prefix_len
        self.told.address_added(address, prefix_len)

    def addr_del(self, address: str) -> None:
        self.addresses.pop(address, None)
        self.told.address_gone(address)

    def nexthop_set(self, address: str, mac: bytes | None, mtu: int = 0) -> None:
        self.told.next_hop(address, mac, mtu)

    def nexthop_forget(self, address: str | None = None) -> None:
        self.told.next_hop_forgotten(address)

    def health(self) -> int:
        """The MTU or the MAC address has changed, or the link."""
        self._tell_link(self._state(0 if self.watch.watcher.interface.up else errno.ENETDOWN))
        return 0

    def _tell_link(self, code: int) -> None:
        before, self._link = self._link, {0: 0, errno.ENETDOWN: 1}.get(code, 2)
        if self._link != before:
            log.warning("%s", self._link_trouble() or f"{self.ifname} is up again")
        self.told.link(self._link, self.watch.watcher.interface)

    def _link_trouble(self) -> str:
        """What the link means for programs; empty: it is up."""
        return (
            "",
            f"{self.ifname} is down: connections wait for it",
            f"{self.ifname} is gone: its connections get nothing and end when their time is over; new ones fail. "
            "Once it is there again: `bypass down`, `bypass up`",
        )[self._link]

    def ails(self) -> str:
        return "; ".join(filter(None, (self._link_trouble(), self.trouble)))

    def link_state(self) -> int:
        return self._link

    def resolve(self, destination: str) -> None:
        self.watch.resolve([destination])

    def watched(self) -> dict[int, Callable[[], None]]:
        return {
            self.watch.fileno(): lambda: self.update(time.monotonic_ns()),
            self.status.fileno(): self.status.poll,
            self.holder.forwarder.fileno(): self._holder_events,
        }

    def _holder_events(self) -> None:
        try:
            for event in self.holder.forwarder.events():
                if isinstance(event, PortCut):
                    self.told.cut(event.app, "broke the rules of its port")
                elif isinstance(event, QueuesAdded):
                    self._sockets_opened(event.queues)
                elif isinstance(event, LinkState):
                    self._port_link(event)
        except ForwarderError as e:
            self.told.lost(str(e))

    def _sockets_opened(self, queues: int) -> None:
        """bypass-fwd has so many of them now, and has put them into the map."""
        return

    def _port_link(self, link: LinkState) -> None:
        """bypass-fwd tells of its device. The kernel tells the same of an interface of its own."""
        return

    def _state(self, code: int) -> int:
        """Of the interface, from what the kernel tells: 0, errno.ENETDOWN, errno.ENXIO."""
        return code

    def update(self, now_ns: int) -> None:
        before, code = self._link, self._state(self.watch.update())
        if (code == errno.ENXIO and before != 2) or (code == 0) != (self._link == 0):
            self._tell_link(code)
        self.entries.check_draining(now_ns)

    def due_ns(self) -> int | None:
        due = (self.watch.due_ns(), self.entries.drain_due_ns())
        return min((t for t in due if t is not None), default=None)

    def close(self) -> None:
        with ExitStack() as end:
            end.callback(self.watch.close)
            end.callback(self.status.close)
            end.callback(self.holder.close)
            end.callback(self.steering.close)
            end.callback(self.entries.clear)
