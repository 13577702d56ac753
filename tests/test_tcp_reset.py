# SPDX-License-Identifier: Apache-2.0
"""TCP: resets and blind attacks (RFC 9293 3.5.2, 3.5.3, 3.10.7; RFC 5961), what is answered where no connection is."""

from __future__ import annotations

import errno

import pytest
from bypass._core import lib
from conversation import PEER_MAC, US
from tcp_talk import Talk, stream
from wire import ACK, BROADCAST, ETH_IPV4, FIN, PSH, RST, SYN, TCP, eth, ipv4, parse_ip, tcp

IN, OUT, ERR, HUP, RDHUP = (getattr(lib, f"BYPASS_{n}") for n in ("IN", "OUT", "ERR", "HUP", "RDHUP"))


# ---- Resets of a connection (RFC 5961 3.2) ------------------------------------------------------------------------
def test_a_reset_at_exactly_the_next_number_ends_the_connection() -> None:
    with Talk() as t:
        conn = t.established()
        t.peer("R 1:1")
        t.silence()
        assert t.state() == ""
        assert t.taken(conn) & (IN | ERR | HUP) == IN | ERR | HUP
        assert t.read() == -errno.ECONNRESET
        assert t.read() == b"", "an error is reported once"
        assert t.stack.send(conn, b"x") == -errno.EPIPE
        assert t.counted()["tcp_in_reset"] == 1


@pytest.mark.parametrize("offset", [1, 100, 65534])
def test_a_reset_elsewhere_in_the_window_draws_a_challenge_and_nothing_else(offset: int) -> None:
    with Talk(rcvbuf=65535) as t:
        t.established()
        t.peer(f"R {1 + offset}:{1 + offset}")
        t.hears(". 1:1 ack 1")
        assert t.state() == "ESTABLISHED"
        assert t.counted()["tcp_out_challenge_acks"] == 1


@pytest.mark.parametrize("seq", [0, -1, -70000, 65536, 1 << 20, 1 << 31])
def test_a_reset_outside_of_the_window_is_ignored(seq: int) -> None:
    with Talk(rcvbuf=65535) as t:
        t.established()
        t.peer(f"R {seq}:{seq}")
        t.silence()
        assert t.state() == "ESTABLISHED"
        assert t.counted()["tcp_in_reset_ignored"] == 1


def test_a_reset_is_believed_when_the_window_is_closed() -> None:
    with Talk(rcvbuf=4096) as t:
        t.established()
        t.peer(". 1:1461", ". 1461:2921", ". 2921:4097")
        t.advance(0.1)
        assert t.out()[-1].win == 0
        t.peer("R 4098:4098")
        assert t.state() == "ESTABLISHED"
        t.peer("R 4097:4097")
        assert t.state() == ""
        assert t.read() == stream(1, 4097), "what came before can be read"
        assert t.read() == -errno.ECONNRESET


def test_a_reset_needs_no_timestamp() -> None:
    """RFC 7323 3.2: PAWS does not apply."""
    with Talk() as t:
        t.established(ts=True, opts="mss 1460, nop, nop, ts 1000 0")
        t.peer("R 1:1 <nop, nop, ts 5 0>")
        assert t.state() == ""


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ("", errno.ECONNRESET),
        ("peer", errno.EPIPE),  # CLOSE_WAIT
        ("shutdown", errno.ECONNRESET),  # FIN_WAIT_1
        ("shutdown ack", errno.ECONNRESET),  # FIN_WAIT_2
        ("shutdown peer", errno.ECONNRESET),  # CLOSING
        ("peer shutdown", errno.ECONNRESET),  # LAST_ACK
    ],
)
def test_a_reset_in_every_state_ends_it(steps: str, error: int) -> None:
    with Talk() as t:
        conn = t.established()
        rcvd, acked = 1, 1
        for step in steps.split():
            if step == "shutdown":
                t.shutdown()
                t.out()
            elif step == "ack":
                acked = 2
                t.peer(f". {rcvd}:{rcvd} ack {acked}")
            else:
                t.peer(f"F. {rcvd}:{rcvd} ack {acked}")
                rcvd = 2
                t.out()
        t.peer(f"R {rcvd}:{rcvd}")
        t.silence(100)
        assert t.state() == ""
        assert t.stack.error(conn) == error
        assert t.stack.error(conn) == 0


def test_a_reset_does_not_end_time_wait() -> None:
    """RFC 1337 3, F1: it may answer our answer to an old duplicate; then nothing would guard against more of them."""
    with Talk() as t:
        t.established()
        t.close_sock()
        t.peer(". 1:1 ack 2", "F. 1:1 ack 2")
        t.out()
        assert t.state() == "TIME_WAIT"
        t.peer(". 1:1 ack 2", "R 2:2", "R. 2:2 ack 2")
        t.out()
        assert t.state() == "TIME_WAIT"
        t.peer("F. 1:1 ack 2")
        t.hears(". 2:2 ack 2")
        t.silence(61)
        assert t.state() == ""


# ---- SYNs in a connection (RFC 5961 4.2) --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "spec", ["S 1:1", "S 500:500", "S. 1:1 ack 1", "S 100000:100000", "S 0:0", "S. 0:0 ack 1"]
)
def test_a_syn_in_a_connection_draws_an_ack_and_changes_nothing(spec: str) -> None:
    with Talk() as t:
        t.established()
        t.peer(spec)
        t.hears(". 1:1 ack 1")
        t.peer("P. 1:11 ack 1")
        assert t.read() == stream(1, 11)


