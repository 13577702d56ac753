# SPDX-License-Identifier: Apache-2.0
"""TCP: ICMP errors: path MTU (RFC 1191), hard and soft ones (RFC 1122 4.2.3.9), blind attacks by them (RFC 5927)."""

from __future__ import annotations

import errno

import pytest
from bypass._core import lib
from tcp_talk import Talk


@pytest.mark.parametrize(
    ("kind", "code", "err"),
    [
        (3, 0, errno.ENETUNREACH),
        (3, 1, errno.EHOSTUNREACH),
        (3, 2, errno.ENOPROTOOPT),
        (3, 3, errno.ECONNREFUSED),
        (3, 13, errno.EHOSTUNREACH),
        (11, 0, errno.EHOSTUNREACH),
    ],
)
def test_an_error_about_our_syn_ends_the_attempt(kind: int, code: int, err: int) -> None:
    with Talk() as t:
        conn = t.client()
        t.hears("S 0:0")
        t.icmp(kind, code, 0)
        assert t.taken(conn) & lib.BYPASS_ERR
        assert t.stack.error(conn) == err
        t.silence(10)


@pytest.mark.parametrize(("kind", "code"), [(3, 0), (3, 1), (3, 2), (3, 3), (3, 13), (11, 0), (12, 0)])
def test_an_established_connection_lives_on_after_any_error(kind: int, code: int) -> None:
    with Talk() as t:
        conn = t.established()
        t.write(100)
        t.hears("P. 1:101")
        t.icmp(kind, code, 1)
        assert t.taken(conn) == 0
        t.peer(". 1:1 ack 101")
        assert t.state() == "ESTABLISHED"
        assert t.stack.error(conn) == 0


def test_the_last_error_is_the_reason_when_the_connection_times_out() -> None:
    with Talk() as t:
        conn = t.established()
        t.write(100)
        t.advance(700)
        t.icmp(3, 1, 1)
        t.advance(700)
        t.out()
        assert t.stack.error(conn) == errno.EHOSTUNREACH


def test_an_error_that_passed_is_not_the_reason_for_a_later_timeout() -> None:
    with Talk() as t:
        conn = t.established()
        t.write(100)
        t.icmp(3, 1, 1)
        t.peer(". 1:1 ack 101")
        t.write(100)
        t.advance(1500)
        t.out()
        assert t.stack.error(conn) == errno.ETIMEDOUT


@pytest.mark.parametrize("seq", [-1, 101, 5000, -(1 << 31)])
def test_errors_that_quote_nothing_in_flight_are_ignored(seq: int) -> None:
    with Talk() as t:
        t.established()
        t.write(100)
        t.hears("P. 1:101")
        t.icmp(3, 4, seq, mtu=600)
        t.silence()
        assert t.info.snd_mss == 1460
        assert "tcp_in_error_quoted" not in t.counted()
        t.peer(". 1:1 ack 101")


def test_errors_about_another_flow_are_ignored() -> None:
    with Talk() as t:
        t.established()
        t.write(100)
        t.hears("P. 1:101")
        t.icmp(3, 4, 1, mtu=600, port=81)
        t.silence()
        assert t.info.snd_mss == 1460
        t.peer(". 1:1 ack 101")


@pytest.mark.parametrize(("mtu", "mss"), [(1400, 1360), (576, 536), (552, 512), (100, 512), (68, 512)])
def test_a_smaller_path_mtu_resends_in_smaller_segments(mtu: int, mss: int) -> None:
    """Below 552 lies an attack (as Linux' min_pmtu)."""
    with Talk() as t:
        t.established()
        t.write(4 * 1460)
        assert len(t.out()) == 4
        cwnd = t.info.cwnd
        t.icmp(3, 4, 1, mtu=mtu)
        assert t.info.snd_mss == mss
        again = t.out()
        assert again[0].seq == 1
        assert all(len(s.data) <= mss for s in again)
        edge = 1
        for _ in range(60):
            for s in again:
                if s.seq <= edge:
                    edge = max(edge, s.end)
            t.peer(f". 1:1 ack {edge}")
            again = t.out()
            if edge == 1 + 4 * 1460:
                break
        assert edge == 1 + 4 * 1460, "without a timeout"
        assert t.info.cwnd >= cwnd // 2
        assert "tcp_timeouts" not in t.counted()


