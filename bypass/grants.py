# SPDX-License-Identifier: Apache-2.0
"""Grants and live entries: what a policy lets somebody take, and what is taken at this moment.

Shared by the control of an embedded stack (bypass.control) and by the broker (bypass.broker). What does not live here:
the rules (bypass.policy), the XDP program (bypass.steering), whose sockets hold the ports.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import random
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from bypass.core import Address
from bypass.errors import GrantError
from bypass.policy import Policy, Rule
from bypass.rules import PortRange
from bypass.stack_api import STREAM
from bypass.steer_maps import BLOCK
from bypass.steering_api import Steers

__all__ = ["ANY", "WHOLE_BLOCK", "Grants", "KernelView", "Key", "Live", "LiveEntries", "Permits", "shadow"]

ANY = "0.0.0.0"
PORT_TRIES = 512
KERNEL_TRIES = 3
DRAIN_NS = 1_000_000_000  # between questions for the kernel's connections
IP_FREEBIND = 15  # linux/in.h

Key = tuple[int, Address, Address | None]
"""Of a live entry: kind (BYPASS_STREAM, BYPASS_DGRAM), local, remote."""
WHOLE_BLOCK: Address = (ANY, 0)
"""A remote that is none: the entry is of bypass.steering.BLOCK local ports, from that of `local` on."""


class KernelView(Protocol):
    """What control asks the kernel."""

    def source_for(self, destination: str) -> str:
        """The local address from which the kernel would reach it. OSError: it is unreachable."""

    def tcp_connections(self, port: int) -> int:
        """TCP connections in any state that the kernel holds on this local port, listeners not counted."""


def protocol_of(kind: int) -> int:
    return socket.IPPROTO_TCP if kind == STREAM else socket.IPPROTO_UDP


# ---- Grants -------------------------------------------------------------------------------------------------------


class Permits(Protocol):
    """Which rules a user may use."""

    def __call__(self, rule: Rule, port: int) -> bool:
        """This one with this local port."""

    def ports(self, rule: Rule) -> Iterable[PortRange | None]:
        """The local ports with which it may be used; None: all."""


class Grants:
    """What a policy grants to one user.

    Args:
        policy: the rules.
        permits: whether the user may use a `steer` rule with a local port; None: every one.
    """

    def __init__(self, policy: Policy, permits: Permits | None = None) -> None:
        self.policy = policy
        self.permits = permits

    def find(self, kind: int, local: Address, remote: Address | None) -> Rule | None:
        """The rule by which a socket may take its flows."""
        laddr = ipaddress.ip_address(local[0])
        if remote is None:
            return self.policy.grant(protocol_of(kind), laddr, local[1], permits=self.permits)
        raddr = ipaddress.ip_address(remote[0])
        return self.policy.grant(protocol_of(kind), laddr, local[1], raddr, remote[1], permits=self.permits)

    def steered(self) -> Iterator[tuple[Rule, PortRange | None]]:
        """The rules that may be used, each with the local ports that it may be used with; None: all."""
        for rule in self.policy.flows:
            if rule.action == "steer":
                if self.permits is None:
                    yield rule, rule.local_port
                else:
                    yield from ((rule, ports) for ports in self.permits.ports(rule))

    def check(self, kind: int, local: Address, remote: Address | None) -> Rule:
        """GrantError: no rule grants it; the message says which one would."""
        rule = self.find(kind, local, remote)
        if rule is None:
            raise GrantError(self.refusal(kind, local, remote))
        return rule

    def refusal(self, kind: int, local: Address, remote: Address | None) -> str:
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

    def choose_port(
        self, kind: int, host: str, remote: Address | None, bind: Callable[[Address], None]
    ) -> Address:
        """Binds to a free port that is granted: the kernel's choice, else one of a rule's own range.

        Args:
            bind: binds; its OSError EADDRINUSE means that somebody was faster.

        Raises:
            GrantError: none is free and granted.
        """
        for port in self._free_ports(kind, host, remote):
            try:
                bind((host, port))
            except OSError as e:
                if e.errno != errno.EADDRINUSE:
                    raise
                continue
            return host, port
        raise GrantError(self.refusal(kind, (host, 0), remote))

    def _free_ports(self, kind: int, host: str, remote: Address | None) -> Iterator[int]:
        for _ in range(KERNEL_TRIES):
            with shadow(kind, (host, 0)) as probe:
                port = probe.getsockname()[1]
            if self.find(kind, (host, port), remote) is None:
                break
            yield port
        # From ranges only: a single port of a rule is a service's, not to be taken by chance.
        for rule in self.policy.flows:
            if rule.action != "steer" or rule.local_port is None or rule.local_port.width == 1:
                continue
            ports = range(rule.local_port.first, rule.local_port.last + 1)
            for port in random.sample(ports, min(len(ports), PORT_TRIES)):
                if self.find(kind, (host, port), remote):
                    yield port


# ---- Reserved ports -----------------------------------------------------------------------------------------------


def shadow(kind: int, local: Address) -> socket.socket:
    """A kernel socket that holds a port, not listening: connections that the kernel still holds on it may live on.
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


# ---- Live entries -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Live:
    """A live entry and how many use it. `owner`: the application, where there are several."""

    entry: int
    kind: int
    local: Address
    owner: int
    users: int
    drain: bool


