# SPDX-License-Identifier: Apache-2.0
"""Socket options as socket.socket has them: names, struct values, and Linux' way of reporting.

What lives here: (level, option) of Linux to the core's numbers and back, and the options that only this layer knows.
What does not: which values are good and what they do (bypass/stack/sock_opt.c, udp.c). See socket(7), tcp(7).
"""

from __future__ import annotations

import errno
import os
import socket as _socket
import struct
from typing import TYPE_CHECKING

from bypass._core import lib
from bypass.zerocopy import TCP_KEEP_FRAMES

if TYPE_CHECKING:
    from bypass.sockets import Socket

__all__ = ["TCP_ECN", "getsockopt", "setsockopt"]

SOL, TCP, IP = _socket.SOL_SOCKET, _socket.IPPROTO_TCP, _socket.IPPROTO_IP
# Linux' numbers; the socket module does not name them.
IP_MTU_DISCOVER, IP_MTU, SO_MAX_PACING_RATE, TCP_FASTOPEN_CONNECT = 10, 14, 47, 30
TCP_ECN = 1 << 16  # of IPPROTO_TCP; on Linux only a route or a sysctl decides about it
Key = tuple[int, int]

OPTIONS: dict[Key, int] = {
    (SOL, _socket.SO_SNDBUF): lib.BYPASS_SO_SNDBUF,
    (SOL, _socket.SO_RCVBUF): lib.BYPASS_SO_RCVBUF,
    (SOL, _socket.SO_KEEPALIVE): lib.BYPASS_SO_KEEPALIVE,
    (SOL, _socket.SO_REUSEADDR): lib.BYPASS_SO_REUSEADDR,
    (SOL, _socket.SO_REUSEPORT): lib.BYPASS_SO_REUSEPORT,
    (SOL, _socket.SO_BROADCAST): lib.BYPASS_SO_BROADCAST,
    (SOL, _socket.SO_OOBINLINE): lib.BYPASS_SO_OOBINLINE,
    (SOL, SO_MAX_PACING_RATE): lib.BYPASS_SO_MAX_PACING_RATE,
    (SOL, _socket.SO_RCVLOWAT): lib.BYPASS_SO_RCVLOWAT,
    (SOL, _socket.SO_ACCEPTCONN): lib.BYPASS_SO_ACCEPTCONN,
    (IP, _socket.IP_TTL): lib.BYPASS_IP_TTL,
    (IP, _socket.IP_TOS): lib.BYPASS_IP_TOS,
    (IP, IP_MTU): lib.BYPASS_IP_MTU,
    (IP, IP_MTU_DISCOVER): lib.BYPASS_IP_MTU_DISCOVER,
    (TCP, _socket.TCP_NODELAY): lib.BYPASS_TCP_NODELAY,
    (TCP, _socket.TCP_MAXSEG): lib.BYPASS_TCP_MAXSEG,
    (TCP, _socket.TCP_QUICKACK): lib.BYPASS_TCP_QUICKACK,
    (TCP, _socket.TCP_CORK): lib.BYPASS_TCP_CORK,
    (TCP, _socket.TCP_KEEPIDLE): lib.BYPASS_TCP_KEEPIDLE,
    (TCP, _socket.TCP_KEEPINTVL): lib.BYPASS_TCP_KEEPINTVL,
    (TCP, _socket.TCP_KEEPCNT): lib.BYPASS_TCP_KEEPCNT,
    (TCP, _socket.TCP_USER_TIMEOUT): lib.BYPASS_TCP_USER_TIMEOUT,
    (TCP, _socket.TCP_SYNCNT): lib.BYPASS_TCP_SYNCNT,
    (TCP, _socket.TCP_LINGER2): lib.BYPASS_TCP_LINGER2,
    (TCP, _socket.TCP_FASTOPEN): lib.BYPASS_TCP_FASTOPEN,
    (TCP, TCP_FASTOPEN_CONNECT): lib.BYPASS_TCP_FASTOPEN_CONNECT,
    (TCP, _socket.TCP_NOTSENT_LOWAT): lib.BYPASS_TCP_NOTSENT_LOWAT,
    (TCP, TCP_KEEP_FRAMES): lib.BYPASS_TCP_KEEP_FRAMES,
    (TCP, TCP_ECN): lib.BYPASS_TCP_ECN,
}
# Linux counts its own overhead too: it doubles what is set, and reports that (socket(7)).
DOUBLED: frozenset[Key] = frozenset({(SOL, _socket.SO_SNDBUF), (SOL, _socket.SO_RCVBUF)})
LINGER = struct.Struct("ii")  # struct linger: on, seconds
TIMEVAL = struct.Struct("ll")  # struct timeval: seconds, microseconds
INFO_BYTES = 248  # struct tcp_info as of Linux 6.7
TIMEOUTS = frozenset({(SOL, _socket.SO_RCVTIMEO), (SOL, _socket.SO_SNDTIMEO)})
INT_MAX, UINT_MAX = 2**31 - 1, 2**32 - 1


