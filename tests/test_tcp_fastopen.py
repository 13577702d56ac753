# SPDX-License-Identifier: Apache-2.0
"""TCP Fast Open (RFC 7413): whose data in a SYN is believed, what is sent early, what a lost or refused one costs."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest
from bypass._core import ffi, lib
from conversation import OTHER, PEER, PEER_MAC, US
from tcp_talk import PEER_PORT, Segment, Talk, stream

from bypass.core import Config
from bypass.sim import Faults, Network

PERIOD = 2**42 / 1e9  # seconds in which a server gives the same cookie
MSS = 1460
SYN_ROOM = MSS - 40  # payload bytes of a SYN: beside any options
FORGED = ("aabbccddeeff0011", "00" * 8, "aabbccdd", "aa" * 16)


# ---- The peer is a client ------------------------------------------------------------------------------------------
def server(t: Talk, backlog: int = 16, most: int = 8) -> int:
    return t.server(backlog, TCP_FASTOPEN=most)


def syn(t: Talk, option: str = "", n: int = 0, opts: str = f"mss {MSS}") -> Segment:
    """A SYN with n bytes and the option; what answers it."""
    t.iss = None
    t.peer(f"S 0:{n} <{opts}{', ' if option else ''}{option}>")
    [answer] = t.out()
    return answer


def cookie(t: Talk) -> str:
    """By a handshake that the peer takes back."""
    answer = syn(t, "fo")
    assert (answer.flags, answer.ack) == ("S.", 1)
    t.peer("R. 1:1 ack 1")
    assert t.state() == ""
    t.counted()
    return str(answer.opts["fo"])


def syn_data(t: Talk) -> bool:
    """TCPI_OPT_SYN_DATA of the connection's TCP_INFO, as Linux lays it out."""
    info, out = ffi.new("struct bypass_tcp_info *"), ffi.new("uint8_t[8]")
    assert lib.bypass_tcp_info(t.stack.c, t.sock, info) == 0
    assert lib.bypass_tcp_info_linux(info, out, 8) == 8
    return bool(out[5] & 32)


def fast(t: Talk, n: int = 500, *, opts: str = f"mss {MSS}") -> int:
    """A connection whose first n bytes came with the SYN, before the handshake's end."""
    answer = syn(t, f"fo {cookie(t)}", n, opts)
    assert (answer.flags, answer.ack) == ("S.", 1 + n)
    assert t.state() == "SYN_RECEIVED"
    return t.accept()


def test_data_in_a_syn_with_a_good_cookie_is_read_and_answered_before_the_handshake_ends() -> None:
    """RFC 7413 4.2.2."""
    with Talk() as t:
        server(t)
        conn = fast(t)
        assert t.stack.ready(conn) == lib.BYPASS_IN | lib.BYPASS_OUT
        assert t.read() == stream(1, 501)
        t.write(3000)
        assert [(s.seq, s.end) for s in t.out()] == [(1, 1461), (1461, 2921)]
        t.peer(". 501:501 ack 2921")
        assert t.state() == "ESTABLISHED"
        t.hears("P. 2921:3001 ack 501")
        t.peer("P. 501:601 ack 3001")
        assert t.read() == stream(501, 601)
        assert syn_data(t)
        counted = t.counted()
        assert counted["tcp_fastopen_passive"] == 1
        assert counted["tcp_established"] == 1


@pytest.mark.parametrize("forged", FORGED)
def test_data_in_a_syn_with_a_forged_cookie_is_never_delivered(forged: str) -> None:
    """RFC 7413 4.2.2: the answer acknowledges the SYN only, and gives the right cookie."""
    with Talk() as t:
        server(t)
        right = cookie(t)
        answer = syn(t, f"fo {forged}", 500)
        assert (answer.flags, answer.ack, answer.opts["fo"]) == ("S.", 1, right)
        with pytest.raises(OSError, match="temporarily"):
            t.accept()
        t.peer(". 1:1 ack 1")
        t.accept()
        assert t.read() == -errno.EAGAIN
        t.peer("P. 1:501 ack 1")
        assert t.read() == stream(1, 501), "sent again it is taken, once"
        assert t.counted()["tcp_fastopen_bad_cookies"] == 1


