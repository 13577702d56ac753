# SPDX-License-Identifier: Apache-2.0
"""The same socket calls on the kernel and on this stack: the same results, errors, states and readiness.

Two hosts: 127.0.0.1 and 127.0.0.2 in a network namespace of the test's own, 10.0.0.1 and 10.0.0.2 on a simulated wire.
Every socket exists twice and never blocks; after each call both worlds come to rest, then all sockets are compared.
What differs on purpose is in DIFFERENCES, with the reason; docs/sockets.md explains it to users.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from support import examples

from bypass import netns
from bypass.sim import Network
from bypass.sockets import Socket

pytestmark = pytest.mark.netns

# What is not as on Linux, and why. Each is kept out of the machine's way where it says so.
DIFFERENCES = {
    "shutdown before there is a connection": "fails with ENOTCONN as on Linux, but leaves no mark on the socket",
    "bind after the connection has ended": "EINVAL always; Linux allows it when the port was not chosen by bind()",
    "the port after a connection attempt failed": "getsockname() tells 0 for a port that is free again; Linux tells "
    "the old number, which is not reserved any more",
    "the port of a socket whose connection has ended": "is free for others at once; Linux keeps a port that was chosen "
    "by bind() until the socket is closed",
    "the largest low-water mark": "any int, and half of the buffer is enough; Linux limits it to half of the largest "
    "buffer that it would make",
    "connect to port 0 or to 0.0.0.0": "ECONNREFUSED at once; Linux sends a SYN, or means the host itself",
}

SHUT = (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)
POLL = select.POLLIN | select.POLLOUT | select.POLLRDHUP  # POLLERR and POLLHUP come anyway
PATIENCE = 300  # milliseconds
DATA = bytes(range(256)) * 32
MS = 1_000_000


@dataclass(eq=False)
class Twin:
    """One socket in both worlds."""

    host: int  # 0 or 1
    kernel: Any
    ours: Socket
    bound: bool = False

    @property
    def both(self) -> tuple[Any, Any]:
        return self.kernel, self.ours


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gave: its value, or the name of its errno."""
    try:
        return call()
    except OSError as e:
        return errno.errorcode[e.errno or 0]


@contextmanager
def namespace() -> Iterator[str]:
    name = f"bypass-{os.getpid()}-sockets"
    netns.create(name)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        netns.remove(name)


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with namespace() as name:
        yield name


