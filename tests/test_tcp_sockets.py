# SPDX-License-Identifier: Apache-2.0
"""TCP sockets as handles: generations, events (edge) and readiness (level), errors reported once."""

from __future__ import annotations

import errno
import random

import pytest
from bypass._core import ffi, lib
from conversation import PEER, US
from tcp_talk import Talk, stream

IN, OUT, ERR, HUP, RDHUP = (getattr(lib, f"BYPASS_{n}") for n in ("IN", "OUT", "ERR", "HUP", "RDHUP"))
STREAM = lib.BYPASS_STREAM
BADF = -errno.EBADF


def every_call(t: Talk, sock: int) -> dict[str, int]:
    """The result of each socket call on a handle."""
    c = t.stack.c
    end = ffi.new("struct bypass_endpoint *")
    buf = ffi.new("uint8_t[16]")
    info = ffi.new("struct bypass_tcp_info *")
    return {
        "bind": lib.bypass_bind(c, sock, end),
        "listen": lib.bypass_listen(c, sock, 1),
        "accept": lib.bypass_accept(c, sock),
        "connect": lib.bypass_connect(c, sock, end),
        "send": lib.bypass_send(c, sock, buf, 1, 0),
        "recv": lib.bypass_recv(c, sock, buf, 1, 0),
        "sendto": lib.bypass_sendto(c, sock, buf, 1, 0, end),
        "recvfrom": lib.bypass_recvfrom(c, sock, buf, 1, 0, end),
        "shutdown": lib.bypass_shutdown(c, sock, 0),
        "local": lib.bypass_local(c, sock, end),
        "peer": lib.bypass_peer(c, sock, end),
        "setopt": lib.bypass_setopt(c, sock, lib.BYPASS_TCP_NODELAY, 1),
        "getopt": lib.bypass_getopt(c, sock, lib.BYPASS_TCP_NODELAY),
        "error": lib.bypass_error(c, sock),
        "ready": lib.bypass_ready(c, sock),
        "set_user": lib.bypass_set_user(c, sock, 1),
        "tcp_info": lib.bypass_tcp_info(c, sock, info),
        "close": lib.bypass_close(c, sock),
        "abort": lib.bypass_abort(c, sock),
    }


@pytest.mark.parametrize("kind", ["closed", "reused", "never", "negative", "far"])
def test_a_stale_handle_is_refused_by_every_call(kind: str) -> None:
    with Talk() as t:
        old = t.stack.socket(STREAM)
        t.stack.close_socket(old)
        new = t.stack.socket(STREAM)
        assert new & 0xFFFFFFFF == old & 0xFFFFFFFF, "the same entry"
        assert new != old
        if kind == "closed":
            t.stack.close_socket(new)
        handle = {"never": 77, "negative": -5, "far": (1 << 62) + 1}.get(kind, old)
        assert set(every_call(t, handle).values()) == {BADF}


def test_a_handle_is_never_that_of_another_connection() -> None:
    with Talk() as t:
        seen = set()
        for _ in range(200):
            sock = t.stack.socket(STREAM)
            assert sock not in seen
            seen.add(sock)
            t.stack.close_socket(sock)


def test_events_of_a_closed_handle_are_not_reported() -> None:
    with Talk() as t:
        conn = t.established()
        t.inject_ip(t.segment("P. 1:11 ack 1"))
        t.events.clear()
        t.stack.close_socket(conn)
        again = t.stack.socket(STREAM)
        t.settle()
        assert [e.sock for e in t.events if e.sock in (conn, again)] == []
        t.out()


def test_events_carry_what_the_program_set_and_come_oldest_first() -> None:
    with Talk() as t:
        listener = t.server()
        t.stack.set_user(listener, 0xDEADBEEF)
        t.peer("S 0:0")
        t.out()
        t.peer(". 1:1", "P. 1:2")
        assert [(e.sock, e.user, e.mask) for e in t.events] == [(listener, 0xDEADBEEF, IN)]
        conn = t.accept()
        t.stack.set_user(conn, 7)
        t.settle()
        assert [(e.sock, e.user) for e in t.events[1:]] == [(conn, 7)]
        assert t.taken(conn) == IN | OUT, "the data that came before accept() is told of"
        t.advance(0.1)
        t.out()


