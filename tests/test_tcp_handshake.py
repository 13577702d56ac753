# SPDX-License-Identifier: Apache-2.0
"""TCP: how connections begin (RFC 9293 3.5, 3.10.7.2 to .4; options RFC 7323)."""

from __future__ import annotations

import errno

import pytest
from bypass._core import lib
from conversation import PEER, PEER_MAC, US
from tcp_talk import Talk, options_bytes, stream
from wire import SYN, TCP, ipv4, tcp

IN, OUT, ERR, HUP, RDHUP = (getattr(lib, f"BYPASS_{n}") for n in ("IN", "OUT", "ERR", "HUP", "RDHUP"))


# ---- Passive ------------------------------------------------------------------------------------------------------
def test_a_passive_open_takes_three_segments() -> None:
    with Talk() as t:
        listener = t.server()
        t.peer("S 0:0 <mss 1460>")
        t.hears("S. 0:0 ack 1 win 65535 <mss 1460>")
        assert t.state() == "SYN_RECEIVED"
        with pytest.raises(BlockingIOError):
            t.accept()
        t.peer(". 1:1 ack 1")
        t.silence()
        assert t.taken(listener) == IN
        conn = t.accept()
        assert t.taken(conn) == OUT
        assert t.state() == "ESTABLISHED"
        assert t.stack.local(conn) == (US, 80)
        assert t.stack.peer(conn) == (PEER, 40000)
        moved = t.counted()
        assert {k: moved[k] for k in ("tcp_passive_opens", "tcp_established", "tcp_accepted")} == {
            "tcp_passive_opens": 1,
            "tcp_established": 1,
            "tcp_accepted": 1,
        }


@pytest.mark.parametrize(
    ("syn", "answer"),
    [
        ("mss 1460", "mss 1460"),
        ("mss 536", "mss 1460"),
        ("", "mss 1460"),
        ("mss 1460, nop, ws 7", "mss 1460, ws 5"),
        ("mss 1460, nop, ws 255", "mss 1460, ws 5"),
        ("mss 1460, ts 77 0", "mss 1460, ts TS 77"),
        ("mss 1460, ts 4294967295 0, nop, ws 0", "mss 1460, ts TS 4294967295, ws 5"),
        ("mss 1460, sackok", "mss 1460, sackok"),
        (
            "hex fd0a0102030405060708, mss 1200, hex 220a0000000000000000, nop, ws 3",
            "mss 1460, ws 5",
        ),  # unknown ones
        ("nop, nop, mss 1460, eol", "mss 1460"),
        ("hex 0205050505, mss 1460", "mss 1460"),  # an MSS option of a wrong length is none
    ],
)
def test_the_syn_ack_offers_only_what_the_syn_offered(syn: str, answer: str) -> None:
    with Talk(rcvbuf=1 << 20) as t:
        t.server()
        t.peer(f"S 0:0 <{syn}>")
        [got] = t.out()
        if "ts" in got.opts:
            answer = answer.replace("TS", str(got.opts["ts"][0]))
        t.match([got], (f"S. 0:0 ack 1 <{answer}>",))


@pytest.mark.parametrize(
    ("syn", "mss"),
    [
        ("mss 1460", 1460),
        ("mss 9000", 1460),
        ("mss 1000", 1000),
        ("", 536),  # RFC 9293 3.7.1, MUST-15
        ("mss 1460, ts 1 0", 1448),
        ("mss 1000, ts 1 0", 988),
        ("mss 1", 60),
        ("mss 0", 536),
    ],
)
def test_segments_are_as_large_as_the_peer_allows(syn: str, mss: int) -> None:
    with Talk() as t:
        t.established(opts=syn, ts="ts" in syn)
        t.write(2 * mss)
        assert [len(s.data) for s in t.out()] == [mss, mss]


