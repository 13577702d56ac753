# SPDX-License-Identifier: Apache-2.0
"""TCP: how connections end: every closing state (RFC 9293 figure 5, 3.6, 3.10.4), half-closed, orphans, TIME_WAIT."""

from __future__ import annotations

import errno

import pytest
from bypass._core import lib
from conversation import PEER
from tcp_talk import Talk, stream

IN, OUT, ERR, HUP, RDHUP = (getattr(lib, f"BYPASS_{n}") for n in ("IN", "OUT", "ERR", "HUP", "RDHUP"))
PIPE = -errno.EPIPE


# ---- We close first -----------------------------------------------------------------------------------------------
def test_closing_first_passes_through_fin_wait_and_time_wait() -> None:
    with Talk() as t:
        t.established()
        t.close_sock()
        t.hears("F. 1:1 ack 1")
        assert t.state() == "FIN_WAIT_1"
        t.peer(". 1:1 ack 2")
        assert t.state() == "FIN_WAIT_2"
        t.silence()
        t.peer("F. 1:1 ack 2")
        t.hears(". 2:2 ack 2")
        assert t.state() == "TIME_WAIT"
        t.silence(59.9)
        assert t.state() == "TIME_WAIT"
        t.silence(0.2)
        assert t.state() == ""


def test_a_fin_that_acknowledges_ours_leads_straight_to_time_wait() -> None:
    with Talk() as t:
        t.established()
        t.close_sock()
        t.hears("F. 1:1")
        t.peer("F. 1:1 ack 2")
        t.hears(". 2:2 ack 2")
        assert t.state() == "TIME_WAIT"


def test_both_closing_at_once_pass_through_closing() -> None:
    with Talk() as t:
        t.established()
        t.close_sock()
        t.hears("F. 1:1")
        t.peer("F. 1:1 ack 1")
        t.hears(". 2:2 ack 2")
        assert t.state() == "CLOSING"
        t.peer(". 2:2 ack 2")
        t.silence()
        assert t.state() == "TIME_WAIT"


def test_data_that_was_written_leaves_before_the_fin() -> None:
    with Talk() as t:
        t.established()
        t.write(3000)
        t.close_sock()
        t.hears(". 1:1461", ". 1461:2921", "FP. 2921:3001")
        t.peer(". 1:1 ack 3002")
        assert t.state() == "FIN_WAIT_2"


def test_the_fin_waits_for_what_the_window_holds_back() -> None:
    with Talk() as t:
        t.established()
        t.peer(". 1:1 ack 1 win 1460")
        t.write(2000)
        t.shutdown()
        t.hears(". 1:1461")
        t.silence(0.1)
        t.peer(". 1:1 ack 1461 win 1460")
        t.hears("FP. 1461:2001")


def test_a_lost_fin_is_sent_again() -> None:
    with Talk() as t:
        t.established()
        t.close_sock()
        t.hears("F. 1:1 ack 1")
        t.at(0.2, "F. 1:1 ack 1", 0.6, "F. 1:1 ack 1")
        t.peer(". 1:1 ack 2")
        assert t.state() == "FIN_WAIT_2"
        t.silence(1)


def test_a_lost_fin_with_data_is_sent_again_with_it() -> None:
    with Talk() as t:
        t.established()
        t.write(100)
        t.hears("P. 1:101")
        t.shutdown()
        t.hears("F. 101:101")
        t.at(0.2, "FP. 1:101")
        t.peer(". 1:1 ack 101")
        t.advance(0.5)
        assert [str(s).split(" win")[0] for s in t.out()] == ["F. 101:101 ack 1"]
        t.peer(". 1:1 ack 102")
        assert t.state() == "FIN_WAIT_2"


def test_an_unanswered_fin_of_an_orphan_is_given_up_after_eight_retries() -> None:
    with Talk() as t:
        t.established()
        t.close_sock()
        t.hears("F. 1:1")
        t.advance(300)
        assert len(t.out()) == 8
        assert t.state() == ""


