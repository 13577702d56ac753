# SPDX-License-Identifier: Apache-2.0
"""The kernel socket that holds the port of a lease: an application's own, of which the broker keeps a duplicate.

What an application passes may be anything. It is asked only for what a socket can answer without its file system (a
file of somebody's own file system could keep us waiting), and closed so that closing never waits.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from contextlib import suppress

from bypass.core import Address
from bypass.grants import ANY
from bypass.netns import SO_NETNS_COOKIE
from bypass.stack_api import STREAM

IP_FREEBIND = 15  # linux/in.h
TCP_CLOSE, TCP_LISTEN = 7, 10  # net/tcp_states.h


class BadShadow(OSError):
    """The descriptor is not the socket that the request is about (EINVAL, EBADF, ENOTSOCK)."""


class Shadow:
    """A passed socket, after it was looked at. Owns the descriptor, unless making it fails.

    Args:
        fd: the descriptor.
        kind: BYPASS_STREAM or BYPASS_DGRAM: what it has to be.

    Raises:
        BadShadow: it is something else.
    """

    def __init__(self, fd: int, kind: int) -> None:
        try:
            self.sock = socket.socket(fileno=fd)  # asks for SO_DOMAIN, SO_TYPE, SO_PROTOCOL
        except OSError as e:
            raise BadShadow(errno.ENOTSOCK, "the descriptor is no socket") from e
        try:
            self._check(kind)
        except BaseException:
            self.sock.detach()
            raise

    def _check(self, kind: int) -> None:
        s = self.sock
        wanted = (
            (socket.SOCK_STREAM, socket.IPPROTO_TCP)
            if kind == STREAM
            else (socket.SOCK_DGRAM, socket.IPPROTO_UDP)
        )
        if s.family not in (socket.AF_INET, socket.AF_INET6) or (s.type, s.proto) != wanted:
            raise BadShadow(errno.EINVAL, "the socket is of another kind than the lease")
        if s.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8) != _our_netns():
            raise BadShadow(errno.EINVAL, "the socket is of another network namespace")

    def bound(self) -> Address | None:
        """IPv4 address and port that it is bound to, "::" counting as any; None: it is bound to none.

        Raises:
            BadShadow: it is bound to IPv6 alone.
        """
        host, port = self.sock.getsockname()[:2]
        if not port:
            return None
        address = ipaddress.ip_address(host)
        if isinstance(address, ipaddress.IPv6Address):
            if address.is_unspecified:
                if self.sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                    raise BadShadow(errno.EINVAL, "the socket is bound to IPv6 only")
                return ANY, port
            if address.ipv4_mapped is None:
                raise BadShadow(errno.EINVAL, "the socket is bound to an IPv6 address")
            address = address.ipv4_mapped
        return str(address), port

    def require(self, local: Address) -> None:
        """BadShadow: it does not hold this address."""
        bound = self.bound()
        if bound is None or bound[1] != local[1] or bound[0] not in (local[0], ANY):
            raise BadShadow(errno.EINVAL, f"the socket does not hold {local[0]}:{local[1]}")

    def bind(self, local: Address, *, free: bool = False) -> None:
        """free: also to an address that is none of this network namespace's. OSError: EADDRINUSE and the like."""
        if free:
            self.sock.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
        host = f"::ffff:{local[0]}" if self.sock.family == socket.AF_INET6 else local[0]
        self.sock.bind((host, local[1]))

    def stop(self) -> None:
        """Nobody may hold it any more: a listener stops to listen, whatever duplicates there are."""
        if self._tcp_state() == TCP_LISTEN:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the duplicate up."""
        if self._tcp_state() not in (None, TCP_CLOSE, TCP_LISTEN):
            # The last close of a connection with SO_LINGER waits.
            with suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        self.sock.close()

    def _tcp_state(self) -> int | None:
        if self.sock.proto != socket.IPPROTO_TCP:
            return None
        try:
            return self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except OSError:
            return None


def _our_netns() -> bytes:
    """SO_NETNS_COOKIE of the calling thread's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        return s.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
