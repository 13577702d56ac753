# SPDX-License-Identifier: Apache-2.0
"""TCP: which segments leave, and when (RFC 9293 3.7.4 Nagle, 3.8.6.1 zero windows, 3.8.6.2.1 silly windows)."""

from __future__ import annotations

import errno
from itertools import pairwise

import pytest
from bypass._core import lib
from conversation import PEER, PEER_MAC
from tcp_talk import Talk

OUT = lib.BYPASS_OUT
MORE = lib.BYPASS_MORE


def test_written_bytes_leave_in_segments_and_the_last_is_pushed() -> None:
    with Talk() as t:
        t.established()
        t.write(3000)
        t.hears(". 1:1461 ack 1", ". 1461:2921 ack 1")
        t.peer(". 1:1 ack 2921")
        t.hears("P. 2921:3001 ack 1")


# ---- Nagle, cork, more --------------------------------------------------------------------------------------------
def test_nagle_holds_small_writes_back_while_data_is_in_flight() -> None:
    with Talk() as t:
        t.established()
        t.write(10)
        t.hears("P. 1:11")
        t.write(10)
        t.write(10)
        t.silence(0.1)
        t.peer(". 1:1 ack 11")
        t.hears("P. 11:31")


def test_nagle_lets_full_segments_go() -> None:
    with Talk() as t:
        t.established()
        t.write(10)
        t.hears("P. 1:11")
        t.write(1460 + 5)
        t.hears(". 11:1471")
        t.write(1455)
        t.hears("P. 1471:2931")


def test_nodelay_lets_every_write_go() -> None:
    with Talk() as t:
        t.established(TCP_NODELAY=1)
        t.write(10)
        t.write(10)
        t.hears("P. 1:11", "P. 11:21")


def test_setting_nodelay_sends_what_nagle_held_back() -> None:
    with Talk() as t:
        t.established()
        t.write(10)
        t.write(10)
        t.hears("P. 1:11")
        t.option("TCP_NODELAY", 1)
        t.hears("P. 11:21")


@pytest.mark.parametrize("inherited", [True, False])
def test_cork_holds_partial_segments_until_it_is_removed(inherited: bool) -> None:
    with Talk() as t:
        t.established(**{"TCP_CORK": 1} if inherited else {})
        t.option("TCP_CORK", 1)
        t.write(100)
        t.silence(0.1)
        t.write(1400)
        t.hears("P. 1:1461")
        t.silence(0.01)
        t.option("TCP_CORK", 0)
        t.silence()  # Nagle: 40 bytes wait for the acknowledgment
        t.peer(". 1:1 ack 1461")
        t.hears("P. 1461:1501")


def test_removing_the_cork_sends_at_once_when_nothing_is_in_flight() -> None:
    with Talk() as t:
        t.established()
        t.option("TCP_CORK", 1)
        t.write(100)
        t.silence(0.1)
        t.option("TCP_CORK", 0)
        t.hears("P. 1:101")
        t.option("TCP_CORK", 1)
        t.peer(". 1:1 ack 101")
        t.write(100)
        t.silence(0.1)


def test_corked_data_goes_after_200_ms_all_the_same() -> None:
    with Talk() as t:
        t.established()
        t.option("TCP_CORK", 1)
        t.mark()
        t.write(100)
        t.at(0.2, "P. 1:101")


def test_more_holds_a_partial_segment_until_the_next_write() -> None:
    with Talk() as t:
        t.established()
        t.write(100, MORE)
        t.silence(0.1)
        t.write(100)
        t.hears("P. 1:201")


def test_more_without_more_goes_after_200_ms() -> None:
    with Talk() as t:
        t.established()
        t.mark()
        t.write(100, MORE)
        t.at(0.2, "P. 1:101")


def test_traffic_from_the_peer_does_not_put_corked_data_off() -> None:
    with Talk() as t:
        t.established()
        t.write(100, MORE)
        t.advance(0.15)
        t.peer("P. 1:2 ack 1")
        t.advance(0.06)
        assert [(s.seq, s.end) for s in t.out() if s.data] == [(1, 101)]


