# SPDX-License-Identifier: Apache-2.0
"""Next hops as the kernel has them: which MAC address and MTU lead to a destination, kept right while it is in use.

    destination --RTM_GETROUTE--> gateway, source, MTU --RTM_GETNEIGH--> MAC, or the kernel resolves it

What lives here: the cache of destinations in use, and when each is asked again: after events (routes, rules,
addresses, the neighbour), and every ten seconds, because path MTU exceptions send no event. What does not: the
events themselves (`netlink.py`), the stack's own cache.

Neighbours in use are marked as managed (NTF_EXT_MANAGED, kernel 5.16), so that the kernel keeps them confirmed: the
stack's packets pass by the kernel, which would otherwise let a dead MAC address stay. NTF_USE is set with it, which is
all that older kernels know: the neighbour is then probed as if the kernel had sent to it, at every renewed question.
The mark is taken off when the last destination behind a neighbour goes, and at close(); a process that is killed
leaves it (`ip neigh show` says `managed`), at the price of an ARP request now and then.

Sources: rtnetlink(7), linux/neighbour.h, linux/rtnetlink.h.
"""

from __future__ import annotations

import enum
import errno
import ipaddress
import os
import socket
from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from bypass.netlink import (
    NLM_F_CREATE,
    NLM_F_REPLACE,
    RTM_DELNEIGH,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_NEWNEIGH,
    Change,
    NetlinkSocket,
    Watcher,
)
from bypass.rules import Address

MAX_DESTINATIONS = 16384
"""Destinations kept current; beyond that the one that was looked at longest ago makes room."""
RENEW_NS = 10_000_000_000
"""How often a destination in use is asked again without any event; less often when there are thousands."""
QUESTIONS_PER_UPDATE = 16
"""Bounds the time of one update(), about 3 ms."""
PACE_NS = 10_000_000
"""Between two updates that have more to ask than that."""

# linux/rtnetlink.h, linux/neighbour.h
RTN_UNICAST, RTN_BROADCAST, RTN_MULTICAST = 1, 3, 5
NUD_INCOMPLETE, NUD_REACHABLE, NUD_STALE, NUD_DELAY, NUD_PROBE = 0x01, 0x02, 0x04, 0x08, 0x10
NUD_FAILED, NUD_NOARP, NUD_PERMANENT = 0x20, 0x40, 0x80
NUD_VALID = NUD_REACHABLE | NUD_STALE | NUD_DELAY | NUD_PROBE | NUD_NOARP | NUD_PERMANENT
NTF_USE, NTF_EXT_MANAGED = 0x01, 0x01

