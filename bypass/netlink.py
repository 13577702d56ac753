# SPDX-License-Identifier: Apache-2.0
"""The kernel's view of the network, asked and watched by netlink: an interface's state, the host's addresses, TCP
connections on a port.

What lives here: netlink sockets, `Watcher` (a descriptor for a selector, and the state it keeps current) and the
inet_diag query. What does not: routes and neighbours (`nexthop.py`), static facts of a NIC (`nic.py`).

Messages are pyroute2's; the sockets are plain ones, because they live in the program's own event loop: rtnetlink
answers a request before send() returns, so a request never waits, and events are read without blocking. A socket
belongs to the network namespace that its thread was in when it was made, for good.

Sources: rtnetlink(7), netlink(7), sock_diag(7).
"""

from __future__ import annotations

import enum
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from pyroute2.netlink import genlmsg
from pyroute2.netlink.diag import MarshalDiag, inet_diag_req
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from bypass.errors import DeviceError
from bypass.rules import Address

# linux/netlink.h, linux/rtnetlink.h, linux/sock_diag.h
NETLINK_ROUTE, NETLINK_SOCK_DIAG, NETLINK_GENERIC = 0, 4, 16
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_CREATE = 0x1, 0x4, 0x300, 0x100, 0x400
NLMSG_ERROR, NLMSG_DONE, NLM_F_DUMP_INTR = 2, 3, 0x10
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_NEWNEXTHOP, RTM_DELNEXTHOP = 32, 33, 104, 105
SOCK_DIAG_BY_FAMILY = 20
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
# RTNLGRP_*: link, neigh, then addresses, routes and rules of each family, nexthop objects
GROUPS = (1, 3, 5, 7, 8, 9, 11, 19, 32)
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
TCP_CLOSE, TCP_LISTEN, TCP_STATES = 7, 10, 13
TIMER_TIME_WAIT = 3  # inet_diag_msg.idiag_timer of what only waits, FIN_WAIT_2 too (net/ipv4/inet_diag.c)

RECV_BYTES = 1 << 18
EVENT_BUFFER_BYTES = 1 << 21
EVENTS_PER_POLL = 250
DUMP_TRIES = 10
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_IFINDEX = struct.Struct("=i")
IFINDEX_OFFSET = _HEADER.size + 4  # in struct ifinfomsg and struct ndmsg alike


@dataclass(frozen=True, slots=True)
class Interface:
    """State of an interface. `mtu` in bytes; `up`: set up by the administrator; `running`: and has a carrier."""

    index: int
    name: str
    mac: bytes
    mtu: int
    up: bool
    running: bool


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """An address of this host, with the length of its subnet's prefix, on the interface of number `index`."""

    address: Address
    prefix_len: int
    index: int


class Change(enum.Flag):
    """What events told since the last poll."""

    NONE = 0
    LINK = enum.auto()  # up, down, carrier
    MTU = enum.auto()
    MAC = enum.auto()
    GONE = enum.auto()  # the interface was deleted, or moved to another namespace; it never comes back
    ADDRESSES = enum.auto()
    ROUTES = enum.auto()
    NEIGHBOURS = enum.auto()


class NetlinkSocket:
    """A socket for requests. Not for two threads at once.

    Args:
        protocol: NETLINK_ROUTE or NETLINK_SOCK_DIAG.
    """

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._marshal: Any = MarshalRtnl() if protocol == NETLINK_ROUTE else MarshalDiag()
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sock.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def get(self, message: Any, kind: int) -> Any:
        """The one message that answers. OSError with the kernel's errno."""
        return next(self._ask(message, kind, 0))

    def do(self, message: Any, kind: int, flags: int = 0) -> None:
        """A change. OSError with the kernel's errno."""
        for _ in self._ask(message, kind, flags | NLM_F_ACK):
            pass

    def dump(self, message: Any, kind: int) -> list[Any]:
        """All messages of a dump, again from the start when it changed under the kernel's hands."""
        for _ in range(DUMP_TRIES):
            found = list(self._ask(message, kind, NLM_F_DUMP))
            if not any(m["header"]["flags"] & NLM_F_DUMP_INTR for m in found):
                break
        return found

    def _ask(self, message: Any, kind: int, flags: int) -> Iterator[Any]:
        self._sequence += 1
        header = message["header"]
        header["type"], header["flags"] = kind, flags | NLM_F_REQUEST
        header["sequence_number"], header["pid"] = self._sequence, 0
        message.reset()
        message.encode()
        self._sock.send(bytes(message.data))
        several = flags & (NLM_F_ACK | NLM_F_DUMP)
        while True:
            for part in self._marshal.parse(self._sock.recv(RECV_BYTES)):
                head = part["header"]
                if head["sequence_number"] != self._sequence:
                    continue  # of a request whose answer nobody waited for
                if head["type"] == NLMSG_ERROR and head["error"] is not None:
                    code = int(head["error"].code)
                    raise OSError(code, os.strerror(code))
                if head["type"] in (NLMSG_DONE, NLMSG_ERROR):
                    return
                yield part
                if not several:
                    return