def test_only_what_was_too_large_is_sent_again() -> None:
    with Talk() as t:
        t.established(TCP_NODELAY=1)
        t.write(100)
        t.write(1460)
        t.write(100)
        t.hears("P. 1:101", "P. 101:1561", "P. 1561:1661")
        t.icmp(3, 4, 101, mtu=1040)
        t.hears(". 101:1101", "P. 1101:1561")
        t.peer(". 1:1 ack 1661")
        assert t.info.snd_queued == 0


def test_cutting_segments_waits_for_frames() -> None:
    with Talk() as t:
        t.established()
        t.write(2 * 1460)
        assert len(t.out()) == 2
        t.faults(alloc_fail_ppm=1_000_000)
        t.icmp(3, 4, 1, mtu=1040)
        t.silence(0.01)
        t.faults()
        t.advance(0.01)
        assert [s.seq for s in t.out()] == [1, 1001, 1461, 2461]
        t.peer(". 1:1 ack 2921")
        assert t.info.snd_queued == 0


def test_an_unstated_mtu_is_the_next_plateau() -> None:
    """RFC 1191 7.1."""
    with Talk() as t:
        t.established()
        t.write(1460)
        t.out()
        t.icmp(3, 4, 1)
        assert t.info.snd_mss == 1492 - 40
        t.sent()
        t.peer(". 1:1 ack 1461")


def test_a_larger_mtu_changes_nothing() -> None:
    with Talk() as t:
        t.established()
        t.write(1460)
        t.out()
        t.icmp(3, 4, 1, mtu=1500)
        t.silence()
        assert t.info.snd_mss == 1460
        t.peer(". 1:1 ack 1461")


def test_the_lower_mtu_holds_for_other_connections_and_for_ten_minutes() -> None:
    """RFC 1191 6.3."""
    with Talk() as t:
        t.established()
        t.write(1460)
        t.out()
        t.icmp(3, 4, 1, mtu=1000)
        t.sent()
        t.peer(". 1:1 ack 1461")
        t.peer_port, t.iss = 40001, None
        t.peer("S 0:0 <mss 1460>")
        t.out()
        t.peer(". 1:1")
        t.accept()
        assert t.info.snd_mss == 960
        t.advance(601)
        t.wrote = 1
        t.write(1460)
        t.out()
        assert t.info.snd_mss == 1460
        t.peer(". 1:1")


@pytest.mark.parametrize("seq", [-1, 1, 5000, 1 << 31])
def test_a_half_open_connection_believes_only_an_error_that_quotes_its_syn_ack(seq: int) -> None:
    with Talk() as t:
        t.server()
        t.peer("S 0:0")
        t.hears("S. 0:0")
        t.icmp(3, 3, seq)
        assert t.state() == "SYN_RECEIVED"
        assert "tcp_in_error_quoted" not in t.counted()


def test_a_source_quench_changes_nothing() -> None:
    """RFC 6633 3."""
    with Talk() as t:
        t.established()
        t.write(3000)
        cwnd = t.info.cwnd
        t.out()
        t.icmp(4, 0, 1)
        assert t.info.cwnd == cwnd
        assert t.counted()["icmp_in_ignored"] == 1
        t.peer(". 1:1 ack 2921")
        t.hears("P. 2921:3001")


def test_a_syn_received_survives_soft_errors() -> None:
    with Talk() as t:
        t.server()
        t.peer("S 0:0")
        t.hears("S. 0:0")
        t.icmp(3, 1, 0)
        assert t.state() == "SYN_RECEIVED"
        t.icmp(3, 3, 0)
        assert t.state() == ""