@pytest.mark.parametrize(
    "raw",
    ["01010102", "02000101", "02010101", "0205ffff", "080a0000", "080a0000 0000ffff", "01fe00ff", "01010205"],
)
def test_a_segment_with_malformed_options_is_dropped_and_counted(raw: str) -> None:
    with Talk() as t:
        t.server()
        t.inject_ip(
            ipv4(PEER, US, TCP, tcp(PEER, US, 40000, 80, 5, 0, SYN, 65535, options=bytes.fromhex(raw)))
        )
        t.silence()
        assert t.counted() == {"tcp_in": 1, "tcp_in_bad_options": 1}


def test_a_lost_syn_ack_is_repeated_with_doubled_intervals_and_then_forgotten() -> None:
    with Talk() as t:
        t.server()
        t.peer("S 0:0 <mss 1460>")
        syn_ack = "S. 0:0 ack 1 <mss 1460>"
        t.hears(syn_ack)
        t.at(1, syn_ack, 3, syn_ack, 7, syn_ack, 15, syn_ack, 31, syn_ack)
        assert t.state() == "SYN_RECEIVED"
        t.silence(33)
        assert t.state() == ""
        assert t.counted()["tcp_timed_out"] == 1


def test_a_repeated_syn_draws_the_syn_ack_again() -> None:
    with Talk() as t:
        t.server()
        t.peer("S 0:0 <mss 1460>")
        t.hears("S. 0:0 ack 1")
        t.advance(0.5)
        t.peer("S 0:0 <mss 1460>")
        t.hears("S. 0:0 ack 1 <mss 1460>")
        t.peer(". 1:1")
        t.accept()
        assert t.info.srtt_us == 0, "which SYN-ACK was answered is not known (Karn)"
        t.write(1460)
        t.hears("P. 1:1461 ack 1")
        t.silence()


def test_data_behind_the_handshake_is_taken_with_the_third_segment() -> None:
    with Talk() as t:
        t.server()
        t.peer("S 0:0")
        t.hears("S. 0:0 ack 1")
        t.peer("P. 1:11 ack 1")
        t.accept()
        assert t.read() == stream(1, 11)
        t.at(0.005, ". 1:1 ack 11")


def test_data_in_a_syn_is_left_to_be_sent_again() -> None:
    with Talk() as t:
        t.server()
        t.inject_ip(t.segment("S 0:0", data=b"early"))
        t.hears("S. 0:0 ack 1")
        t.peer("P. 1:6")
        t.accept()
        assert t.read() == stream(1, 6)


def test_a_wrong_ack_of_the_handshake_draws_a_reset_that_its_sender_believes() -> None:
    with Talk() as t:
        t.server()
        t.peer("S 0:0")
        t.hears("S. 0:0 ack 1")
        for ack in (0, 2, 5000, -7):
            t.peer(f". 1:1 ack {ack}")
            [rst] = t.out()
            assert (rst.flags, rst.seq, rst.ack) == ("R", ack, None)
        assert t.state() == "SYN_RECEIVED"
        t.peer(". 1:1 ack 1")
        assert t.state() == "ESTABLISHED"


def test_a_reset_in_syn_received_returns_to_listen_silently() -> None:
    with Talk() as t:
        listener = t.server()
        t.peer("S 0:0")
        t.hears("S. 0:0 ack 1")
        t.peer("R 1:1")
        t.silence()
        assert t.state() == ""
        assert t.taken(listener) == 0
        t.peer("S 5000:5000")
        t.hears("S. 0:0 ack 5001")


def test_an_old_duplicate_syn_costs_nothing_but_a_reset_from_the_peer() -> None:
    """RFC 9293 figure 9: the peer refuses our answer to its old SYN, then its new one is served."""
    with Talk() as t:
        t.server()
        t.peer("S -90000:-90000")
        t.hears("S. 0:0 ack -89999")
        t.peer("S 0:0")  # the real one, far from the window
        [ack] = t.out()
        assert (ack.flags, ack.ack) == (".", -89999)
        t.peer("R -89999:-89999")
        assert t.state() == ""
        t.advance(1)
        t.peer("S 0:0")
        t.hears("S. 0:0 ack 1")
        t.peer(". 1:1")
        t.accept()