# ---- The peer closes first ----------------------------------------------------------------------------------------
def test_the_peers_fin_is_the_end_of_the_stream() -> None:
    with Talk() as t:
        conn = t.established()
        t.peer("FP. 1:101 ack 1")
        t.hears(". 1:1 ack 102")
        assert t.state() == "CLOSE_WAIT"
        assert t.taken(conn) == IN | RDHUP
        assert t.read() == stream(1, 101)
        assert t.read() == b""
        assert t.read() == b""
        t.write(50)  # our direction is open
        t.hears("P. 1:51 ack 102")
        t.peer(". 102:102 ack 51")
        t.close_sock()
        t.hears("F. 51:51 ack 102")
        assert t.state() == "LAST_ACK"
        t.peer(". 102:102 ack 52")
        t.silence()
        assert t.state() == ""


def test_a_repeated_fin_is_acknowledged_again() -> None:
    with Talk() as t:
        t.established()
        t.peer("F. 1:1 ack 1")
        t.hears(". 1:1 ack 2")
        t.peer("F. 1:1 ack 1")
        t.hears(". 1:1 ack 2")
        assert t.state() == "CLOSE_WAIT"


def test_a_fin_ahead_of_missing_data_waits_for_it() -> None:
    with Talk() as t:
        conn = t.established()
        t.peer("F. 201:301 ack 1")
        t.hears(". 1:1 ack 1")
        assert t.state() == "ESTABLISHED"
        assert t.taken(conn) == 0
        t.peer("P. 1:201 ack 1")
        t.hears(". 1:1 ack 302")
        assert t.state() == "CLOSE_WAIT"
        assert t.read() == stream(1, 301)
        assert t.read() == b""


def test_a_bare_fin_ahead_of_missing_data_waits_for_it() -> None:
    with Talk() as t:
        t.established()
        t.peer("F. 101:101 ack 1")
        t.hears(". 1:1 ack 1")
        t.peer("P. 1:101 ack 1")
        t.hears(". 1:1 ack 102")
        assert t.read() == stream(1, 101)
        assert t.read() == b""


def test_a_last_ack_that_is_lost_is_asked_for() -> None:
    with Talk() as t:
        t.established()
        t.peer("F. 1:1 ack 1")
        t.hears(". 1:1 ack 2")
        t.close_sock()
        t.hears("F. 1:1 ack 2")
        t.at(0.2, "F. 1:1 ack 2")
        t.peer(". 2:2 ack 2")
        assert t.state() == ""


# ---- Half-closed, both ways ---------------------------------------------------------------------------------------
def test_after_shutdown_the_peer_may_go_on_sending() -> None:
    with Talk() as t:
        conn = t.established()
        t.shutdown()
        t.hears("F. 1:1 ack 1")
        assert t.stack.send(conn, b"x") == PIPE
        t.peer(". 1:1 ack 2")
        assert t.state() == "FIN_WAIT_2"
        t.silence(600)  # a program that reads may wait as long as it likes
        for i in range(5):
            t.peer(f"P. {1 + 100 * i}:{101 + 100 * i} ack 2")
        t.advance(0.1)
        assert t.out()[-1].ack == 501
        assert t.read() == stream(1, 501)
        t.taken(conn)
        t.peer("F. 501:501 ack 2")
        t.hears(". 2:2 ack 502")
        assert t.taken(conn) & (IN | HUP | RDHUP) == IN | HUP | RDHUP
        assert t.read() == b""
        assert t.state() == "TIME_WAIT"
        t.close_sock()
        t.silence(61)
        assert t.state() == ""


def test_a_handle_outlives_time_wait() -> None:
    with Talk() as t:
        conn = t.established()
        t.shutdown()
        t.peer("F. 1:11 ack 2")
        t.out()
        t.advance(61)
        assert t.state() == ""
        assert t.read() == stream(1, 11)
        assert t.read() == b""
        assert t.stack.error(conn) == 0


def test_a_second_shutdown_does_nothing_and_a_late_one_says_so() -> None:
    with Talk() as t:
        conn = t.established()
        t.shutdown()
        t.hears("F. 1:1")
        t.shutdown()
        t.silence()
        t.peer("R. 1:1 ack 2")
        with pytest.raises(OSError, match="not connected"):
            t.stack.shutdown(conn, lib.BYPASS_SHUT_WR)


