# SPDX-License-Identifier: Apache-2.0
"""What the two machines of socket calls share (tests/test_socket_machine.py: TCP, test_socket_machine_udp.py: UDP).

Every socket exists twice and never blocks; after each call both worlds come to rest, then all sockets are compared:
names, readiness as poll() tells it, and that nothing became ready without an event (epoll's EPOLLET, bypass_events()).
"""

from __future__ import annotations

import fcntl
import itertools
import select
import socket
import struct
import termios
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from socket_worlds import DGRAM, STREAM, Kernel, Ours, outcome, readiness

from bypass.sockets import POLL_BITS, Socket

SHUT = (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)
PATIENCE = 1000  # milliseconds
DATA = bytes(range(256)) * 32
SOL, TCP, IP = socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP
PORTS = itertools.count(10_000, 4)  # TIME_WAIT of the last run must not be in the way
OPTIONS = [
    *[
        (SOL, getattr(socket, f"SO_{n}"))
        for n in ("ACCEPTCONN", "TYPE", "DOMAIN", "PROTOCOL", "KEEPALIVE", "REUSEADDR")
    ],
    *[(SOL, getattr(socket, f"SO_{n}")) for n in ("REUSEPORT", "RCVLOWAT", "OOBINLINE", "BROADCAST")],
    *[
        (TCP, getattr(socket, f"TCP_{n}"))
        for n in ("NODELAY", "CORK", "KEEPIDLE", "KEEPINTVL", "KEEPCNT", "LINGER2")
    ],
    *[(TCP, getattr(socket, f"TCP_{n}")) for n in ("SYNCNT", "USER_TIMEOUT", "NOTSENT_LOWAT")],
    *[(IP, getattr(socket, f"IP_{n}")) for n in ("TTL", "TOS")],
]
# Values that change what leaves when: that depends on the size of a segment, or on when the last acknowledgment came
# (which TCP_QUICKACK tells: tests/test_socket_options_linux.py).
TIMING = {
    (TCP, socket.TCP_CORK): 0,
    (TCP, socket.TCP_NODELAY): 1,
    (TCP, socket.TCP_NOTSENT_LOWAT): -1,
}


@dataclass(eq=False)
class Twin:
    """One socket in both worlds."""

    host: int  # 0 or 1
    kernel: Any
    ours: Socket
    bound: bool = False
    edges: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})  # ours?: since the last look
    levels: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    queued: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    @property
    def both(self) -> tuple[Any, Any]:
        return self.kernel, self.ours


def queued(x: Any) -> int:
    """Bytes that wait to be read; of a listener, and of datagrams, 0."""
    if x.type == DGRAM:
        return 0
    if isinstance(x, Socket):
        info = x.stack.core.tcp_info(x._handle)
        return 0 if info.state == "LISTEN" else info.rcv_queued
    try:
        return int(struct.unpack("i", fcntl.ioctl(x.fileno(), termios.FIONREAD, bytes(4)))[0])
    except OSError:
        return 0


