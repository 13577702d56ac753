# SPDX-License-Identifier: Apache-2.0
"""An interface by AF_XDP: the steering program on it, and its queues, of which it may get more.

What lives here: what direct and shared mode have in common on such an interface. Who has the sockets: direct.py,
shared.py.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address

from bypass._core import ffi
from bypass.afxdp import interface_queues
from bypass.broker.interface import DeviceView, InterfaceSite
from bypass.broker.takeover import Left
from bypass.doctor import choose_mode
from bypass.errors import BypassError
from bypass.hwflow.interface import InterfaceRules
from bypass.netlink import settings_changed
from bypass.nic import driver_of
from bypass.policy import AfxdpBackend, Policy
from bypass.rss import Queue, queue_of
from bypass.rss import read as read_rss
from bypass.steering import Steering

log = logging.getLogger("bypass.broker")

SOL_XDP, XDP_STATISTICS = 283, 7  # linux/if_xdp.h
QUEUES_NS = 1_000_000_000
"""How often the interface's queues are counted, while an application has it; netlink tells most changes at once."""
KERNEL_COUNTERS = tuple(name for name, _ in ffi.typeof("struct afxdp_kernel_stats").fields)


class AfxdpSite(InterfaceSite):
    """An interface with the steering program."""

    steering: Steering

    def __init__(self, policy: Policy, name: str = "", left: Left | None = None) -> None:
        self.fds: dict[int, int] = {}  # AF_XDP sockets by queue, where they are known here
        self._queues_ns = 0
        self._settings = settings_changed()
        try:
            super().__init__(policy, name, left)
            self._begin_rules(left)
        except BaseException:
            if self._settings is not None:
                self._settings.close()
            raise

    def _begin_rules(self, left: Left | None) -> None:
        """After the program, which drivers begin their queues anew for; before there are sockets."""
        try:
            self.rules = InterfaceRules(self.policy, self.keeper(), left=left is not None)
        except BaseException:
            InterfaceSite.close(self)
            raise
        self.hardware = self.rules.in_force

    @property
    def backend(self) -> AfxdpBackend:
        """The policy's, with the queues that sockets are on."""
        return self.rules.backend

    def swap(self, policy: Policy) -> None:
        old = self.policy
        self.rules.exchange(policy)
        try:
            super().swap(policy)
        except BaseException:
            self.rules.exchange(old)
            raise
        self.hardware = self.rules.in_force

    def _steer(self, policy: Policy, left: Left | None) -> Steering:
        generic = left is None and choose_mode(policy.interface, policy.afxdp.mode)[0] == "skb"
        return Steering(
            policy,
            policy.interface,
            queues=interface_queues(policy.interface),
            mode="skb" if generic else "native",
            left=left.attached if left else None,
        )

    def _view(self) -> DeviceView:
        return _AfxdpView(self)

    def arrival(self, proto: int, local: tuple[IPv4Address, int], remote: tuple[IPv4Address, int]) -> Queue:
        if interface_queues(self.ifname) == 1:
            return Queue(0, "the only one")
        if self.hardware is not None and self.hardware.rules:
            rule, ours = self.decide(proto, local, remote), self.backend.queues or ()
            if rule is not None and rule.action == "steer":
                if len(ours) == 1:
                    return Queue(ours[0], f"a rule of the interface sends what '{rule.name}' steers there")
                return Queue(None, "rules of the interface share what is steered between the stack's queues")
        if driver_of(self.ifname) == "veth":
            return Queue(
                None, "a veth has no hash: packets arrive on the queue of the number that the peer sends by"
            )
        return queue_of(read_rss(self.ifname), proto, remote, local)

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
            why = "" if self.watch.update() == errno.ENXIO else str(e)  # it is gone, which is told by itself
        if why and why != self.trouble:
            log.error("%s", why)
        self.trouble = why

    @property
    def _counting(self) -> bool:
        """A policy that names queues means those."""
        return bool(self.queues) and self.backend.queues is None and self._link != 2

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

    def _serve(self, queues: range) -> None:
        """All of these have sockets. BypassError."""
        new = [*queues[len(self.queues) :]]
        # A veth runs no XDP on queues that appear below an attached program, until one is attached anew: what began
        # there in that moment is the kernel's, and stays with it.
        self.entries.drain_listeners()
        self.steering.attach_anew()
        self.queues = tuple(queues)
        log.warning("%s has got queues, which are served from now on: %s", self.ifname, new)

    def health(self) -> int:
        self._queues_ns = 0
        return super().health()

    def watched(self) -> dict[int, Callable[[], None]]:
        settings = {} if self._settings is None else {self._settings.fileno(): self._settings_changed}
        return settings | super().watched()

    def update(self, now_ns: int) -> None:
        super().update(now_ns)
        self._count_queues(now_ns)
        self.rules.check(now_ns)

    def due_ns(self) -> int | None:
        queues = self._queues_ns if self._counting else None
        rules = self.rules.due_ns if self.rules.held else None
        return min((t for t in (super().due_ns(), queues, rules) if t is not None), default=None)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.rules.close()
            if self._settings is not None:
                self._settings.close()


class _AfxdpView(DeviceView):
    _site: AfxdpSite

    def statistics(self) -> dict[int, dict[str, int]]:
        """What the kernel counts; what the application counts lies in its memory, which is not believed."""
        return {queue: kernel_counters(fd) for queue, fd in self._site.fds.items()}


def kernel_counters(fd: int) -> dict[str, int]:
    """XDP_STATISTICS of an AF_XDP socket. OSError."""
    with socket.socket(fileno=os.dup(fd), family=44, type=socket.SOCK_RAW, proto=0) as sock:
        raw = sock.getsockopt(SOL_XDP, XDP_STATISTICS, 8 * len(KERNEL_COUNTERS))
    return dict(zip(KERNEL_COUNTERS, struct.unpack(f"={len(raw) // 8}Q", raw), strict=False))