def test_a_cookie_is_good_for_the_address_that_it_was_given_to() -> None:
    with Talk() as t:
        server(t)
        given = cookie(t)
    with Talk(address=OTHER) as t:  # the same secrets
        server(t)
        assert cookie(t) != given
        assert syn(t, f"fo {given}", 100).ack == 1
    with Talk() as t:
        server(t)
        assert syn(t, f"fo {given}", 100).ack == 101


def test_a_cookie_that_gets_old_is_renewed_and_then_refused() -> None:
    """RFC 7413 4.1.2: secrets change, and the one before is still known."""
    with Talk(iss=None) as t:
        server(t)
        first = cookie(t)
        t.advance(PERIOD)
        answer = syn(t, f"fo {first}", 100)
        second = answer.opts["fo"]
        assert (answer.ack, second != first) == (101, True)
        t.peer("R. 101:101 ack 1")
        answer = syn(t, f"fo {second}", 100)
        assert (answer.ack, "fo" in answer.opts) == (101, False)
        t.peer("R. 101:101 ack 1")
        t.advance(PERIOD)
        answer = syn(t, f"fo {first}", 100)
        assert (answer.ack, answer.opts["fo"] in (first, second)) == (1, False)


@pytest.mark.parametrize(
    ("most", "config"), [(0, {}), (8, {"fastopen": 0}), (8, {"fastopen": 1}), (8, {"syn_cookies": 2})]
)
def test_without_leave_the_option_and_the_data_are_passed_over(most: int, config: dict[str, Any]) -> None:
    """Off for the listener, or for the stack; and a SYN that is not remembered cannot have one."""
    with Talk() as t:
        server(t)
        given = cookie(t)
    with Talk(config=config) as t:
        server(t, most=most)
        assert "fo" not in syn(t, "fo").opts
        t.peer("R. 1:1 ack 1")
        answer = syn(t, f"fo {given}", 500)
        assert (answer.ack, "fo" in answer.opts) == (1, False)


def test_a_cookie_without_data_opens_early_too() -> None:
    with Talk() as t:
        server(t)
        fast(t, 0)
        t.write(100)
        t.hears("P. 1:101 ack 1")
        t.peer(". 1:1 ack 101")
        assert t.state() == "ESTABLISHED"


# ---- Bounds --------------------------------------------------------------------------------------------------------
def test_connections_before_the_end_of_their_handshake_are_bounded() -> None:
    """RFC 7413 4.2.2, PendingFastOpenRequests. Beyond the bound the handshake is an ordinary one, without a cookie."""
    with Talk() as t:
        server(t, most=3)
        option = f"fo {cookie(t)}"
        taken = []
        for port in range(41000, 41010):
            t.peer_port = port
            taken.append(syn(t, option, 100).ack)
        assert taken == [101] * 3 + [1] * 7
        assert t.counted()["tcp_fastopen_overflow"] == 7
        for _ in range(3):
            t.accept()
            assert t.read() == stream(1, 101)
        with pytest.raises(OSError, match="temporarily"):
            t.accept()
        t.peer_port = 41000
        t.iss = None
    with Talk() as t:
        server(t, most=1)
        option = f"fo {cookie(t)}"
        for port in range(41000, 41010):
            t.peer_port = port
            assert syn(t, option, 100).ack == 101, "whose handshake ended counts no more"
            t.peer(". 101:101 ack 1")


def test_a_stolen_cookie_gets_no_more_connections_by_the_resets_of_its_owner() -> None:
    """RFC 7413 5.1: those that were reset count for a minute."""
    with Talk() as t:
        server(t, most=3)
        option = f"fo {cookie(t)}"
        taken = []
        for port in range(41000, 41010):
            t.peer_port = port
            taken.append(syn(t, option, 100).ack)
            t.peer(f"R. {taken[-1]}:{taken[-1]} ack 1")
        assert taken == [101] * 3 + [1] * 7
        t.silence(61)
        t.peer_port = 42000
        assert syn(t, option, 100).ack == 101


