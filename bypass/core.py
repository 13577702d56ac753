# SPDX-License-Identifier: Apache-2.0
"""CoreStack: one stack of the C core, as Python sees it. Thin: arena, arguments, errors.

What lives here: the memory of a stack, the translation of addresses and of -errno results, one method a C call.
What does not: waiting, threads, policy (bypass.stack_api), sockets (bypass.sockets).
The contract of each call, units and errors included, is bypass/include/bypass.h.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from bypass._core import ffi, lib

__all__ = ["FOREVER", "Address", "Config", "ConnInfo", "CoreStack", "Event", "check"]

Address = tuple[str, int]
"""(IP address as text, port): what AF_INET sockets use."""

FOREVER: int = 2**64 - 1
"""A deadline in nanoseconds that never comes (UINT64_MAX of the C interface)."""

HUGE_FROM = 128 << 20  # bytes of an arena from which huge pages are worth what they waste: up to 2 MiB a pool
MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.12 on
NONE_ADDR = ffi.NULL
STATES = {
    1: "ESTABLISHED",
    2: "SYN_SENT",
    3: "SYN_RECEIVED",
    4: "FIN_WAIT_1",
    5: "FIN_WAIT_2",
    6: "TIME_WAIT",
    7: "CLOSED",
    8: "CLOSE_WAIT",
    9: "LAST_ACK",
    10: "LISTEN",
    11: "CLOSING",
}
log = logging.getLogger("bypass.stack")
LOG_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)


@ffi.def_extern(name="host_log")  # type: ignore[untyped-decorator]
def _host_log(_ctx: Any, level: int, msg: Any) -> None:
    log.log(LOG_LEVELS[min(level, 3)], "%s", ffi.string(msg).decode(errors="replace"))


def check(result: int) -> int:
    """The result of a C call, or OSError (its subclass by errno) when it is -errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return int(result)


@lru_cache(maxsize=4096)
def address_bytes(text: str) -> bytes:
    """16 bytes in network order; IPv4 mapped into IPv6 (RFC 4291 2.5.5.2). "" is 0.0.0.0, as for socket.

    Raises:
        socket.gaierror: not an IP address. Names are not resolved: that would ask the kernel's network.
    """
    try:
        ip = ipaddress.ip_address(text or "0.0.0.0")
    except ValueError:
        raise socket.gaierror(socket.EAI_NONAME, f"{text!r} is not an IP address") from None
    return ip.packed if ip.version == 6 else b"\0" * 10 + b"\xff\xff" + ip.packed


@lru_cache(maxsize=4096)
def address_text(raw: bytes) -> str:
    """The other way round; IPv4-mapped addresses as IPv4."""
    ip = ipaddress.IPv6Address(raw)
    return str(ip.ipv4_mapped or ip)


def _addr(text: str) -> Any:
    a = ffi.new("struct bypass_addr *")
    a.b = address_bytes(text)
    return a


def _endpoint(address: Address) -> Any:
    e = ffi.new("struct bypass_endpoint *")
    e.addr.b = address_bytes(address[0])
    e.port = address[1]
    return e


