# SPDX-License-Identifier: Apache-2.0
"""The same calls of UDP sockets on the kernel and on this stack: the same results, errors and readiness.

As tests/test_socket_machine.py, which has the worlds. What differs on purpose is kept out of the machine's way where it
says DIFFERENCES (tests/socket_worlds.py).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import multiple, rule
from socket_machine import DATA, IP, SHUT, SOL, TCP, Machine, Twin
from socket_worlds import DGRAM, namespace
from support import examples

pytestmark = [pytest.mark.netns, pytest.mark.hypothesis, pytest.mark.timeout(600)]

OPTIONS = [
    *[
        (SOL, getattr(socket, f"SO_{n}"))
        for n in ("ACCEPTCONN", "TYPE", "DOMAIN", "PROTOCOL", "KEEPALIVE", "REUSEADDR")
    ],
    *[(SOL, getattr(socket, f"SO_{n}")) for n in ("RCVLOWAT", "OOBINLINE", "BROADCAST", "REUSEPORT")],
    *[(IP, getattr(socket, f"IP_{n}")) for n in ("TTL", "TOS")],
    (TCP, socket.TCP_NODELAY),
]
SIZES = st.sampled_from([0, 1, 100, 5000])


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with namespace() as name:
        yield name


class Worlds(Machine):
    sockets = Machine.sockets
    kind = DGRAM

    @rule(target=sockets, host=st.integers(0, 1))
    def new(self, host: int) -> Any:
        return self.make(host) if len(self.all) < 6 else multiple()

    @rule(target=sockets, port=st.integers(0, 1), connect=st.booleans())
    def pair(self, port: int, connect: bool) -> Any:
        """The way to a conversation that most programs take."""
        if len(self.all) > 4:
            return multiple()
        server, client = self.make(1), self.make(0)
        self.bind(server, port, any_address=False)
        if connect:
            self.connect(client, port)
        return multiple(server, client)

    @rule(s=sockets, port=st.integers(0, 2), any_address=st.booleans())
    def bind(self, s: Twin, port: int, any_address: bool) -> None:
        number = 0 if port == 2 else self.ports[port]
        if self.tried_only(s):
            return

        def call(x: Any, ours: bool) -> Any:
            address = self.address(s.host, number, ours=ours)
            return x.bind(("0.0.0.0", 0) if any_address and number == 0 else address)

        done = self.same(f"bind({number})", s, call) is None
        s.bound = (done and not (any_address and number == 0)) or s.bound

    @rule(s=sockets, port=st.integers(0, 1))
    def connect(self, s: Twin, port: int) -> None:
        """To the other host: of its own each kernel has its own idea. DIFFERENCES: connect to port 0."""
        number = self.ports[port]
        if s.host == 1 and not s.bound:
            return  # Linux would choose 127.0.0.1 as its address
        self.same(
            f"connect({number})", s, lambda x, ours: x.connect(self.address(1 - s.host, number, ours=ours))
        )

    @rule(s=sockets, port=st.integers(0, 2), n=SIZES)
    def send_to(self, s: Twin, port: int, n: int) -> None:
        number = 0 if port == 2 else self.ports[port]
        if s.host == 1 and not s.bound:
            return  # as above
        self.same(
            f"sendto({n}, {number})",
            s,
            lambda x, ours: x.sendto(DATA[:n], self.address(1 - s.host, number, ours=ours)),
        )

    @rule(s=sockets, how=st.sampled_from(SHUT))
    def shutdown(self, s: Twin, how: int) -> None:
        self.same(f"shutdown({how})", s, lambda x, ours: x.shutdown(how))

    @rule(s=sockets, backlog=st.integers(0, 1))
    def calls_of_streams(self, s: Twin, backlog: int) -> None:
        self.same("listen()", s, lambda x, ours: x.listen(backlog))
        self.same("accept()", s, lambda x, ours: x.accept())

    @rule(s=sockets)
    def urgent(self, s: Twin) -> None:
        self.same("send(OOB)", s, lambda x, ours: x.send(b"!", socket.MSG_OOB))

    @rule(
        s=sockets,
        option=st.sampled_from(OPTIONS),
        value=st.none() | st.sampled_from([0, 1, 7, 100, -1, 300, 40000]),
    )
    def option(self, s: Twin, option: tuple[int, int], value: int | None) -> None:
        self.set_and_get(s, option, value)

    @staticmethod
    def tried_only(s: Twin) -> bool:
        """DIFFERENCES: the port of a datagram socket that could not send."""
        return s.ours.getsockname()[1] == 0 != s.kernel.getsockname()[1]

    def look(self, s: Twin, x: Any) -> dict[str, Any]:
        return super().look(s, x) | ({"name": None} if self.tried_only(s) else {})


Worlds.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40)


def test_every_call_in_every_state_is_as_on_linux(host: str) -> None:
    Worlds.namespace = host
    case = Worlds.TestCase()
    case.settings = Worlds.TestCase.settings
    case.runTest()