def test_readiness_is_a_level() -> None:
    with Talk() as t:
        fresh = t.stack.socket(STREAM)
        assert t.stack.ready(fresh) == OUT | HUP
        conn = t.established()
        assert t.stack.ready(t.listener) == 0
        assert t.stack.ready(conn) == OUT
        t.peer("P. 1:11")
        assert t.stack.ready(conn) == IN | OUT
        t.read()
        assert t.stack.ready(conn) == OUT
        t.peer("F. 11:11")
        assert t.stack.ready(conn) == IN | OUT | RDHUP
        t.shutdown()
        assert t.stack.ready(conn) & (IN | RDHUP | HUP) == IN | RDHUP | HUP
        t.peer("R 12:12")
        assert t.stack.ready(conn) & HUP
        t.out()


def test_a_queued_connection_that_dies_leaves_the_queue() -> None:
    with Talk() as t:
        listener = t.server()
        t.peer("S 0:0")
        t.out()
        t.peer(". 1:1")
        assert t.stack.ready(listener) == IN
        t.peer("R 1:1")
        assert t.stack.ready(listener) == 0
        with pytest.raises(BlockingIOError):
            t.accept()


def test_a_queued_connection_keeps_what_came_and_its_end() -> None:
    with Talk() as t:
        t.server()
        t.peer("S 0:0")
        t.out()
        t.peer(". 1:1", "FP. 1:11")
        t.accept()
        assert t.read() == stream(1, 11)
        assert t.read() == b""
        assert t.state() == "CLOSE_WAIT"
        t.out()


def test_no_handle_left_leaves_the_connection_queued() -> None:
    with Talk(conns=4) as t:
        listener = t.server()
        t.peer("S 0:0")
        t.out()
        t.peer(". 1:1")
        held = [t.stack.socket(STREAM) for _ in range(4 + 64 - 1)]
        assert t.stack.accept(listener) == -errno.ENFILE
        t.stack.close_socket(held.pop())
        assert t.stack.accept(listener) >= 0


# ---- Calls in the wrong state -------------------------------------------------------------------------------------
def test_calls_in_the_wrong_state_say_what_is_wrong() -> None:
    with Talk() as t:
        s = t.stack
        fresh = s.socket(STREAM)
        assert s.send(fresh, b"x") == -errno.EPIPE
        assert s.recv(fresh, 1) == -errno.ENOTCONN
        assert lib.bypass_accept(s.c, fresh) == -errno.EINVAL
        assert s.connect(fresh, (PEER, 0)) == -errno.ECONNREFUSED
        assert s.connect(fresh, ("2001:db8::1", 1)) == -errno.EAFNOSUPPORT
        listener = t.server()
        assert s.connect(listener, (PEER, 1)) == -errno.EISCONN
        assert s.send(listener, b"x") == -errno.EPIPE
        t.peer("S 0:0")
        t.out()
        t.peer(". 1:1")
        conn = t.accept()
        assert s.connect(conn, (PEER, 1)) == -errno.EISCONN
        assert lib.bypass_listen(s.c, conn, 1) == -errno.EINVAL
        assert lib.bypass_accept(s.c, conn) == -errno.EINVAL
        assert lib.bypass_socket(s.c, 77) == -errno.EPROTOTYPE
        pending = s.socket(STREAM)
        assert s.connect(pending, (PEER, 9)) == -errno.EINPROGRESS
        assert s.connect(pending, (PEER, 9)) == -errno.EALREADY
        assert s.send(pending, b"x") == -errno.EAGAIN
        assert s.recv(pending, 1) == -errno.EAGAIN
        t.sent()