def _raised(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _signed(value: int) -> int:
    return value - 2**32 if value > INT_MAX else value


def _number(level: int, value: int | bytes) -> int:
    """An int argument as Linux reads it: four bytes, or one for options of IP."""
    if isinstance(value, int):
        return value
    if len(value) >= 4:
        return int.from_bytes(value[:4], "little", signed=True)
    if level == IP:
        return value[0] if value else 0
    raise _raised(errno.EINVAL)


def _struct(layout: struct.Struct, value: int | bytes) -> tuple[int, int]:
    if isinstance(value, int) or len(value) < layout.size:
        raise _raised(errno.EINVAL)
    first, second = layout.unpack(value[: layout.size])
    return first, second


def _known_level(sock: Socket, level: int) -> bool:
    return level in (SOL, IP) or (level == TCP and sock.type == _socket.SOCK_STREAM)


def _pacing_rate(value: int | bytes) -> int:
    """An unsigned long, or an unsigned int; all ones: no limit, which is the core's 0."""
    if isinstance(value, bytes) and len(value) >= 8:
        rate, most = int.from_bytes(value[:8], "little"), 2**64 - 1
    else:
        rate, most = _number(SOL, value) & UINT_MAX, UINT_MAX
    return 0 if rate == most else min(rate, 2**63 - 1)


def setsockopt(sock: Socket, handle: int, level: int, option: int, value: int | bytes) -> None:
    """Lock held. OSError: ENOPROTOOPT for options that are not there, EINVAL for values that are not good."""
    core, key = sock.stack.core, (level, option)
    if key == (SOL, _socket.SO_LINGER):
        on, seconds = _struct(LINGER, value)
        core.setopt(handle, lib.BYPASS_SO_LINGER, (seconds if seconds >= 0 else INT_MAX) if on else -1)
    elif key in TIMEOUTS:
        seconds, micros = _struct(TIMEVAL, value)
        if not 0 <= micros < 1_000_000:
            raise _raised(errno.EDOM)
        sock._io_timeouts[option] = max(seconds + micros / 1e6, 0.0) if seconds or micros else None
    elif key == (SOL, SO_MAX_PACING_RATE):
        core.setopt(handle, OPTIONS[key], _pacing_rate(value))
    elif key == (TCP, _socket.TCP_CONGESTION) and sock.type == _socket.SOCK_STREAM:
        name = value if isinstance(value, bytes) else (value & UINT_MAX).to_bytes(4, "little")
        if not name:
            raise _raised(errno.EINVAL)
        core.cc_set(handle, name.split(b"\0")[0].decode("latin-1"))
    elif key in OPTIONS and _known_level(sock, level):
        core.setopt(handle, OPTIONS[key], _number(level, value))
        if key == (SOL, _socket.SO_RCVLOWAT) and sock.type == _socket.SOCK_STREAM:
            sock._lowat = core.getopt(handle, OPTIONS[key])
    else:
        if level == SOL:
            _number(level, value)  # Linux looks at the length before the name
        raise _raised(errno.ENOPROTOOPT)


def _told_here(sock: Socket, key: Key) -> int | bytes | None:
    """What this layer knows; None: another option."""
    match key:
        case (_socket.SOL_SOCKET, _socket.SO_TYPE):
            return int(sock.type)
        case (_socket.SOL_SOCKET, _socket.SO_DOMAIN):
            return int(sock.family)
        case (_socket.SOL_SOCKET, _socket.SO_PROTOCOL):
            return int(sock.proto)
        case (_socket.SOL_SOCKET, _socket.SO_SNDLOWAT):
            return 1  # socket(7): not changeable
        case (_socket.SOL_SOCKET, _socket.SO_RCVTIMEO | _socket.SO_SNDTIMEO):
            limit = sock._io_timeouts.get(key[1]) or 0.0
            return TIMEVAL.pack(int(limit), round(limit % 1 * 1e6))
    return None


def getsockopt(sock: Socket, handle: int, level: int, option: int, room: int) -> int | bytes:
    """Lock held. bytes for structs, else an int; room: what the caller takes, bytes."""
    core, key, stream = sock.stack.core, (level, option), sock.type == _socket.SOCK_STREAM
    if (here := _told_here(sock, key)) is not None:
        return here
    if key == (SOL, _socket.SO_ERROR):
        return core.error(handle)
    if key == (SOL, _socket.SO_LINGER):
        seconds = core.getopt(handle, lib.BYPASS_SO_LINGER)
        return LINGER.pack(seconds >= 0, max(seconds, 0))
    if key == (SOL, SO_MAX_PACING_RATE):
        rate = core.getopt(handle, OPTIONS[key]) or 2**64 - 1
        return rate.to_bytes(8, "little") if room >= 8 else _signed(min(rate, UINT_MAX))
    if stream and key == (TCP, _socket.TCP_INFO):
        return core.tcp_info_linux(handle, min(room, INFO_BYTES))
    if stream and key == (TCP, _socket.TCP_CONGESTION):
        return core.cc_get(handle).encode().ljust(16, b"\0")
    if not _known_level(sock, level):
        raise _raised(errno.EOPNOTSUPP)
    if key not in OPTIONS:
        raise _raised(errno.ENOPROTOOPT)
    value = core.getopt(handle, OPTIONS[key])
    return min(2 * value, INT_MAX) if key in DOUBLED else _signed(value)