class Watcher:
    """Keeps the state of one interface, and of all addresses of the host, current.

    Raises:
        DeviceError: there is no such interface.

    Attributes:
        interface: as last seen; its last state when it is gone.
        gone: it was deleted or moved away.
        addresses: of every interface, also those below it in the namespace.
        neighbours: addresses whose neighbour entry on the interface changed since the caller last cleared the set.
    """

    def __init__(self, ifname: str) -> None:
        self._requests = NetlinkSocket()
        self._marshal: Any = MarshalRtnl()
        self._events = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_ROUTE
        )
        self.gone = False
        self.neighbours: set[Address] = set()
        try:
            self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, EVENT_BUFFER_BYTES)
            self._events.bind((0, 0))
            for group in GROUPS:
                self._events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
            # Subscribed first, read second: what changes in between is told again, never missed.
            self.interface = read_interface(self._requests, ifname)
            self.addresses = read_addresses(self._requests)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Readable when poll() has something."""
        return self._events.fileno()

    def close(self) -> None:
        self._events.close()
        self._requests.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def poll(self) -> Change:
        """Reads what has happened, without waiting. NONE: nothing. After EVENTS_PER_POLL there may be more: the
        descriptor is then still readable."""
        change = Change.NONE
        addresses_moved = False
        for _ in range(EVENTS_PER_POLL):
            try:
                data = self._events.recv(RECV_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                change |= self._resync()  # events were lost: look at everything
                addresses_moved = True
                continue
            for kind, message in _split(data):
                if kind in (RTM_NEWADDR, RTM_DELADDR):
                    addresses_moved = True
                elif kind not in (RTM_NEWLINK, RTM_DELLINK, RTM_NEWNEIGH, RTM_DELNEIGH):
                    change |= Change.ROUTES  # not decoded: a router has a great many of these
                elif _IFINDEX.unpack_from(message, IFINDEX_OFFSET)[0] == self.interface.index:
                    change |= self._about_us(kind, next(iter(self._marshal.parse(message))))
        if addresses_moved:
            change |= self._reread_addresses()
        return change

    def _about_us(self, kind: int, message: Any) -> Change:
        if kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
            return self._neighbour(message)
        if self.gone or message["family"] != socket.AF_UNSPEC:  # AF_BRIDGE: a port's other half
            return Change.NONE
        return self._is_gone() if kind == RTM_DELLINK else self._see(_interface(message))

    def _see(self, new: Interface) -> Change:
        old, self.interface = self.interface, new
        change = Change.NONE
        if (old.up, old.running) != (new.up, new.running):
            change |= Change.LINK | Change.ROUTES
        if old.mtu != new.mtu:
            change |= Change.MTU | Change.ROUTES
        if old.mac != new.mac:
            change |= Change.MAC
        return change

    def _is_gone(self) -> Change:
        self.gone = True
        self.interface = replace(self.interface, up=False, running=False)
        return Change.GONE | Change.LINK | Change.ROUTES

    def _neighbour(self, message: Any) -> Change:
        if message["family"] not in (socket.AF_INET, socket.AF_INET6):
            return Change.NONE
        self.neighbours.add(ipaddress.ip_address(message.get_attr("NDA_DST")))
        return Change.NEIGHBOURS

    def _reread_addresses(self) -> Change:
        old, self.addresses = self.addresses, read_addresses(self._requests)
        return Change.ADDRESSES | Change.ROUTES if old != self.addresses else Change.NONE

    def _resync(self) -> Change:
        change = Change.ROUTES
        if not self.gone:
            try:
                change |= self._see(read_interface(self._requests, index=self.interface.index))
            except DeviceError:
                change |= self._is_gone()
        return change


def settings_changed() -> socket.socket | None:
    """A socket that becomes readable when somebody changes settings of an interface of this network namespace by
    ethtool(8): queues, which rtnetlink tells late or not at all, among others. None: the kernel has no such family
    (before 5.6), or does not let us hear it."""
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic import GenericNetlinkSocket

    try:
        with GenericNetlinkSocket() as family:
            family.bind("ethtool", genlmsg)
            group = int(family.mcast_groups["monitor"])
    except (NetlinkError, KeyError):
        return None
    events = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_GENERIC
    )
    try:
        events.bind((0, 0))  # one without a number of its own hears nothing
        events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    except OSError:
        events.close()
        return None
    return events


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The messages of one datagram, with their types."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind = _HEADER.unpack_from(data, at)[:2]
        yield kind, data[at : at + length]
        at += (max(length, _HEADER.size) + 3) & ~3


def read_interface(requests: NetlinkSocket, ifname: str = "", index: int = 0) -> Interface:
    """State of an interface, by name or number.

    Raises:
        DeviceError: there is no such interface; the message lists those that there are.
    """
    query: Any = ifinfmsg()
    if ifname:
        query["attrs"] = [("IFLA_IFNAME", ifname)]
    else:
        query["index"] = index
    try:
        return _interface(requests.get(query, RTM_GETLINK))
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL, errno.ERANGE):
            raise
    there = sorted(m.get_attr("IFLA_IFNAME") for m in requests.dump(ifinfmsg(), RTM_GETLINK))
    raise DeviceError(f"no interface {ifname or index!r} here; there are: {', '.join(there)}")


def _interface(message: Any) -> Interface:
    up = bool(message["flags"] & IFF_UP)
    return Interface(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        mac=bytes.fromhex((message.get_attr("IFLA_ADDRESS") or "").replace(":", "")),
        mtu=message.get_attr("IFLA_MTU"),
        up=up,
        running=up and bool(message["flags"] & IFF_LOWER_UP),
    )


def read_addresses(requests: NetlinkSocket) -> frozenset[LocalAddress]:
    """Every address of this host, of both families, loopback's too."""
    return frozenset(
        LocalAddress(
            # IFA_ADDRESS is the peer's on point-to-point links; IPv6 has IFA_LOCAL only there
            ipaddress.ip_address(m.get_attr("IFA_LOCAL") or m.get_attr("IFA_ADDRESS")),
            m["prefixlen"],
            m["index"],
        )
        for m in requests.dump(ifaddrmsg(), RTM_GETADDR)
    )