_UNREACHABLE_ERRNOS = {
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EACCES,
    errno.EINVAL,
    errno.ENONET,
    errno.ESRCH,
}


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where frames for a destination go. `mtu`: of the path as far as the kernel knows, bytes; `source`: the local
    address that the kernel would use."""

    mac: bytes
    mtu: int
    source: Address | None


class Unresolved(enum.Enum):
    """Why a destination has no next hop."""

    PENDING = "the neighbour is being resolved"
    UNREACHABLE = "no route by this interface, or the neighbour does not answer"


PENDING, UNREACHABLE = Unresolved.PENDING, Unresolved.UNREACHABLE
Answer = NextHop | Unresolved


@dataclass(slots=True)
class _Route:
    """What RTM_GETROUTE said. gateway None: `mac` is known without a neighbour."""

    gateway: Address | None
    mac: bytes
    mtu: int
    source: Address | None


@dataclass(slots=True)
class _Destination:
    answer: Answer
    gateway: Address | None
    asked_ns: int


class NextHops:
    """Next hops out of one interface.

    Args:
        watcher: of the interface; its events are handed on by its owner, see changed().
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._requests = NetlinkSocket()
        self._known: OrderedDict[Address, _Destination] = OrderedDict()  # by asked_ns
        self._stale: dict[Address, None] = {}  # destinations to ask again, in order
        self._behind: Counter[Address] = Counter()  # destinations by gateway
        self._managed: set[Address] = set()  # neighbours that we marked
        self._updated_ns = 0

    def close(self) -> None:
        """Takes the marks off the neighbours."""
        for gateway in list(self._managed):
            self._unmanage(gateway)
        self._requests.close()

    # ---- Questions
    def resolve(self, destination: Address, now_ns: int) -> Answer:
        """The next hop, which is kept current from now on: update() tells when it changes, and when a pending one is
        found. What is unreachable is not kept: it is to be asked for again when it is used again. Asking for what
        is known asks the kernel anew."""
        return self._look(destination, now_ns, {}, fresh=True).answer

    def source_for(self, destination: Address) -> Address:
        """The local address from which the kernel would reach a destination by this interface.

        Raises:
            OSError: ENETUNREACH and the like; also when its route leaves by another interface.
        """
        route = self._route(destination)
        if route is None or route.source is None:
            raise OSError(errno.ENETUNREACH, f"{os.strerror(errno.ENETUNREACH)}: {destination}")
        return route.source

    def changed(self, change: Change) -> None:
        """Takes note of what the watcher's poll() told; update() asks again."""
        if change & (Change.ROUTES | Change.ADDRESSES | Change.GONE):
            self._stale.update(dict.fromkeys(self._known))
        if change & Change.NEIGHBOURS:
            moved, self._watcher.neighbours = self._watcher.neighbours, set()
            self._stale.update({d: None for d, known in self._known.items() if known.gateway in moved})

    def update(self, now_ns: int) -> dict[Address, Answer | None]:
        """Asks again what may have changed, a bounded number at a time: due_ns() tells when to call again.

        Returns:
            The destinations whose answer has changed. None: pushed out, to be asked for when it is used again.
        """
        told: dict[Address, Answer | None] = {}
        self._updated_ns = now_ns
        while len(self._known) > MAX_DESTINATIONS:
            oldest = next(iter(self._known))
            self._drop(oldest)
            told[oldest] = None
        macs: dict[Address, bytes | Unresolved] = {}
        for destination in self._questions(now_ns):
            before = self._known[destination]
            # A neighbour that was there and fails may have a new MAC address: tried once more at once.
            after = self._look(destination, now_ns, macs, fresh=isinstance(before.answer, NextHop))
            if after.answer != before.answer:
                told[destination] = after.answer
        for gateway in [g for g in self._managed if not self._behind[g]]:
            self._unmanage(gateway)
        return told

    def due_ns(self) -> int | None:
        """When update() has something to do if no event arrives; None: never."""
        if not self._known:
            return None
        if self._stale:
            return self._updated_ns + PACE_NS
        oldest = next(iter(self._known.values()))
        return max(oldest.asked_ns + RENEW_NS, self._updated_ns + PACE_NS)

    def _questions(self, now_ns: int) -> list[Address]:
        """What to ask again in one update: what events touched, then what is oldest."""
        chosen = dict.fromkeys(islice(self._stale, QUESTIONS_PER_UPDATE))
        for destination, known in self._known.items():
            if len(chosen) >= QUESTIONS_PER_UPDATE or now_ns - known.asked_ns < RENEW_NS:
                break
            chosen[destination] = None
        return list(chosen)

    def _look(
        self,
        destination: Address,
        now_ns: int,
        macs: dict[Address, bytes | Unresolved],
        *,
        fresh: bool,
    ) -> _Destination:
        """Asks the kernel and remembers. macs: of neighbours that were asked a moment ago; fresh: a neighbour that
        failed before is tried again."""
        new = self._ask(destination, now_ns, macs, fresh=fresh)
        self._drop(destination)
        if new.answer is not UNREACHABLE:
            self._known[destination] = new
            if new.gateway is not None:
                self._behind[new.gateway] += 1
        return new

    def _drop(self, destination: Address) -> None:
        self._stale.pop(destination, None)
        old = self._known.pop(destination, None)
        if old is not None and old.gateway is not None:
            self._behind[old.gateway] -= 1
            if not self._behind[old.gateway]:
                del self._behind[old.gateway]

    def _ask(
        self,
        destination: Address,
        now_ns: int,
        macs: dict[Address, bytes | Unresolved],
        *,
        fresh: bool,
    ) -> _Destination:
        route = self._route(destination)
        if route is None:
            return _Destination(UNREACHABLE, None, now_ns)
        if route.gateway is None:
            return _Destination(NextHop(route.mac, route.mtu, route.source), None, now_ns)
        mac = macs.get(route.gateway)
        if mac is None:
            mac = macs[route.gateway] = self._neighbour(route.gateway, fresh=fresh)
        answer = mac if isinstance(mac, Unresolved) else NextHop(mac, route.mtu, route.source)
        return _Destination(answer, route.gateway, now_ns)

    # ---- Routes
    def _route(self, destination: Address) -> _Route | None:
        """None: unreachable, or not by this interface."""
        interface = self._watcher.interface
        if self._watcher.gone or not interface.up:
            return None
        query: Any = rtmsg()
        query["family"] = socket.AF_INET if destination.version == 4 else socket.AF_INET6
        query["dst_len"] = destination.max_prefixlen
        query["attrs"] = [("RTA_DST", str(destination))]
        try:
            message = self._requests.get(query, RTM_GETROUTE)
        except OSError as error:
            if error.errno not in _UNREACHABLE_ERRNOS:
                raise
            return None
        if message.get_attr("RTA_OIF") != interface.index:
            return None
        metrics = message.get_attr("RTA_METRICS")
        mtu = (metrics.get_attr("RTAX_MTU") if metrics is not None else None) or interface.mtu
        source = message.get_attr("RTA_PREFSRC")
        found = _Route(None, b"", min(mtu, interface.mtu), ipaddress.ip_address(source) if source else None)
        kind = message["type"]
        if kind == RTN_BROADCAST:
            found.mac = b"\xff" * 6
        elif kind == RTN_MULTICAST:
            found.mac = multicast_mac(destination)
        elif kind == RTN_UNICAST:
            found.gateway = _gateway(message) or destination
        else:
            return None  # local, blackhole, unreachable, prohibit
        return found

    # ---- Neighbours
    def _neighbour(self, gateway: Address, *, fresh: bool) -> bytes | Unresolved:
        """The MAC address, or the kernel is made to look for it."""
        state, mac = self._read_neighbour(gateway)
        if state & NUD_FAILED and not fresh:
            return UNREACHABLE
        if not state & (NUD_PERMANENT | NUD_NOARP):
            try:
                self._manage(gateway)
            except OSError as error:
                # The interface went down or away meanwhile; an event tells.
                if error.errno not in (errno.ENODEV, errno.ENETDOWN, errno.EINVAL, errno.ENOBUFS):
                    raise
                return UNREACHABLE
        if state & NUD_VALID and len(mac) == 6:
            return mac
        return PENDING

    def _read_neighbour(self, gateway: Address) -> tuple[int, bytes]:
        """(NUD_* state, MAC address); (0, b"") when the kernel has no entry."""
        try:
            message = self._requests.get(self._about(gateway), RTM_GETNEIGH)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            return 0, b""
        return message["state"], bytes.fromhex((message.get_attr("NDA_LLADDR") or "").replace(":", ""))

    def _about(self, gateway: Address, *attrs: tuple[str, Any]) -> Any:
        message: Any = ndmsg()
        message["family"] = socket.AF_INET if gateway.version == 4 else socket.AF_INET6
        message["ifindex"] = self._watcher.interface.index
        message["attrs"] = [("NDA_DST", str(gateway)), *attrs]
        return message

    def _manage(self, gateway: Address) -> None:
        message = self._about(gateway, ("NDA_FLAGS_EXT", NTF_EXT_MANAGED))
        message["flags"] = NTF_USE
        self._requests.do(message, RTM_NEWNEIGH, NLM_F_CREATE)
        self._managed.add(gateway)

    def _unmanage(self, gateway: Address) -> None:
        """Back to an ordinary entry. Nothing to do where the interface or the entry is gone."""
        self._managed.discard(gateway)
        with suppress(OSError):
            state, mac = self._read_neighbour(gateway)
            if state & (NUD_PERMANENT | NUD_NOARP):
                return  # somebody has set it since: not ours any more
            if mac:
                lladdr = ":".join(f"{b:02x}" for b in mac)
                message = self._about(gateway, ("NDA_LLADDR", lladdr))
                message["state"] = NUD_STALE
                self._requests.do(message, RTM_NEWNEIGH, NLM_F_REPLACE)
            else:
                self._requests.do(self._about(gateway), RTM_DELNEIGH)


def _gateway(message: Any) -> Address | None:
    gateway = message.get_attr("RTA_GATEWAY")
    if gateway is None:
        via = message.get_attr("RTA_VIA")  # IPv4 by an IPv6 gateway, RFC 8950
        gateway = via["addr"] if via is not None else None
    return ipaddress.ip_address(gateway) if gateway is not None else None


def multicast_mac(group: Address) -> bytes:
    """RFC 1112 6.4 and RFC 2464 7."""
    if group.version == 4:
        return b"\x01\x00\x5e" + (int(group) & 0x7FFFFF).to_bytes(3, "big")
    return b"\x33\x33" + group.packed[-4:]