def test_shutdown_of_both_directions_sends_a_fin_and_reads_nothing_more() -> None:
    with Talk() as t:
        t.established()
        t.shutdown(lib.BYPASS_SHUT_RDWR)
        t.hears("F. 1:1 ack 1")
        assert t.read() == b""
        t.peer("F. 1:1 ack 2")
        t.hears(". 2:2 ack 2")
        assert t.state() == "TIME_WAIT"


def test_data_for_a_program_that_shut_down_both_directions_resets() -> None:
    """RFC 1122 4.2.2.13; Linux tells the program too."""
    with Talk() as t:
        conn = t.established()
        t.shutdown(lib.BYPASS_SHUT_RDWR)
        t.hears("F. 1:1 ack 1")
        t.peer("P. 1:11 ack 2")
        t.hears("R. 2:2 ack 1")
        assert t.stack.error(conn) == errno.ECONNRESET
        assert t.read() == b""


@pytest.mark.parametrize("how", [-1, 3, 99])
def test_shutdown_of_an_unknown_direction_is_refused(how: int) -> None:
    with Talk() as t:
        conn = t.established()
        with pytest.raises(OSError, match="Invalid argument"):
            t.stack.shutdown(conn, how)


def test_shutdown_while_connecting_ends_the_attempt() -> None:
    with Talk() as t:
        conn = t.client()
        t.hears("S 0:0")
        t.stack.shutdown(conn, lib.BYPASS_SHUT_WR)
        assert t.stack.error(conn) == errno.ECONNRESET
        assert t.state() == ""
        with pytest.raises(OSError, match="not connected"):
            t.stack.shutdown(conn, lib.BYPASS_SHUT_WR)
        assert t.stack.connect(conn, (PEER, 40000)) == -errno.EINPROGRESS, "it may try again"
        t.hears("S 0:0")


# ---- Ends by reset ------------------------------------------------------------------------------------------------
def test_closing_with_unread_data_resets() -> None:
    """RFC 2525 2.17: the peer must learn that its data was lost."""
    with Talk() as t:
        t.established()
        t.peer("P. 1:11 ack 1")
        t.close_sock()
        t.hears("R. 1:1 ack 11")
        assert t.state() == ""


def test_linger_of_zero_resets_even_with_data_queued() -> None:
    with Talk() as t:
        t.established(SO_LINGER=0)
        t.write(100)
        t.hears("P. 1:101")
        t.close_sock()
        t.hears("R. 101:101 ack 1")
        assert t.state() == ""


def test_abort_resets() -> None:
    with Talk() as t:
        conn = t.established()
        t.stack.abort(conn)
        t.hears("R. 1:1 ack 1")
        with pytest.raises(OSError, match="Bad file descriptor"):
            t.stack.abort(conn)


@pytest.mark.parametrize("state", ["FIN_WAIT_1", "FIN_WAIT_2"])
def test_data_for_a_program_that_is_gone_is_answered_with_a_reset(state: str) -> None:
    """RFC 1122 4.2.2.13."""
    with Talk() as t:
        t.established()
        t.close_sock()
        t.hears("F. 1:1")
        ack = 1
        if state == "FIN_WAIT_2":
            ack = 2
            t.peer(". 1:1 ack 2")
        assert t.state() == state
        t.peer(f"P. 1:11 ack {ack}")
        [rst] = t.out()
        assert rst.flags in ("R.", "R")
        assert t.state() == ""
        assert t.counted()["tcp_in_after_close"] == 1


def test_an_orphan_in_fin_wait_2_does_not_wait_for_ever() -> None:
    with Talk() as t:
        t.established()
        t.close_sock()
        t.out()
        t.peer(". 1:1 ack 2")
        t.silence(59)
        assert t.state() == "FIN_WAIT_2"
        t.silence(2)
        assert t.state() == ""


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_closed_window_does_not_keep_an_orphan_for_ever(in_flight: bool) -> None:
    with Talk() as t:
        t.established()
        if in_flight:
            t.write(100)
        t.peer(". 1:1 ack 1 win 0")
        t.write(100)
        t.close_sock()
        for _ in range(60):
            t.advance(10)
            if t.out() and t.state():
                t.peer(". 1:1 ack 1 win 0")
        assert t.state() == ""