def test_closing_sends_corked_data() -> None:
    with Talk() as t:
        t.established(TCP_CORK=1)
        t.write(100)
        t.silence()
        t.close_sock()
        got = t.out()
        assert (got[0].seq, got[0].end) == (1, 101)
        assert "F" in got[-1].flags
        t.peer("R 1:1")


# ---- The peer's window --------------------------------------------------------------------------------------------
def test_no_more_is_sent_than_the_window_allows() -> None:
    with Talk() as t:
        t.established()
        t.peer(". 1:1 ack 1 win 3000")
        t.write(10000)
        t.hears(". 1:1461", ". 1461:2921")
        t.silence(0.1)
        t.peer(". 1:1 ack 2921 win 3000")
        t.hears(". 2921:4381", ". 4381:5841")


def test_the_window_is_scaled_as_agreed() -> None:
    with Talk() as t:
        t.established(opts="mss 1460, nop, ws 3")
        t.peer(". 1:1 ack 1 win 1000")
        assert t.info.snd_wnd == 8000
        t.write(20000)
        assert t.out()[-1].end == 1 + 5 * 1460


def test_a_new_acknowledgment_tells_the_window_whatever_its_sequence_number() -> None:
    """RFC 9293 3.10.7.4 would keep the window, and so move its right edge where nobody has offered it."""
    with Talk() as t:
        t.established()
        t.peer("P. 101:111 ack 1 win 3000")  # what is before it was lost, and is repeated now
        t.write(10000)
        assert t.out()[-1].end == 2921
        t.peer("P. 1:101 ack 1461 win 1540")
        assert t.info.snd_wnd == 1540
        t.hears(". 2921:2921 ack 111")
        t.silence(0.1)


def test_a_window_from_an_older_segment_is_not_believed() -> None:
    """RFC 9293 3.10.7.4: SND.WL1, SND.WL2."""
    with Talk() as t:
        t.established()
        t.peer("P. 101:111 ack 1 win 5000", ". 1:1 ack 1 win 100")  # reordered on the way
        assert t.info.snd_wnd == 5000
        t.peer("P. 1:101 ack 1 win 100")
        assert t.info.snd_wnd == 5000
        t.peer(". 111:111 ack 1 win 6000")
        assert t.info.snd_wnd == 6000
        t.write(10)
        t.peer(". 111:111 ack 11 win 7000", ". 111:111 ack 1 win 200")
        assert t.info.snd_wnd == 7000
        t.sent()


def test_a_closed_window_is_probed_with_doubled_intervals() -> None:
    with Talk() as t:
        t.established()
        t.write(1460)
        t.hears("P. 1:1461")
        t.peer(". 1:1 ack 1461 win 0")
        t.mark()
        t.write(5000)
        probe = ". 1460:1460 ack 1"
        t.at(0.2, probe, 0.6, probe, 1.4, probe, 3.0, probe, 6.2, probe)


def test_answered_probes_still_come_more_and_more_rarely() -> None:
    """RFC 9293 3.8.6.1, SHLD-30; and MUST-36: the connection lives as long as the peer answers."""
    with Talk() as t:
        t.established()
        t.peer(". 1:1 ack 1 win 0")
        t.mark()
        t.write(100)
        waits = []
        for _ in range(40):
            t.mark()
            while not (got := t.out()):
                t.advance(0.05)
            assert len(got) == 1
            assert (got[0].seq, got[0].data) == (0, b"")
            waits.append(got[0].at_ns - t._mark)
            t.peer(". 1:1 ack 1 win 0")
        assert all(1.6 < b / a < 2.2 for a, b in pairwise(waits[1:9]))
        assert all(100e9 < w < 121e9 for w in waits[-20:]), "two minutes is the most"
        t.peer(". 1:1 ack 1 win 1000")
        t.hears("P. 1:101")