@pytest.mark.parametrize(
    ("first", "second", "reuse", "allowed"),
    [
        (US, US, False, False),
        (US, "0.0.0.0", False, False),
        ("0.0.0.0", US, False, False),
        (US, US, True, True),
        ("0.0.0.0", US, True, True),
    ],
)
def test_two_sockets_share_a_port_only_when_both_say_so(
    first: str, second: str, reuse: bool, allowed: bool
) -> None:
    with Talk() as t:
        socks = []
        for i, address in enumerate((first, second)):
            sock = t.stack.socket(STREAM)
            t.stack.setopt(sock, lib.BYPASS_SO_REUSEADDR, reuse)
            socks.append(sock)
            if i == 1 and not allowed:
                with pytest.raises(OSError, match="Address already in use"):
                    t.stack.bind(sock, (address, 80))
                return
            t.stack.bind(sock, (address, 80))
        t.stack.listen(socks[0], 1)
        with pytest.raises(OSError, match="Address already in use"):
            t.stack.listen(socks[1], 1)


def test_a_foreign_address_cannot_be_bound() -> None:
    with Talk() as t:
        sock = t.stack.socket(STREAM)
        with pytest.raises(OSError, match="Cannot assign"):
            t.stack.bind(sock, (PEER, 80))
        t.stack.bind(sock, ("", 0))
        assert t.stack.local(sock)[1] >= 32768
        with pytest.raises(OSError, match="Invalid argument"):
            t.stack.bind(sock, ("", 81))


def test_listening_without_a_name_chooses_a_port() -> None:
    with Talk() as t:
        sock = t.stack.socket(STREAM)
        t.stack.listen(sock, 1)
        address, port = t.stack.local(sock)
        assert (address, port >= 32768) == ("0.0.0.0", True)
        info = t.stack.tcp_info(sock)
        assert (info.state, info.local) == ("LISTEN", (address, port))
        assert t.stack.error(sock) == 0


def test_a_connection_speaks_through_the_datagram_calls_too() -> None:
    with Talk() as t:
        conn = t.established()
        t.peer("P. 1:11")
        assert t.stack.recvfrom(conn, 100) == (stream(1, 11), (PEER, 40000), 10)
        assert t.stack.sendto(conn, stream(1, 6), None) == 5
        t.hears("P. 1:6")
        assert t.stack.sendto(conn, stream(6, 7), (PEER, 1)) == 1, "the address says nothing, as on Linux"
        t.peer(". 11:11 ack 6")
        t.hears("P. 6:7")


def test_too_many_connections_are_an_error_of_connect() -> None:
    with Talk(conns=2) as t:
        socks = [t.stack.socket(STREAM) for _ in range(3)]
        results = [t.stack.connect(s, (PEER, 9)) for s in socks]
        assert results == [-errno.EINPROGRESS, -errno.EINPROGRESS, -errno.ENOBUFS]
        assert t.stack.ready(socks[2]) == OUT | HUP
        t.stack.close_socket(socks[0])
        assert t.stack.connect(socks[2], (PEER, 9)) == -errno.EINPROGRESS, "it may be tried again"
        t.sent()


def test_without_an_address_of_our_own_nothing_is_reached() -> None:
    with Talk() as t:
        t.stack.addr_del(US)
        sock = t.stack.socket(STREAM)
        assert t.stack.connect(sock, (PEER, 9)) == -errno.ENETUNREACH


# ---- The flow table -----------------------------------------------------------------------------------------------
def test_many_connections_that_come_and_go_stay_findable() -> None:
    """Insertions and removals in a nearly full table against a plain set."""
    rng = random.Random(7)
    with Talk(conns=256, frames=1024, iss=None) as t:
        t.server(backlog=1000)
        alive: dict[int, int] = {}
        for step in range(3000):
            port = rng.randrange(1, 400)
            t.peer_port, t.iss = port, None
            if port in alive:
                t.iss = alive.pop(port)
                t.peer("R 1:1")
            elif len(alive) < 250:
                t.peer("S 0:0")
                t.out()
                t.peer(". 1:1")
                assert t.iss is not None
                alive[port] = t.iss
            if step % 500 == 0:
                assert sorted(i.peer[1] for i in t.stack.conns()) == sorted(alive)
                assert t.stack.port_users(STREAM, None, 80) == len(alive) + 1
        assert sorted(i.peer[1] for i in t.stack.conns()) == sorted(alive)
        assert t.stack.port_users(STREAM, US, 80) == len(alive) + 1
        assert t.stack.port_users(STREAM, None, 81) == 0
        t.sent()
