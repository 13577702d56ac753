# SPDX-License-Identifier: Apache-2.0
"""Messages between applications and the broker: struct app_msg of bypass/app/app.h, as Python sees it.

What lives here: bytes to objects and back, and sending and receiving with descriptors. What does not: what a message
means (broker.py). Of a received message nothing is believed but its size; text ends at its first 0, whatever follows.

Source: unix(7), SCM_RIGHTS.
"""

from __future__ import annotations

import array
import enum
import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from bypass._core import ffi, lib
from bypass.core import Address, address_bytes, address_text

__all__ = ["ABI", "SIZE", "Kind", "Message", "receive", "send"]

ABI: int = lib.APP_ABI
SIZE: int = ffi.sizeof("struct app_msg")
MAX_FDS = 4
"""Descriptors that are taken with one message; one is what any message has."""
MAX_BYTES = 1 << 16
"""Of one packet: what is longer is cut, and then of no known size."""
DEFAULT_SOCKET = "/run/bypass/broker.sock"

NOWHERE: Address = ("::", 0)
"""An endpoint of zeroes: a field that the message does not use."""


class Kind(enum.IntEnum):
    """enum app_msg_type."""

    HELLO = lib.APP_HELLO
    READY = lib.APP_READY
    LEASE = lib.APP_LEASE
    RELEASE = lib.APP_RELEASE
    RESOLVE = lib.APP_RESOLVE
    NEXTHOP = lib.APP_NEXTHOP
    ADDR_ADD = lib.APP_ADDR_ADD
    ADDR_DEL = lib.APP_ADDR_DEL
    GRANT = lib.APP_GRANT
    REVOKED = lib.APP_REVOKED
    LINK = lib.APP_LINK
    EXEC = lib.APP_EXEC
    LINGER = lib.APP_LINGER
    FORK = lib.APP_FORK
    DRAIN = lib.APP_DRAIN
    QUEUE = lib.APP_QUEUE
    LEASED = lib.APP_LEASED


@dataclass(slots=True)
class Message:
    """One message. Addresses are text, IPv4 as IPv4; the field that a type does not use stays as it is here."""

    type: int
    error: int = 0
    seq: int = 0
    app: int = 0
    lease: int = 0
    local: Address = NOWHERE
    remote: Address = NOWHERE
    kind: int = 0
    flags: int = 0
    mtu: int = 0
    last_port: int = 0
    last_remote_port: int = 0
    prefix_len: int = 0
    remote_prefix_len: int = 0
    index: int = 0
    mac: bytes = bytes(6)
    abi: int = 0
    token: bytes = bytes(lib.APP_TOKEN)
    name: str = ""
    text: str = ""

    def pack(self) -> bytes:
        """The bytes on the wire. Texts that are too long are cut."""
        m = ffi.new("struct app_msg *")
        for name in NUMBERS:
            setattr(m, name, getattr(self, name))
        for name in ("local", "remote"):
            host, port = getattr(self, name)
            end = getattr(m, name)
            end.addr.b = address_bytes(host)
            end.port = port
        m.mac, m.token = self.mac, self.token
        m.name, m.text = _fit(self.name, lib.APP_NAME), _fit(self.text, TEXT_BYTES)
        return bytes(ffi.buffer(m))

    @classmethod
    def unpack(cls, data: bytes) -> Message:
        """ValueError: these bytes are no message."""
        if len(data) != SIZE:
            raise ValueError(f"a message has {SIZE} bytes, not {len(data)}")
        m = ffi.from_buffer("struct app_msg *", data)
        said = {name: int(getattr(m, name)) for name in NUMBERS}
        return cls(
            **said,
            local=(address_text(bytes(m.local.addr.b)), int(m.local.port)),
            remote=(address_text(bytes(m.remote.addr.b)), int(m.remote.port)),
            mac=bytes(m.mac),
            token=bytes(m.token),
            name=_text(m.name),
            text=_text(m.text),
        )

    def answer(self, code: int = 0, text: str = "", **fields: object) -> Message:
        """The answer to this request; code: 0 or an errno."""
        message = Message(self.type, error=code, seq=self.seq, text=text)
        for name, value in fields.items():
            setattr(message, name, value)
        return message


NUMBERS = (
    "type",
    "error",
    "seq",
    "app",
    "lease",
    "kind",
    "flags",
    "mtu",
    "last_port",
    "last_remote_port",
    "prefix_len",
    "remote_prefix_len",
    "index",
    "abi",
)
TEXT_BYTES: int = ffi.sizeof(ffi.typeof("struct app_msg").fields[-1][1].type)


def _fit(text: str, size: int) -> bytes:
    """UTF-8 of at most size - 1 bytes, not cut within a character."""
    return text.encode(errors="replace")[: size - 1].decode(errors="ignore").encode()


def _text(field: object) -> str:
    return bytes(ffi.buffer(field)).partition(b"\0")[0].decode(errors="replace")


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> bool:
    """Sends without waiting. False: there is no room; try when the socket is writable.

    Raises:
        OSError: the peer is gone.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sock.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError as error:
        # ETOOMANYREFS: descriptors of this user that are under way in sockets; they are read sooner or later.
        if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS):
            return False
        raise
    return True


def receive(sock: socket.socket, *, max_fds: int = MAX_FDS) -> tuple[bytes, list[int], bool] | None:
    """One packet, its descriptors, which are the caller's, and whether all are there; b"": end. None: nothing yet.

    Raises:
        OSError: the peer is gone.
    """
    room = socket.CMSG_SPACE(max_fds * array.array("i").itemsize)
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    try:
        data, rights, got, _ = sock.recvmsg(MAX_BYTES, room, flags)
    except BlockingIOError:
        return None
    fds = array.array("i")
    for level, kind, raw in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    return data, list(fds), not got & socket.MSG_CTRUNC


def socket_address(name: str) -> str:
    """What AF_UNIX takes for a name of BYPASS_SOCKET: a path, or an abstract name with a leading @."""
    return "\0" + name[1:] if name.startswith("@") else name


def name_of(sock: socket.socket) -> str:
    """The name that others reach a listening socket by."""
    address = sock.getsockname()
    return "@" + os.fsdecode(address[1:]) if isinstance(address, bytes) else str(address)


def socket_name(environ: dict[str, str] | None = None) -> str:
    """Where the broker is: BYPASS_SOCKET, or the usual place."""
    return (os.environ if environ is None else environ).get("BYPASS_SOCKET") or DEFAULT_SOCKET
