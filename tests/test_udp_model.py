# SPDX-License-Identifier: Apache-2.0
"""UDP sockets against a plain model: who gets a datagram, what a name means, what closing leaves."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest
from bypass._core import lib
from conversation import OTHER, PEER, PEER_MAC, US, Conversation, broadcast
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from support import examples
from wire import UDP, ipv4, udp

from bypass.core import Address, Config

SECOND_US = "192.0.2.5"
ANY = "0.0.0.0"
BCAST = "192.0.2.255"
MOST = 6

ports = st.sampled_from([7, 8, 71])  # 7 and 71 share a bucket of the table
hosts = st.sampled_from([PEER, OTHER])


@dataclass(eq=False)
class Socket:
    reuse: bool = False
    bound: int = 0  # order of binding; 0: not yet
    local: Address = (ANY, 0)
    auto: bool = False  # connect() chose the address
    peer: Address | None = None
    queue: list[tuple[bytes, Address]] = field(default_factory=list)

    def takes(self, src: Address, dst: Address) -> int:
        """How well it fits, -1: not at all."""
        if not self.bound or self.local[1] != dst[1]:
            return -1
        if self.local[0] not in (ANY, dst[0]) or self.peer not in (None, src):
            return -1
        return (self.local[0] != ANY) + 2 * (self.peer is not None)


class UdpModel(RuleBasedStateMachine):
    sockets = Bundle("sockets")

    def __init__(self) -> None:
        super().__init__()
        self.c = Conversation(config=Config(conns=16, socks=MOST))
        self.c.stack.addr_add(SECOND_US, 24)
        for host in (PEER, OTHER):
            self.c.stack.nexthop_set(host, PEER_MAC)
        self.open: dict[int, Socket] = {}
        self.order = 0
        self.sent = 0

    def teardown(self) -> None:
        self.c.sent()
        self.c.close()

    @rule(target=sockets, reuse=st.booleans())
    def create(self, reuse: bool) -> object:
        if len(self.open) == MOST:
            with pytest.raises(OSError, match="Too many open files"):
                self.c.stack.socket(lib.BYPASS_DGRAM)
            return multiple()
        sock = self.c.stack.socket(lib.BYPASS_DGRAM)
        self.c.stack.setopt(sock, lib.BYPASS_SO_REUSEADDR, reuse)
        self.open[sock] = Socket(reuse)
        return sock

    @rule(sock=sockets, address=st.sampled_from([ANY, US, SECOND_US, PEER]), port=ports)
    def bind(self, sock: int, address: str, port: int) -> None:
        expected = self.bind_error(sock, address, port)
        if expected:
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
                self.c.stack.bind(sock, (address, port))
            assert caught.value.errno == expected
            return
        self.c.stack.bind(sock, (address, port))
        self.order += 1
        self.open[sock].bound = self.order
        self.open[sock].local = (address, port)

    def bind_error(self, sock: int, address: str, port: int) -> int:
        s = self.open.get(sock)
        if s is None:
            return errno.EBADF
        if s.bound:
            return errno.EINVAL
        if address == PEER:
            return errno.EADDRNOTAVAIL
        for o in self.open.values():
            overlap = ANY in (address, o.local[0]) or o.local[0] == address
            if o.bound and o.local[1] == port and overlap and not (o.reuse and s.reuse):
                return errno.EADDRINUSE
        return 0

    @rule(sock=sockets, host=hosts, port=ports)
    def connect(self, sock: int, host: str, port: int) -> None:
        s = self.open.get(sock)
        if s is None:
            assert self.c.stack.connect(sock, (host, port)) == -errno.EBADF
            return
        if not s.bound:
            return  # it would choose a port that the model cannot know
        assert self.c.stack.connect(sock, (host, port)) == 0
        s.peer = (host, port)
        if s.local[0] == ANY or s.auto:
            s.local, s.auto = (US, s.local[1]), True

    @rule(sock=sockets)
    def disconnect(self, sock: int) -> None:
        s = self.open.get(sock)
        assert self.c.stack.connect(sock, (ANY, 0)) == (-errno.EBADF if s is None else 0)
        if s is not None:
            s.peer = None
            if s.auto:
                s.local, s.auto = (ANY, s.local[1]), False

    @rule(sock=sockets)
    def close(self, sock: int) -> None:
        if self.open.pop(sock, None) is not None:
            self.c.stack.close_socket(sock)

    @rule(
        host=hosts,
        sport=ports,
        dst=st.sampled_from([US, SECOND_US, BCAST]),
        dport=ports,
        n=st.sampled_from([3, 300, 900]),
    )
    def arrive(self, host: str, sport: int, dst: str, dport: int, n: int) -> None:
        self.sent += 1
        data = self.sent.to_bytes(4, "big") * (n // 4 + 1)
        packet = ipv4(host, dst, UDP, udp(host, dst, sport, dport, data))
        fits = [(s.takes((host, sport), (dst, dport)), s.bound, s) for s in self.open.values()]
        fits = [f for f in fits if f[0] >= 0]
        if dst == BCAST:
            self.c.inject(broadcast(packet))
            getters = [f[2] for f in fits]
        else:
            self.c.inject_ip(packet)
            getters = [max(fits, key=lambda f: f[:2])[2]] if fits else []
        for s in getters:
            s.queue.append((data, (host, sport)))

    @rule(sock=sockets)
    def receive(self, sock: int) -> None:
        s = self.open.get(sock)
        got = self.c.stack.recvfrom(sock, 2000)
        if s is None:
            assert got == -errno.EBADF
        elif not s.queue:
            assert got == -errno.EAGAIN
        else:
            data, src = s.queue.pop(0)
            assert got == (data, src, len(data))

    @rule(sock=sockets)
    def send(self, sock: int) -> None:
        """From where and to where a connected socket sends."""
        self.c.sent()
        s = self.open.get(sock)
        result = self.c.stack.send(sock, b"out")
        if s is None or s.peer is None:
            assert result == -(errno.EBADF if s is None else errno.EDESTADDRREQ)
            return
        assert result == 3
        [sent] = self.c.sent_udp()
        assert (sent.src, sent.dst, sent.data) == (s.local, s.peer, b"out")

    @invariant()
    def names_and_readiness_are_right(self) -> None:
        for sock, s in self.open.items():
            assert self.c.stack.local(sock) == s.local
            assert bool(self.c.stack.ready(sock) & lib.BYPASS_IN) == bool(s.queue)
        audit = self.c.stack.audit()
        assert audit["udp_socks"] == len(self.open)
        held = sum(len(data) > 256 for s in self.open.values() for data, _ in s.queue)
        assert self.c.held() <= held


@pytest.mark.hypothesis
def test_udp_sockets_agree_with_the_model() -> None:
    run_state_machine_as_test(UdpModel, settings=settings(max_examples=examples(60), stateful_step_count=40))
