# SPDX-License-Identifier: Apache-2.0
"""The same calls of TCP sockets on the kernel and on this stack: the same results, errors, states and readiness.

Two hosts: 127.0.0.1 and 127.0.0.2 in a network namespace of the test's own, 10.0.0.1 and 10.0.0.2 on a simulated wire.
How both worlds are kept and compared: tests/socket_machine.py. What differs on purpose is kept out of the machine's way
where it says DIFFERENCES (tests/socket_worlds.py).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import multiple, rule
from socket_machine import DATA, OPTIONS, SHUT, SOL, TCP, TIMING, Machine, Twin
from socket_worlds import namespace, outcome
from support import examples

pytestmark = [pytest.mark.netns, pytest.mark.hypothesis, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with namespace() as name:
        yield name


class Worlds(Machine):
    sockets = Machine.sockets

    # ---- calls
    @rule(target=sockets, host=st.integers(0, 1))
    def new(self, host: int) -> Any:
        if len(self.all) >= 8:
            return multiple()
        twin = self.make(host)
        for s in twin.both:
            s.setsockopt(TCP, socket.TCP_NODELAY, 1)
        return twin

    @rule(target=sockets, keep_listener=st.booleans())
    def connected(self, keep_listener: bool) -> Any:
        """The way to a connection that most programs take."""
        if len(self.all) > 5:
            return multiple()
        listener, client = self.new(1), self.new(0)
        for x, ours in ((listener.kernel, False), (listener.ours, True)):
            x.setsockopt(SOL, socket.SO_REUSEADDR, 1)
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
            return self.name(address)

        self.same("accept()", s, call)
        if not got:
            return multiple()
        return self.add(Twin(s.host, got[False], got[True]))

    @rule(s=sockets, how=st.sampled_from(SHUT))
    def shutdown(self, s: Twin, how: int) -> None:
        if outcome(lambda: s.kernel.getpeername()) == "ENOTCONN" and self.state(s.kernel) == 7:
            return  # DIFFERENCES: shutdown of a stream before there is a connection
        self.same(f"shutdown({how})", s, lambda x, ours: x.shutdown(how))

    @rule(s=sockets, n=st.sampled_from([0, 1, 3]))
    def send_urgent(self, s: Twin, n: int) -> None:
        self.urgent = self.urgent or n > 0
        self.same(
            f"send({n}, OOB)", s, lambda x, ours: x.send(DATA[:n], socket.MSG_OOB | socket.MSG_NOSIGNAL)
        )

    @rule(s=sockets, n=st.sampled_from([0, 1, 50]), peek=st.booleans())
    def recv_urgent(self, s: Twin, n: int, peek: bool) -> None:
        mask = socket.MSG_OOB | (socket.MSG_PEEK if peek else 0)
        self.same(f"recv({n}, OOB, {peek})", s, lambda x, ours: x.recvmsg(n, 0, mask)[0])

    @rule(s=sockets, port=st.integers(0, 1))
    def send_to(self, s: Twin, port: int) -> None:
        """The address says nothing."""
        number = self.ports[port]
        self.same("sendto()", s, lambda x, ours: x.sendto(b"abc", self.address(1, number, ours=ours)))

    @rule(
        s=sockets,
        option=st.sampled_from(OPTIONS),
        value=st.none() | st.sampled_from([0, 1, 7, 100, -1, 40000]),
    )
    def option(self, s: Twin, option: tuple[int, int], value: int | None) -> None:
        if option in TIMING and value is not None:
            value = TIMING[option]
        if option == (SOL, socket.SO_RCVLOWAT) and value == -1:
            value = 1  # the largest low-water mark: DIFFERENT in tests/test_socket_options_linux.py
        self.set_and_get(s, option, value)

    # ---- what is compared all the time
    @staticmethod
    def state(x: Any) -> int:
        info: bytes = x.getsockopt(TCP, socket.TCP_INFO, 248)
        return info[0]

    def over(self, s: Twin) -> bool:
        info = s.ours.stack.core.tcp_info(s.ours._handle)
        return info.state in ("CLOSED", "TIME_WAIT") and info.peer[1] != 0

    def look(self, s: Twin, x: Any) -> dict[str, Any]:
        seen = super().look(s, x) | {"state": self.state(x)}
        if seen["state"] == 7 and not self.over(s) and not s.bound:
            seen["name"] = seen["name"][0]  # DIFFERENCES: the port after a connection attempt failed
        return seen


Worlds.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40)


def test_every_call_in_every_state_is_as_on_linux(host: str) -> None:
    Worlds.namespace = host
    case = Worlds.TestCase()
    case.settings = Worlds.TestCase.settings
    case.runTest()