class Worlds(RuleBasedStateMachine):
    sockets = Bundle("sockets")
    namespace = ""  # set by the test
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).runs += 1
        base = 10_000 + type(self).runs * 4 % 20_000  # TIME_WAIT of the last run must not be in the way
        self.ports = (base, base + 1)
        self.net = Network(seed=1)
        self.net.wire()
        self.stacks = [self.net.stack(f"10.0.0.{n}/24") for n in (1, 2)]
        self.all: list[Twin] = []
        self.names: dict[tuple[str, int], int] = {}  # chosen ports, by the order in which they were seen
        self.log: list[str] = []

    # ---- both worlds
    def address(self, host: int, port: int, *, ours: bool) -> tuple[str, int]:
        return (f"10.0.0.{host + 1}" if ours else f"127.0.0.{host + 1}", port)

    def name(self, address: Any, *, ours: bool) -> Any:
        """An address in words that hold in both worlds."""
        if not isinstance(address, tuple):
            return address
        ip, port = address
        if ip != "0.0.0.0":
            ip = "host" + ip[-1]
        if port in self.ports or port == 0:
            return ip, port
        seen = self.names.setdefault(("ours" if ours else "kernel", port), 0)
        if not seen:
            seen = self.names["ours" if ours else "kernel", port] = 1 + sum(
                world == ("ours" if ours else "kernel") for world, _ in self.names if self.names[world, _]
            )
        return ip, f"chosen{seen}"

    def rest(self) -> None:
        self.net.run(duration_ns=MS)

    def same(self, what: str, twin: Twin, call: Callable[[Any, bool], Any]) -> Any:
        """call(socket, ours) in both worlds has the same outcome, which is returned."""
        theirs = outcome(lambda: call(twin.kernel, False))
        mine = outcome(lambda: call(twin.ours, True))
        self.rest()
        self.log.append(f"{self.all.index(twin)}.{what} -> {theirs}")
        assert mine == theirs, f"{what}: {mine!r} here, {theirs!r} on Linux; before:\n" + "\n".join(self.log)
        return mine

    # ---- calls
    @rule(target=sockets, host=st.integers(0, 1))
    def new(self, host: int) -> Any:
        if len(self.all) >= 8:
            return multiple()
        with netns.entered(self.namespace):
            kernel = socket.socket()
        twin = Twin(host, kernel, Socket(self.stacks[host]))
        for s in twin.both:
            s.settimeout(0)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.all.append(twin)
        return twin

    @rule(target=sockets, keep_listener=st.booleans())
    def connected(self, keep_listener: bool) -> Any:
        """The way to a connection that most programs take."""
        if len(self.all) > 5:
            return multiple()
        listener, client = self.new(1), self.new(0)
        for x, ours in ((listener.kernel, False), (listener.ours, True)):
            x.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            x.bind(self.address(1, 0, ours=ours))
            x.listen(5)
        self.same(
            "connect()",
            client,
            lambda x, ours: x.connect((listener.ours if ours else listener.kernel).getsockname()),
        )
        self.all_are_alike()
        server = self.accept(listener)
        if not keep_listener:
            self.close(listener, None)
        return multiple(client, server)

    @rule(s=sockets, port=st.integers(0, 2), any_address=st.booleans())
    def bind(self, s: Twin, port: int, any_address: bool) -> None:
        if self.over(s):
            return  # DIFFERENCES: bind after the connection has ended
        number = 0 if port == 2 else self.ports[port]
        if any(o.bound and o.host == s.host and self.over(o) for o in self.all):
            return  # DIFFERENCES: the port of a socket whose connection has ended

        def call(x: Any, ours: bool) -> Any:
            address = self.address(s.host, number, ours=ours)
            if any_address and number == 0:
                address = ("0.0.0.0", 0)
            return x.bind(address)

        s.bound = (self.same(f"bind({number})", s, call) is None and number != 0) or s.bound

    @rule(s=sockets, backlog=st.sampled_from([0, 1, 5]))
    def listen(self, s: Twin, backlog: int) -> None:
        self.same(f"listen({backlog})", s, lambda x, ours: x.listen(backlog))

    @rule(s=sockets, port=st.integers(0, 1))
    def connect(self, s: Twin, port: int) -> None:
        if s.host == 1:
            return  # Linux would choose 127.0.0.1 as its address
        number = self.ports[port]
        self.same(f"connect({number})", s, lambda x, ours: x.connect(self.address(1, number, ours=ours)))

    @rule(target=sockets, s=sockets)
    def accept(self, s: Twin) -> Any:
        got: dict[bool, Any] = {}

        def call(x: Any, ours: bool) -> Any:
            got[ours], address = x.accept()
            got[ours].settimeout(0)
            return self.name(address, ours=ours)

        self.same("accept()", s, call)
        if not got:
            return multiple()
        twin = Twin(s.host, got[False], got[True])
        self.all.append(twin)
        return twin

    @rule(s=sockets, n=st.sampled_from([0, 1, 100, 5000]))
    def send(self, s: Twin, n: int) -> None:
        self.same(f"send({n})", s, lambda x, ours: x.send(DATA[:n], socket.MSG_NOSIGNAL))

    @rule(
        s=sockets,
        n=st.sampled_from([0, 1, 50, 100_000]),
        flags=st.sampled_from(["", "", "PEEK", "WAITALL", "TRUNC", "DONTWAIT"]),
    )
    def recv(self, s: Twin, n: int, flags: str) -> None:
        mask = getattr(socket, f"MSG_{flags}") if flags else 0

        def call(x: Any, ours: bool) -> Any:
            got = x.recv(n, mask) if n else x.recvmsg(n, 0, mask)[0]  # socket.recv(0) asks nobody
            return (len(got), 0 if flags == "TRUNC" else zlib.crc32(got))

        self.same(f"recv({n}, {flags})", s, call)

    @rule(s=sockets, how=st.sampled_from(SHUT))
    def shutdown(self, s: Twin, how: int) -> None:
        if outcome(lambda: s.kernel.getpeername()) == "ENOTCONN" and self.state(s.kernel) == 7:
            return  # DIFFERENCES: shutdown before there is a connection
        self.same(f"shutdown({how})", s, lambda x, ours: x.shutdown(how))

    @rule(s=consumes(sockets), linger=st.sampled_from([None, None, 0]))
    def close(self, s: Twin, linger: int | None) -> None:
        if linger is not None:
            for x in s.both:
                x.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, linger))
        self.same(f"close({linger})", s, lambda x, ours: x.close())
        self.all.remove(s)

    @rule(s=sockets)
    def error(self, s: Twin) -> None:
        self.same("SO_ERROR", s, lambda x, ours: x.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    @rule(
        s=sockets,
        option=st.sampled_from(
            [
                (socket.SOL_SOCKET, socket.SO_ACCEPTCONN),
                (socket.SOL_SOCKET, socket.SO_TYPE),
                (socket.SOL_SOCKET, socket.SO_DOMAIN),
                (socket.SOL_SOCKET, socket.SO_PROTOCOL),
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                (socket.SOL_SOCKET, socket.SO_REUSEADDR),
                (socket.SOL_SOCKET, socket.SO_RCVLOWAT),
                (socket.IPPROTO_TCP, socket.TCP_NODELAY),
                (socket.IPPROTO_TCP, socket.TCP_CORK),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                (socket.IPPROTO_TCP, socket.TCP_LINGER2),
                (socket.IPPROTO_TCP, socket.TCP_SYNCNT),
                (socket.IPPROTO_IP, socket.IP_TTL),
                (socket.IPPROTO_IP, socket.IP_TOS),
            ]
        ),
        value=st.none() | st.sampled_from([0, 1, 7, 100, -1, 40000]),
    )
    def option(self, s: Twin, option: tuple[int, int], value: int | None) -> None:
        if option == (socket.IPPROTO_TCP, socket.TCP_CORK) and value:
            value = 0  # what leaves then depends on the size of a segment, which differs
        if option == (socket.IPPROTO_TCP, socket.TCP_NODELAY) and value == 0:
            value = 1  # what leaves then depends on when the last acknowledgment came
        if option == (socket.SOL_SOCKET, socket.SO_RCVLOWAT) and value == -1:
            value = 1  # DIFFERENCES: the largest low-water mark
        if value is not None:
            self.same(f"setsockopt{option}={value}", s, lambda x, ours: x.setsockopt(*option, value))
        self.same(f"getsockopt{option}", s, lambda x, ours: x.getsockopt(*option))

    # ---- what is compared all the time
    @staticmethod
    def state(x: Any) -> int:
        info: bytes = x.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 248)
        return info[0]

    def over(self, s: Twin) -> bool:
        info = s.ours.stack.core.tcp_info(s.ours._handle)
        return info.state in ("CLOSED", "TIME_WAIT") and info.peer[1] != 0

    @staticmethod
    def ready(x: Any) -> int:
        if isinstance(x, Socket):
            return x.readiness()
        poll = select.poll()
        poll.register(x, POLL)
        return sum(mask for _, mask in poll.poll(0))

    def look(self, s: Twin, x: Any) -> dict[str, Any]:
        ours = x is s.ours
        name = self.name(x.getsockname(), ours=ours)
        if self.state(x) == 7 and not self.over(s) and not s.bound:
            name = name[0]  # DIFFERENCES: the port after a connection attempt failed
        return {
            "state": self.state(x),
            "readiness": self.ready(x),
            "name": name,
            "peer": self.name(outcome(x.getpeername), ours=ours),
        }

    @invariant()
    def all_are_alike(self) -> None:
        for i, s in enumerate(self.all):
            mine = self.look(s, s.ours)
            for _ in range(PATIENCE):  # Linux delivers on its loopback in its own time
                theirs = self.look(s, s.kernel)
                if mine == theirs:
                    break
                time.sleep(0.001)
            assert mine == theirs, f"socket {i}: {mine} here, {theirs} on Linux; after:\n" + "\n".join(
                self.log
            )

    def teardown(self) -> None:
        for s in self.all:
            for x in s.both:
                x.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                x.close()
        self.net.close()


Worlds.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40)


def test_every_call_in_every_state_is_as_on_linux(host: str) -> None:
    Worlds.namespace = host
    case = Worlds.TestCase()
    case.settings = Worlds.TestCase.settings
    case.runTest()
