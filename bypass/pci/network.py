# SPDX-License-Identifier: Apache-2.0
"""What the network knows of an interface, saved before its driver leaves it and put back when the driver has returned:
name, state, MTU, MAC, master, settings, addresses, permanent neighbours, routes.

What lives here: netlink messages kept as the kernel gave them, as `ip address save` and `ip route save` do, since the
kernel takes what it has told; only the interface's number is written anew. What does not come back: what others made
on top of the interface (VLANs, macvlans), queueing disciplines, what ethtool(8) set, routes that name a nexthop object.

Sources: rtnetlink(7), linux/if_addr.h, linux/rtnetlink.h, linux/neighbour.h; iproute2's ip-address(8), ip-route(8).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bypass.netlink import (
    NETLINK_ROUTE,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    RTM_GETADDR,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_NEWADDR,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
)
from bypass.offloop import off_loop

__all__ = ["Item", "Saved", "restore", "snapshot"]

NLM_F_EXCL = 0x200
IFF_UP = 1
# Attributes: addresses, routes, neighbours.
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS, IFA_PROTO = 1, 2, 8, 11
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_MULTIPATH, RTA_TABLE, RTA_VIA, RTA_NH_ID = (
    1,
    4,
    5,
    6,
    9,
    15,
    18,
    30,
)
NDA_DST = 1
IFA_F_TEMPORARY, IFA_F_KEPT = (
    0x01,
    0x02 | 0x80 | 0x100 | 0x200 | 0x400,
)  # no DAD, permanent, ... no prefix route, ...
IFAPROT_KERNEL_RA, IFAPROT_KERNEL_LL = 2, 3
RTPROT_KERNEL, RTPROT_RA, RT_TABLE_LOCAL, RTN_UNICAST, RTM_F_CLONED = 2, 9, 255, 1, 0x200
RTNH_F_ONLINK = 4
NUD_PERMANENT = 0x80

_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_ADDR, _ROUTE, _NEIGH = struct.Struct("=4BI"), struct.Struct("=8BI"), struct.Struct("=BxHiHBB")
_HOP = struct.Struct("=HBBi")
RECV_BYTES = 1 << 18
CONF = Path("/proc/sys/net")
UNSET = {"mtu", "stable_secret"}  # settings that are not copied


@dataclass(frozen=True)
class Item:
    """An address, neighbour or route. `text`: for people; `raw`: the message's body, hexadecimal."""

    text: str
    raw: str


@dataclass(frozen=True)
class Saved:
    """An interface as it was. `settings`: of sysctl where they differ from the default, by `ipv4/rp_filter`. `lost`:
    what will not come back, in words. `index` is the number that the messages name."""

    name: str
    index: int
    mac: str
    mtu: int
    up: bool
    port: int = 0
    master: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    addresses: list[Item] = field(default_factory=list)
    neighbours: list[Item] = field(default_factory=list)
    routes: list[Item] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Saved:
        """TypeError, KeyError: it is not what `dataclasses.asdict` made."""
        kinds = ("addresses", "neighbours", "routes")
        said: dict[str, Any] = {k: [Item(**i) for i in v] if k in kinds else v for k, v in data.items()}
        return cls(**said)