@pytest.mark.parametrize("flags", [".", "P.", "F.", "S."])
def test_a_listener_answers_an_ack_with_a_reset(flags: str) -> None:
    with Talk() as t:
        t.server()
        t.iss = 0
        t.peer(f"{flags} 7:7 ack 99")
        [rst] = t.out()
        assert (rst.flags, rst.seq, rst.ack) == ("R", 99, None)
        assert t.state() == ""


@pytest.mark.parametrize("flags", ["R", "R.", "F", "P", "U", "SF"])
def test_a_listener_ignores_what_begins_no_connection(flags: str) -> None:
    with Talk() as t:
        t.server()
        t.iss = 0
        t.peer(f"{flags} 7:7 ack 1" if "." in flags else f"{flags} 7:7")
        t.silence()
        assert t.state() == ""


def test_a_full_accept_queue_drops_syns_and_they_are_counted() -> None:
    with Talk() as t:
        listener = t.server(backlog=1)  # and one more, as on Linux
        for port in (40001, 40002):
            t.peer_port, t.iss = port, None
            t.peer("S 0:0")
            t.out()
            t.peer(". 1:1")
        t.peer_port, t.iss = 40003, None
        t.peer("S 0:0")
        t.silence()
        assert t.counted()["tcp_listen_overflow"] == 1
        first, second = t.stack.accept(listener), t.stack.accept(listener)
        assert [t.stack.peer(s)[1] for s in (first, second)] == [40001, 40002], "first come, first served"
        t.peer("S 0:0")
        t.hears("S. 0:0 ack 1")


def test_a_handshake_that_ends_when_the_queue_is_full_may_be_accepted_later() -> None:
    with Talk() as t:
        listener = t.server(backlog=0)
        for port in (40001, 40002):
            t.peer_port, t.iss = port, None
            t.peer("S 0:0")
            t.out()
        t.peer_port = 40002
        t.peer(". 1:1")
        t.peer_port, t.iss = 40001, None
        t.iss = next(i for i in t.stack.conns() if i.peer[1] == 40001).snd_una
        t.peer(". 1:1 ack 1")
        assert t.state() == "SYN_RECEIVED"
        assert t.stack.peer(t.stack.accept(listener))[1] == 40002
        t.advance(1.1)  # our SYN-ACK comes again, the peer answers it
        t.hears("S. 0:0 ack 1")
        t.peer(". 1:1")
        assert t.stack.peer(t.stack.accept(listener))[1] == 40001


def test_many_half_open_connections_are_bounded() -> None:
    with Talk(conns=300) as t:
        t.server(backlog=5)
        for port in range(1, 201):
            t.peer_port, t.iss = port, None
            t.peer("S 0:0")
        t.sent()
        assert t.counted()["tcp_syn_overflow"] == 200 - 128


def test_connections_without_room_are_refused_silently_and_counted() -> None:
    with Talk(conns=2) as t:
        t.server()
        for port in (1, 2):
            t.peer_port, t.iss = port, None
            t.peer("S 0:0")
            t.out()
            t.peer(". 1:1")
        t.peer_port, t.iss = 3, None
        t.peer("S 0:0")
        t.silence(2)
        assert t.counted()["tcp_no_conn"] == 1


def test_a_handshake_that_ends_when_there_is_no_room_may_end_later() -> None:
    with Talk(conns=1) as t:
        listener = t.server()
        for port in (40001, 40002):
            t.peer_port, t.iss = port, None
            t.peer("S 0:0")
            t.out()
        t.peer(". 1:1")
        t.peer_port, t.iss = 40001, next(i for i in t.stack.conns() if i.peer[1] == 40001).snd_una
        t.peer(". 1:1 ack 1")
        assert t.state() == "SYN_RECEIVED"
        assert t.counted()["tcp_no_conn"] == 1
        t.stack.abort(t.stack.accept(listener))
        t.sent()
        t.at(1, "S. 0:0 ack 1")  # our SYN-ACK comes again, the peer answers it
        t.peer(". 1:1 ack 1")
        assert t.state() == "ESTABLISHED"


