# SPDX-License-Identifier: Apache-2.0
"""TCP: urgent data (RFC 9293 3.8.5, RFC 6093), as Linux has it: one byte out of band, and a mark in the stream."""

from __future__ import annotations

import errno

from bypass._core import ffi, lib
from tcp_talk import Talk, stream

OOB, PEEK, PRI, IN = lib.BYPASS_OOB, lib.BYPASS_PEEK, lib.BYPASS_PRI, lib.BYPASS_IN
AGAIN, INVAL = -errno.EAGAIN, -errno.EINVAL


def ready(t: Talk) -> int:
    return t.stack.ready(t.sock) & (IN | PRI)


def marked(t: Talk) -> bool:
    return t.stack.at_mark(t.sock)


# ---- Receiving --------------------------------------------------------------------------------------------------
def test_the_byte_before_the_pointer_comes_out_of_band_and_not_in_the_stream() -> None:
    """RFC 6093 2.1: the pointer names the byte behind the urgent one."""
    with Talk() as t:
        t.established()
        t.peer("PU. 1:101 <urg 100>")
        assert t.taken(t.sock) & (IN | PRI) == IN | PRI
        assert ready(t) == IN | PRI
        assert t.read(10, OOB) == stream(100, 101)
        assert t.read(10, OOB) == INVAL, "once"
        assert ready(t) == IN
        assert t.read() == stream(1, 100)
        assert ready(t) == 0, "the byte at the mark is not data"
        assert t.read() == AGAIN
        t.peer("P. 101:201")
        assert t.read() == stream(101, 201)
        t.out()


def test_a_read_stops_at_the_mark_and_the_next_passes_over_the_byte() -> None:
    with Talk() as t:
        t.established()
        t.peer("PU. 1:101 <urg 50>")
        assert not marked(t)
        assert t.read() == stream(1, 50)
        assert marked(t)
        assert t.read(0) == b""
        assert t.read() == stream(51, 101)
        assert not marked(t)
        assert t.read(1, OOB) == INVAL, "it was not fetched in time"
        t.out()


def test_looking_ahead_stops_at_the_mark_too_and_changes_nothing() -> None:
    with Talk() as t:
        t.established()
        t.peer("PU. 1:101 <urg 50>")
        assert t.read(1000, PEEK) == stream(1, 50)
        assert t.read(30) == stream(1, 31)
        assert t.read() == stream(31, 50)
        assert t.read(1000, PEEK) == stream(51, 101)
        assert marked(t)
        assert t.read(1, OOB | PEEK) == stream(50, 51)
        assert t.read(1, OOB) == stream(50, 51)
        t.out()


def test_in_line_the_byte_stays_in_the_stream_and_the_mark_still_stops_reads() -> None:
    """RFC 6093 4.2: what programs should ask for."""
    with Talk() as t:
        t.established(SO_OOBINLINE=1)
        t.peer("PU. 1:101 <urg 50>")
        assert t.read(1, OOB) == INVAL
        assert t.read() == stream(1, 50)
        assert marked(t)
        assert ready(t) & IN
        assert t.read() == stream(50, 101)
        assert not marked(t)
        t.out()


def test_a_byte_that_is_announced_but_not_here_is_waited_for() -> None:
    with Talk() as t:
        t.established()
        t.peer("PU. 1:101 <urg 150>")
        assert t.read(1, OOB) == AGAIN
        assert ready(t) == IN
        t.peer("P. 101:201")
        assert ready(t) == IN | PRI
        assert t.read(1, OOB) == stream(150, 151)
        assert t.read() == stream(1, 150)
        assert t.read() == stream(151, 201)
        t.out()


def test_the_pointer_alone_is_enough() -> None:
    """RFC 9293 3.8.5: an empty segment may announce it, also into a closed window."""
    with Talk() as t:
        t.established()
        t.peer("U. 1:1 <urg 10>")
        assert t.read(1, OOB) == AGAIN
        t.peer("P. 1:21")
        assert t.read(1, OOB) == stream(10, 11)
        t.out()


def test_of_two_marks_the_later_stands() -> None:
    """RFC 6093 2.2: the older byte stays in the stream where it was not reached yet."""
    with Talk() as t:
        t.established()
        t.peer("PU. 1:51 <urg 50>", "PU. 51:101 <urg 50>")
        assert t.read(1, OOB) == stream(100, 101)
        assert t.read() == stream(1, 100)
        t.out()


def test_an_older_or_repeated_pointer_changes_nothing() -> None:
    with Talk() as t:
        t.established()
        t.peer("PU. 1:101 <urg 100>")
        assert t.read(1, OOB) == stream(100, 101)
        t.peer("PU. 1:101 <urg 100>", "PU. 101:151 <urg 0>", "PU. 151:161 <urg 10>")
        assert t.read(1, OOB) == stream(160, 161)
        assert t.read() == stream(1, 160)
        t.out()
    with Talk() as t:
        t.established()
        t.peer("PU. 1:101 <urg 150>", "PU. 101:121 <urg 5>", "P. 121:201")
        assert t.read(1, OOB) == stream(150, 151)
        assert t.read() == stream(1, 150)
        t.out()