# ---- Saving --------------------------------------------------------------------------------------------------------
@off_loop
def snapshot(ifname: str) -> Saved:
    """What is to be put back. OSError: there is no such interface, or it cannot be asked."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        link = ip.link("get", index=socket.if_nametoindex(ifname))[0]
        links = {each["index"]: each for each in ip.get_links()}
    index = link["index"]
    master = links.get(link.get("master"))
    uppers = [each.get("ifname") for each in links.values() if _is_upper(each, index)]
    saved = Saved(
        name=ifname,
        index=index,
        mac=link.get("address") or "",
        mtu=link.get("mtu"),
        up=bool(link["flags"] & IFF_UP),
        port=_dev_port(ifname),
        master=master.get("ifname") if master else "",
        settings=_settings(ifname),
        lost=[f"the interface {upper} on top of it" for upper in sorted(uppers)],
    )
    with _Socket() as rt:
        for family in (socket.AF_INET, socket.AF_INET6):
            _save(saved, rt, family)
    return saved


def _is_upper(other: Any, index: int) -> bool:
    """A VLAN, macvlan or the like that would go with the interface; not the other end of a veth."""
    kind = other.get(("linkinfo", "kind"))
    return other.get("link") == index and kind != "veth" and other.get("link_netnsid") is None


def _dev_port(ifname: str) -> int:
    try:
        return int((Path("/sys/class/net") / ifname / "dev_port").read_text())
    except (OSError, ValueError):
        return 0  # /sys of another network namespace: such an interface has no ports to tell apart


def _settings(ifname: str) -> dict[str, str]:
    """Settings of sysctl that differ from what a new interface begins with."""
    found = {}
    for family in ("ipv4", "ipv6"):
        for file in sorted((CONF / family / "conf" / ifname).glob("*")):
            try:
                value = file.read_text().strip()
                default = (CONF / family / "conf/default" / file.name).read_text().strip()
            except OSError:
                continue  # not readable: one that was never set
            if value != default and file.name not in UNSET:
                found[f"{family}/{file.name}"] = value
    return found


def _save(saved: Saved, rt: _Socket, family: int) -> None:
    for body in rt.dump(RTM_GETADDR, _ADDR.pack(family, 0, 0, 0, 0)):
        if _ADDR.unpack_from(body)[4] == saved.index and (item := _address(body)) is not None:
            saved.addresses.append(item)
    for body in rt.dump(RTM_GETNEIGH, _NEIGH.pack(family, 0, 0, 0, 0, 0)):
        _, _, index, state, _, _ = _NEIGH.unpack_from(body)
        if index == saved.index and state & NUD_PERMANENT:
            saved.neighbours.append(Item(_dotted(_attrs(body, _NEIGH.size)[NDA_DST]), body.hex()))
    for body in rt.dump(RTM_GETROUTE, _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
        _save_route(saved, body)


def _address(body: bytes) -> Item | None:
    """None: the kernel makes it by itself (link-local, or by router advertisement)."""
    _, plen, flags, _, _ = _ADDR.unpack_from(body)
    attrs = _attrs(body, _ADDR.size)
    proto = attrs[IFA_PROTO][0] if IFA_PROTO in attrs else 0
    if IFA_FLAGS in attrs:
        flags = int.from_bytes(attrs[IFA_FLAGS], "little" if _LITTLE else "big")
    temporary = body[0] == socket.AF_INET6 and flags & IFA_F_TEMPORARY
    if temporary or proto in (IFAPROT_KERNEL_RA, IFAPROT_KERNEL_LL):
        return None
    kept = _edited(body, _ADDR.size, {IFA_FLAGS: struct.pack("=I", flags & IFA_F_KEPT)})
    fixed = bytearray(kept)
    fixed[2] = flags & IFA_F_KEPT & 0xFF
    return Item(f"{_dotted(attrs.get(IFA_LOCAL) or attrs[IFA_ADDRESS])}/{plen}", bytes(fixed).hex())


def _save_route(saved: Saved, body: bytes) -> None:
    """Those that somebody set; the kernel's own come with the addresses."""
    _, plen, _, _, table, proto, _, kind, flags = _ROUTE.unpack_from(body)
    attrs = _attrs(body, _ROUTE.size)
    if (
        table == RT_TABLE_LOCAL
        or kind != RTN_UNICAST
        or flags & RTM_F_CLONED
        or proto in (RTPROT_KERNEL, RTPROT_RA)
    ):
        return
    hops = _hops(attrs[RTA_MULTIPATH]) if RTA_MULTIPATH in attrs else []
    devices = {struct.unpack("=i", attrs[RTA_OIF])[0]} if RTA_OIF in attrs else {index for index, *_ in hops}
    if saved.index not in devices:
        return
    text = f"{_dotted(attrs[RTA_DST])}/{plen}" if RTA_DST in attrs else "default"
    if RTA_GATEWAY in attrs:
        text += f" via {_dotted(attrs[RTA_GATEWAY])}"
    if RTA_PRIORITY in attrs:
        text += f" metric {struct.unpack('=I', attrs[RTA_PRIORITY])[0]}"
    if RTA_TABLE in attrs and (number := struct.unpack("=I", attrs[RTA_TABLE])[0]) != 254:
        text += f" table {number}"
    if RTA_NH_ID in attrs:
        saved.lost.append(f"the route {text}, which names a nexthop object")
        return
    saved.routes.append(Item(text, body.hex()))


# ---- Putting back --------------------------------------------------------------------------------------------------
@off_loop
def restore(saved: Saved, ifname: str) -> list[str]:
    """Makes the interface that is called `ifname` now what was saved. What is there already stays.

    Returns:
        What could not be put back, in words; everything else was.
    """
    from pyroute2 import IPRoute

    problems: list[str] = []
    with IPRoute() as ip:
        index = socket.if_nametoindex(ifname)
        _restore_link(ip, saved, index, problems)
    with _Socket() as rt:
        for what, kind, items, at in (
            ("address", RTM_NEWADDR, saved.addresses, 4),
            ("neighbour", RTM_NEWNEIGH, saved.neighbours, 4),
        ):
            for item in items:
                body = bytearray.fromhex(item.raw)
                struct.pack_into("=I", body, at, index)
                _put(rt, kind, bytes(body), f"{what} {item.text}", problems)
        # Those without a gateway first: a gateway has to be reachable when its route is set.
        for item in sorted(saved.routes, key=lambda i: " via " in i.text):
            route = _with_index(bytes.fromhex(item.raw), saved.index, index)
            _put(rt, RTM_NEWROUTE, route, f"route {item.text}", problems)
    return problems