def test_a_syn_that_comes_again_and_again_is_delivered_once() -> None:
    """RFC 7413 2.1, 6.1: duplicates of a SYN whose connection lives draw its SYN-ACK; nothing is read twice."""
    with Talk() as t:
        server(t)
        conn = fast(t, 300)
        spec = f"S 0:300 <mss {MSS}, fo {'ab' * 8}>"
        for _ in range(5):
            t.peer(spec)
            t.hears("S. 0:0 ack 301")
        t.peer(". 301:301 ack 1")
        for _ in range(5):
            t.peer(spec)
        t.out()
        assert t.stack.recv(conn, 1000) == stream(1, 301)
        assert t.stack.recv(conn, 1000) == -errno.EAGAIN
        with pytest.raises(OSError, match="temporarily"):
            t.accept()


def test_a_replay_of_a_finished_connections_syn_is_not_taken_while_time_wait_guards_it() -> None:
    with Talk() as t:
        server(t)
        option = f"fo {cookie(t)}"
        t.iss = None
        opts = f"mss {MSS}, nop, nop, ts 1000 0"
        assert syn(t, option, 300, opts).ack == 301
        t.accept()
        assert t.read() == stream(1, 301)
        t.peer(". 301:301 ack 1 <nop, nop, ts 1001 1>")
        t.close_sock()
        t.hears("F. 1:1 ack 301")
        t.peer("F. 301:301 ack 2 <nop, nop, ts 1002 1>")
        t.hears(". 2:2 ack 302")
        assert t.state() == "TIME_WAIT"
        t.peer(f"S 0:300 <{opts}, {option}>")
        t.out()
        assert t.state() == "TIME_WAIT"
        with pytest.raises(OSError, match="temporarily"):
            t.accept()


def test_a_full_accept_queue_takes_no_data_either() -> None:
    with Talk() as t:
        server(t, backlog=0)
        option = f"fo {cookie(t)}"
        assert syn(t, option, 100).ack == 101
        t.peer_port += 1
        t.iss = None
        t.peer(f"S 0:100 <mss {MSS}, {option}>")
        assert t.out() == []
        assert t.counted()["tcp_listen_overflow"] == 1


# ---- The handshake goes on -----------------------------------------------------------------------------------------
def test_a_lost_syn_ack_is_repeated_and_early_data_waits_for_the_handshake() -> None:
    """RFC 7413 4.2.2; Linux repeats nothing else before the handshake's ACK either."""
    with Talk() as t:
        server(t)
        fast(t)
        t.write(2000)
        t.hears(". 1:1461 ack 501")
        t.mark()
        t.at(1.0, "S. 0:0 ack 501", 3.0, "S. 0:0 ack 501")
        t.peer(". 501:501 ack 1")
        assert t.state() == "ESTABLISHED"
        t.advance(3.01)
        assert t.out()[0].seq == 1, "the data goes again when its own timeout is over"
        t.peer(". 501:501 ack 1461")
        t.hears("P. 1461:2001")


def test_a_peer_that_never_answers_is_given_up_and_leaves_the_queue() -> None:
    with Talk() as t:
        server(t, most=1)
        option = f"fo {cookie(t)}"
        assert syn(t, option, 100).ack == 101
        t.advance(64)
        assert [s.flags for s in t.out()] == ["S."] * 5
        assert t.state() == ""
        with pytest.raises(OSError, match="temporarily"):
            t.accept()
        assert syn(t, option, 100).ack == 101, "its place is free"


def test_an_accepted_one_that_is_given_up_tells_its_program() -> None:
    with Talk() as t:
        server(t)
        conn = fast(t, 100)
        t.advance(64)
        t.out()
        assert t.read() == stream(1, 101), "what came stays readable"
        assert t.stack.error(conn) == errno.ETIMEDOUT


def test_a_close_before_the_handshakes_end_sends_its_fin_after_it() -> None:
    """RFC 9293 3.10.4: queued until ESTABLISHED."""
    with Talk() as t:
        server(t)
        fast(t, 100)
        assert t.read() == stream(1, 101)
        t.write(200)
        t.hears("P. 1:201 ack 101")
        t.close_sock()
        t.hears()
        t.peer(". 101:101 ack 201")
        t.hears("F. 201:201 ack 101")
        t.peer("F. 101:101 ack 202")
        t.hears(". 202:202 ack 102")
        assert t.state() == "TIME_WAIT"


