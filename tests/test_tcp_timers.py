# SPDX-License-Identifier: Apache-2.0
"""TCP: keepalive (RFC 9293 3.8.4) and user timeout (RFC 5482)."""

from __future__ import annotations

import errno

import pytest
from bypass._core import lib
from conversation import PEER, PEER_MAC, SECOND
from tcp_talk import Talk

from bypass.core import FOREVER

KEEP = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4}
PROBE = ". 0:0 ack 1"


def test_without_the_option_silence_is_eternal() -> None:
    with Talk() as t:
        t.established()
        t.silence(7 * 86400)
        assert t.state() == "ESTABLISHED"


def test_an_idle_connection_wakes_nobody() -> None:
    with Talk() as t:
        t.established()
        t.write(100)
        t.out()
        t.peer("P. 1:101 ack 101")
        t.advance(10)
        t.out()
        assert t.stack.deadline() == FOREVER


def test_waiting_for_a_next_hop_or_a_peer_is_no_busy_waiting() -> None:
    with Talk(neighbours=(), iss=None) as t:
        t.client()
        t.settle()
        assert t.stack.deadline() >= t.now + SECOND // 10
        t.stack.nexthop_set(PEER, PEER_MAC)
        t.hears("S 0:0")
        assert t.stack.deadline() >= t.now + SECOND // 2
        t.peer("S. 0:0")
        t.stack.nexthop_set(PEER, None)
        t.write(100)
        t.sent()
        assert t.stack.deadline() >= t.now + SECOND // 10


def test_an_idle_connection_is_probed_and_ended_when_nobody_answers() -> None:
    with Talk() as t:
        conn = t.established(**KEEP)
        t.mark()
        t.at(10, PROBE, 13, PROBE, 16, PROBE, 19, PROBE)
        t.at(3, "R. 1:1 ack 1")
        assert t.taken(conn) & lib.BYPASS_ERR
        assert t.stack.error(conn) == errno.ETIMEDOUT
        assert t.counted()["tcp_keepalive_timeouts"] == 1


def test_an_answer_starts_the_idle_time_over() -> None:
    with Talk() as t:
        t.established(**KEEP)
        t.mark()
        for _ in range(5):
            t.at(10, PROBE)
            t.peer(". 1:1 ack 1")
            t.mark()
        t.at(10, PROBE, 13, PROBE)
        t.peer(". 1:1 ack 1")
        t.mark()
        t.at(10, PROBE)


def test_traffic_puts_the_probe_off() -> None:
    with Talk() as t:
        t.established(**KEEP)
        t.advance(6)
        t.peer("P. 1:11 ack 1")
        t.mark()
        t.advance(1)
        t.hears(". 1:1 ack 11")
        t.silence(8.9)
        t.at(0.1, ". 0:0 ack 11")


def test_two_hours_are_the_default() -> None:
    """RFC 9293 3.8.4, MUST-28."""
    with Talk() as t:
        t.established(SO_KEEPALIVE=1)
        t.silence(7199)
        t.at(1, PROBE)


def test_keepalive_may_be_switched_on_and_off_later() -> None:
    with Talk() as t:
        conn = t.established()
        for name, value in KEEP.items():
            t.option(name, value)
        assert t.stack.getopt(conn, lib.BYPASS_TCP_KEEPIDLE) == 10
        t.mark()
        t.at(10, PROBE)
        t.option("SO_KEEPALIVE", 0)
        t.silence(1000)


def test_a_keepalive_probe_of_the_peer_is_answered() -> None:
    with Talk() as t:
        t.established()
        t.peer(". 0:0 ack 1")
        t.hears(". 1:1 ack 1")
        t.advance(1)
        t.inject_ip(t.segment(". 0:0 ack 1", data=b"x"))  # the old form, with a byte of garbage
        t.hears(". 1:1 ack 1")


def test_keepalive_leaves_a_closed_window_to_its_own_probes() -> None:
    with Talk() as t:
        t.established(**KEEP)
        t.peer(". 1:1 ack 1 win 0")
        t.write(100)
        for _ in range(100):
            t.advance(10)
            if t.out():
                t.peer(". 1:1 ack 1 win 0")
        assert t.state() == "ESTABLISHED"
        assert "tcp_out_keepalives" not in t.counted()
        t.peer("R 1:1")


def ends_after(t: Talk, conn: int, seconds: float) -> None:
    """The connection ends with ETIMEDOUT so long from now, and not before."""
    t.advance(seconds - 0.01)
    assert t.stack.error(conn) == 0
    t.advance(0.02)
    assert t.stack.error(conn) == errno.ETIMEDOUT
    assert t.state() == ""