def test_listening_on_one_address_comes_before_listening_on_all() -> None:
    with Talk() as t:
        t.server()
        one = t.stack.socket(lib.BYPASS_STREAM)
        with pytest.raises(OSError, match="Address already in use"):
            t.stack.bind(one, (US, 80))
        t.peer("S 0:0")
        t.hears("S. 0:0 ack 1")


def test_closing_a_listener_resets_those_that_wait_in_its_queues() -> None:
    with Talk() as t:
        listener = t.server()
        t.peer("S 0:0")
        t.out()
        t.peer(". 1:1")
        t.peer_port = 40001
        t.iss = None
        t.peer("S 0:0")
        t.out()
        t.stack.close_socket(listener)
        frames = t.sent()
        assert len(frames) == 2
        for frame in frames:
            assert frame[14 + 20 + 13] == 4 | 16, "RST, ACK"
        assert t.state() == ""
        assert t.stack.audit()["conns"] == 0
        t.iss = 0
        t.peer("S 0:0")
        t.hears("R. 0:0 ack 1")


# ---- Active -------------------------------------------------------------------------------------------------------
def test_an_active_open_takes_three_segments() -> None:
    with Talk() as t:
        conn = t.client()
        [syn] = t.out()
        t.match([syn], (f"S 0:0 win 65535 <mss 1460, sackok, ts {syn.opts['ts'][0]} 0, ws 7>",))
        assert t.state() == "SYN_SENT"
        t.advance(0.030)
        t.peer("S. 0:0 <mss 1460>")
        t.hears(". 1:1 ack 1 <>")
        assert t.taken(conn) == OUT
        assert t.stack.error(conn) == 0
        assert 29_000 <= t.info.srtt_us <= 31_000


def test_what_the_syn_ack_does_not_answer_is_not_used() -> None:
    with Talk() as t:
        t.client()
        t.out()
        t.peer("S. 0:0 win 1000 <mss 1000>")
        t.hears(". 1:1 ack 1 <>")
        info = t.info
        assert (info.timestamps, info.window_scaling, info.snd_mss, info.snd_wnd) == (
            False,
            False,
            1000,
            1000,
        )


def test_what_the_syn_ack_answers_is_used() -> None:
    with Talk() as t:
        t.client()
        [syn] = t.out()
        t.peer(f"S. 0:0 win 1000 <mss 1460, nop, nop, ts 500 {syn.opts['ts'][0]}, nop, ws 4>")
        [ack] = t.out()
        assert ack.opts["ts"][1] == 500
        assert ack.win == (1 << 18) >> 7
        assert (t.info.timestamps, t.info.window_scaling, t.info.snd_mss) == (True, True, 1448)
        assert t.info.snd_wnd == 1000, "the window of a SYN is never scaled (RFC 7323 2.2)"
        t.peer(". 1:1 win 1000 <nop, nop, ts 501 0>")
        assert t.info.snd_wnd == 16000


def test_an_unanswered_syn_is_repeated_six_times_and_then_times_out() -> None:
    with Talk() as t:
        conn = t.client()
        t.hears("S 0:0")
        t.at(1, "S 0:0", 3, "S 0:0", 7, "S 0:0", 15, "S 0:0", 31, "S 0:0", 63, "S 0:0")
        t.silence(63.9)
        assert t.taken(conn) == 0
        t.silence(0.2)
        assert t.taken(conn) & ERR
        assert t.stack.error(conn) == errno.ETIMEDOUT
        assert t.stack.error(conn) == 0, "an error is reported once"