class Machine(RuleBasedStateMachine):
    sockets = Bundle("sockets")
    namespace: ClassVar[str] = ""  # set by the test
    kind: ClassVar[int] = STREAM

    def __init__(self) -> None:
        super().__init__()
        base = 10_000 + next(PORTS) % 20_000
        self.ports = (base, base + 1)
        self.linux, self.here = Kernel(self.namespace), Ours()
        self.epoll = select.epoll()
        self.all: list[Twin] = []
        self.log: list[str] = []
        self.urgent = False  # an urgent byte was sent: Linux leaves it out of FIONREAD

    # ---- both worlds
    def address(self, host: int, port: int, *, ours: bool) -> tuple[str, int]:
        return (self.here if ours else self.linux).address(host, port)

    def name(self, address: Any) -> Any:
        """An address in words that hold in both worlds; a port that nobody asked for is any."""
        if not isinstance(address, tuple):
            return address
        ip, port = address
        if ip != "0.0.0.0":
            ip = "host" + ip[-1]
        return ip, port if port in self.ports or port == 0 else "chosen"

    def same(self, what: str, twin: Twin, call: Callable[[Any, bool], Any]) -> Any:
        """call(socket, ours) in both worlds has the same outcome, which is returned."""
        theirs = outcome(lambda: call(twin.kernel, False))
        mine = outcome(lambda: call(twin.ours, True))
        self.here.rest()
        self.log.append(f"{self.all.index(twin)}.{what} -> {theirs}")
        assert mine == theirs, f"{what}: {mine!r} here, {theirs!r} on Linux; before:\n" + "\n".join(self.log)
        return mine

    def add(self, twin: Twin) -> Twin:
        self.all.append(twin)
        for x in twin.both:
            x.settimeout(0)
        self.epoll.register(
            twin.kernel,
            select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET,
        )

        def event(mask: int) -> None:
            twin.edges[True] |= sum(bit for own, bit in POLL_BITS.items() if mask & own)

        twin.ours.stack.set_handler(twin.ours._handle, event)
        self.take_edges()
        twin.edges = {True: 0, False: 0}
        twin.levels = {False: readiness(twin.kernel), True: readiness(twin.ours)}
        return twin

    def take_edges(self) -> None:
        by_number = {s.kernel.fileno(): s for s in self.all}
        for number, mask in self.epoll.poll(0):
            by_number[number].edges[False] |= mask

    def make(self, host: int) -> Twin:
        return self.add(Twin(host, self.linux.socket(host, self.kind), self.here.socket(host, self.kind)))

    # ---- calls
    @rule(s=sockets, n=st.sampled_from([0, 1, 100, 5000]), flags=st.sampled_from(["", "DONTWAIT"]))
    def send(self, s: Twin, n: int, flags: str) -> None:
        mask = socket.MSG_NOSIGNAL | (getattr(socket, f"MSG_{flags}") if flags else 0)
        self.same(f"send({n}, {flags})", s, lambda x, ours: x.send(DATA[:n], mask))

    @rule(
        s=sockets,
        n=st.sampled_from([0, 1, 50, 100_000]),
        flags=st.sampled_from(["", "", "PEEK", "WAITALL", "TRUNC", "DONTWAIT", "PEEK|TRUNC", "PEEK|WAITALL"]),
    )
    def recv(self, s: Twin, n: int, flags: str) -> None:
        mask = sum(getattr(socket, f"MSG_{flag}") for flag in flags.split("|") if flag)

        def call(x: Any, ours: bool) -> Any:
            got, _, shown, sender = x.recvmsg(n, 0, mask)  # socket.recv(0) asks nobody
            told = shown & socket.MSG_TRUNC, self.name(sender) if self.kind == DGRAM else None
            return len(got), 0 if "TRUNC" in flags and self.kind == STREAM else zlib.crc32(got), told

        self.same(f"recv({n}, {flags})", s, call)

    @rule(s=consumes(sockets), linger=st.sampled_from([None, None, 0]))
    def close(self, s: Twin, linger: int | None) -> None:
        if linger is not None:
            for x in s.both:
                x.setsockopt(SOL, socket.SO_LINGER, struct.pack("ii", 1, linger))
        self.epoll.unregister(s.kernel)
        self.same(f"close({linger})", s, lambda x, ours: x.close())
        self.all.remove(s)

    @rule(s=sockets)
    def error(self, s: Twin) -> None:
        self.same("SO_ERROR", s, lambda x, ours: x.getsockopt(SOL, socket.SO_ERROR))

    def set_and_get(self, s: Twin, option: tuple[int, int], value: int | None) -> None:
        if value is not None:
            self.same(f"setsockopt{option}={value}", s, lambda x, ours: x.setsockopt(*option, value))
        self.same(f"getsockopt{option}", s, lambda x, ours: x.getsockopt(*option))

    # ---- what is compared all the time
    def look(self, s: Twin, x: Any) -> dict[str, Any]:
        return {
            "readiness": readiness(x),
            "queued": queued(x) if self.kind == STREAM and not self.urgent else None,
            "name": self.name(x.getsockname()),
            "peer": self.name(outcome(x.getpeername)),
        }

    @invariant()
    def all_are_alike(self) -> None:
        for i, s in enumerate(self.all):
            for _ in range(PATIENCE):  # Linux delivers on its loopback in its own time
                mine, theirs = self.look(s, s.ours), self.look(s, s.kernel)
                if mine == theirs:
                    break
                time.sleep(0.001)
                self.here.rest()
            assert mine == theirs, f"socket {i}: {mine} here, {theirs} on Linux; after:\n" + "\n".join(
                self.log
            )
        self.take_edges()
        for i, s in enumerate(self.all):
            self.nothing_became_ready_unsaid(i, s)

    def nothing_became_ready_unsaid(self, i: int, s: Twin) -> None:
        for x, ours in ((s.kernel, False), (s.ours, True)):
            now = readiness(x)
            came = now & ~s.levels[ours]
            if not self.urgent and queued(x) > s.queued[ours] and now & select.POLLIN:
                came |= select.POLLIN  # more came: an edge again
            where = "here" if ours else "on Linux"
            assert came & ~s.edges[ours] == 0, (
                f"socket {i}: {came:#x} became ready {where}, the event said "
                + (f"{s.edges[ours]:#x}; after:\n" + "\n".join(self.log))
            )
            s.levels[ours], s.edges[ours], s.queued[ours] = now, 0, queued(x)

    def teardown(self) -> None:
        for s in self.all:
            for x in s.both:
                x.setsockopt(SOL, socket.SO_LINGER, struct.pack("ii", 1, 0))
                x.close()
        self.epoll.close()
        self.here.close()
