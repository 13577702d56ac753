# SPDX-License-Identifier: Apache-2.0
"""Socket options: which values are good, what comes back, what an accepted connection inherits, what a change does."""

from __future__ import annotations

import errno

import pytest
from bypass._core import lib
from tcp_talk import Talk

STREAM = lib.BYPASS_STREAM
INT_MAX = (1 << 31) - 1

# The values between which a good one lies; others are refused.
LIMITED = {
    "SO_LINGER": (-1, INT_MAX),
    "IP_TTL": (1, 255),
    "IP_MTU_DISCOVER": (1, 2),
    "TCP_KEEPIDLE": (1, 32767),
    "TCP_KEEPINTVL": (1, 32767),
    "TCP_KEEPCNT": (1, 127),
    "TCP_USER_TIMEOUT": (0, INT_MAX),
    "TCP_SYNCNT": (1, 127),
}
SWITCHES = (
    "SO_KEEPALIVE",
    "SO_REUSEADDR",
    "SO_REUSEPORT",
    "SO_OOBINLINE",
    "SO_BROADCAST",
    "TCP_NODELAY",
    "TCP_CORK",
    "TCP_KEEP_FRAMES",
)
# What is set, and what it becomes.
FITTED = {
    "SO_SNDBUF": {1: 4096, 4096: 4096, 100_000: 100_000, 1 << 40: 1 << 30},
    "SO_RCVBUF": {1: 4096, 4096: 4096, 100_000: 100_000, 1 << 40: 1 << 30},
    "SO_RCVLOWAT": {0: 1, 1: 1, 5000: 5000, -1: INT_MAX},
    "IP_TTL": {-1: 64},
    "IP_TOS": {0: 0, 0x28: 0x28, 0xFF: 0xFC, 0x3: 0, 256: 0},
    "TCP_LINGER2": {0: 60, 1: 1, 120: 120, 121: 120, -5: -1},
    "TCP_NOTSENT_LOWAT": {0: 0, 5000: 5000, -1: (1 << 32) - 1},
    "TCP_MAXSEG": {88: 88, 1000: 1000, 32767: 32767, 0: 536},
}
ELSEWHERE = {
    "SO_MAX_PACING_RATE",
    "TCP_ECN",
    "TCP_FASTOPEN",
    "TCP_FASTOPEN_CONNECT",
}  # have tests of their own
FIXED = ("SO_TYPE", "SO_ACCEPTCONN", "IP_MTU")
both = pytest.mark.parametrize("connected", [False, True])


def number(name: str) -> int:
    return int(getattr(lib, f"BYPASS_{name}"))


def some(t: Talk, connected: bool) -> int:
    return t.established() if connected else t.stack.socket(STREAM)


def test_every_option_is_in_one_of_these_tables() -> None:
    names = {n for n in dir(lib) if n.startswith(("BYPASS_SO_", "BYPASS_IP_", "BYPASS_TCP_"))}
    known = {*LIMITED, *SWITCHES, *FITTED, *FIXED, "TCP_QUICKACK", *ELSEWHERE}
    assert {n.removeprefix("BYPASS_") for n in names} - ELSEWHERE == known - ELSEWHERE


@both
@pytest.mark.parametrize("name", LIMITED)
def test_a_value_between_the_limits_comes_back_and_others_are_refused(name: str, connected: bool) -> None:
    low, high = LIMITED[name]
    with Talk() as t:
        sock = some(t, connected)
        for value in (low, high):
            t.stack.setopt(sock, number(name), value)
            assert t.stack.getopt(sock, number(name)) == value
        refused = {low - 1, high + 1} - FITTED.get(name, {}).keys()
        for value in refused:
            with pytest.raises(OSError, match="Invalid argument"):
                t.stack.setopt(sock, number(name), value)
        assert t.stack.getopt(sock, number(name)) == high, "a refused value changes nothing"
        t.stack.setopt(sock, lib.BYPASS_SO_LINGER, -1)


@both
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_on_or_off(name: str, connected: bool) -> None:
    with Talk() as t:
        sock = some(t, connected)
        for value, back in ((1, 1), (0, 0), (7, 1), (0, 0), (-1, 1)):
            t.stack.setopt(sock, number(name), value)
            assert t.stack.getopt(sock, number(name)) == back


@both
@pytest.mark.parametrize("name", FITTED)
def test_a_value_is_made_to_fit_as_linux_does(name: str, connected: bool) -> None:
    with Talk() as t:
        sock = some(t, connected)
        for value, back in FITTED[name].items():
            t.stack.setopt(sock, number(name), value)
            if not (connected and name == "TCP_MAXSEG"):
                assert t.stack.getopt(sock, number(name)) == back
        if name == "TCP_MAXSEG":
            for bad in (1, 87, 32768):
                with pytest.raises(OSError, match="Invalid argument"):
                    t.stack.setopt(sock, number(name), bad)


