# SPDX-License-Identifier: Apache-2.0
"""TCP: received bytes: acknowledgments, the window that is offered, reassembly (RFC 9293 3.8.6, RFC 5681 4.2)."""

from __future__ import annotations

import errno
from itertools import permutations

import pytest
from bypass._core import lib
from tcp_talk import Talk, stream

IN = lib.BYPASS_IN
PEEK = lib.BYPASS_PEEK
AGAIN = -errno.EAGAIN


# ---- Acknowledging ------------------------------------------------------------------------------------------------
def test_a_lone_segment_is_acknowledged_after_40_ms() -> None:
    with Talk() as t:
        t.established(TCP_QUICKACK=0)
        t.mark()
        t.peer("P. 1:101")
        t.at(0.040, ". 1:1 ack 101")


def test_every_second_full_segment_is_acknowledged_at_once() -> None:
    with Talk() as t:
        t.established()
        t.option("TCP_QUICKACK", 0)
        t.peer(". 1:1461")
        t.silence()
        t.peer(". 1461:2921")
        t.hears(". 1:1 ack 2921")
        t.peer(". 2921:4381")
        t.peer(". 4381:5841")
        t.hears(". 1:1 ack 5841")


def test_full_segments_that_come_together_share_an_acknowledgment() -> None:
    """As behind a NIC that coalesces; but never more than eight, and none is left over."""
    with Talk() as t:
        t.established()
        t.option("TCP_QUICKACK", 0)
        t.peer(*(f". {1 + 1460 * i}:{1461 + 1460 * i}" for i in range(20)))
        assert [s.ack for s in t.out()] == [1 + 1460 * n for n in (8, 16, 20)]
        t.peer(". 29201:30661", ". 32121:33581")  # around a hole, at once
        t.hears(". 1:1 ack 30661")


def test_the_first_full_segments_are_acknowledged_each() -> None:
    """The peer is in slow start and lives on acknowledgments."""
    with Talk() as t:
        t.established()
        acks = []
        for i in range(20):
            t.peer(f". {1 + 1460 * i}:{1461 + 1460 * i}")
            acks.append(len(t.out()))
            t.read()
        assert acks[:16] == [1] * 16
        assert 0 in acks[16:]


def test_a_repeated_segment_is_acknowledged_at_once() -> None:
    with Talk() as t:
        t.established()
        t.peer("P. 1:101")
        t.advance(0.1)
        t.hears(". 1:1 ack 101")
        t.peer("P. 1:101")
        t.hears(". 1:1 ack 101")
        assert t.read() == stream(1, 101)
        assert t.read() == AGAIN


def test_a_segment_that_overlaps_what_is_here_gives_its_new_part() -> None:
    with Talk() as t:
        t.established()
        t.peer("P. 1:101", "P. 51:151")
        assert t.read() == stream(1, 151)
        t.peer("P. 0:201")  # begins with the SYN's number
        assert t.read() == stream(151, 201)


def test_a_segment_without_ack_is_dropped() -> None:
    with Talk() as t:
        t.established()
        t.peer("P 1:101")
        t.silence(0.1)
        assert t.read() == AGAIN


# ---- Reassembly ---------------------------------------------------------------------------------------------------
def test_a_hole_is_acknowledged_at_once_and_so_is_its_end() -> None:
    with Talk() as t:
        t.established()
        t.peer("P. 101:201")
        t.hears(". 1:1 ack 1")
        t.peer("P. 201:301")
        t.hears(". 1:1 ack 1")
        assert t.read() == AGAIN
        t.peer("P. 1:101")
        t.hears(". 1:1 ack 301")
        assert t.read() == stream(1, 301)


@pytest.mark.parametrize("size", [1, 4], ids=["chunks", "frames"])
def test_pieces_in_every_order_become_one_stream(size: int) -> None:
    """100-byte payloads are copied, 400-byte payloads stay in their frames."""
    for order in permutations(range(4)):
        with Talk() as t:
            t.established()
            for i in order:
                first = 1 + i * 100 * size
                t.peer(f"P. {first}:{first + 100 * size}")
            assert t.read() == stream(1, 1 + 400 * size), order
            t.sent()