class TcpFlow(NamedTuple):
    """A TCP connection of the kernel. `waits`: it is in TIME_WAIT, or in FIN_WAIT_2 without a socket."""

    local: Address
    local_port: int
    remote: Address
    remote_port: int
    waits: bool


def tcp_flows(diag: NetlinkSocket, port: int = 0) -> Iterator[TcpFlow]:
    """TCP connections that the kernel holds on a local port, in every state from SYN_SENT to TIME_WAIT; listeners
    and sockets that are only bound are none. IPv4 over IPv6 sockets is IPv4.

    Args:
        diag: NetlinkSocket(NETLINK_SOCK_DIAG).
        port: local port; 0: all.
    """
    states = (1 << TCP_STATES) - 1 & ~(1 << TCP_LISTEN | 1 << TCP_CLOSE)
    for family in (socket.AF_INET, socket.AF_INET6):
        query: Any = inet_diag_req()
        query["sdiag_family"], query["sdiag_protocol"] = family, socket.IPPROTO_TCP
        query["idiag_states"], query["idiag_sport"] = states, port
        for m in diag.dump(query, SOCK_DIAG_BY_FAMILY):
            if port in (0, m["idiag_sport"]):
                local, remote = _plain(m["idiag_src"]), _plain(m["idiag_dst"])
                waits = m["idiag_timer"] == TIMER_TIME_WAIT
                yield TcpFlow(local, m["idiag_sport"], remote, m["idiag_dport"], waits)


def tcp_connections(diag: NetlinkSocket, port: int, address: Address | None = None) -> int:
    """How many tcp_flows() there are on a local port, of one local address or (None) of all."""
    return sum(address in (None, flow.local) for flow in tcp_flows(diag, port))


def _plain(text: str) -> Address:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped if mapped is not None else address


def steerable(addresses: Iterable[LocalAddress]) -> set[Address]:
    """The addresses at which packets from outside arrive: all but loopback's."""
    return {a.address for a in addresses if not a.address.is_loopback}
