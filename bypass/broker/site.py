# SPDX-License-Identifier: Apache-2.0
"""A site: where applications get their packets. Steering, AF_XDP sockets, live entries, and what the kernel tells.

    Site        what the broker asks of any of them
    LoopSite    no interface: every application talks to itself (`bypass run --loopback`)
    DirectSite  direct.py: one application at a time owns AF_XDP sockets on all its queues
    SharedSite  shared.py, ports.py: several applications, which do not trust each other; bypass-fwd moves their frames

Nothing here knows connections or messages: `told` is called for what applications have to know.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from typing import Protocol

from bypass._core import lib
from bypass.access import NO_QUOTA, Quota
from bypass.broker.apps import App, Lease
from bypass.broker.memory import AppMemory
from bypass.broker.users import User
from bypass.core import Address
from bypass.errors import BypassError, DeviceError
from bypass.grants import Grants, Key
from bypass.netlink import Interface
from bypass.policy import Policy, Rule
from bypass.profiles import NO_OPTIONS, StackOptions
from bypass.rss import Queue
from bypass.rules import PortRange

LOOP_FRAMES = 16384  # as the preload library has it, which makes the device once more
LOOP_CONNS = 8192
LOOP_ADDRESS = "127.0.0.1"
LOOP_PREFIX = 8


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

    def queue(self, owner: int, number: int, of: int, fd: int) -> None:
        """This application has one more queue, of so many that there are going to be; the socket is its own now."""

    def cut(self, owner: int, why: str) -> None:
        """This application has broken the rules: it has to end."""

    def lost(self, why: str) -> None:
        """The site serves nobody any more: the broker has to end."""


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
        trouble: what does not work at the moment besides the link, for the operator; empty: nothing.
        blocks: entries may be blocks of ports (bypass.grants.WHOLE_BLOCK).
        told: set by the broker.
        left: applications of a killed broker, to go on with.
        apart: the kernel has the interface in another network namespace: its addresses are not this one's.
        without_fwd: what becomes of the interface when bypass-fwd ends, in words.
    """

    ifname = ""
    mode = ""
    flags = 0
    device = 0
    trouble = ""
    blocks = False
    apart = False
    without_fwd = "the kernel has all of its flows"
    options: StackOptions = NO_OPTIONS
    congestion: str | None = None
    cpus: tuple[int, ...] | None = None
    numa: int | None = None
    told: Told

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.queues: tuple[int, ...] = ()
        self.policy_path = ""
        self.left: list[App] = []

    def ails(self) -> str:
        """All that does not work at the moment, for the operator; empty: nothing."""
        return self.trouble

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

    def arrival(self, proto: int, local: tuple[IPv4Address, int], remote: tuple[IPv4Address, int]) -> Queue:
        """The queue of the interface on which packets of this flow arrive."""
        return Queue(None, "there is no interface")

    @abstractmethod
    def grants(self, user: User) -> Grants:
        """What a user may take."""

    def quota(self, user: User) -> Quota:
        """What an application of a user may have."""
        return NO_QUOTA

    def limit(self, owner: int, quota: Quota) -> None:
        """An application that runs has this quota from now on: what of it can still be changed."""
        return

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

    def joined(self, owner: int, pidfd: int) -> None:
        """One more process belongs to an application."""
        return

    # ---- what a successor has to know of a broker that was killed
    def keep(self, app: App) -> None:
        """Has it outlive this broker. Again when it has changed."""
        return

    def leased(self, app: App, lease: Lease) -> None:
        """Before it is used."""
        return

    def released(self, app: App, lease: Lease) -> None:
        """It is used no more."""
        return

    def keeper(self) -> int:
        """The process that what is live ends with at the latest."""
        return os.getpid()

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

    def watched(self) -> dict[int, Callable[[], None]]:
        """Descriptors, and what to call when they are readable."""
        return {}

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


class Nobody:
    """Before the broker listens."""

    def address_added(self, address: str, prefix_len: int) -> None: ...
    def address_gone(self, address: str) -> None: ...
    def next_hop(self, address: str, mac: bytes | None, mtu: int) -> None: ...
    def next_hop_forgotten(self, address: str | None) -> None: ...
    def link(self, state: int, interface: Interface) -> None: ...
    def queue(self, owner: int, number: int, of: int, fd: int) -> None: ...
    def cut(self, owner: int, why: str) -> None: ...
    def lost(self, why: str) -> None: ...