def test_a_user_timeout_ends_a_connection_whose_data_is_not_acknowledged() -> None:
    """RFC 5482 2: at that time, not at the retransmission behind it."""
    with Talk() as t:
        conn = t.established(TCP_USER_TIMEOUT=5000)
        t.advance(100)
        t.write(100)
        ends_after(t, conn, 5)
        t.out()


def test_a_long_user_timeout_allows_more_retransmissions_than_the_default() -> None:
    """tcp(7): the maximum time, not a number; 15 retransmissions are over after 15 minutes."""
    with Talk() as t:
        conn = t.established(TCP_USER_TIMEOUT=3_600_000)
        t.write(100)
        ends_after(t, conn, 3600)
        assert 15 < len(t.out()) < 45


def test_a_short_user_timeout_still_tries_once_more() -> None:
    with Talk() as t:
        conn = t.established(TCP_USER_TIMEOUT=10)
        t.write(100)
        t.hears("P. 1:101")
        t.at(0.2, "P. 1:101")
        t.advance(0.01)
        assert t.stack.error(conn) == errno.ETIMEDOUT


def test_a_user_timeout_limits_the_wait_for_a_next_hop() -> None:
    """Each try that finds none is no reason to count anew."""
    with Talk() as t:
        conn = t.established(TCP_USER_TIMEOUT=3000)
        t.stack.nexthop_set(PEER, None)
        t.write(100)
        for _ in range(5):
            t.advance(0.5)
            t.stack.nexthop_set(PEER, None)
            assert t.stack.error(conn) == 0
        t.advance(0.6)
        assert t.stack.error(conn) == errno.EHOSTUNREACH


@pytest.mark.parametrize(("options", "seconds"), [({}, 924), ({"TCP_USER_TIMEOUT": 3000}, 3)])
def test_without_a_device_time_decides_as_on_a_silent_wire(options: dict[str, int], seconds: int) -> None:
    """Frames for a device that was removed are lost, and the stack does not ask it all the time."""
    with Talk() as t:
        conn = t.established(**options)
        t.faults(gone=1)
        t.write(50_000)
        t.advance(0.01)
        assert t.stack.deadline() > t.now
        t.advance(seconds - 1)
        assert t.stack.error(conn) == 0
        assert t.stack.deadline() > t.now
        t.advance(2)
        assert t.stack.error(conn) == errno.ETIMEDOUT


def test_a_user_timeout_limits_connecting_too() -> None:
    with Talk() as t:
        conn = t.client(TCP_USER_TIMEOUT=5000)
        ends_after(t, conn, 5)
        assert len(t.out()) == 3


def test_a_user_timeout_limits_the_wait_for_a_window() -> None:
    """RFC 9293 3.8.6.1: probes that are answered would go on for ever."""
    with Talk() as t:
        conn = t.established(TCP_USER_TIMEOUT=5000)
        t.peer(". 1:1 ack 1 win 0")
        t.write(100)
        for _ in range(9):
            t.advance(0.5)
            if t.out():
                t.peer(". 1:1 ack 1 win 0")
        ends_after(t, conn, 0.5)


def test_a_user_timeout_decides_about_keepalive_in_place_of_the_number_of_probes() -> None:
    """tcp(7): at the first probe behind it; not earlier, however many there are."""
    with Talk() as t:
        conn = t.established(
            SO_KEEPALIVE=1, TCP_KEEPIDLE=10, TCP_KEEPINTVL=1, TCP_KEEPCNT=2, TCP_USER_TIMEOUT=15_500
        )
        ends_after(t, conn, 16)
        assert [s.flags for s in t.out()] == ["."] * 6 + ["R."]


def test_a_user_timeout_counts_from_the_last_progress() -> None:
    with Talk() as t:
        t.established(TCP_USER_TIMEOUT=5000)
        t.write(1460)
        for i in range(1, 20):
            t.write(1460)
            t.out()
            t.advance(3)
            t.peer(f". 1:1 ack {1 + 1460 * i}")
        assert t.state() == "ESTABLISHED"
        t.sent()


def test_a_user_timeout_does_not_end_an_idle_connection_that_finds_its_window_closed() -> None:
    with Talk() as t:
        t.established(TCP_USER_TIMEOUT=5000)
        t.peer(". 1:1 ack 1 win 0")
        t.advance(100)
        t.write(100)
        t.advance(2)
        t.out()
        assert t.state() == "ESTABLISHED"
        t.peer(". 1:1 ack 1 win 1000")
        t.hears("P. 1:101")