# (what is here ahead of the hole, what comes then); the hole 1:301 is filled last
OVERLAPS = [
    ([(301, 401)], (301, 401)),  # the same
    ([(301, 401)], (351, 451)),  # over its end
    ([(351, 451)], (301, 401)),  # over its beginning
    ([(301, 501)], (351, 401)),  # inside
    ([(351, 401)], (301, 501)),  # around
    ([(301, 401)], (401, 501)),  # behind, touching
    ([(401, 501)], (301, 401)),  # before, touching
    ([(301, 401)], (451, 501)),  # behind, a gap
    ([(301, 401), (501, 601)], (401, 501)),  # between, exactly
    ([(301, 401), (501, 601)], (351, 551)),  # between, over both
    ([(301, 401), (501, 601)], (301, 601)),  # over all
    ([(301, 401), (501, 601), (701, 801)], (251, 901)),
    ([(301, 401), (501, 601), (701, 801)], (351, 751)),
    ([(301, 401), (501, 601), (701, 801)], (501, 601)),
    ([(301, 401), (402, 403), (404, 405)], (301, 405)),
    ([(301, 1201)], (701, 1601)),  # frames
    ([(701, 1601)], (301, 1201)),
    ([(301, 1601)], (801, 901)),
]


@pytest.mark.parametrize(("have", "new"), OVERLAPS)
def test_overlaps_of_every_shape_give_the_bytes_once(
    have: list[tuple[int, int]], new: tuple[int, int]
) -> None:
    with Talk() as t:
        t.established()
        for first, end in [*have, new]:
            t.peer(f". {first}:{end}")
        t.out()
        covered = set()
        for first, end in [*have, new]:
            covered |= set(range(first, end))
        t.peer(". 1:301")
        end = 301
        while end in covered:
            end += 1
        assert t.read() == stream(1, end)
        assert t.out()[-1].ack == end
        last = max(e for _, e in [*have, new])
        t.peer(f". {end}:{last + 1}")
        assert t.read() == stream(end, last + 1)
        t.sent()
        assert t.stack.audit()["chunks"] == 0


def test_data_beyond_the_window_is_cut_off() -> None:
    with Talk(rcvbuf=4096) as t:
        t.established()
        for first in (1, 1461):
            t.peer(f". {first}:{first + 1460}")
        t.peer(". 2921:4381")  # 284 bytes too many
        assert t.info.rcv_nxt == (t.peer_iss + 4097) % 2**32
        assert t.out()[-1].ack == 4097
        t.peer(". 4097:5000")  # a probe of a closed window
        got = t.out()
        assert (got[-1].ack, got[-1].win) == (4097, 0)
        assert t.read() == stream(1, 4097)


def test_segments_wholly_outside_the_window_are_answered_and_counted() -> None:
    with Talk(rcvbuf=4096) as t:
        t.established()
        t.peer(". 4097:4197")
        t.hears(". 1:1 ack 1")
        t.peer(". -1000:-900")
        t.hears(". 1:1 ack 1")
        moved = t.counted()
        assert (moved["tcp_in_out_of_window"], moved["tcp_in_duplicate"]) == (1, 1)


def test_data_behind_the_peers_fin_is_not_delivered() -> None:
    with Talk() as t:
        t.established()
        t.peer("F. 1:101")
        t.hears(". 1:1 ack 102")
        t.peer("P. 102:202")
        t.out()
        assert t.read() == stream(1, 101)
        assert t.read() == b""
        assert t.state() == "CLOSE_WAIT"


# ---- The window ---------------------------------------------------------------------------------------------------
def test_the_window_closes_as_data_waits_and_opens_when_it_is_read() -> None:
    with Talk(rcvbuf=8192) as t:
        t.established()
        assert t.info.rcv_wnd == 8192
        edge = 8193
        nxt = 1
        while nxt < edge:
            end = min(nxt + 1460, edge)
            t.peer(f". {nxt}:{end}")
            nxt = end
        t.advance(0.1)
        got = t.out()
        assert (got[-1].ack, got[-1].win) == (8193, 0)
        assert all(g.ack is not None and g.ack + g.win == edge for g in got), "the right edge stays"
        assert t.read(1000) == stream(1, 1001)
        t.silence()  # less than it is worth
        t.read(1920)
        [update] = t.hears(". 1:1 ack 8193")
        assert update.win == 2920
        t.read()
        [update] = t.hears(". 1:1 ack 8193")
        assert update.win == 8192


