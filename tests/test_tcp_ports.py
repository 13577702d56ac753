# SPDX-License-Identifier: Apache-2.0
"""TCP: local names: SO_REUSEADDR and SO_REUSEPORT as Linux has them, ports of active opens (RFC 6056), and TIME_WAIT's
bound and reuse (RFC 6191)."""

from __future__ import annotations

import errno
import itertools
import socket
from collections import Counter
from typing import Any

import pytest
from bypass._core import lib
from conversation import OTHER, PEER, US
from tcp_talk import Talk
from wire import ACK, FIN, SYN, TCP, ipv4, parse_ip, tcp

ADDR, PORTOPT = "SO_REUSEADDR", "SO_REUSEPORT"
ANY = "0.0.0.0"


def bound(t: Talk, address: str, port: int, *options: str, listening: bool = False) -> int:
    """0 or -errno."""
    sock = t.stack.socket(lib.BYPASS_STREAM)
    for name in options:
        t.stack.setopt(sock, getattr(lib, f"BYPASS_{name}"), 1)
    try:
        t.stack.bind(sock, (address, port))
        if listening:
            t.stack.listen(sock, 5)
    except OSError as error:
        t.stack.close_socket(sock)
        return -(error.errno or 0)
    return 0


def linux(first: tuple[Any, ...], second: tuple[Any, ...]) -> int:
    """What the kernel says to the second, on loopback."""
    socks = []
    try:
        port = 0
        for address, options, listening in (first, second):
            s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            socks.append(s)
            for name in options:
                s.setsockopt(socket.SOL_SOCKET, getattr(socket, name), 1)
            s.bind((address, port))
            if listening:
                s.listen(5)
            port = s.getsockname()[1]
    except OSError as error:
        return -(error.errno or 0)
    finally:
        for s in socks:
            s.close()
    return 0


OPTIONS: tuple[tuple[str, ...], ...] = ((), (ADDR,), (PORTOPT,), (ADDR, PORTOPT))