@pytest.mark.parametrize("name", [*LIMITED, *SWITCHES, *FITTED])
def test_an_accepted_connection_inherits_what_its_listener_has(name: str) -> None:
    if name in SWITCHES:
        value = 1
    elif name in LIMITED:
        value = min(LIMITED[name][1], 100)
    else:
        value = max(v for v in FITTED[name] if v < 1 << 20)
    with Talk() as t:
        conn = t.established(**{name: value})
        want = t.stack.getopt(t.listener, number(name))
        if name == "TCP_MAXSEG":
            want = 1460  # what the peer and the path allow is less than what the listener would
        assert t.stack.getopt(conn, number(name)) == want
        t.stack.setopt(conn, lib.BYPASS_SO_LINGER, -1)
        t.option("TCP_CORK", 0)


def test_options_that_only_tell() -> None:
    with Talk() as t:
        conn = t.established()
        fresh = t.stack.socket(STREAM)
        get = t.stack.getopt
        assert [get(h, number("SO_TYPE")) for h in (conn, fresh, t.listener)] == [STREAM] * 3
        assert [get(h, number("SO_ACCEPTCONN")) for h in (conn, fresh, t.listener)] == [0, 0, 1]
        assert get(conn, number("IP_MTU")) == 1500
        with pytest.raises(OSError, match="not connected"):
            get(fresh, number("IP_MTU"))
        for name in FIXED:
            with pytest.raises(OSError, match="Protocol not available"):
                t.stack.setopt(conn, number(name), 1)


def test_options_of_the_moment() -> None:
    with Talk() as t:
        conn = t.established()
        get = t.stack.getopt
        assert get(conn, lib.BYPASS_TCP_MAXSEG) == 1460, "what segments carry now"
        assert get(conn, lib.BYPASS_TCP_QUICKACK) == 1
        t.option("TCP_QUICKACK", 0)
        assert get(conn, lib.BYPASS_TCP_QUICKACK) == 0


def test_quickack_sends_the_acknowledgment_that_was_delayed() -> None:
    with Talk() as t:
        t.established(TCP_QUICKACK=0)
        t.peer("P. 1:11 ack 1")
        t.hears()
        t.option("TCP_QUICKACK", 1)
        t.hears(". 1:1 ack 11")


def test_reading_waits_for_the_low_water_mark() -> None:
    """SO_RCVLOWAT: readiness, not recv() itself."""
    with Talk() as t:
        conn = t.established()
        t.option("SO_RCVLOWAT", 100)
        t.taken(conn)
        t.peer("P. 1:51 ack 1")
        assert not t.taken(conn) & lib.BYPASS_IN
        assert not t.stack.ready(conn) & lib.BYPASS_IN
        t.peer("P. 51:101 ack 1")
        assert t.taken(conn) & lib.BYPASS_IN
        assert t.stack.ready(conn) & lib.BYPASS_IN
        assert len(t.read(30)) == 30, "recv() takes what is there"
        assert not t.stack.ready(conn) & lib.BYPASS_IN
        t.option("SO_RCVLOWAT", 70)
        assert t.taken(conn) & lib.BYPASS_IN, "a lower mark may be reached at once"
        t.peer("F. 101:101 ack 1")
        t.read()
        assert t.stack.ready(conn) & lib.BYPASS_IN, "the end is news below every mark"
        t.advance(0.1)
        t.out()


def test_what_was_never_sent_is_limited_by_its_low_water_mark() -> None:
    """TCP_NOTSENT_LOWAT, tcp(7)."""
    with Talk() as t:
        conn = t.established()
        t.win = 1460
        t.peer(". 1:1 ack 1")
        t.option("TCP_NOTSENT_LOWAT", 2000)
        sent = 0
        while (n := t.stack.send(conn, bytes(20_000))) > 0:
            sent += n
        assert n == -errno.EAGAIN
        assert 2000 <= sent - 1460 <= 2000 + 1460, "a window and the mark, in whole frames"
        assert not t.stack.ready(conn) & lib.BYPASS_OUT
        t.option("TCP_NOTSENT_LOWAT", 50_000)
        assert t.stack.ready(conn) & lib.BYPASS_OUT
        t.stack.abort(conn)
        t.settle()
        t.sent_at()


def test_the_wait_for_the_peers_end_is_limited_by_linger2() -> None:
    """TCP_LINGER2: seconds in FIN_WAIT_2 that no program holds; negative: none, the peer gets a reset."""
    for seconds in (7, -1):
        with Talk() as t:
            t.established(TCP_LINGER2=seconds)
            t.close_sock()
            t.hears("F. 1:1 ack 1")
            t.peer(". 1:1 ack 2")
            if seconds < 0:
                t.hears("R. 2:2 ack 1")
                assert t.state() == ""
            else:
                t.advance(seconds - 0.5)
                assert t.state() == "FIN_WAIT_2"
                t.advance(1)
                assert t.state() == ""


def test_a_syn_is_repeated_as_often_as_the_option_says() -> None:
    with Talk() as t:
        t.client(TCP_SYNCNT=2)
        t.advance(60)
        assert [s.flags for s in t.out()] == ["S", "S", "S"]
        assert t.stack.error(t.sock) == errno.ETIMEDOUT


def test_unknown_options_are_refused() -> None:
    with Talk() as t:
        sock = t.stack.socket(STREAM)
        for unknown in (99, -1, lib.BYPASS_OPT_COUNT, 0):
            for call in (lambda n: t.stack.setopt(sock, n, 1), lambda n: t.stack.getopt(sock, n)):
                with pytest.raises(OSError, match="Protocol not available"):
                    call(unknown)