def test_the_right_edge_never_moves_left() -> None:
    """RFC 9293 3.8.6, SHLD-14; whatever was announced is accepted (RFC 7323 2.4)."""
    with Talk(rcvbuf=1 << 17) as t:
        t.established(opts="mss 1460, nop, ws 7")
        scale = 2
        edge = 0
        nxt = 1
        step = 700
        for i in range(400):
            t.peer(f". {nxt}:{nxt + step}")
            nxt += step
            t.advance(0.05)
            for g in t.out():
                assert g.ack is not None
                new = g.ack + (g.win << scale)
                assert new > edge - (1 << scale), "but for the scale's rounding (RFC 7323 2.4)"
                edge = max(edge, new)
            step = min(700, edge - nxt)
            if step == 0:
                break
            if i % 3 == 0:
                t.read(911)
        assert step == 0, "the window closed"
        assert t.info.rcv_nxt == (t.peer_iss + nxt) % 2**32, "everything that was announced was taken"
        t.peer(f". {nxt}:{nxt + 100}")
        assert t.out()[-1].win == 0


def test_a_slow_reader_does_not_draw_small_segments() -> None:
    """RFC 9293 3.8.6.2.2: the window grows by a segment or half the buffer, or not at all."""
    with Talk(rcvbuf=8192) as t:
        t.established()
        for first in range(1, 8193, 1024):
            t.peer(f". {first}:{first + 1024}")
        t.advance(0.1)
        assert t.out()[-1].win == 0
        windows = []
        for _ in range(8192 // 64):
            t.read(64)
            windows += [g.win for g in t.out()]
        assert windows[0] >= 1024
        assert all(b - a >= 1024 for a, b in zip([0, *windows], windows, strict=False))


def test_the_right_edge_moves_by_worthwhile_steps_only() -> None:
    with Talk(rcvbuf=8192) as t:
        t.established()
        for first in range(1, 7169, 1024):
            t.peer(f". {first}:{first + 1024}")
        edges = []
        for i in range(12):
            t.read(100)
            t.peer(f"P. {7169 + i}:{7170 + i}")
            t.advance(0.05)
            edges += [g.ack + g.win for g in t.out() if g.ack is not None]
        assert set(edges[:10]) == {8193}
        assert edges[-1] >= 8193 + 1024


def test_small_segments_of_a_slow_reader_do_not_take_a_chunk_each() -> None:
    with Talk(chunks=64) as t:
        t.established()
        for first in range(1, 5001, 10):
            t.peer(f"P. {first}:{first + 10}")
        t.sent()
        assert t.stack.audit()["chunks"] <= 12
        assert t.read() == stream(1, 5001)


def test_out_of_order_data_never_starves_data_in_order() -> None:
    """Every second byte takes a chunk; the holes must be filled all the same."""
    with Talk(chunks=16, frames=64) as t:
        t.established()
        for first in range(2, 82, 2):
            t.peer(f". {first}:{first + 1}")
        t.out()
        t.peer(". 1:101")
        assert t.out()[-1].ack == 101
        assert t.read() == stream(1, 101)
        assert t.counted()["tcp_in_no_memory"] > 0


def test_one_connections_out_of_order_data_leaves_chunks_for_others() -> None:
    with Talk(chunks=32) as t:
        t.established()
        for first in range(2, 202, 2):
            t.peer(f". {first}:{first + 1}")
        t.sent()
        assert t.stack.audit()["chunks"] == 24
        t.peer_port, t.iss = 40001, None
        t.peer("S 0:0")
        t.out()
        t.peer(". 1:1", "P. 1:201")
        other = t.accept()
        assert t.stack.recv(other, 1000) == stream(1, 201)
        t.sent()


def test_data_in_order_takes_the_place_of_data_ahead_when_all_chunks_are_used() -> None:
    with Talk(chunks=16) as t:
        t.established()
        for first in range(3001, 3025, 2):
            t.peer(f". {first}:{first + 1}")
        for first in range(1, 2501, 100):
            t.peer(f". {first}:{first + 100}")
        assert t.out()[-1].ack == 2501
        assert t.counted()["tcp_ooo_pruned"] == 2, "no more than needed"
        assert t.read() == stream(1, 2501)
        t.peer(". 2501:3101")
        assert t.read() == stream(2501, 3101)
        t.sent()


def test_data_is_accepted_when_every_frame_is_held() -> None:
    with Talk(frames=32) as t:
        t.established()
        for i in range(40):
            t.peer(f". {1 + 1000 * i}:{1001 + 1000 * i}")
        got = t.read(100000)
        assert got == stream(1, 40001)
        t.sent()


# ---- recv() -------------------------------------------------------------------------------------------------------
def test_peeking_leaves_the_data_and_reads_may_be_of_any_size() -> None:
    with Talk() as t:
        conn = t.established()
        t.peer(". 1:1461", "P. 1461:1561")
        assert t.taken(conn) == IN
        assert t.read(10, PEEK) == stream(1, 11)
        assert t.read(5000, PEEK) == stream(1, 1561)
        assert t.read(1) == stream(1, 2)
        assert t.read(1459) == stream(2, 1461)
        assert t.read(0) == b""
        assert t.read(7, PEEK) == stream(1461, 1468)
        assert t.read(5000) == stream(1461, 1561)
        assert t.read(5000) == AGAIN
        assert not t.stack.ready(conn) & IN


def test_an_event_tells_of_new_data_once() -> None:
    with Talk() as t:
        conn = t.established()
        t.peer("P. 1:11")
        assert t.taken(conn) == IN
        assert t.taken(conn) == 0
        assert t.stack.ready(conn) & IN, "but readiness stays"
        t.peer("P. 11:21")
        assert t.taken(conn) == IN
        t.peer("P. 31:41")
        assert t.taken(conn) == 0, "nothing new can be read"
        t.peer("P. 21:31")
        assert t.taken(conn) == IN


def test_after_shutdown_of_reading_what_comes_may_still_be_read() -> None:
    """As on Linux: recv() gives 0 in place of EAGAIN, and that is all."""
    with Talk() as t:
        t.established()
        t.peer("P. 1:11", "P. 21:31")
        t.shutdown(lib.BYPASS_SHUT_RD)
        assert t.read() == stream(1, 11)
        assert t.read() == b""
        t.peer("P. 11:21")
        assert t.out()[-1].ack == 31
        assert t.read() == stream(11, 31)
        assert t.read() == b""


# ---- PAWS (RFC 7323 5) --------------------------------------------------------------------------------------------
def test_an_old_timestamp_marks_an_old_duplicate() -> None:
    with Talk() as t:
        t.established(opts="mss 1460, nop, nop, ts 1000 0", ts=True)
        t.peer("P. 1:11 ack 1 <nop, nop, ts 2000 0>")
        t.advance(1)
        t.out()
        t.peer("P. 11:21 ack 1 <nop, nop, ts 1999 0>")
        [ack] = t.out()
        assert (ack.flags, ack.ack, ack.opts["ts"][1]) == (".", 11, 2000)
        assert t.counted()["tcp_in_paws"] == 1
        assert t.read() == stream(1, 11)
        t.peer("P. 11:21 ack 1 <nop, nop, ts 2000 0>")
        assert t.read() == stream(11, 21)


def test_the_timestamp_of_what_came_before_is_not_echoed() -> None:
    """RFC 7323 5.3 R2: R3 is for what lies in the window. By the old echo its sender sees that the first copy had come
    (RFC 3522)."""
    with Talk() as t:
        t.established(opts="mss 1460, nop, nop, ts 1000 0", ts=True)
        t.peer("P. 1:11 ack 1 <nop, nop, ts 2000 0>")
        assert t.read() == stream(1, 11)
        t.advance(1)
        t.out()
        for ts in (2200, 2600):
            t.peer(f"P. 1:11 ack 1 <nop, nop, ts {ts} 0>")
            [answer] = t.out()
            assert (answer.flags, answer.ack, answer.opts["ts"][1]) == (".", 11, 2000)
        assert t.counted()["tcp_in_duplicate"] == 2


def test_an_old_forged_timestamp_is_not_echoed() -> None:
    """Behind more than a window nothing is repeated: a timestamp ahead of time would stop the connection (PAWS)."""
    with Talk() as t:
        t.established(opts="mss 1460, nop, nop, ts 1000 0", ts=True)
        t.stack.setopt(t.sock, lib.BYPASS_SO_RCVBUF, 4096)
        for start in range(1, 70001, 1000):
            t.peer(f"P. {start}:{start + 1000} ack 1 <nop, nop, ts 2000 0>")
            assert t.read() == stream(start, start + 1000)
        t.advance(1)
        t.out()
        t.peer("P. 1:11 ack 1 <nop, nop, ts 900000 0>")
        [answer] = t.out()
        assert answer.opts["ts"][1] == 2000
        t.peer("P. 70001:70011 ack 1 <nop, nop, ts 2001 0>")
        assert t.read() == stream(70001, 70011)
        t.advance(1)
        t.out()


def test_timestamps_wrap() -> None:
    with Talk() as t:
        t.ts_base = 4294967290
        t.established(opts="mss 1460, nop, nop, ts 4294967290 0", ts=True)
        t.peer("P. 1:11 ack 1 <nop, nop, ts 4294967295 0>")
        t.peer("P. 21:31 ack 1 <nop, nop, ts 5 0>")  # out of order: not on the short way
        t.peer("P. 11:21 ack 1 <nop, nop, ts 5 0>")
        assert t.read() == stream(1, 31)


def test_after_24_days_of_silence_an_old_timestamp_proves_nothing() -> None:
    """RFC 7323 5.5."""
    with Talk() as t:
        t.established(opts="mss 1460, nop, nop, ts 1000 0", ts=True)
        t.peer("P. 1:11 ack 1 <nop, nop, ts 2000 0>")
        for _ in range(24):
            t.advance(86400)
        t.out()
        t.peer("P. 11:21 ack 1 <nop, nop, ts 1500 0>")
        t.advance(1)
        t.peer("P. 21:31 ack 1 <nop, nop, ts 1501 0>")
        t.advance(1)
        t.out()
        assert t.read() == stream(1, 31)


def test_the_echo_is_of_the_oldest_unacknowledged_segment() -> None:
    """RFC 7323 4.3: delayed ACKs and holes."""
    with Talk() as t:
        t.established(opts="mss 1460, nop, nop, ts 1000 0", ts=True)
        t.option("TCP_QUICKACK", 0)
        t.peer(". 1:1449 ack 1 <nop, nop, ts 1010 0>", ". 1449:2897 ack 1 <nop, nop, ts 1020 0>")
        [ack] = t.out()
        assert ack.opts["ts"][1] == 1010, "of the first of the two"
        t.peer(". 4345:5793 ack 1 <nop, nop, ts 1030 0>")
        [ack] = t.out()
        assert ack.opts["ts"][1] == 1010, "a segment behind a hole does not count"
        t.peer(". 2897:4345 ack 1 <nop, nop, ts 1040 0>")
        [ack] = t.out()
        assert ack.opts["ts"][1] == 1040, "the one that filled it does"


def test_two_sides_that_reject_each_other_do_not_fight() -> None:
    """An ACK with an old timestamp is not answered without limit."""
    with Talk() as t:
        t.established(opts="mss 1460, nop, nop, ts 1000 0", ts=True)
        t.peer("P. 1:11 ack 1 <nop, nop, ts 90000 0>")
        t.out()
        for _ in range(100):
            t.peer(". 11:11 ack 1 <nop, nop, ts 5 0>")
        assert len(t.out()) <= 2


def test_payloads_with_a_wrong_checksum_are_dropped_and_counted() -> None:
    with Talk() as t:
        t.established()
        t.inject_ip(t.segment("P. 1:11", csum=0x1234))
        t.silence(0.1)
        assert t.read() == AGAIN
        assert t.counted() == {"tcp_in": 1, "tcp_in_bad_checksum": 1}