class LiveEntries:
    """The live entries of one interface, by key."""

    def __init__(self, steering: Steers, kernel: KernelView) -> None:
        self.steering = steering
        self.kernel = kernel
        self._live: dict[Key, Live] = {}
        self._at: dict[tuple[int, int], dict[Key, int]] = {}  # by kind and port: keys, with owners
        self._draining: set[Key] = set()
        self._drain_ns = 0

    def __iter__(self) -> Iterator[Live]:
        return iter(self._live.values())

    def __getitem__(self, key: Key) -> Live:
        return self._live[key]

    def __contains__(self, key: Key) -> bool:
        return key in self._live

    @property
    def draining(self) -> int:
        """Entries for which the kernel still has connections."""
        return len(self._draining)

    def use(self, key: Key, owner: int = 0) -> Live:
        """Makes it live, or counts one more user. OSError EADDRINUSE: as require() says."""
        self.require(key, owner)
        live = self._live.get(key)
        if live is None:
            live = self._live[key] = self._add(key, owner)
            self._at.setdefault((key[0], key[1][1]), {})[key] = owner
            if live.drain:
                self._draining.add(key)
        live.users += 1
        return live

    def go_on(self, key: Key, owner: int) -> Live | None:
        """One more user of an entry that somebody else has made live, in `steering.left`; None: there is none."""
        live = self._live.get(key)
        if live is None:
            kind, (host, port), remote = key
            block = remote == WHOLE_BLOCK
            peer = None if block or remote is None else remote
            entry = self.steering.find(protocol_of(kind), host, port, peer, block=block)
            if entry is None:
                return None
            live = self._live[key] = Live(entry, kind, (host, port), owner, 0, self.steering.draining(entry))
            self._at.setdefault((kind, port), {})[key] = owner
            if live.drain:
                self._draining.add(key)
        live.users += 1
        return live

    def require(self, key: Key, owner: int) -> None:
        """OSError EADDRINUSE: it would take packets from another owner, in whose entry they are now.

        A more specific entry goes before a wider one: without this, who holds a kernel socket of the same port (which
        SO_REUSEADDR and SO_REUSEPORT permit) could take single connections of a listener, or of a block."""
        kind, (_, port), _ = key
        for at in {port, port - port % BLOCK}:
            there = self._at.get((kind, at), {})
            if set(there.values()) <= {owner}:
                continue
            if any(whose != owner and _takes(key, other) for other, whose in there.items()):
                raise OSError(
                    errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: another application has it"
                )

    def unuse(self, key: Key) -> bool:
        """One user less. Whether there is none any more; the entry stays until remove()."""
        live = self._live[key]
        live.users -= 1
        return live.users <= 0

    def remove(self, key: Key) -> None:
        """Its packets are the kernel's from now on."""
        self.steering.remove_endpoint(self._live.pop(key).entry)
        at = (key[0], key[1][1])
        del self._at[at][key]
        if not self._at[at]:
            del self._at[at]
        self._draining.discard(key)

    def clear(self) -> None:
        for key in list(self._live):
            self.remove(key)

    def _add(self, key: Key, owner: int) -> Live:
        kind, local, remote = key
        laddr = None if local[0] == ANY else local[0]
        block = remote == WHOLE_BLOCK
        raddr, rport = (None, None) if block or remote is None else remote
        drain = kind == STREAM and remote is None and self.kernel.tcp_connections(local[1]) > 0
        entry = self.steering.add_endpoint(
            protocol_of(kind), laddr, local[1], raddr, rport, drain=drain, block=block
        )
        return Live(entry, kind, local, owner, 0, drain)

    def drain_listeners(self) -> None:
        """From now on connections that the kernel has accepted meanwhile stay with it, as at the begin of an entry.
        For a moment in which it saw packets of live entries."""
        for key, live in self._live.items():
            if key[0] == STREAM and key[2] is None and not live.drain:
                self.steering.set_drain(live.entry, True)
                live.drain = True
                self._draining.add(key)

    def drain_due_ns(self) -> int | None:
        """When check_draining() has something to do."""
        return self._drain_ns if self._draining else None

    def check_draining(self, now_ns: int) -> int:
        """Ends draining, once a second, where the kernel's connections are gone; how many go on."""
        if self._draining and now_ns >= self._drain_ns:
            self._drain_ns = now_ns + DRAIN_NS
            for key in list(self._draining):
                live = self._live[key]
                if self.kernel.tcp_connections(live.local[1]) == 0:
                    self.steering.set_drain(live.entry, False)
                    live.drain = False
                    self._draining.discard(key)
                else:
                    self.steering.set_drain(live.entry, True)
        return len(self._draining)


def _takes(key: Key, other: Key) -> bool:
    """Whether there are packets that would be the one's and are, or might have been, the other's."""
    (_, (host, port), remote), (_, (its_host, its_port), its_remote) = key, other
    if host != its_host and ANY not in (host, its_host):
        return False
    if its_remote == WHOLE_BLOCK:
        return remote != WHOLE_BLOCK or port == its_port
    if remote == WHOLE_BLOCK or port != its_port:
        return False  # a block gets what nothing else says
    return remote == its_remote or remote is None or its_remote is None
