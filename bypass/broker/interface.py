# SPDX-License-Identifier: Apache-2.0
"""A site on an interface: steering, live entries, what the kernel tells; and direct mode.

What lives here: what direct and shared mode have in common, and AF_XDP sockets that are handed to one application.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
from ipaddress import IPv4Address
from typing import Any

from bypass._core import ffi, lib
from bypass.access import Quota
from bypass.afxdp import AfxdpDevice, interface_queues
from bypass.broker.apps import App, Lease
from bypass.broker.holder import Holder
from bypass.broker.memory import AppMemory
from bypass.broker.site import Nobody, Site
from bypass.broker.takeover import Left
from bypass.broker.users import Access, User
from bypass.doctor import choose_mode
from bypass.errors import BypassError
from bypass.fwd import ForwarderError, PortCut, QueuesAdded
from bypass.grants import Grants, Key, LiveEntries
from bypass.netlink import settings_changed
from bypass.nic import driver_of
from bypass.policy import Policy
from bypass.rss import Queue, queue_of
from bypass.rss import read as read_rss
from bypass.rules import Rule
from bypass.status import Snapshot, StatusServer
from bypass.steering import Steering
from bypass.watch import KernelWatch

log = logging.getLogger("bypass.broker")

SOL_XDP, XDP_STATISTICS = 283, 7  # linux/if_xdp.h
FIXED = ("interface", "mode", "backend")
"""What of a policy cannot change under a running broker, nor under a successor."""
QUEUES_NS = 1_000_000_000
"""How often the interface's queues are counted, while an application has it; netlink tells most changes at once."""
KERNEL_COUNTERS = tuple(name for name, _ in ffi.typeof("struct afxdp_kernel_stats").fields)


TAKE_NS = 20_000_000
"""What an application has to give frames to a new queue, before packets come there."""