def test_closing_after_shutdown_begins_the_orphans_wait() -> None:
    with Talk() as t:
        t.established()
        t.shutdown()
        t.out()
        t.peer(". 1:1 ack 2")
        t.silence(100)
        t.close_sock()
        assert t.state() == "FIN_WAIT_2"
        t.silence(61)
        assert t.state() == ""


@pytest.mark.parametrize(
    "what", ["established", "queued", "half-open", "connecting", "data", "time-wait", "dead"]
)
def test_destroying_a_stack_leaves_nothing(what: str) -> None:
    """The audit is the conversation's: its end asserts that every count is zero."""
    with Talk() as t:
        if what == "queued":
            t.server()
            t.peer("S 0:0")
            t.out()
            t.peer(". 1:1", "P. 1:11")
        elif what == "half-open":
            t.server()
            t.peer("S 0:0")
        elif what == "connecting":
            t.client()
        else:
            t.established()
        if what == "data":
            t.write(3000)
            t.peer("P. 1:11", ". 21:31", ". 1001:1901")
        elif what == "time-wait":
            t.shutdown()
            t.peer("F. 1:1 ack 2")
        elif what == "dead":
            t.peer("P. 1:11", "R 11:11")


# ---- TIME_WAIT ----------------------------------------------------------------------------------------------------
def time_wait(t: Talk, ts: bool = False, rcvd: int = 0) -> None:
    t.established(ts=ts, opts="mss 1460, nop, nop, ts 1000 0" if ts else "mss 1460")
    if rcvd:
        t.peer(f"P. 1:{1 + rcvd} ack 1")
        t.read()
    t.close_sock()
    t.out()
    t.peer(f"F. {1 + rcvd}:{1 + rcvd} ack 2")
    t.out()
    assert t.state() == "TIME_WAIT"


def test_a_repeated_fin_in_time_wait_is_acknowledged_and_the_wait_starts_over() -> None:
    """RFC 9293 3.10.7.4, eighth."""
    with Talk() as t:
        time_wait(t)
        t.advance(40)
        t.peer("F. 1:1 ack 2")
        t.hears(". 2:2 ack 2")
        t.silence(40)
        assert t.state() == "TIME_WAIT"
        t.silence(21)
        assert t.state() == ""


def test_a_newer_syn_replaces_time_wait() -> None:
    """RFC 9293 3.6.1, RFC 6191; our next sequence numbers lie behind the last ones (RFC 1122 4.2.2.13)."""
    with Talk() as t:
        time_wait(t)
        old = t.iss
        t.peer("S 1000:1000 <mss 1460>")
        [syn_ack] = t.out()
        assert (syn_ack.flags, syn_ack.ack) == ("S.", 1001)
        assert old is not None
        assert t.iss is not None
        assert 2 < (t.iss - old) % 2**32 < 2**31
        t.peer(". 1001:1001 ack 1")
        t.accept()
        assert t.state() == "ESTABLISHED"


def test_our_next_sequence_numbers_lie_behind_those_of_a_fast_connection() -> None:
    """Which sent more than its initial sequence numbers' clock went on."""
    with Talk(sndbuf=1 << 20) as t:
        t.established()
        for _ in range(50):
            t.write(1460)
            t.write(1460)
            t.out()
            t.peer(". 1:1")
        last = t.wrote
        t.close_sock()
        t.out()
        t.peer(f"F. 1:1 ack {last + 1}")
        t.out()
        assert t.state() == "TIME_WAIT"
        old = t.iss
        t.peer("S 1000:1000 <mss 1460>")
        t.out()
        assert old is not None
        assert t.iss is not None
        assert last < (t.iss - old) % 2**32 < 2**31