def test_nothing_can_be_sent_after_an_early_shutdown() -> None:
    with Talk() as t:
        server(t)
        conn = fast(t, 100)
        t.shutdown()
        t.hears()
        assert t.stack.send(conn, b"more", 0) == -errno.EPIPE
        t.peer("P. 101:201 ack 1")
        assert t.read() == stream(1, 201)
        assert [s.flags for s in t.out()][:1] == ["F."]
        assert t.state() == "FIN_WAIT_1"


def test_a_reset_before_the_handshakes_end_is_told_to_the_program() -> None:
    with Talk() as t:
        server(t)
        conn = fast(t, 100)
        t.peer("R. 100:100 ack 1")
        assert t.state() == "SYN_RECEIVED", "only the exact number resets (RFC 5961 3.2)"
        t.peer("R. 101:101 ack 1")
        assert t.state() == ""
        assert t.stack.error(conn) == errno.ECONNRESET


@pytest.mark.parametrize("ack", [0, 103, 5000, -1])
def test_an_ack_of_what_was_never_sent_does_not_end_the_handshake(ack: int) -> None:
    """RFC 9293 3.10.7.4, fifth, SYN-RECEIVED."""
    with Talk() as t:
        server(t)
        fast(t, 100)
        t.write(101)
        t.out()
        t.peer(f". 101:101 ack {ack}")
        assert [s.flags for s in t.out()] == ["R"]
        assert t.state() == "SYN_RECEIVED"


@pytest.mark.parametrize("ack", [1, 50, 102])
def test_an_ack_of_any_part_of_early_data_ends_the_handshake(ack: int) -> None:
    with Talk() as t:
        server(t)
        fast(t, 100)
        t.write(101)
        t.out()
        t.peer(f". 101:101 ack {ack}")
        assert t.state() == "ESTABLISHED"
        assert t.info.snd_queued == 102 - ack


def test_a_listener_that_closes_resets_who_waits_and_keeps_who_was_accepted() -> None:
    with Talk() as t:
        server(t)
        option = f"fo {cookie(t)}"
        assert syn(t, option, 100).ack == 101
        accepted = t.iss
        t.accept()
        t.peer_port += 1
        assert syn(t, option, 100).ack == 101
        t.stack.close_socket(t.listener)
        t.settle()
        assert [s.flags for s in t.out()] == ["R."]
        t.peer_port, t.iss = PEER_PORT, accepted
        assert t.state() == "SYN_RECEIVED"
        t.peer(". 101:101 ack 1")
        assert t.state() == "ESTABLISHED"


def test_an_icmp_error_about_the_syn_ack_ends_it_when_it_is_hard() -> None:
    with Talk() as t:
        server(t)
        conn = fast(t, 100)
        t.icmp(3, 1, 0)
        assert t.state() == "SYN_RECEIVED"
        t.icmp(3, 3, 0)
        assert t.state() == ""
        assert t.stack.error(conn) == errno.ECONNREFUSED


def test_ecn_and_options_are_agreed_as_in_any_handshake() -> None:
    with Talk() as t:
        server(t)
        option = f"fo {cookie(t)}"
        t.iss = None
        t.peer(f"SEW 0:100 <mss {MSS}, sackok, nop, ws 7, {option}>")
        [answer] = t.out()
        assert (answer.flags, answer.ack) == ("S.E", 101)
        assert {"mss", "sackok", "ws"} <= answer.opts.keys()
        t.peer(". 101:101 ack 1 win 100")
        t.accept()
        assert t.info.snd_wnd == 100 << 7


def test_what_waits_for_a_next_hop_goes_in_order() -> None:
    with Talk(neighbours=()) as t:
        server(t)
    with Talk() as t:
        server(t)
        given = cookie(t)
        t.stack.nexthop_forget(PEER)
        t.iss = None
        t.peer(f"S 0:100 <mss {MSS}, fo {given}>")
        t.hears()
        t.accept()
        t.write(50)
        t.stack.nexthop_set(PEER, PEER_MAC)
        t.settle()
        t.hears("S. 0:0 ack 101", "P. 1:51 ack 101")
        t.peer(". 101:101 ack 51")