@pytest.mark.parametrize("first_options", OPTIONS)
@pytest.mark.parametrize("second_options", OPTIONS)
@pytest.mark.parametrize("first_listens", [False, True])
@pytest.mark.parametrize("second_listens", [False, True])
@pytest.mark.parametrize(
    ("first_any", "second_any"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_two_sockets_may_share_a_port_exactly_where_the_kernel_lets_them(
    first_options: tuple[str, ...],
    second_options: tuple[str, ...],
    first_listens: bool,
    second_listens: bool,
    first_any: bool,
    second_any: bool,
) -> None:
    """Asked of the kernel itself, in the same run."""
    want = linux(
        (ANY if first_any else "127.0.0.1", first_options, first_listens),
        (ANY if second_any else "127.0.0.1", second_options, second_listens),
    )
    with Talk(iss=None) as t:
        assert bound(t, ANY if first_any else US, 4000, *first_options, listening=first_listens) == 0
        got = bound(t, ANY if second_any else US, 4000, *second_options, listening=second_listens)
    assert got == want


@pytest.mark.parametrize("server_option", [(), (ADDR,)])
@pytest.mark.parametrize("again_option", [(), (ADDR,)])
@pytest.mark.parametrize("ending", ["established", "time_wait"])
def test_a_server_starts_again_beside_its_old_connections_with_reuseaddr(
    server_option: tuple[str, ...], again_option: tuple[str, ...], ending: str
) -> None:
    with Talk() as t:
        t.established(SO_REUSEADDR=int(bool(server_option)))
        if ending == "time_wait":
            t.close_sock()
            t.out()
            t.peer("F. 1:1 ack 2")
            t.out()
            assert t.state() == "TIME_WAIT"
        t.stack.close_socket(t.listener)
        got = bound(t, ANY, 80, *again_option, listening=True)
        assert got == (0 if server_option and again_option else -errno.EADDRINUSE)


def listeners(t: Talk, n: int) -> list[int]:
    made = []
    for _ in range(n):
        sock = t.stack.socket(lib.BYPASS_STREAM)
        t.stack.setopt(sock, lib.BYPASS_SO_REUSEPORT, 1)
        t.stack.bind(sock, (ANY, 80))
        t.stack.listen(sock, 500)
        made.append(sock)
    return made


def flood(t: Talk, ports: range) -> None:
    """A handshake from each port."""
    for port in ports:
        t.peer_port, t.iss = port, None
        t.peer("S 0:0")
        t.out()
        t.peer(". 1:1")


def accepted(t: Talk, socks: list[int]) -> dict[int, int]:
    """Which of them each peer's port came to."""
    where = {}
    for i, listener in enumerate(socks):
        while (conn := t.stack.accept(listener)) >= 0:
            where[t.stack.peer(conn)[1]] = i
            t.stack.abort(conn)
    t.sent()
    return where


def test_flows_spread_over_the_listeners_of_a_port_and_each_stays_with_its_own() -> None:
    with Talk(iss=None, conns=500, frames=2048) as t:
        socks = listeners(t, 4)
        flood(t, range(1000, 1200))
        first = accepted(t, socks)
        assert len(first) == 200
        assert all(25 <= n <= 80 for n in Counter(first.values()).values())
        assert len(set(first.values())) == 4
        t.advance(1)
        flood(t, range(1000, 1200))
        assert accepted(t, socks) == first, "the same flow, the same listener"
        t.stack.close_socket(socks[3])
        flood(t, range(1000, 1200))
        after = accepted(t, socks[:3])
        assert all(after[p] == i for p, i in first.items() if i != 3), "only those of the one that left move"


def test_a_listener_on_the_address_comes_before_a_group_on_all_of_them() -> None:
    with Talk(iss=None) as t:
        group = listeners(t, 3)
        own = t.stack.socket(lib.BYPASS_STREAM)
        t.stack.setopt(own, lib.BYPASS_SO_REUSEPORT, 1)
        t.stack.bind(own, (US, 80))
        t.stack.listen(own, 50)
        flood(t, range(1000, 1020))
        assert set(accepted(t, [*group, own]).values()) == {3}


# ---- Ports of active opens (RFC 6056) -------------------------------------------------------------------------------
def connect(t: Talk, address: str, port: int) -> int:
    """The local port, or -errno."""
    sock = t.stack.socket(lib.BYPASS_STREAM)
    result = t.stack.connect(sock, (address, port))
    if result != -errno.EINPROGRESS:
        t.stack.close_socket(sock)
        return int(result)
    local = int(t.stack.local(sock)[1])
    t.stack.close_socket(sock)
    t.sent()
    return local


def test_ports_are_of_the_dynamic_range_and_each_is_another() -> None:
    with Talk(iss=None) as t:
        ports = [connect(t, PEER, 443) for _ in range(500)]
        assert all(32768 <= p <= 60999 for p in ports)
        assert len(set(ports)) == 500


def test_a_peer_cannot_count_connections_to_others_by_its_own_ports() -> None:
    """RFC 6056 3.3.4: each destination has its own counter."""
    with Talk(iss=None, neighbours=(PEER, OTHER)) as t:
        a = [connect(t, PEER, 443) for _ in range(2)]
        for _ in range(300):
            connect(t, OTHER, 443)
        b = connect(t, PEER, 443)
        assert 0 < (b - a[1]) % 28232 <= 4


def test_the_first_port_of_each_peer_and_each_start_is_another() -> None:
    seen = set()
    for seed in range(20):
        with Talk(iss=None, seed=seed) as t:
            seen |= {connect(t, PEER, 443), connect(t, PEER, 80)}
    assert len(seen) == 40


def test_steps_between_ports_cannot_be_foretold() -> None:
    with Talk(iss=None) as t:
        ports = [connect(t, PEER, 443) for _ in range(100)]
        steps = Counter((b - a) % 28232 for a, b in itertools.pairwise(ports))
        assert set(steps) == {1, 2, 3, 4}


def test_one_port_serves_many_peers() -> None:
    """Only flows have to differ: more connections than ports."""
    with Talk(iss=None, conns=64, neighbours=(PEER, OTHER)) as t:
        socks = []
        for address in (PEER, OTHER):
            for port in (80, 81):
                sock = t.stack.socket(lib.BYPASS_STREAM)
                t.stack.setopt(sock, lib.BYPASS_SO_REUSEADDR, 1)
                t.stack.bind(sock, (US, 5000))
                assert t.stack.connect(sock, (address, port)) == -errno.EINPROGRESS
                socks.append(sock)
        assert {t.stack.local(s)[1] for s in socks} == {5000}
        again = t.stack.socket(lib.BYPASS_STREAM)
        t.stack.setopt(again, lib.BYPASS_SO_REUSEADDR, 1)
        t.stack.bind(again, (US, 5000))
        assert t.stack.connect(again, (PEER, 80)) == -errno.EADDRNOTAVAIL
        t.sent()


def test_a_port_that_somebody_bound_is_not_chosen() -> None:
    with Talk(iss=None) as t:
        first = connect(t, PEER, 443)
        for n in range(1, 30):
            sock = t.stack.socket(lib.BYPASS_STREAM)
            t.stack.bind(sock, (US, 32768 + (first - 32768 + n) % 28232))
        assert (connect(t, PEER, 443) - first) % 28232 == 30


# ---- TIME_WAIT ---------------------------------------------------------------------------------------------------
def into_time_wait(t: Talk, port: int) -> None:
    t.peer_port, t.iss = port, None
    t.peer("S 0:0")
    t.out()
    t.peer(". 1:1")
    t.accept()
    t.close_sock()
    t.out()
    t.peer("F. 1:1 ack 2")
    t.out()
    assert t.state() == "TIME_WAIT"


def test_time_wait_is_bounded_and_the_oldest_goes_first() -> None:
    with Talk(iss=None, config={"time_wait": 3}) as t:
        t.server()
        for port in range(1, 6):
            into_time_wait(t, port)
            t.advance(0.01)
        assert sorted(i.peer[1] for i in t.stack.conns()) == [3, 4, 5]
        assert t.counted()["tcp_time_wait_overflow"] == 2


def test_without_the_option_nothing_takes_a_time_waits_place() -> None:
    for reuse in (False, True):
        with Talk(iss=None, config={"tw_reuse": reuse}) as t:
            t.ts = (t.now, 0)
            t.client(SO_REUSEADDR=1)
            t.out()
            t.peer("S. 0:0 <mss 1460, ts 1000 0>")
            t.out()
            t.close_sock()
            t.out()
            t.peer("F. 1:1 ack 2")
            t.out()
            t.advance(5)
            sock = t.stack.socket(lib.BYPASS_STREAM)
            t.stack.setopt(sock, lib.BYPASS_SO_REUSEADDR, 1)
            t.stack.bind(sock, (US, 80))
            got = t.stack.connect(sock, (PEER, 40000))
            assert got == (-errno.EINPROGRESS if reuse else -errno.EADDRNOTAVAIL)
            t.sent()


def acknowledged(t: Talk, frame: bytes, flags: int = ACK) -> int:
    """The peer acknowledges this frame and all before it; what it acknowledged."""
    raw = parse_ip(frame[14:]).payload
    end = int.from_bytes(raw[4:8], "big") + len(raw) - (raw[12] >> 4) * 4 + (raw[13] & FIN)
    opts = b"\x01\x01\x08\x0a" + t.ts_base.to_bytes(4, "big") + raw[24:28]
    segment = tcp(PEER, US, 40000, 80, t.peer_iss + 1, end, flags, 65535, options=opts)
    t.inject_ip(ipv4(PEER, US, TCP, segment))
    return end


def test_the_next_connection_of_a_flow_begins_beyond_the_last_ones_numbers() -> None:
    """RFC 1122 4.2.2.13 (1), also when it sent faster than the clock of initial sequence numbers runs: 30 MB in no
    time, while 1.1 s of that clock are 17 MB."""
    with Talk(iss=None, frames=4096, sndbuf=1 << 22) as t:
        t.ts = (t.now, 0)
        t.client(SO_REUSEADDR=1)
        t.out()
        t.peer("S. 0:0 win 65535 <mss 1460, ts 1000 0, nop, ws 10>")
        t.out()
        sent = 0
        while sent < 30 << 20:
            sent += max(t.stack.send(t.sock, bytes(1 << 20)), 0)
            t.settle()
            for frame in t.sent()[-1:]:
                acknowledged(t, frame)
        t.stack.close_socket(t.sock)
        end = None
        while t.state() == "FIN_WAIT_1":
            frame = t.sent()[-1]
            end = acknowledged(t, frame, ACK | (FIN if parse_ip(frame[14:]).payload[13] & FIN else 0))
        assert t.state() == "TIME_WAIT"
        assert end is not None
        t.advance(1.1)
        t.sent()
        t.client(SO_REUSEADDR=1)
        [frame] = t.sent()
        raw = parse_ip(frame[14:]).payload
        assert raw[13] == SYN
        assert 65536 <= (int.from_bytes(raw[4:8], "big") - end) % 2**32 < 2**31