@pytest.mark.parametrize(
    ("ts", "syn", "replaced"),
    [
        (False, "S 1000:1000 <mss 1460>", True),
        (False, "S 2:2 <mss 1460>", False),  # exactly the next one: not above RCV.NXT
        (False, "S -1000:-1000 <mss 1460>", False),
        (True, "S -1000:-1000 <mss 1460, ts 60000 0>", True),  # the timestamp is newer
        (True, "S 1000:1000 <mss 1460, ts 500 0>", False),
    ],
)
def test_only_a_syn_that_is_certainly_newer_replaces_time_wait(ts: bool, syn: str, replaced: bool) -> None:
    with Talk() as t:
        time_wait(t, ts=ts)
        t.peer(syn)
        [answer] = t.out()
        assert answer.flags == ("S." if replaced else ".")
        assert t.state() == ("SYN_RECEIVED" if replaced else "TIME_WAIT")


def test_a_syn_that_nobody_listens_for_leaves_time_wait_alone() -> None:
    with Talk() as t:
        time_wait(t)
        t.stack.close_socket(t.listener)
        t.peer("S 1000:1000")
        t.out()
        assert t.state() == "TIME_WAIT"


def test_connecting_again_replaces_our_own_time_wait_when_timestamps_guard_it() -> None:
    with Talk() as t:
        t.ts = (t.now, 0)
        t.client(SO_REUSEADDR=1)
        t.out()
        t.peer("S. 0:0 <mss 1460, ts 1000 0>")
        t.out()
        t.close_sock()
        t.out()
        t.peer("F. 1:1 ack 2")
        t.out()
        assert t.state() == "TIME_WAIT"
        t.advance(0.5)
        with pytest.raises(AssertionError):
            t.client(SO_REUSEADDR=1)  # not within a second: the clock may be the same
        t.stack.close_socket(t.sock)
        t.advance(0.6)
        old, t.iss = t.iss, None
        t.client(SO_REUSEADDR=1)
        [syn] = t.out()
        assert syn.flags == "S"
        assert old is not None
        assert t.iss is not None
        assert 0 < (t.iss - old) % 2**32 < 2**31


def test_connecting_again_without_timestamps_has_to_wait() -> None:
    with Talk() as t:
        t.established(passive=False, SO_REUSEADDR=1)
        t.close_sock()
        t.out()
        t.peer("F. 1:1 ack 2")
        t.out()
        t.advance(2)
        again = t.stack.socket(lib.BYPASS_STREAM)
        t.stack.setopt(again, lib.BYPASS_SO_REUSEADDR, 1)
        t.stack.bind(again, ("192.0.2.1", 80))
        assert t.stack.connect(again, (PEER, 40000)) == -errno.EADDRNOTAVAIL
        t.advance(61)
        assert t.stack.connect(again, (PEER, 40000)) == -errno.EINPROGRESS
        t.out()


def test_the_oldest_time_wait_makes_room_for_a_new_connection() -> None:
    with Talk(conns=3) as t:
        listener = t.server()
        for port in (1, 2, 3):
            t.peer_port, t.iss = port, None
            t.peer("S 0:0")
            t.out()
            t.peer(". 1:1")
            t.sock = t.stack.accept(listener)
            if port == 1:
                t.shutdown()  # its handle stays: this one cannot make room
            else:
                t.close_sock()
            t.out()
            t.peer("F. 1:1 ack 2")
            t.out()
            assert t.state() == "TIME_WAIT"
            t.advance(1)
        t.peer_port, t.iss = 4, None
        t.peer("S 0:0")
        t.hears("S. 0:0 ack 1")
        assert sorted(i.peer[1] for i in t.stack.conns()) == [1, 2, 3, 4], (
            "a SYN alone costs nobody its place"
        )
        t.peer(". 1:1")
        assert sorted(i.peer[1] for i in t.stack.conns()) == [1, 3, 4]
        assert t.counted()["tcp_time_wait_reused"] == 1


def test_data_in_time_wait_is_not_delivered() -> None:
    with Talk() as t:
        t.established()
        t.shutdown()
        t.peer("F. 1:11 ack 2")
        t.out()
        t.peer("P. 12:22 ack 2")
        t.out()
        assert t.read() == stream(1, 11)
        assert t.read() == b""