# ---- We are the client ---------------------------------------------------------------------------------------------
def opens(t: Talk, n: int, **options: int) -> int:
    """sendto() with MSG_FASTOPEN from our_port: its result."""
    t.iss = None
    t.wrote = 1
    t.sock = t.stack.socket(lib.BYPASS_STREAM)
    for name, value in options.items():
        t.stack.setopt(t.sock, getattr(lib, f"BYPASS_{name}"), value)
    t.stack.bind(t.sock, (US, t.our_port))
    result = t.stack.sendto(t.sock, stream(1, 1 + n), (t.address, t.peer_port), lib.BYPASS_FASTOPEN)
    t.settle()
    return int(result)


def learns(t: Talk, given: str = "1122334455667788", mss: str = f"mss {MSS}, ") -> None:
    """A connection that brings a cookie, and is over."""
    assert opens(t, 100) == -errno.EINPROGRESS
    [ours] = t.out()
    assert (ours.flags, ours.end, ours.opts["fo"]) == ("S", 0, "")
    t.peer(f"S. 0:0 <{mss}fo {given}>")
    t.hears(". 1:1 ack 1")
    over(t)


def over(t: Talk) -> None:
    t.peer(f"R. {max(t.nxt, 1)}:{max(t.nxt, 1)}")
    assert t.state() == ""
    t.stack.close_socket(t.sock)
    t.nxt = 0
    t.out()
    t.counted()


def test_a_client_asks_for_a_cookie_and_then_sends_data_with_its_syn() -> None:
    """RFC 7413 3.1, 4.2.1."""
    with Talk() as t:
        learns(t)
        assert opens(t, 300) == 300
        [ours] = t.out()
        assert (ours.flags, ours.seq, ours.end, ours.opts["fo"]) == ("S", 0, 300, "1122334455667788")
        assert t.stack.ready(t.sock) == 0
        t.peer("S. 0:0 ack 301 <mss 1460>")
        t.hears(". 301:301 ack 1")
        t.wrote = 301
        t.write(100)
        t.hears("P. 301:401 ack 1")
        t.peer(". 1:1 ack 401")
        assert t.counted()["tcp_fastopen_active_taken"] == 1
        assert syn_data(t)


@pytest.mark.parametrize("taken", [0, 1, 100, 299])
def test_what_the_syn_ack_does_not_acknowledge_goes_again_at_once(taken: int) -> None:
    """RFC 7413 4.2.1."""
    with Talk() as t:
        learns(t)
        assert opens(t, 300) == 300
        t.out()
        t.peer(f"S. 0:0 ack {1 + taken} <mss 1460, fo aabbccdd>")
        t.hears(f"P. {1 + taken}:301 ack 1")
        t.peer(". 1:1 ack 301")
        assert t.info.snd_queued == 0
        over(t)
        assert opens(t, 10) == 10
        assert t.out()[0].opts["fo"] == "aabbccdd", "a refused cookie is replaced"


def test_a_syn_ack_of_more_than_was_sent_is_refused() -> None:
    with Talk() as t:
        learns(t)
        assert opens(t, 300) == 300
        t.out()
        t.peer("S. 0:0 ack 302 <mss 1460>")
        assert t.out()[0].flags == "R"
        assert t.state() == "SYN_SENT"


def test_a_lost_syn_is_repeated_without_data_and_option() -> None:
    """RFC 7413 4.2.1. The server may have had the first one all the same."""
    for acked in (1, 301):
        with Talk() as t:
            learns(t)
            assert opens(t, 300) == 300
            t.out()
            t.mark()
            [again] = t.at(1.0, "S 0:0")
            assert "fo" not in again.opts
            t.peer(f"S. 0:0 ack {acked} <mss 1460>")
            t.hears("P. 1:301 ack 1" if acked == 1 else ". 301:301 ack 1")