@pytest.mark.parametrize(("lost", "cwnd"), [(1, 10_000), (2, 1000)])
def test_after_two_lost_syns_the_first_window_is_one_segment(lost: int, cwnd: int) -> None:
    """RFC 6928 2: not after one, which may have been late. RFC 6298 3 (Karn): no round trip either way."""
    with Talk() as t:
        t.client()
        t.hears("S 0:0")
        t.at(*(1, "S 0:0", 3, "S 0:0")[: 2 * lost])
        t.peer("S. 0:0 <mss 1000>")
        t.hears(". 1:1 ack 1")
        assert (t.info.srtt_us, t.info.cwnd) == (0, cwnd)


def test_timestamps_tell_which_syn_was_answered() -> None:
    """RFC 7323 4: no three seconds until the first timeout then (RFC 6298 5.7)."""
    with Talk() as t:
        t.client()
        t.hears("S 0:0")
        [again] = t.at(1, "S 0:0")
        t.advance(0.05)
        t.peer(f"S. 0:0 <mss 1000, nop, nop, ts 500 {again.opts['ts'][0]}>")
        t.hears(". 1:1 ack 1")
        assert t.info.srtt_us == pytest.approx(50_000, abs=3000)
        assert t.info.rto_us < 300_000


def test_timestamps_tell_which_syn_ack_was_answered() -> None:
    with Talk() as t:
        t.server()
        t.peer("S 0:0 <mss 1000, nop, nop, ts 500 0>")
        t.advance(1.5)
        again = t.out()[-1]
        age_us = (t.now - again.at_ns) // 1000
        t.peer(f". 1:1 ack 1 <nop, nop, ts 600 {again.opts['ts'][0]}>")
        assert t.info.srtt_us == pytest.approx(age_us, abs=3000)
        assert t.info.cwnd == 10 * t.info.snd_mss


def test_a_refused_connection_says_so_once() -> None:
    with Talk() as t:
        conn = t.client()
        t.hears("S 0:0")
        t.peer("R. 0:0 ack 1")
        t.silence()
        assert t.taken(conn) & (ERR | HUP) == ERR | HUP
        assert t.stack.send(conn, b"x") == -errno.ECONNREFUSED
        assert t.stack.error(conn) == 0
        assert t.stack.send(conn, b"x") == -errno.EPIPE
        assert t.state() == ""


@pytest.mark.parametrize("spec", ["R 0:0", "R. 0:0 ack 0", "R. 0:0 ack 2", "R. 0:0 ack 70000"])
def test_a_reset_that_does_not_acknowledge_our_syn_is_ignored(spec: str) -> None:
    with Talk() as t:
        t.client()
        t.hears("S 0:0")
        t.peer(spec)
        t.silence()
        assert t.state() == "SYN_SENT"


@pytest.mark.parametrize("ack", [0, 2, -5000])
def test_a_syn_ack_of_something_else_is_answered_with_a_reset(ack: int) -> None:
    with Talk() as t:
        t.client()
        t.hears("S 0:0")
        t.peer(f"S. 0:0 ack {ack}")
        [rst] = t.out()
        assert (rst.flags, rst.seq, rst.ack) == ("R", ack, None)
        assert t.state() == "SYN_SENT"


def test_a_bare_ack_does_not_open_a_connection() -> None:
    with Talk() as t:
        t.client()
        t.hears("S 0:0")
        t.peer(". 1:1 ack 1")
        t.silence()
        assert t.state() == "SYN_SENT"


def test_data_and_fin_with_the_syn_ack_are_taken() -> None:
    with Talk() as t:
        conn = t.client()
        t.hears("S 0:0")
        t.inject_ip(t.segment("SF. 0:0 ack 1 <mss 1460>", data=stream(1, 101)))
        t.hears(". 1:1 ack 102")
        assert t.taken(conn) & (IN | OUT | RDHUP) == IN | OUT | RDHUP
        assert t.read() == stream(1, 101)
        assert t.read() == b""
        assert t.state() == "CLOSE_WAIT"