# ---- Challenge ACKs are limited (RFC 5961 7) ----------------------------------------------------------------------
def test_challenges_of_one_connection_are_two_a_second_at_most() -> None:
    with Talk() as t:
        t.established()
        for _ in range(40):
            t.peer("R 100:100")
            t.advance(0.1)
        assert 4 <= len(t.out()) <= 9
        assert t.counted()["tcp_out_challenge_limited"] >= 30


def test_challenges_of_a_half_open_connection_are_two_a_second_at_most() -> None:
    with Talk() as t:
        t.server()
        t.peer("S 0:0")
        t.hears("S. 0:0 ack 1")
        for _ in range(9):
            t.peer("R 100:100", "S 100:100", ". 90000:90000 ack 1")
            t.advance(0.1)
        assert 1 <= len(t.out()) <= 2
        assert t.state() == "SYN_RECEIVED"
        assert t.counted()["tcp_out_challenge_limited"] >= 20


def test_challenges_of_all_connections_are_limited_and_the_limit_is_not_told() -> None:
    """CVE-2016-5696: a fixed limit lets others count what it was spent on."""
    counts = set()
    for seed in range(2):
        with Talk(conns=2000, frames=4096, iss=None, seed=seed) as t:
            t.server(backlog=3000)
            t.advance(5)
            total = 0
            for port in range(1, 1801):
                t.peer_port, t.iss = port, None
                t.peer("S 0:0")
                t.out()
                t.peer(". 1:1", "R 100:100")
                total += len(t.out())
                t.stack.accept(t.listener)
            assert 500 <= total <= 1500
            counts.add(total)
    assert len(counts) == 2


# ---- Where no connection is (RFC 9293 3.10.7.1) -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "data", "answer"),
    [
        (SYN, b"", (RST | ACK, 0, 1001)),
        (FIN, b"", (RST | ACK, 0, 1001)),
        (PSH, b"12345", (RST | ACK, 0, 1005)),
        (SYN | FIN, b"12345", (RST | ACK, 0, 1007)),
        (ACK, b"", (RST, 7777, 0)),
        (ACK | PSH, b"12345", (RST, 7777, 0)),
        (SYN | ACK, b"", (RST, 7777, 0)),
        (FIN | ACK, b"", (RST, 7777, 0)),
        (0, b"", (RST | ACK, 0, 1000)),
    ],
)
def test_a_segment_of_no_connection_is_reset_so_that_its_sender_believes_it(
    flags: int, data: bytes, answer: tuple[int, int, int]
) -> None:
    with Talk() as t:
        t.inject_ip(t_segment(1000, 7777, flags, data))
        [frame] = t.sent()
        raw = parse_ip(frame[14:]).payload
        assert (raw[13], int.from_bytes(raw[4:8], "big"), int.from_bytes(raw[8:12], "big")) == answer
        assert len(raw) == 20
        assert t.counted()["tcp_in_no_socket"] == 1


def t_segment(seq: int, ack: int, flags: int, data: bytes = b"", dst: str = US) -> bytes:
    return ipv4("192.0.2.2", dst, TCP, tcp("192.0.2.2", dst, 4000, 9999, seq, ack, flags, 1000, data))


@pytest.mark.parametrize("flags", [RST, RST | ACK, RST | SYN])
def test_a_reset_is_never_answered(flags: int) -> None:
    with Talk() as t:
        t.inject_ip(t_segment(1, 2, flags))
        t.silence()


def test_without_the_flag_nothing_is_reset() -> None:
    """The kernel's other sockets live at the same address."""
    with Talk(flags=0) as t:
        t.inject_ip(t_segment(1, 2, SYN), t_segment(1, 2, ACK))
        t.silence()
        assert t.counted()["tcp_in_no_socket"] == 2


def test_segments_to_groups_are_ignored() -> None:
    with Talk() as t:
        t.server()
        packet = ipv4("192.0.2.2", US, TCP, tcp("192.0.2.2", US, 4000, 80, 1, 0, SYN, 1000))
        t.inject(eth(BROADCAST, PEER_MAC, ETH_IPV4, packet))
        t.silence()
        assert t.stack.audit()["conns"] == 0


@pytest.mark.parametrize("src", [US, "255.255.255.255", "224.0.0.1", "0.0.0.0", "127.0.0.1"])
def test_segments_from_impossible_addresses_are_ignored(src: str) -> None:
    """RFC 1122 3.2.1.3; our own address: the LAND attack."""
    with Talk() as t:
        t.server()
        t.inject_ip(ipv4(src, US, TCP, tcp(src, US, 80, 80, 1, 0, SYN, 1000)))
        t.silence()
        assert t.stack.audit()["conns"] == 0
        assert t.counted() == {"ip_in_bad_source": 1}


# ---- Acknowledgments from nowhere (RFC 5961 5.2) ------------------------------------------------------------------
@pytest.mark.parametrize("ack", [2, 1000, 1 << 20, (1 << 31) - 10, -65536, -100000])
def test_data_with_an_impossible_ack_is_not_taken(ack: int) -> None:
    with Talk() as t:
        t.established()
        t.peer(f"P. 1:11 ack {ack}")
        t.hears(". 1:1 ack 1")
        t.advance(1)
        assert t.read() == -errno.EAGAIN


def test_data_with_an_ack_of_the_last_window_is_taken() -> None:
    with Talk() as t:
        t.established()
        t.write(100)
        t.out()
        t.peer(". 1:1 ack 101")
        t.peer("P. 1:11 ack 1")
        assert t.read() == stream(1, 11)
