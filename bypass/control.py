# SPDX-License-Identifier: Apache-2.0
"""Control of a stack that takes flows off a live interface: grants, reserved ports, live entries.

In the order of a socket's life: the policy must grant the flow; a shadow socket reserves its port in the kernel, so
that nobody else takes it; a live entry of the steering program brings its packets. The entry lives as long as the
stack has any connection on that port, TIME_WAIT included: TCP of a live flow must never reach the kernel, which would
answer with a reset.

What does not live here: the rules themselves (bypass.policy), the XDP program (bypass.steering), packets.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from bypass.core import Address, CoreStack
from bypass.errors import GrantError
from bypass.policy import Policy, Rule
from bypass.stack_api import STREAM, Lease
from bypass.steering import Steering

__all__ = ["KernelView", "PolicyControl"]

ANY = "0.0.0.0"
PORT_TRIES = 512
DRAIN_NS = 1_000_000_000  # between questions for the kernel's connections
IP_FREEBIND = 15  # linux/in.h


class KernelView(Protocol):
    """What control asks the kernel."""

    def source_for(self, destination: str) -> str:
        """The local address from which the kernel would reach it. OSError: it is unreachable."""

    def tcp_connections(self, port: int) -> int:
        """TCP connections in any state that the kernel holds on this local port, listeners not counted."""


@dataclass(slots=True)
class _Live:
    """A live entry and who uses it."""

    entry: int
    kind: int
    local: Address
    users: int
    drain: bool


@dataclass(slots=True)
class _Shadow:
    """A kernel socket that holds a port."""

    sock: socket.socket
    users: int


Key = tuple[int, Address, Address | None]


class PolicyControl:
    """Grants, shadows and live entries of one stack. Calls with the stack's lock held.

    Attributes:
        changed: called with the stack's lock held, whenever a live entry may have to go: tick() soon.
    """

    def __init__(self, policy: Policy, steering: Steering, kernel: KernelView) -> None:
        self.policy = policy
        self.steering = steering
        self.kernel = kernel
        self.core: CoreStack | None = None  # set when the stack exists
        self.changed: Callable[[], None] = lambda: None
        self._live: dict[Key, _Live] = {}
        self._shadows: dict[tuple[int, Address], _Shadow] = {}
        self._leaving: set[Key] = set()  # entries without a socket
        self._draining: set[Key] = set()
        self._drain_ns = 0

    # ---- Control of bypass.stack_api
    def lease(self, kind: int, local: Address, remote: Address | None) -> Lease:
        host, port = local[0] or ANY, local[1]
        if remote is not None and host == ANY:
            host = self.kernel.source_for(remote[0])
        if not port:
            return Lease(kind, self._reserve_any(kind, host, remote))
        self._check(kind, (host, port), remote)
        shadow = self._shadows.get((kind, (host, port)))
        if shadow is not None:
            shadow.users += 1
        else:
            self._hold(kind, self._shadow(kind, (host, port)))
        return Lease(kind, (host, port))

    def activate(self, lease: Lease, remote: Address | None) -> None:
        kind, local = lease.kind, lease.local
        if remote is not None:
            self._check(kind, local, remote)
            if (kind, local, None) in lease.live:
                return  # every peer's packets come already
        key = (kind, local, remote)
        live = self._live.get(key)
        if live is None:
            live = self._live[key] = self._add(kind, local, remote)
            if live.drain:
                self._draining.add(key)
                self.changed()
        live.users += 1  # it may be that of a socket closed a moment ago: taken over
        lease.live.append(key)

    def release(self, lease: Lease) -> None:
        for key in lease.live:
            self._live[key].users -= 1
            if self._live[key].users <= 0:
                self._leaving.add(key)
        lease.live.clear()
        self._shadows[lease.kind, lease.local].users -= 1
        self.changed()

    # ---- grants
    def _check(self, kind: int, local: Address, remote: Address | None) -> None:
        if self._grant(kind, local, remote) is None:
            raise GrantError(self._refusal(kind, local, remote))

    def _grant(self, kind: int, local: Address, remote: Address | None) -> Rule | None:
        proto = socket.IPPROTO_TCP if kind == STREAM else socket.IPPROTO_UDP
        laddr = ipaddress.ip_address(local[0])
        if remote is None:
            return self.policy.grant(proto, laddr, local[1])
        return self.policy.grant(proto, laddr, local[1], ipaddress.ip_address(remote[0]), remote[1])

    def _refusal(self, kind: int, local: Address, remote: Address | None) -> str:
        proto = "tcp" if kind == STREAM else "udp"
        flow = f"{proto} {local[0]}:{local[1] or '(a port of its choice)'}"
        match = [f"proto: {proto}"]
        if local[0] != ANY:
            match.append(f"local: {local[0]}")
        if local[1]:
            match.append(f"local_port: {local[1]}")
        elif remote is not None:
            match.append("local_port: FIRST-LAST")
        if remote is not None:
            flow += f" to {remote[0]}:{remote[1]}"
            match += [f"remote: {remote[0]}", f"remote_port: {remote[1]}"]
        return (
            f"{self.policy.path} does not grant {flow}; this rule would: "
            f"{{name: NAME, match: {{{', '.join(match)}}}, action: steer}}"
        )

    # ---- ports
    def _reserve_any(self, kind: int, host: str, remote: Address | None) -> Address:
        """A free port that the policy grants: the kernel's choice, else one of a rule's own range."""
        held = self._shadow(kind, (host, 0))
        port = held.getsockname()[1]
        if self._grant(kind, (host, port), remote) is not None:
            self._hold(kind, held)
            return host, port
        held.close()
        for port in self._ports_of_rules(kind, host, remote):
            try:
                held = self._shadow(kind, (host, port))
            except OSError as e:
                if e.errno == errno.EADDRINUSE:
                    continue
                raise
            self._hold(kind, held)
            return host, port
        raise GrantError(self._refusal(kind, (host, 0), remote))

    def _ports_of_rules(self, kind: int, host: str, remote: Address | None) -> Iterator[int]:
        """From ranges only: a single port of a rule is a service's, not to be taken by chance."""
        for rule in self.policy.flows:
            if rule.action != "steer" or rule.local_port is None or rule.local_port.width == 1:
                continue
            ports = range(rule.local_port.first, rule.local_port.last + 1)
            for port in random.sample(ports, min(len(ports), PORT_TRIES)):
                if (kind, (host, port)) not in self._shadows and self._grant(kind, (host, port), remote):
                    yield port

    def _shadow(self, kind: int, local: Address) -> socket.socket:
        """Binds a kernel socket, not listening: connections that the kernel still holds on the port may live on.
        OSError EADDRINUSE: a program listens there (TCP) or has it (UDP)."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == STREAM else socket.SOCK_DGRAM)
        try:
            if kind == STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # nobody reads it
            # Also before an address is configured on the interface.
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            sock.bind(local)
        except OSError as e:
            sock.close()
            if e.errno == errno.EADDRINUSE:
                raise OSError(
                    e.errno, f"{os.strerror(e.errno)}: a kernel socket has {local[0]}:{local[1]}"
                ) from None
            raise
        return sock

    def _hold(self, kind: int, sock: socket.socket) -> None:
        host, port = sock.getsockname()
        self._shadows[kind, (host, port)] = _Shadow(sock, 1)

    # ---- live entries
    def _add(self, kind: int, local: Address, remote: Address | None) -> _Live:
        proto = socket.IPPROTO_TCP if kind == STREAM else socket.IPPROTO_UDP
        laddr = None if local[0] == ANY else local[0]
        raddr, rport = remote or (None, None)
        drain = kind == STREAM and remote is None and self.kernel.tcp_connections(local[1]) > 0
        entry = self.steering.add_endpoint(proto, laddr, local[1], raddr, rport, drain=drain)
        return _Live(entry, kind, local, 0, drain)

    # ---- now and then
    def tick(self, now_ns: int) -> int:
        """Removes entries that nothing uses any more, and ends draining where the kernel's connections are gone.

        Returns:
            How many are on their way out: as long as there are some it has to be called again.
        """
        for key in list(self._leaving):
            live = self._live[key]
            if live.users > 0:
                self._leaving.discard(key)
            elif self._unused(live):
                self.steering.remove_endpoint(live.entry)
                del self._live[key]
                self._leaving.discard(key)
        if self._draining and now_ns >= self._drain_ns:
            self._drain_ns = now_ns + DRAIN_NS
            self._check_draining()
        self._close_shadows()
        return len(self._leaving) + len(self._draining)

    def _unused(self, live: _Live) -> bool:
        """TIME_WAIT counts as use."""
        assert self.core is not None
        port = live.local[1]
        if not self.core.port_users(live.kind, None, port):
            return True
        # Looking at addresses walks all connections: only where another entry may own them.
        others = (v for v in self._live.values() if v is not live)
        if live.local[0] == ANY or not any(v.kind == live.kind and v.local[1] == port for v in others):
            return False
        return self.core.port_users(live.kind, live.local[0], port) == 0

    def _check_draining(self) -> None:
        for key in list(self._draining):
            live = self._live.get(key)
            if live is None:
                self._draining.discard(key)
            elif self.kernel.tcp_connections(live.local[1]) == 0:
                self.steering.set_drain(live.entry, False)
                self._draining.discard(key)

    def _close_shadows(self) -> None:
        """Gives ports back that no socket holds and no entry needs."""
        free = [place for place, shadow in self._shadows.items() if shadow.users <= 0]
        if not free:
            return
        needed = {(live.kind, live.local) for live in self._live.values()}
        for place in free:
            if place not in needed:
                self._shadows.pop(place).sock.close()

    def close(self) -> None:
        """Removes every live entry and gives the ports back to the kernel."""
        for live in self._live.values():
            self.steering.remove_endpoint(live.entry)
        self._live.clear()
        self._leaving.clear()
        self._draining.clear()
        for shadow in self._shadows.values():
            shadow.sock.close()
        self._shadows.clear()
