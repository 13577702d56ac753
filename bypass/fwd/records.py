# SPDX-License-Identifier: Apache-2.0
"""What bypass-fwd is told and what it answers, between Python and the structs of `fwd.h`."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, NamedTuple, Self

from bypass._core import ffi, lib
from bypass.errors import BypassError

REFUSALS: tuple[str, ...] = tuple(
    name.removeprefix("FWD_REFUSED_").lower()
    for number, name in sorted(ffi.typeof("enum fwd_refusal").elements.items())
    if name.startswith("FWD_REFUSED_")
)
"""Why frames of an application are not sent, as in `port_stats()["refused"]`."""
LINK_STATES = ("up", "down", "gone")


class ForwarderError(BypassError):
    """bypass-fwd cannot be started, or has ended."""


class Lease(NamedTuple):
    """Where an application may send from.

    Attributes:
        proto: 6 or 17.
        local: "": any address of the host.
        peer: of a connected one, which comes before those without.
        block: 256 ports from `port` on.
    """

    app: int
    proto: int
    local: str
    port: int
    peer: tuple[str, int] = ("", 0)
    block: bool = False


@dataclass(frozen=True, slots=True)
class Died:
    """All processes of an item are dead: its keys, its ports and the item itself are gone."""

    item: str


@dataclass(frozen=True, slots=True)
class PortCut:
    """An application broke the rules of its port, which is not served any more."""

    app: int


@dataclass(frozen=True, slots=True)
class LinkState:
    """Of the interface, when one of these has changed, and at the beginning of a connection.

    Attributes:
        state: "up", "down" or "gone".
    """

    state: str
    mac: bytes
    mtu: int


@dataclass(frozen=True, slots=True)
class QueuesAdded:
    """The interface has got queues, which have sockets now. A veth runs no XDP program on them until one is attached
    anew (`Steering.attach_anew()`)."""

    queues: int


Event = Died | PortCut | LinkState | QueuesAdded


class Item(NamedTuple):
    """What was put in: some bytes and some descriptors, the caller's to close."""

    blob: bytes
    fds: list[int]


class Listed(NamedTuple):
    """An item from outside: bytes, descriptors, processes that are watched and alive, keys to delete after them."""

    name: str
    size: int
    fds: int
    pids: int
    keys: int


class Doorbells(NamedTuple):
    """How an application and bypass-fwd wake each other (bypass/fwd/port.h).

    Attributes:
        to_fwd: eventfd, for both.
        app: the application's end of the sockets.
        fwd: bypass-fwd's end.
    """

    to_fwd: int
    app: int
    fwd: int

    @classmethod
    def make(cls) -> Self:
        app, fwd = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        return cls(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), app.detach(), fwd.detach())

    def close(self) -> None:
        for fd in self:
            os.close(fd)


def address(text: str) -> bytes:
    """16 bytes; "" is any address."""
    return bytes(10) + b"\xff\xff" + IPv4Address(text).packed if text else bytes(16)


def item_name(name: str) -> bytes:
    raw = name.encode()
    if not 0 < len(raw) < lib.FWD_NAME:
        raise OSError(errno.EINVAL, f"item {name!r}: a name has 1 to {lib.FWD_NAME - 1} bytes")
    return raw


def device_info(a: Any) -> dict[str, Any]:
    """Of `struct fwd_device_info`, what every kind of device has."""
    about = {name: int(getattr(a, name)) for name in ("mtu", "queues", "caps")}
    return about | {"mac": bytes(a.mac), "zerocopy": bool(a.zerocopy)}


def lease_values(lease: Lease) -> dict[str, Any]:
    return {
        "app": lease.app,
        "proto": lease.proto,
        "flags": lib.FWD_LEASE_BLOCK if lease.block else 0,
        "local": {"addr": {"b": address(lease.local)}, "port": lease.port},
        "remote": {"addr": {"b": address(lease.peer[0])}, "port": lease.peer[1]},
    }


def fields(struct: Any) -> dict[str, int]:
    """The numbers of a struct, by name."""
    kind = ffi.typeof(struct)
    kind = kind if kind.kind == "struct" else kind.item
    return {name: int(getattr(struct, name)) for name, field in kind.fields if field.type.kind == "primitive"}


def event_of(message: Any) -> Event | None:
    """What a message tells that answers nothing; None: nothing that is known here."""
    kind = ffi.cast("struct fwd_head *", message).type
    if kind == lib.FWD_DIED:
        return Died(ffi.string(ffi.cast("struct fwd_name *", message).name).decode())
    if kind == lib.FWD_CUT:
        return PortCut(ffi.cast("struct fwd_app *", message).app)
    if kind == lib.FWD_QUEUES:
        return QueuesAdded(ffi.cast("struct fwd_queues *", message).queues)
    if kind == lib.FWD_LINK:
        link = ffi.cast("struct fwd_link *", message)
        return LinkState(LINK_STATES[link.state], bytes(link.mac), link.mtu)
    return None