def test_a_path_that_swallows_such_syns_is_left_alone_for_a_while() -> None:
    """RFC 7413 4.1.3.1: after two in a row; twice as long after each more."""
    with Talk() as t:
        learns(t)
        for _ in range(2):
            assert opens(t, 300) == 300
            t.advance(1.01)
            assert [(s.flags, s.end, "fo" in s.opts) for s in t.out()] == [("S", 300, True), ("S", 0, False)]
            t.peer("S. 0:0 ack 1 <mss 1460>")
            t.hears("P. 1:301 ack 1")
            over(t)
        assert opens(t, 300) == -errno.EINPROGRESS
        assert "fo" not in t.out()[0].opts
        t.peer("S. 0:0 ack 1 <mss 1460>")
        over(t)
        t.silence(241)
        assert opens(t, 300) == 300
        t.out()
        t.peer("S. 0:0 ack 301 <mss 1460>")
        over(t)
        assert opens(t, 300) == 300, "one that arrives makes up for them"


@pytest.mark.parametrize(
    ("mss", "maxseg", "room"),
    [("mss 1460, ", 0, SYN_ROOM), ("mss 600, ", 0, 560), ("", 0, 496), ("mss 1460, ", 200, 160)],
)
def test_no_more_goes_with_the_syn_than_fits_one_segment(mss: str, maxseg: int, room: int) -> None:
    """RFC 7413 4.1.3: the cache keeps the server's MSS, else 536 counts."""
    with Talk() as t:
        learns(t, mss=mss)
        assert opens(t, 5000, **({"TCP_MAXSEG": maxseg} if maxseg else {})) == room
        [ours] = t.out()
        assert ours.end == room


def test_segments_after_it_keep_to_the_mss_of_this_answer() -> None:
    with Talk() as t:
        learns(t)
        assert opens(t, 1400) == 1400
        t.out()
        t.peer("S. 0:0 ack 1 <mss 500>")
        t.hears(". 1:501", ". 501:1001")
        t.peer(". 1:1 ack 1001")
        t.hears("P. 1001:1401")


def test_a_reset_refuses_it_and_the_data_is_forgotten() -> None:
    with Talk() as t:
        learns(t)
        assert opens(t, 300) == 300
        t.out()
        t.peer("R. 0:0 ack 301")
        assert t.stack.error(t.sock) == errno.ECONNREFUSED


def test_a_cookie_that_nobody_asked_for_is_not_kept() -> None:
    with Talk() as t:
        t.client()
        assert "fo" not in t.out()[0].opts
        t.peer("S. 0:0 <mss 1460, fo 1122334455667788>")
        over(t)
        assert opens(t, 100) == -errno.EINPROGRESS


def test_a_simultaneous_open_sends_the_data_afterwards() -> None:
    with Talk() as t:
        learns(t)
        assert opens(t, 300) == 300
        t.out()
        t.peer("S 0:0 <mss 1460>")
        t.hears("S. 0:0 ack 1")
        t.peer(". 1:1 ack 1")
        t.hears("P. 1:301 ack 1")


def test_a_syn_that_waits_for_its_next_hop_has_its_data_then() -> None:
    with Talk() as t:
        learns(t)
        t.stack.nexthop_forget(PEER)
        assert opens(t, 300) == 300
        t.hears()
        t.stack.nexthop_set(PEER, PEER_MAC)
        t.settle()
        t.hears("S 0:300")


def test_connect_waits_for_the_first_write_where_a_cookie_is_known() -> None:
    """tcp(7), TCP_FASTOPEN_CONNECT."""
    with Talk() as t:
        for known in (False, True):
            t.iss = None
            t.wrote = 1
            t.sock = t.stack.socket(lib.BYPASS_STREAM)
            t.option("TCP_FASTOPEN_CONNECT", 1)
            t.stack.bind(t.sock, (US, t.our_port))
            result = t.stack.connect(t.sock, (t.address, t.peer_port))
            t.settle()
            if not known:
                assert result == -errno.EINPROGRESS
                assert t.out()[0].opts["fo"] == ""
                t.peer("S. 0:0 ack 1 <mss 1460, fo 1122334455667788>")
                t.hears(". 1:1 ack 1")
                over(t)
        assert result == 0
        assert t.out() == []
        assert t.stack.ready(t.sock) == lib.BYPASS_OUT
        assert t.stack.recv(t.sock, 10) == -errno.EAGAIN
        assert t.stack.connect(t.sock, (t.address, t.peer_port)) == -errno.EISCONN
        t.write(200)
        t.hears("S 0:200")
        t.peer("S. 0:0 ack 201 <mss 1460>")
        t.hears(". 201:201 ack 1")