def test_an_open_window_ends_probing_and_starts_sending() -> None:
    with Talk() as t:
        t.established()
        t.peer(". 1:1 ack 1 win 0")
        t.mark()
        t.write(5000)
        t.at(0.2, ". 0:0 ack 1", 0.6, ". 0:0 ack 1")
        t.peer(". 1:1 ack 1 win 3000")
        t.hears(". 1:1461", ". 1461:2921")
        t.silence(0.15)
        t.at(0.05, ". 1:1461")  # an ordinary retransmission


def test_unanswered_probes_end_the_connection() -> None:
    with Talk() as t:
        conn = t.established()
        t.peer(". 1:1 ack 1 win 0")
        t.write(100)
        t.advance(3000)
        assert 10 <= len(t.out()) <= 20
        assert t.stack.error(conn) == errno.ETIMEDOUT


def test_a_peer_that_closes_its_window_over_data_in_flight_is_not_given_up_while_it_answers() -> None:
    """RFC 9293 3.8.6: a shrunk window; RFC 1122 4.2.2.17: no time-out while the peer answers."""
    with Talk() as t:
        t.established()
        t.write(1000)
        t.hears("P. 1:1001")
        for _ in range(60):
            t.advance(60)
            t.out()
            t.peer(". 1:1 ack 1 win 0")
        assert t.state() == "ESTABLISHED"
        t.peer(". 1:1 ack 1001 win 1000")
        t.write(10)
        t.out()


def test_a_small_window_is_not_filled_in_small_pieces() -> None:
    """RFC 9293 3.8.6.2.1: at least a full segment, or half of the largest window seen, or all there is."""
    with Talk() as t:
        t.established()
        t.peer(". 1:1 ack 1 win 1000")  # less than a segment, less than half of 65535
        t.write(5000)
        t.silence(0.19)
        t.peer(". 1:1 ack 1 win 1459")
        t.silence()
        t.peer(". 1:1 ack 1 win 1460")
        t.hears(". 1:1461")


def test_half_of_a_small_peers_largest_window_is_enough() -> None:
    with Talk() as t:
        t.win = 1000
        t.established()
        t.write(5000)
        t.hears(". 1:1001")
        t.peer(". 1:1 ack 1001 win 400")
        t.silence()
        t.peer(". 1:1 ack 1001 win 500")
        t.hears(". 1001:1461")  # as far as the segment reaches that the first window cut


def test_a_window_that_stays_small_is_used_after_a_while() -> None:
    """RFC 9293 3.8.6.2.1 (4), the override timeout."""
    with Talk() as t:
        t.established()
        t.peer(". 1:1 ack 1 win 700")
        t.mark()
        t.write(5000)
        t.at(0.2, ". 1:701")
        t.peer(". 1:1 ack 701 win 700")
        t.mark()
        t.at(0.2, ". 701:1401")


def test_probing_does_not_count_as_a_lost_segment() -> None:
    with Talk() as t:
        t.established()
        cwnd = t.info.cwnd
        t.peer(". 1:1 ack 1 win 0")
        t.mark()
        t.write(100)
        t.advance(1)
        t.out()
        t.peer(". 1:1 ack 1 win 65535")
        t.hears("P. 1:101")
        assert t.info.cwnd == cwnd
        assert t.counted()["tcp_out_probes"] >= 2
        assert t.info.retransmits == 0


# ---- Buffers and events -------------------------------------------------------------------------------------------
def test_a_full_send_buffer_says_so_and_an_event_says_when_there_is_room() -> None:
    with Talk(sndbuf=8192) as t:
        conn = t.established()
        t.peer(". 1:1 ack 1 win 4000")
        assert t.stack.send(conn, bytes(20000)) == 8192
        assert t.stack.send(conn, b"x") == -errno.EAGAIN
        assert not t.stack.ready(conn) & OUT
        assert t.taken(conn) == 0
        t.sent()
        t.peer(". 1:1 ack 1461 win 65535")
        assert t.taken(conn) == 0, "too little room for an event"
        t.sent()
        t.peer(". 1:1 ack 4381 win 65535")
        assert t.taken(conn) == OUT
        t.peer(". 1:1 ack 5841 win 65535")
        assert t.taken(conn) == 0, "told once"
        t.sent()