def _restore_link(ip: Any, saved: Saved, index: int, problems: list[str]) -> None:
    def attempt(what: str, **change: Any) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            ip.link("set", index=index, **change)
        except NetlinkError as error:
            problems.append(f"{what}: {os.strerror(abs(error.code))}")

    link = ip.link("get", index=index)[0]
    renamed = link.get("ifname") != saved.name
    if renamed or link.get("address") != saved.mac:
        attempt("down", state="down")
    if renamed:
        attempt(f"name {saved.name}", ifname=saved.name)
    if saved.mac and link.get("address") != saved.mac:
        attempt(f"MAC {saved.mac}", address=saved.mac)
    if link.get("mtu") != saved.mtu:
        attempt(f"MTU {saved.mtu}", mtu=saved.mtu)
    if saved.master:
        masters = ip.link_lookup(ifname=saved.master)
        if masters:
            attempt(f"master {saved.master}", master=int(masters[0]))
        else:
            problems.append(f"master {saved.master}: there is no such interface any more")
    name = ip.link("get", index=index)[0].get("ifname")
    for setting, value in saved.settings.items():
        family, key = setting.split("/")
        try:
            (CONF / family / "conf" / name / key).write_text(value)
        except OSError as error:
            problems.append(f"setting {setting} = {value}: {error.strerror}")
    attempt("up" if saved.up else "down", state="up" if saved.up else "down")


def _put(rt: _Socket, kind: int, body: bytes, what: str, problems: list[str]) -> None:
    try:
        rt.do(kind, NLM_F_CREATE | NLM_F_EXCL, body)
    except OSError as error:
        if error.errno != errno.EEXIST:
            problems.append(f"{what}: {error.strerror}")


# ---- Messages ------------------------------------------------------------------------------------------------------
_LITTLE = struct.pack("=H", 1) == b"\1\0"


def _walk(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """(kind, begin, end) of each attribute's payload."""
    while at + _ATTR.size <= len(data):
        length, kind = _ATTR.unpack_from(data, at)
        if length < _ATTR.size:
            return
        yield kind & 0x3FFF, at + _ATTR.size, at + length
        at += (length + 3) & ~3


def _attrs(body: bytes, head: int) -> dict[int, bytes]:
    return {kind: body[a:b] for kind, a, b in _walk(body, head)}


def _edited(body: bytes, head: int, change: dict[int, bytes]) -> bytes:
    """With attributes of the same length replaced."""
    data = bytearray(body)
    for kind, a, b in _walk(body, head):
        if kind in change:
            data[a:b] = change[kind]
    return bytes(data)


def _hops(data: bytes) -> list[tuple[int, int]]:
    """(interface, place) of each hop of RTA_MULTIPATH."""
    found, at = [], 0
    while at + _HOP.size <= len(data):
        length, _, _, index = _HOP.unpack_from(data, at)
        if length < _HOP.size:
            break
        found.append((index, at))
        at += (length + 3) & ~3
    return found


def _with_index(body: bytes, old: int, new: int) -> bytes:
    """A route's message for the interface's new number. Flags that tell of a state (dead, offloaded) are taken off:
    the kernel refuses them."""
    data = bytearray(body)
    flags = struct.unpack_from("=I", body, 8)[0]
    struct.pack_into("=I", data, 8, flags & RTNH_F_ONLINK)
    for kind, a, b in _walk(body, _ROUTE.size):
        if kind == RTA_OIF and struct.unpack_from("=i", body, a)[0] == old:
            struct.pack_into("=i", data, a, new)
        if kind == RTA_MULTIPATH:
            for index, place in _hops(body[a:b]):
                data[a + place + 2] &= RTNH_F_ONLINK
                if index == old:
                    struct.pack_into("=i", data, a + place + 4, new)
    return bytes(data)


def _dotted(raw: bytes) -> str:
    return str(ipaddress.ip_address(raw))


class _Socket:
    """Netlink with the bodies of messages as bytes. OSError with the kernel's errno."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE)
        self._sequence = 0

    def __enter__(self) -> _Socket:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        return list(self._ask(kind, NLM_F_DUMP, body))

    def do(self, kind: int, flags: int, body: bytes) -> None:
        list(self._ask(kind, flags | NLM_F_ACK, body))

    def _ask(self, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
        self._sequence += 1
        length = _HEADER.size + len(body)
        self._sock.send(_HEADER.pack(length, kind, flags | NLM_F_REQUEST, self._sequence, 0) + body)
        while True:
            data, at = self._sock.recv(RECV_BYTES), 0
            while at + _HEADER.size <= len(data):
                length, what, _, sequence, _ = _HEADER.unpack_from(data, at)
                part = data[at + _HEADER.size : at + length]
                at += (length + 3) & ~3
                if sequence != self._sequence:
                    continue
                if what == NLMSG_DONE:
                    return
                if what == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", part)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield part