def test_at_an_unread_mark_the_next_announcement_passes_over_the_byte() -> None:
    with Talk() as t:
        t.established()
        t.peer("PU. 1:11 <urg 10>")
        assert t.read() == stream(1, 10)
        t.peer("PU. 11:21 <urg 10>")
        assert t.read() == stream(11, 20), "byte 10 is gone"
        t.out()


def test_urgent_bytes_ahead_of_a_hole_are_fetched_at_once() -> None:
    with Talk() as t:
        t.established()
        t.peer("PU. 101:201 <urg 100>")
        assert t.read(1, OOB) == stream(200, 201)
        t.peer("P. 1:101")
        assert t.read() == stream(1, 200)
        t.out()


def test_the_end_of_the_stream_is_seen_behind_the_mark() -> None:
    with Talk() as t:
        t.established()
        t.peer("PU. 1:101 <urg 100>", "F. 101:101")
        assert t.read() == stream(1, 100)
        assert marked(t)
        assert t.read() == b""
        t.close_sock()
        assert "R" not in "".join(s.flags for s in t.out())


def test_without_a_mark_there_is_nothing_out_of_band() -> None:
    with Talk() as t:
        t.established()
        assert t.read(1, OOB) == INVAL
        assert not marked(t)
        t.peer("P. 1:101 <urg 50>")  # the flag is what counts
        assert t.read(1, OOB) == INVAL
        assert t.read() == stream(1, 101)
        t.out()


# ---- Sending ----------------------------------------------------------------------------------------------------
def test_the_last_byte_written_out_of_band_is_marked() -> None:
    with Talk() as t:
        t.established()
        t.write(100, OOB)
        t.hears("PU. 1:101 ack 1 <urg 100>")
        t.peer(". 1:1 ack 101")
        t.write(100)
        t.hears("P. 101:201 ack 1 <>")


def test_urgent_data_does_not_wait_for_nagle_or_the_cork() -> None:
    with Talk() as t:
        t.established()
        t.write(100)
        t.out()
        t.write(50, OOB)
        t.hears("PU. 101:151 ack 1 <urg 50>")


def test_every_segment_before_the_mark_tells_of_it_also_when_it_is_sent_again() -> None:
    """RFC 9293 3.8.5: from the urgent pointer on the sender is in urgent mode until it is acknowledged."""
    with Talk() as t:
        t.established()
        t.write(1460 * 2 + 100, OOB)
        assert [(s.seq, s.opts.get("urg")) for s in t.out()] == [(1, 3020), (1461, 1560), (2921, 100)]
        t.advance(1.1)
        again = t.out()
        assert (again[0].seq, again[0].opts.get("urg")) == (1, 3020)
        t.peer(". 1:1 ack 3021")


def test_a_closed_window_does_not_keep_the_news_back() -> None:
    """RFC 9293 3.8.5: the pointer is sent although the window is zero: the window probes carry it."""
    with Talk() as t:
        t.established()
        t.win = 0
        t.peer(". 1:1 ack 1 win 0")
        t.write(10, OOB)
        t.advance(0.5)
        probes = t.out()
        assert probes
        assert all(s.opts.get("urg") == 11 for s in probes), "from the byte before"
        t.win = 65535
        t.peer(". 1:1 ack 1 win 65535")
        assert t.out()[-1].opts["urg"] == 10


def test_marks_travel_with_timestamps_and_blocks() -> None:
    with Talk() as t:
        t.established(opts="mss 1460, sackok, nop, nop, ts 1000 0", ts=True)
        t.peer(". 101:201")
        t.out()
        t.write(10, OOB)
        [s] = t.out()
        assert (s.flags, s.opts["urg"], s.opts["sack"]) == ("P.U", 10, ("101:201",))
        assert "ts" in s.opts


# ---- Throwing away ----------------------------------------------------------------------------------------------
def test_bytes_are_thrown_away_without_being_copied() -> None:
    """tcp(7), MSG_TRUNC."""
    with Talk() as t:
        t.established()
        t.peer("P. 1:1001")
        t.counted()
        assert lib.bypass_recv(t.stack.c, t.sock, ffi.NULL, 600, lib.BYPASS_TRUNC) == 600
        assert lib.bypass_recv(t.stack.c, t.sock, ffi.NULL, 600, lib.BYPASS_TRUNC | PEEK) == 400
        assert "tcp_copied_bytes" not in t.counted()
        assert t.read() == stream(601, 1001)
        t.out()