def test_nothing_written_is_nothing_sent() -> None:
    with Talk() as t:
        conn = t.established()
        assert t.stack.send(conn, b"") == 0
        t.silence(1)


def test_frames_that_are_short_are_waited_for() -> None:
    with Talk(frames=16) as t:
        conn = t.established()
        t.peer(". 1:1 win 65535")
        took = t.stack.send(conn, bytes(60000))
        assert 0 < took < 60000
        t.sent()
        assert t.taken(conn) == 0


def test_an_acknowledgment_waits_for_a_frame() -> None:
    with Talk() as t:
        t.established()
        t.faults(alloc_fail_ppm=1_000_000)
        t.peer(". 1:1461", ". 1461:2921")
        t.silence(0.01)
        t.faults()
        t.advance(0.001)
        t.hears(". 1:1 ack 2921")


def test_a_fin_waits_for_a_frame() -> None:
    with Talk() as t:
        t.established()
        t.faults(alloc_fail_ppm=1_000_000)
        t.shutdown()
        t.silence(0.01)
        t.faults()
        t.advance(0.001)
        t.hears("F. 1:1 ack 1")


def test_a_piece_of_a_segment_waits_for_a_frame() -> None:
    with Talk() as t:
        t.established()
        t.peer(". 1:1 ack 1 win 700")
        t.write(1460)
        t.advance(0.1)
        t.faults(alloc_fail_ppm=1_000_000)
        t.silence(0.2)
        t.faults()
        t.advance(0.5)
        assert t.out()[0].end == 701
        t.peer(". 1:1 ack 701 win 40000")
        t.hears("P. 701:1461")


def test_a_write_waits_for_a_frame() -> None:
    with Talk() as t:
        conn = t.established()
        t.faults(alloc_fail_ppm=1_000_000)
        assert t.stack.send(conn, b"x") == -errno.EAGAIN
        t.silence(0.01)
        t.faults()
        t.advance(0.001)
        assert t.taken(conn) == OUT
        t.write(1)
        t.hears("P. 1:2")


def test_a_next_hop_that_fails_for_a_while_is_no_end() -> None:
    with Talk() as t:
        conn = t.established()
        t.stack.nexthop_set(PEER, None)
        t.write(100)
        t.silence(1.9)
        t.stack.nexthop_set(PEER, PEER_MAC)
        t.advance(3)
        got = t.out()
        assert got
        assert {(s.seq, s.end) for s in got} == {(1, 101)}
        t.peer(". 1:1 ack 101")
        assert t.stack.error(conn) == 0


def test_a_next_hop_that_never_comes_is_the_reason_of_the_time_out() -> None:
    with Talk() as t:
        conn = t.established()
        t.stack.nexthop_set(PEER, None)
        t.write(100)
        for _ in range(600):
            t.advance(5)
            if t.stack.nexthop_wanted():
                t.stack.nexthop_set(PEER, None)
        t.silence()
        assert t.stack.error(conn) == errno.EHOSTUNREACH


def test_a_segment_that_acknowledges_carries_the_delayed_ack() -> None:
    with Talk() as t:
        t.established(TCP_QUICKACK=0)
        t.peer("P. 1:101 ack 1")
        t.silence(0.01)
        t.write(50)
        t.hears("P. 1:51 ack 101")
        t.silence(0.1)


def test_maxseg_limits_our_segments_and_what_we_announce() -> None:
    with Talk() as t:
        t.server(TCP_MAXSEG=500)
        t.peer("S 0:0 <mss 1460>")
        t.hears("S. 0:0 ack 1 <mss 500>")
        t.peer(". 1:1")
        t.accept()
        t.write(1000)
        t.hears(". 1:501", "P. 501:1001")


def test_ttl_and_tos_are_the_programs() -> None:
    with Talk() as t:
        t.established(IP_TTL=17, IP_TOS=0x48)
        t.write(1)
        [got] = t.hears("P. 1:2")
        assert got.ip is not None
        assert (got.ip.ttl, got.ip.tos) == (17, 0x48)