class InterfaceSite(Site):
    """What direct and shared mode have in common.

    bypass-fwd holds what outlives the broker (holder.py). When it is killed the broker ends: all is the kernel's again.

    Args:
        policy: in force from now on.
        name: of the broker's socket, where a successor will listen; empty: there is none, the broker is private.
        left: what a killed broker has left on the interface, to go on with.

    Raises:
        PrivilegeError, DeviceError, SteeringError, ForeignProgramError, PolicyError: as their parts.
    """

    mode = "direct"
    # The kernel answers ARP and ping; resets of live flows are the stack's alone.
    flags: int = lib.BYPASS_F_RST
    device: int = lib.APP_DEV_AFXDP
    blocks = True

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
        self.fds: dict[int, int] = {}  # AF_XDP sockets by queue, where they are known here
        self._link = 0
        self._queues_ns = 0
        self.told = Nobody()
        with ExitStack() as undo:
            generic = left is None and choose_mode(self.ifname, policy.backend.mode)[0] == "skb"
            self.steering = Steering(
                policy,
                self.ifname,
                queues=interface_queues(self.ifname),
                mode="skb" if generic else "native",
                left=left.attached if left else None,
            )
            undo.callback(self.steering.close)
            self.watch = KernelWatch(self.ifname, self, self.steering, self)
            undo.callback(self.watch.close)
            self._settings = settings_changed()
            if self._settings is not None:
                undo.callback(self._settings.close)
            self.entries = LiveEntries(self.steering, self.watch)
            view = _DeviceView(self)
            self.status = StatusServer(self.ifname, Snapshot(self.steering, view, name="broker"))
            undo.callback(self.status.close)
            about: dict[str, Any] = {"socket": name, "device": left.about.get("device") if left else None}
            about |= {"policy": {key: repr(getattr(policy, key)) for key in FIXED}}
            self.holder = Holder(
                self.steering, policy.stack.spin_us, about if name else None, left.forwarder if left else None
            )
            undo.pop_all()

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

    def arrival(self, proto: int, local: tuple[IPv4Address, int], remote: tuple[IPv4Address, int]) -> Queue:
        if interface_queues(self.ifname) == 1:
            return Queue(0, "the only one")
        if driver_of(self.ifname) == "veth":
            return Queue(
                None, "a veth has no hash: packets arrive on the queue of the number that the peer sends by"
            )
        return queue_of(read_rss(self.ifname), proto, remote, local)

    def quota(self, user: User) -> Quota:
        return self.access.quota(user)

    def frames(self, quota: Quota) -> int | None:
        if quota.frames is None:
            return self.policy.backend.frames
        queues = self.policy.backend.queues
        count = interface_queues(self.ifname) if queues is None else len(queues)
        return min(quota.frames, self.policy.backend.default_frames(count))

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
        device = {
            "queues": self.queues,
            "sockets": list(self.fds),
            "mode": self.device_mode,
            "reason": self.device_reason,
        }
        self.holder.keep(app, device)

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
        self._tell_link(0 if self.watch.watcher.interface.up else errno.ENETDOWN)
        self._queues_ns = 0
        return 0

    def _tell_link(self, code: int) -> None:
        self._link = {0: 0, errno.ENETDOWN: 1}.get(code, 2)
        self.told.link(self._link, self.watch.watcher.interface)

    def link_state(self) -> int:
        return self._link

    def resolve(self, destination: str) -> None:
        self.watch.resolve([destination])

    def watched(self) -> dict[int, Callable[[], None]]:
        settings = {} if self._settings is None else {self._settings.fileno(): self._settings_changed}
        return settings | {
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
        except ForwarderError as e:
            self.told.lost(str(e))

    # ---- queues that the interface gets (ethtool -L); those with sockets cannot be taken from it
    def _count_queues(self, now_ns: int) -> None:
        """Has new ones served; else live TCP on them would be lost, or, on a veth, the kernel would see it."""
        if not self._counting or now_ns < self._queues_ns:
            return
        self._queues_ns = now_ns + QUEUES_NS
        try:
            unserved = range(len(self.queues), interface_queues(self.ifname))
            why = self._take_queues(unserved) if unserved else ""
        except (BypassError, OSError) as e:
            why = str(e)
        if why and why != self.trouble:
            log.error("%s", why)
        self.trouble = why

    @property
    def _counting(self) -> bool:
        """A policy that names queues means those."""
        return bool(self.queues) and self.policy.backend.queues is None and self._link != 2

    def _settings_changed(self) -> None:
        """By ethtool, of any interface. That events were lost says the same (ENOBUFS)."""
        assert self._settings is not None
        with suppress(BlockingIOError):
            while True:
                try:
                    self._settings.recv(1)
                except OSError as e:
                    if e.errno != errno.ENOBUFS:
                        raise
        self._queues_ns = 0

    @abstractmethod
    def _take_queues(self, unserved: range) -> str:
        """Serves them, now or by and by. What cannot be, in words; empty: nothing."""

    def _sockets_opened(self, queues: int) -> None:
        """bypass-fwd has so many of them now, and has put them into the map."""
        return

    def _serve(self, queues: range) -> None:
        """All of these have sockets. BypassError."""
        new = [*queues[len(self.queues) :]]
        # A veth runs no XDP on queues that appear below an attached program, until one is attached anew: what began
        # there in that moment is the kernel's, and stays with it.
        self.entries.drain_listeners()
        self.steering.attach_anew()
        self.queues = tuple(queues)
        log.warning("%s has got queues, which are served from now on: %s", self.ifname, new)

    def update(self, now_ns: int) -> None:
        before, code = self._link, self.watch.update()
        if (code == errno.ENXIO and before != 2) or (code == 0) != (self._link == 0):
            self._tell_link(code)
        self._count_queues(now_ns)
        self.entries.check_draining(now_ns)

    def due_ns(self) -> int | None:
        queues = self._queues_ns if self._counting else None
        due = (self.watch.due_ns(), self.entries.drain_due_ns(), queues)
        return min((t for t in due if t is not None), default=None)

    def close(self) -> None:
        with ExitStack() as end:
            end.callback(self.watch.close)
            if self._settings is not None:
                end.callback(self._settings.close)
            end.callback(self.status.close)
            end.callback(self.holder.close)
            end.callback(self.steering.close)
            end.callback(self.entries.clear)


class DirectSite(InterfaceSite):
    """An interface that one application at a time uses directly: a grant equal to CAP_NET_RAW on it."""

    mode = "direct"
    device: int = lib.APP_DEV_AFXDP

    def __init__(self, policy: Policy, name: str = "", left: Left | None = None) -> None:
        super().__init__(policy, name, left)
        self._owner = 0
        self._device: AfxdpDevice | None = None  # handed over
        if left:
            self._go_on(left)

    def _go_on(self, left: Left) -> None:
        super()._go_on(left)
        for app, device in left.apps:
            self._owner, self.queues = app.number, tuple(device["queues"])
            self.fds = dict(zip(device["sockets"], app.fds, strict=True))
            self.device_mode, self.device_reason = device["mode"], device["reason"]

    # ---- devices
    def busy(self) -> bool:
        return self._owner != 0

    def open(self, memory: AppMemory, owner: int, quota: Quota) -> list[int]:
        b = self.policy.backend
        device = AfxdpDevice(
            self.ifname,
            queues="all" if b.queues is None else b.queues,
            mode=b.mode,
            ring_size=b.ring_size,
            frames=self.frames(quota),
            frame_size=b.frame_size,
            bind_wait_s=0,
            memory=memory,
        )
        try:
            self._describe(device, memory.header)
            self.device_mode, self.device_reason = device.mode, device.mode_reason
            self.queues = device.queue_numbers
            fds = device.hand_over()
        finally:
            device.close()
        for queue, fd in fds.items():
            self.steering.set_socket(0, queue, fd)
        self.fds, self._owner, self._device = fds, owner, device
        self.holder.begin(owner)
        return list(fds.values())

    def _describe(self, device: AfxdpDevice, header: Any) -> None:
        header.mtu = device.mtu
        header.mac = bytes(ffi.buffer(device.netdev.mac))
        header.ifname = self.ifname.encode()

    def _take_queues(self, unserved: range) -> str:
        if len(self.fds) > len(self.queues):
            for queue in range(len(self.queues), len(self.fds)):
                self.steering.set_socket(0, queue, self.fds[queue])
            self._serve(range(len(self.fds)))
            return self.trouble  # of those that are still to come
        if self._device is None:
            return (
                f"{self.ifname} has got queues, and its application was taken over from a broker that was killed: live "
                "connections stall there, and new ones are the kernel's, before it is started anew"
            )
        self._queues_ns = time.monotonic_ns() + TAKE_NS
        for number in unserved:
            self.fds[number] = self._device.more_socket(number, unserved.stop, self.fds[0])
            self.told.queue(self._owner, number, unserved.stop, self.fds[number])
        return ""

    def close_device(self, owner: int) -> None:
        if owner == self._owner:
            for queue in self.queues:
                self.steering.clear_socket(0, queue)
            self.holder.end(owner)
            self.fds, self._owner, self._device = {}, 0, None
            self.queues, self.trouble = (), ""


class _DeviceView:
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
        return self._site.device_reason or "no application has the interface"

    @property
    def queue_numbers(self) -> tuple[int, ...]:
        return self._site.queues

    def statistics(self) -> dict[int, dict[str, int]]:
        """What the kernel counts; what the application counts lies in its memory, which is not believed."""
        return {queue: kernel_counters(fd) for queue, fd in self._site.fds.items()}


def kernel_counters(fd: int) -> dict[str, int]:
    """XDP_STATISTICS of an AF_XDP socket. OSError."""
    with socket.socket(fileno=os.dup(fd), family=44, type=socket.SOCK_RAW, proto=0) as sock:
        raw = sock.getsockopt(SOL_XDP, XDP_STATISTICS, 8 * len(KERNEL_COUNTERS))
    return dict(zip(KERNEL_COUNTERS, struct.unpack(f"={len(raw) // 8}Q", raw), strict=False))
