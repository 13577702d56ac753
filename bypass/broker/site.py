# SPDX-License-Identifier: Apache-2.0
"""A site: where applications get their packets. Steering, AF_XDP sockets, live entries, and what the kernel tells.

    Site        what the broker asks of any of them
    DirectSite  one interface; one application at a time owns AF_XDP sockets on all its queues
    LoopSite    no interface: every application talks to itself (`bypass run --loopback`)

Nothing here knows connections or messages: `told` is called for what applications have to know.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import Any, Protocol

from bypass._core import ffi, lib
from bypass.access import NO_QUOTA, Quota
from bypass.afxdp import AfxdpDevice, interface_queues
from bypass.broker.memory import AppMemory
from bypass.broker.users import Access, User
from bypass.core import Address
from bypass.doctor import choose_mode
from bypass.errors import BypassError, DeviceError
from bypass.grants import Grants, Key, LiveEntries
from bypass.netlink import Interface
from bypass.policy import Policy, Rule
from bypass.profiles import NO_OPTIONS, StackOptions
from bypass.rules import PortRange
from bypass.steering import Steering
from bypass.watch import KernelWatch

LOOP_FRAMES = 16384  # as the preload library has it, which makes the device once more
LOOP_CONNS = 8192
LOOP_ADDRESS = "127.0.0.1"
LOOP_PREFIX = 8
BATCH = 256


class Told(Protocol):
    """Who wants to know what changes."""

    def address_added(self, address: str, prefix_len: int) -> None: ...
    def address_gone(self, address: str) -> None: ...
    def next_hop(self, address: str, mac: bytes | None, mtu: int) -> None:
        """mac None: unreachable."""

    def next_hop_forgotten(self, address: str | None) -> None:
        """None: all of them."""

    def link(self, state: int, interface: Interface) -> None:
        """state: 0 up, 1 down, 2 gone for good."""


class Site(ABC):
    """Base of sites.

    Attributes:
        ifname: empty without an interface.
        mode: `direct` or `loop`.
        addresses: of this host that a stack serves, with their prefix lengths.
        queues: of the interface, that applications have sockets on.
        policy_path: where the policy was read; empty: there is none.
        options: of the stack.
        flags: BYPASS_F_* of the stack.
        device: APP_DEV_*.
        cpus, numa: where applications run and their memory lies; None: as it comes.
        told: set by the broker.
    """

    ifname = ""
    mode = ""
    flags = 0
    device = 0
    options: StackOptions = NO_OPTIONS
    congestion: str | None = None
    cpus: tuple[int, ...] | None = None
    numa: int | None = None
    told: Told

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.queues: tuple[int, ...] = ()
        self.policy_path = ""

    def prepare(self, policy: Policy) -> None:
        """Does the slow part of swap(), in any thread. BypassError: it cannot be."""
        raise BypassError("this broker has no policy")

    def swap(self, policy: Policy) -> None:
        """Puts another policy in force. BypassError: it cannot be."""
        raise BypassError("this broker has no policy")

    def decide(
        self, proto: int, local: tuple[IPv4Address, int], remote: tuple[IPv4Address, int]
    ) -> Rule | None:
        """The rule that decides about a packet of this flow."""
        return None

    @abstractmethod
    def grants(self, user: User) -> Grants:
        """What a user may take."""

    def quota(self, user: User) -> Quota:
        """What an application of a user may have."""
        return NO_QUOTA

    def busy(self) -> bool:
        """No more application can be had now."""
        return False

    @abstractmethod
    def open(self, memory: AppMemory, owner: int, quota: Quota) -> list[int]:
        """Makes the device of an application in its memory, whose header gets what the device decides.

        Returns:
            The device's descriptors, which are the caller's.

        Raises:
            QueueBusyError: try again in a moment. Other BypassError, OSError: it cannot be.
        """

    def close_device(self, owner: int) -> None:
        """Its packets go nowhere any more. Before its descriptors are closed."""
        return

    @abstractmethod
    def use(self, key: Key, owner: int) -> None:
        """Makes flows live for an owner, or counts one more user of them."""

    @abstractmethod
    def unuse(self, key: Key) -> None:
        """One user less; the last one ends them."""

    @abstractmethod
    def source_for(self, destination: str) -> str:
        """The local address from which a destination is reached. OSError: it is not."""

    def resolve(self, destination: str) -> None:
        """Tells the next hop, now or when it is known."""
        return

    def fileno(self) -> int:
        """Readable when update() has something to do; -1: never."""
        return -1

    def update(self, now_ns: int) -> None:
        """Passes on what the kernel tells; does what is due."""
        return

    def due_ns(self) -> int | None:
        """When update() has something to do without an event."""
        return None

    def close(self) -> None:
        """The kernel has all traffic again."""
        return


class Everything(Grants):
    """Whoever talks to itself alone may take all of itself."""

    def __init__(self) -> None:
        rule = Rule(0, "loopback", None, None, None, None, None, None, "steer")
        self.rules = (rule,)

    def find(self, kind: int, local: Address, remote: Address | None) -> Rule | None:
        return self.rules[0]

    def refusal(self, kind: int, local: Address, remote: Address | None) -> str:
        return "no port is free"

    def steered(self) -> Iterator[tuple[Rule, PortRange | None]]:
        return iter([(self.rules[0], None)])


class LoopSite(Site):
    """Applications without a network."""

    mode = "loop"
    flags: int = lib.BYPASS_F_RST | lib.BYPASS_F_PING | lib.BYPASS_F_LOOPBACK
    device: int = lib.APP_DEV_LOOP

    def __init__(self, options: StackOptions = NO_OPTIONS) -> None:
        super().__init__()
        self.options = options.over(StackOptions(conns=LOOP_CONNS))
        self.addresses = {LOOP_ADDRESS: LOOP_PREFIX}
        self._grants = Everything()

    def grants(self, user: User) -> Grants:
        return self._grants

    def open(self, memory: AppMemory, owner: int, quota: Quota) -> list[int]:
        size = int(lib.loop_mem_size(LOOP_FRAMES))
        mem = memory.map(size)
        try:
            if lib.loop_init(mem, size, LOOP_FRAMES) != 0:
                raise DeviceError("the loop device cannot be made")
        finally:
            memory.unmap()
        memory.header.mtu = lib.LOOP_MTU
        return []

    def use(self, key: Key, owner: int) -> None:
        return

    def unuse(self, key: Key) -> None:
        return

    def source_for(self, destination: str) -> str:
        if destination.startswith("127."):
            return LOOP_ADDRESS
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


class DirectSite(Site):
    """An interface that one application at a time uses directly: a grant equal to CAP_NET_RAW on it.

    Raises:
        PrivilegeError, DeviceError, SteeringError, ForeignProgramError, PolicyError: as their parts.
    """

    mode = "direct"
    flags: int = (
        lib.BYPASS_F_RST
    )  # the kernel answers ARP and ping; resets of live flows are the stack's alone
    device: int = lib.APP_DEV_AFXDP

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        if policy.mode != "direct":
            raise BypassError(f"{policy.path}: mode {policy.mode} cannot be served yet: say `mode: direct`")
        self.policy = policy
        self.access = Access(policy)
        self.cpus, self.numa = policy.cpus, policy.numa
        self.ifname = policy.interface
        self.options = policy.stack
        self.congestion = policy.congestion
        self.device_mode = ""
        self.policy_path = policy.path
        self._owner = 0
        self._link = 0
        self.told = _Nobody()
        with ExitStack() as undo:
            generic = choose_mode(self.ifname, policy.backend.mode)[0] == "skb"
            self.steering = Steering(
                policy,
                self.ifname,
                queues=interface_queues(self.ifname),
                mode="skb" if generic else "native",
            )
            undo.callback(self.steering.close)
            self.watch = KernelWatch(self.ifname, self, self.steering, self)
            undo.callback(self.watch.close)
            self.entries = LiveEntries(self.steering, self.watch)
            undo.pop_all()

    def grants(self, user: User) -> Grants:
        return Grants(self.policy, self.access.permits(user))

    def prepare(self, policy: Policy) -> None:
        old = self.policy
        for what, before, after in (
            ("interface", old.interface, policy.interface),
            ("mode", old.mode, policy.mode),
            ("backend", old.backend, policy.backend),
        ):
            if before != after:
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
            frames=self._frames(quota),
            frame_size=b.frame_size,
            bind_wait_s=0,
            memory=memory,
        )
        try:
            self._describe(device, memory.header)
            self.device_mode, self.queues = device.mode, device.queue_numbers
            fds = device.hand_over()
        finally:
            device.close()
        for queue, fd in fds.items():
            self.steering.set_socket(0, queue, fd)
        self._owner = owner
        return list(fds.values())

    def _frames(self, quota: Quota) -> int | None:
        if quota.frames is None:
            return self.policy.backend.frames
        queues = self.policy.backend.queues
        count = interface_queues(self.ifname) if queues is None else len(queues)
        return min(quota.frames, self.policy.backend.default_frames(count))

    def _describe(self, device: AfxdpDevice, header: Any) -> None:
        header.mtu = device.mtu
        header.mac = bytes(ffi.buffer(device.netdev.mac))
        header.ifname = self.ifname.encode()

    def close_device(self, owner: int) -> None:
        if owner == self._owner:
            for queue in self.queues:
                self.steering.clear_socket(0, queue)
            self._owner = 0
            self.queues = ()

    # ---- live entries
    def use(self, key: Key, owner: int) -> None:
        self.entries.use(key)

    def unuse(self, key: Key) -> None:
        if self.entries.unuse(key):
            self.entries.remove(key)

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
        return 0

    def _tell_link(self, code: int) -> None:
        self._link = {0: 0, errno.ENETDOWN: 1}.get(code, 2)
        self.told.link(self._link, self.watch.watcher.interface)

    def link_state(self) -> int:
        return self._link

    def resolve(self, destination: str) -> None:
        self.watch.resolve([destination])

    def fileno(self) -> int:
        return self.watch.fileno()

    def update(self, now_ns: int) -> None:
        before, code = self._link, self.watch.update()
        if (code == errno.ENXIO and before != 2) or (code == 0) != (self._link == 0):
            self._tell_link(code)
        self.entries.check_draining(now_ns)

    def due_ns(self) -> int | None:
        due = self.watch.due_ns()
        drain = self.entries.drain_due_ns()
        return min((t for t in (due, drain) if t is not None), default=None)

    def close(self) -> None:
        with ExitStack() as end:
            end.callback(self.watch.close)
            end.callback(self.steering.close)
            end.callback(self.entries.clear)


class _Nobody:
    """Before the broker listens."""

    def address_added(self, address: str, prefix_len: int) -> None: ...
    def address_gone(self, address: str) -> None: ...
    def next_hop(self, address: str, mac: bytes | None, mtu: int) -> None: ...
    def next_hop_forgotten(self, address: str | None) -> None: ...
    def link(self, state: int, interface: Interface) -> None: ...