def test_a_simultaneous_open_becomes_one_connection() -> None:
    """RFC 9293 figure 8."""
    with Talk() as t:
        conn = t.client()
        t.hears("S 0:0")
        t.peer("S 0:0 <mss 1460, nop, ws 7>")
        t.hears("S. 0:0 ack 1 <mss 1460, ws 7>")
        assert t.state() == "SYN_RECEIVED"
        t.peer("S. 0:0 ack 1 win 60000 <mss 1460, nop, ws 7>")
        assert t.state() == "ESTABLISHED"
        assert t.taken(conn) & OUT
        assert 60000 - 128 < t.info.snd_wnd <= 60000, "the window of a SYN is never scaled (RFC 7323 2.2)"
        t.silence(0.1)
        t.write(10)
        t.hears("P. 1:11 ack 1")


def test_a_simultaneous_open_may_end_with_a_plain_ack() -> None:
    with Talk() as t:
        conn = t.client()
        t.hears("S 0:0")
        t.peer("S 0:0 <mss 1460>")
        t.hears("S. 0:0 ack 1")
        t.peer("P. 1:11 ack 1")
        assert t.state() == "ESTABLISHED"
        assert t.taken(conn) == IN | OUT
        assert t.read() == stream(1, 11)


def test_a_reset_in_a_simultaneous_open_is_a_refusal() -> None:
    with Talk() as t:
        conn = t.client()
        t.hears("S 0:0")
        t.peer("S 0:0")
        t.hears("S. 0:0 ack 1")
        t.peer("R 1:1")
        assert t.stack.error(conn) == errno.ECONNREFUSED


def test_closing_before_the_answer_forgets_the_connection() -> None:
    with Talk() as t:
        t.client()
        t.hears("S 0:0")
        t.close_sock()
        t.silence()
        assert t.state() == ""
        t.peer("S. 0:0 ack 1")
        t.hears("R 1:1")


def test_a_connection_waits_for_its_next_hop_without_wasting_time() -> None:
    with Talk(neighbours=(), iss=None) as t:
        t.client()
        t.silence(0.5)
        assert t.stack.nexthop_wanted() == [PEER]
        t.stack.nexthop_set(PEER, PEER_MAC)
        t.hears("S 0:0")
        t.peer("S. 0:0")
        t.hears(". 1:1 ack 1")


def test_a_next_hop_that_does_not_exist_fails_the_connection_at_once() -> None:
    with Talk(neighbours=(), iss=None) as t:
        conn = t.client()
        t.silence(0.1)
        t.stack.nexthop_set(PEER, None)
        t.settle()
        assert t.taken(conn) & ERR
        assert t.stack.error(conn) == errno.EHOSTUNREACH


def test_a_chosen_port_is_free_and_not_predictable() -> None:
    ports = []
    for seed in range(8):
        with Talk(iss=None, seed=seed) as t:
            for _ in range(3):
                conn = t.stack.socket(lib.BYPASS_STREAM)
                t.stack.connect(conn, (PEER, 9))
                ports.append(t.stack.local(conn)[1])
            t.sent()
            assert len(set(ports[-3:])) == 3
    assert all(32768 <= p <= 60999 for p in ports)
    assert len(set(ports)) >= 20, "of 24 with 8 seeds"


def test_options_are_written_as_the_rfc_says() -> None:
    assert options_bytes("mss 1460, nop, ws 7, ts 1 2") == bytes.fromhex(
        "020405b4 01 030307 080a 00000001 00000002"
    )


def test_a_burst_of_syns_is_answered_while_the_question_for_their_neighbour_is_open() -> None:
    """The answers go back to where the SYNs came from; none of them waits, or is dropped."""
    with Talk(neighbours=(), iss=None) as t:
        t.server(backlog=64)
        t.peer("S 0:0 <mss 1460>")
        t.out()
        t.peer(". 1:1")
        assert t.stack.nexthop_wanted() == [PEER], "the connection asks"
        frames = []
        for t.peer_port in range(41000, 41040):
            frames.append(t.frame(t.segment("S 0:0 <mss 1460>")))
        t.inject(*frames)
        answers = t.sent()
        assert len(answers) == 40
        assert {f[:6] for f in answers} == {PEER_MAC}
        assert "dst_wait_dropped" not in t.counted()