def test_a_client_that_may_not_gets_an_error() -> None:
    with Talk(config={"fastopen": 2}) as t:
        assert opens(t, 100) == -errno.EOPNOTSUPP
        with pytest.raises(OSError, match="not supported"):
            t.option("TCP_FASTOPEN_CONNECT", 1)


def test_what_makes_no_sense_is_refused() -> None:
    with Talk() as t:
        sock = t.stack.socket(lib.BYPASS_STREAM)
        assert t.stack.sendto(sock, b"x", None, lib.BYPASS_FASTOPEN) == -errno.EDESTADDRREQ
        for value in (-1, 1 << 31):
            with pytest.raises(OSError, match="Invalid"):
                t.stack.setopt(sock, lib.BYPASS_TCP_FASTOPEN, value)
        for value, back in ((5, 5), (1 << 20, 65535), (0, 0)):
            t.stack.setopt(sock, lib.BYPASS_TCP_FASTOPEN, value)
            assert t.stack.getopt(sock, lib.BYPASS_TCP_FASTOPEN) == back
        conn = t.established()
        assert t.stack.sendto(conn, b"x", (PEER, 1), lib.BYPASS_FASTOPEN) == -errno.EISCONN
        for name in ("TCP_FASTOPEN", "TCP_FASTOPEN_CONNECT"):
            with pytest.raises(OSError, match="Invalid"):
                t.option(name, 1)
    with Talk() as t:
        assert opens(t, 100) == -errno.EINPROGRESS
        assert t.stack.sendto(t.sock, b"x", (PEER, 1), lib.BYPASS_FASTOPEN) == -errno.EALREADY


def test_the_table_of_cookies_is_bounded() -> None:
    servers = [f"192.0.{1 + n // 250}.{3 + n % 250}" for n in range(700)]
    with Talk(config={"dsts": 1024}, conns=1024) as t:
        found: list[bool] = []
        for _ in range(2):
            found = []
            for t.address in servers:
                t.stack.nexthop_set(t.address, PEER_MAC)
                found.append(opens(t, 10) == 10)
                t.out()
                t.peer("S. 0:0 ack 1 <mss 1460, fo 1122334455667788>")
                over(t)
        assert 150 < sum(found) <= 512


# ---- Both ends -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", [0.0, 0.2])
def test_requests_with_their_syn_are_answered_over_a_lossy_wire(loss: float) -> None:
    net = Network(seed=7)
    net.wire(faults=Faults(delay_ns=10_000_000, loss=loss))
    here = net.stack("10.0.0.1/24", name="client", config=Config(conns=64))
    there = net.stack("10.0.0.2/24", name="server", config=Config(conns=64))
    listener = there.socket(socket.SOCK_STREAM)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    listener.bind(("10.0.0.2", 80))
    listener.listen(16)
    with listener:
        for n in range(20):
            client = here.socket(socket.SOCK_STREAM)
            request = bytes([n]) * 3000
            with client:
                assert client.sendto(request, socket.MSG_FASTOPEN, ("10.0.0.2", 80)) == len(request)
                served, _ = listener.accept()
                with served:
                    got = b""
                    while len(got) < len(request):
                        got += served.recv(4096)
                    assert got == request
                    served.sendall(got[::-1])
                    served.shutdown(socket.SHUT_WR)
                    assert client.recv(4096, socket.MSG_WAITALL) == request
                    assert client.recv(1) == b""
    taken = there.stats()["tcp_fastopen_passive"]
    assert taken == 19 if loss == 0 else 0 < taken <= 19
    net.close()