def _address(e: Any) -> Address:
    return address_text(bytes(e.addr.b)), int(e.port)


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of a stack; None: the core's default for so many connections.

    Attributes:
        conns: TCP connections in all states, TIME_WAIT included.
        socks: handles: listeners, UDP sockets, connections that a program holds.
        chunks: 512-byte pieces for received data that is copied out of frames.
        dsts: destinations in the next-hop cache.
        frags: IPv4 datagrams under reassembly.
        sndbuf, rcvbuf: buffers of a new socket, bytes.
        sndbuf_max, rcvbuf_max: what a TCP socket's buffers grow to as its peer and path can use them, bytes up to
            1 GiB, until the program sets a size. None: with `sndbuf` or `rcvbuf` given, that; else 4 and 6 MiB.
        delack_ms: longest delay of an acknowledgment, 1 to 500 milliseconds.
        syn_backlog: half-open connections of all listeners together.
        time_wait: connections in TIME_WAIT; of more the oldest ends early.
        syn_cookies: 0 never, 1 while the queue of half-open connections is full, 2 always.
        mtu_probing: packetization-layer path MTU discovery: 0 off, 1 once a path swallows large segments, 2 always.
        fastopen: bits: 1 as a client, 2 as a server.
        tw_reuse: connect() may take over a TIME_WAIT older than a second.
        ecn: explicit congestion notification: 0 never, 1 asked for, 2 agreed to when the peer asks.
        keep_idle_window: the congestion window stays after a pause.
    """

    conns: int = 1024
    socks: int | None = None
    chunks: int | None = None
    dsts: int | None = None
    frags: int | None = None
    sndbuf: int | None = None
    rcvbuf: int | None = None
    sndbuf_max: int | None = None
    rcvbuf_max: int | None = None
    delack_ms: int | None = None
    syn_backlog: int | None = None
    time_wait: int | None = None
    syn_cookies: int | None = None
    mtu_probing: int | None = None
    fastopen: int | None = None
    tw_reuse: bool | None = None
    ecn: int | None = None
    keep_idle_window: bool | None = None

    def fill(self, flags: int) -> Any:
        """The C struct."""
        cfg = ffi.new("struct bypass_config *")
        lib.bypass_config_default(cfg, self.conns)
        cfg.flags = flags
        for name, value in (
            ("max_socks", self.socks),
            ("max_chunks", self.chunks),
            ("max_dsts", self.dsts),
            ("max_frags", self.frags),
            ("sndbuf", self.sndbuf),
            ("rcvbuf", self.rcvbuf),
            ("sndbuf_max", self.sndbuf_max if self.sndbuf_max is not None else self.sndbuf),
            ("rcvbuf_max", self.rcvbuf_max if self.rcvbuf_max is not None else self.rcvbuf),
            ("delack_ms", self.delack_ms),
            ("max_syn_backlog", self.syn_backlog),
            ("max_time_wait", self.time_wait),
            ("syn_cookies", self.syn_cookies),
            ("mtu_probing", self.mtu_probing),
            ("fastopen", self.fastopen),
            ("tw_reuse", self.tw_reuse),
            ("ecn", self.ecn),
            ("keep_idle_window", self.keep_idle_window),
        ):
            if value is not None:
                setattr(cfg, name, value)
        return cfg


@dataclass(frozen=True, slots=True)
class Event:
    """What became ready since the last report: `mask` of lib.BYPASS_IN, OUT, ERR, HUP, RDHUP."""

    sock: int
    user: int
    mask: int


@dataclass(frozen=True, slots=True)
class ConnInfo:
    """State of a connection (struct bypass_tcp_info). Buffers and windows in bytes, times in microseconds."""

    local: Address
    peer: Address
    state: str
    timestamps: bool
    window_scaling: bool
    snd_una: int
    snd_nxt: int
    rcv_nxt: int
    snd_wnd: int
    rcv_wnd: int
    cwnd: int
    ssthresh: int
    snd_mss: int
    snd_queued: int
    rcv_queued: int
    srtt_us: int
    rttvar_us: int
    rto_us: int
    retransmits: int
    pacing_rate: int  # bytes a second, as the next
    delivery_rate: int


INFO_NUMBERS = tuple(f.name for f in fields(ConnInfo))[5:]


def _info(i: Any) -> ConnInfo:
    numbers = (int(getattr(i, name)) for name in INFO_NUMBERS)
    state = STATES.get(i.state, str(i.state))
    return ConnInfo(
        _address(i.local), _address(i.peer), state, bool(i.flags & 1), bool(i.flags & 2), *numbers
    )


class CoreStack:
    """A stack of the C core on a network device.

    Every call may raise OSError with the errno that bypass.h names for it. Not thread-safe: one caller at a time.

    Args:
        dev: `struct bypass_netdev *`; has to outlive the stack. `owner` keeps its memory alive.
        flags: lib.BYPASS_F_*.
        now_ns: the clock's time, nanoseconds; every later time is of the same clock.
        env: `struct bypass_env *`; None: secrets from getrandom(2), log to the logger `bypass.stack`.

    Raises:
        OSError: EINVAL (the configuration makes no sense), ENOMEM.
    """

    EVENTS = 256
    WANTED = 64

    def __init__(
        self,
        dev: Any,
        *,
        config: Config | None = None,
        flags: int = 0,
        now_ns: int = 0,
        env: Any = None,
        owner: object = None,
    ) -> None:
        self._dev = dev
        self._owner = owner
        self.c: Any = ffi.new("struct bypass_stack *")
        if env is None:
            env = ffi.new("struct bypass_env *")
            env.random = lib.host_random
            env.log = lib.host_log
        self._env = env
        cfg = (config or Config()).fill(flags)
        size = lib.bypass_arena_size(cfg)
        if not size:
            check(-22)
        # Untouched pages never exist: a stack for many connections costs nothing until they come.
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._map = mmap.mmap(-1, size, flags=kind)
        if size >= HUGE_FROM:
            with suppress(OSError):  # a kernel without transparent huge pages: slower, not wrong
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._arena = ffi.from_buffer("uint8_t[]", self._map)
        self._events = ffi.new("struct bypass_event[]", self.EVENTS)
        self._wanted = ffi.new("struct bypass_addr[]", self.WANTED)
        self._scratch: Any = ffi.new("uint8_t[]", 1 << 18)
        self.closed = True
        check(lib.bypass_create(self.c, self._arena, size, cfg, dev, env, now_ns))
        self.closed = False

    def close(self) -> None:
        """Resets what is open (a RST each) and frees the memory. A second call does nothing."""
        if not self.closed:
            lib.bypass_destroy(self.c)
            self.closed = True
            self.__class__ = _ClosedCoreStack
            ffi.release(self._arena)
            self._map.close()

    # ---- addresses and next hops
    def addr_add(self, address: str, prefix_len: int) -> None:
        check(lib.bypass_addr_add(self.c, _addr(address), prefix_len))

    def addr_del(self, address: str) -> None:
        check(lib.bypass_addr_del(self.c, _addr(address)))

    def gateway_set(self, address: str | None) -> None:
        check(lib.bypass_gateway_set(self.c, _addr(address) if address is not None else NONE_ADDR))

    def nexthop_wanted(self) -> list[str]:
        """Destinations whose next hop the stack asks for."""
        n = check(lib.bypass_nexthop_wanted(self.c, self._wanted, self.WANTED))
        return [address_text(bytes(a.b)) for a in self._wanted[0:n]] if n else []

    def nexthop_set(self, address: str, mac: bytes | None, mtu: int = 0) -> None:
        """mac: 6 bytes, None: unreachable; mtu of the path in bytes, 0: the device's."""
        check(lib.bypass_nexthop_set(self.c, _addr(address), ffi.NULL if mac is None else mac, mtu))

    def nexthop_forget(self, address: str | None = None) -> None:
        lib.bypass_nexthop_forget(self.c, _addr(address) if address is not None else ffi.NULL)

    # ---- driving
    def poll(self, now_ns: int, budget: int = 256) -> int:
        """Frames received, or -errno of the device (not raised: the caller decides; timers have run)."""
        return int(lib.bypass_poll(self.c, now_ns, budget))

    def flush(self) -> int:
        return int(lib.bypass_flush(self.c))

    def set_now(self, now_ns: int) -> None:
        lib.bypass_now(self.c, now_ns)

    def deadline(self) -> int:
        """Nanoseconds; FOREVER when only a frame can make it necessary to poll."""
        return int(lib.bypass_deadline(self.c))

    def events(self) -> list[Event]:
        n = lib.bypass_events(self.c, self._events, self.EVENTS)
        return [Event(e.sock, e.user, e.mask) for e in self._events[0:n]]

    # ---- sockets
    def socket(self, kind: int) -> int:
        return check(lib.bypass_socket(self.c, kind))

    def bind(self, sock: int, address: Address) -> None:
        check(lib.bypass_bind(self.c, sock, _endpoint(address)))

    def listen(self, sock: int, backlog: int) -> None:
        check(lib.bypass_listen(self.c, sock, backlog))

    def accept(self, sock: int) -> int:
        """A handle, or -errno."""
        return int(lib.bypass_accept(self.c, sock))

    def connect(self, sock: int, address: Address) -> int:
        """0 or -errno (-EINPROGRESS is no failure)."""
        return int(lib.bypass_connect(self.c, sock, _endpoint(address)))

    def send(self, sock: int, data: Any, flags: int = 0) -> int:
        """Bytes queued, or -errno. data: any contiguous buffer."""
        with ffi.from_buffer(data) as buf:
            return int(lib.bypass_send(self.c, sock, buf, len(buf), flags))

    def recv(self, sock: int, n: int, flags: int = 0) -> bytes | int:
        """At most n bytes (and at most 256 KiB), or -errno as an int. b"": the peer closed its direction."""
        got = lib.bypass_recv(self.c, sock, self._scratch, min(n, len(self._scratch)), flags)
        return ffi.buffer(self._scratch, got)[:] if got >= 0 else int(got)

    def recv_into(self, sock: int, buffer: Any, flags: int = 0) -> int:
        with ffi.from_buffer(buffer, require_writable=True) as buf:
            return int(lib.bypass_recv(self.c, sock, buf, len(buf), flags))

    def sendto(self, sock: int, data: Any, address: Address | None, flags: int = 0) -> int:
        to = _endpoint(address) if address is not None else ffi.NULL
        with ffi.from_buffer(data) as buf:
            return int(lib.bypass_sendto(self.c, sock, buf, len(buf), flags, to))

    def recvfrom(self, sock: int, n: int, flags: int = 0) -> tuple[bytes, Address, int] | int:
        """(at most n bytes, sender, result of the C call), or -errno as an int."""
        sender = ffi.new("struct bypass_endpoint *")
        room = min(n, len(self._scratch))
        got = lib.bypass_recvfrom(self.c, sock, self._scratch, room, flags, sender)
        if got < 0:
            return int(got)
        return ffi.buffer(self._scratch, min(got, room))[:], _address(sender), int(got)

    def shutdown(self, sock: int, how: int) -> None:
        check(lib.bypass_shutdown(self.c, sock, how))

    def close_socket(self, sock: int) -> None:
        check(lib.bypass_close(self.c, sock))

    def abort(self, sock: int) -> None:
        check(lib.bypass_abort(self.c, sock))

    def local(self, sock: int) -> Address:
        e = ffi.new("struct bypass_endpoint *")
        check(lib.bypass_local(self.c, sock, e))
        return _address(e)

    def peer(self, sock: int) -> Address:
        e = ffi.new("struct bypass_endpoint *")
        check(lib.bypass_peer(self.c, sock, e))
        return _address(e)

    def setopt(self, sock: int, option: int, value: int) -> None:
        check(lib.bypass_setopt(self.c, sock, option, value))

    def getopt(self, sock: int, option: int) -> int:
        value = int(lib.bypass_getopt(self.c, sock, option))
        # Off is -1 for the two lingers, which is also -EPERM: no option fails with that.
        return -1 if value == -1 else check(value)

    def cc_set(self, sock: int, name: str) -> None:
        """Congestion control by name; of a listener: its connections'. ENOENT: unknown."""
        check(lib.bypass_cc_set(self.c, sock, name.encode()))

    def cc_get(self, sock: int) -> str:
        out = ffi.new("char[]", lib.BYPASS_CC_NAME)
        check(lib.bypass_cc_get(self.c, sock, out, len(out)))
        return str(ffi.string(out).decode())

    def cc_default(self, name: str) -> None:
        """Of sockets that are made from now on. ENOENT: unknown."""
        check(lib.bypass_cc_default(self.c, name.encode()))

    def cc_names(self) -> list[str]:
        """The algorithms that there are."""
        names: list[str] = []
        while (name := lib.bypass_cc_name(self.c, len(names))) != ffi.NULL:
            names.append(str(ffi.string(name).decode()))
        return names

    def error(self, sock: int) -> int:
        """The pending errno, which is cleared; 0: none."""
        return check(lib.bypass_error(self.c, sock))

    def at_mark(self, sock: int) -> bool:
        """What is read next is the urgent byte, or lies behind it (SIOCATMARK)."""
        return bool(check(lib.bypass_at_mark(self.c, sock)))

    def ready(self, sock: int) -> int:
        return check(lib.bypass_ready(self.c, sock))

    def set_user(self, sock: int, user: int) -> None:
        check(lib.bypass_set_user(self.c, sock, user))

    # ---- introspection
    def tcp_info(self, sock: int) -> ConnInfo:
        i = ffi.new("struct bypass_tcp_info *")
        check(lib.bypass_tcp_info(self.c, sock, i))
        return _info(i)

    def tcp_info_linux(self, sock: int, n: int) -> bytes:
        """At most n bytes of Linux' struct tcp_info."""
        i = ffi.new("struct bypass_tcp_info *")
        check(lib.bypass_tcp_info(self.c, sock, i))
        out = ffi.new("uint8_t[]", max(n, 1))
        return bytes(ffi.buffer(out, lib.bypass_tcp_info_linux(i, out, n)))

    def disconnect(self, sock: int) -> None:
        """As connect() to AF_UNSPEC: what there is ends, and the socket is fresh."""
        check(lib.bypass_disconnect(self.c, sock))

    def conns(self) -> Iterator[ConnInfo]:
        """Connections in every state, also those that no handle owns."""
        cursor = ffi.new("uint32_t *", 0)
        i = ffi.new("struct bypass_tcp_info *")
        while check(lib.bypass_conn_next(self.c, cursor, i)):
            yield _info(i)

    def port_users(self, kind: int, address: str | None, port: int) -> int:
        a = _addr(address) if address is not None else ffi.NULL
        return check(lib.bypass_port_users(self.c, kind, a, port))

    def stats(self) -> dict[str, int]:
        """Counters by name."""
        values = lib.bypass_stats(self.c)
        names = (ffi.string(lib.bypass_stat_name(i)).decode() for i in range(lib.bypass_stat_count()))
        return {name: int(values[i]) for i, name in enumerate(names)}

    def audit(self) -> dict[str, int]:
        """What is in use, by kind; all zero after an orderly end."""
        a = ffi.new("struct bypass_audit *")
        lib.bypass_audit(self.c, a)
        return {name: int(getattr(a, name)) for name, _ in ffi.typeof("struct bypass_audit").fields}


class _ClosedCoreStack(CoreStack):
    """What a CoreStack becomes by close(): its memory is gone, so every call fails with EBADF."""


def _closed(*_args: Any, **_kwargs: Any) -> Any:
    raise OSError(errno.EBADF, "the stack is closed")


for _name, _value in list(vars(CoreStack).items()):
    if callable(_value) and not _name.startswith("_") and _name != "close":
        setattr(_ClosedCoreStack, _name, _closed)
