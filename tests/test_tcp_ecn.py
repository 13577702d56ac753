# SPDX-License-Identifier: Apache-2.0
"""Explicit congestion notification (RFC 3168): who agrees, what is marked capable, how marks are told and answered."""

from __future__ import annotations

import pytest
from bypass._core import lib
from cc_bench import Bottleneck
from tcp_talk import Talk
from wire import TCP, ipv4

MSS = 1000
NOT, ECT1, ECT0, CE = 0, 1, 2, 3


def arrive(t: Talk, spec: str, tos: int = NOT) -> None:
    """A segment from the peer with these ECN bits."""
    packet = t.segment(spec)
    t.inject_ip(ipv4(t.address, "192.0.2.1", TCP, packet[20:], tos=tos))
    t.nxt = max(t.nxt, int(spec.split()[1].split(":")[1]) + ("S" in spec.split()[0]))


def agreed(t: Talk, **options: int) -> None:
    t.server(**options)
    arrive(t, f"SEW 0:0 win 65535 <mss {MSS}, nop, ws 7>")
    [answer] = t.out()
    assert answer.flags == "S.E"
    arrive(t, ". 1:1 ack 1")
    t.accept()


def marks(t: Talk) -> list[tuple[str, int]]:
    return [(s.flags, s.ip.tos & 3) for s in t.out() if s.ip]


# ---- Agreement (6.1.1) ----------------------------------------------------------------------------------------
def test_a_listener_agrees_when_asked() -> None:
    with Talk() as t:
        agreed(t)
        t.write(MSS)
        assert marks(t) == [("P.", ECT0)]
        t.peer("R 1:1")


@pytest.mark.parametrize("flags", ["S", "SE", "SW"])
def test_a_listener_agrees_to_nothing_less(flags: str) -> None:
    """Both flags ask; one alone is something else."""
    with Talk() as t:
        t.server()
        arrive(t, f"{flags} 0:0 <mss 1000>")
        t.hears("S. 0:0 ack 1")
        arrive(t, ". 1:1 ack 1")
        t.accept()
        t.write(100)
        assert marks(t) == [("P.", NOT)]
        t.peer("R 1:1")


@pytest.mark.parametrize("tos", [ECT1, ECT0, CE])
def test_a_syn_that_is_marked_is_not_trusted(tos: int) -> None:
    """6.1.1: a SYN is not ECN-capable; somebody on the way changes the bits."""
    with Talk() as t:
        t.server()
        arrive(t, "SEW 0:0 <mss 1000>", tos)
        t.hears("S. 0:0 ack 1")
        t.peer("R 1:1")


def test_a_socket_that_wants_none_gets_none() -> None:
    with Talk() as t:
        t.server(TCP_ECN=0)
        arrive(t, "SEW 0:0 <mss 1000>")
        t.hears("S. 0:0 ack 1")
        t.peer("R 1:1")


def test_a_program_may_ask_for_one_connection() -> None:
    with Talk() as t:
        t.client(TCP_ECN=1)
        [syn] = t.out()
        assert syn.flags == "SEW"
        assert syn.ip
        assert syn.ip.tos & 3 == NOT
        t.peer("SE. 0:0 ack 1 <mss 1000>")
        t.out()
        t.write(100)
        assert marks(t) == [("P.", ECT0)]
        t.peer("R 1:1")


@pytest.mark.parametrize("flags", ["S.", "SEW.", "SW."])
def test_a_server_that_does_not_agree(flags: str) -> None:
    """6.1.1: both flags in a SYN-ACK are the echo of one who knows neither."""
    with Talk() as t:
        t.client(TCP_ECN=1)
        t.out()
        t.peer(f"{flags} 0:0 ack 1 <mss 1000>")
        t.out()
        t.write(100)
        assert marks(t) == [("P.", NOT)]
        t.peer("R 1:1")


def test_a_repeated_syn_asks_no_more() -> None:
    """6.1.1.1: a middle box may have dropped it for its flags. An answer with ECE agrees to nothing then."""
    with Talk() as t:
        t.client(TCP_ECN=1)
        t.out()
        t.advance(1.1)
        assert [s.flags for s in t.out()] == ["S"]
        t.peer("SE. 0:0 ack 1 <mss 1000>")
        t.out()
        t.write(100)
        assert marks(t) == [("P.", NOT)]
        t.peer("R 1:1")


# ---- Receiver (6.1.3) ---------------------------------------------------------------------------------------------
def test_a_mark_is_told_in_every_ack_until_the_sender_says_cwr() -> None:
    with Talk() as t:
        agreed(t)
        arrive(t, "P. 1:1001 ack 1", CE)
        arrive(t, "P. 1001:2001 ack 1", ECT0)
        t.advance(0.1)
        assert {m[0] for m in marks(t)} == {".E"}
        arrive(t, "PW. 2001:3001 ack 1", ECT0)
        t.advance(0.1)
        assert marks(t)[-1] == (".", NOT)


def test_a_mark_on_the_segment_that_says_cwr_is_a_new_one() -> None:
    with Talk() as t:
        agreed(t)
        arrive(t, "P. 1:1001 ack 1", CE)
        arrive(t, "PW. 1001:2001 ack 1", CE)
        t.advance(0.1)
        assert marks(t)[-1] == (".E", NOT)


def test_a_mark_on_a_bare_ack_means_nothing() -> None:
    """6.1.4: pure ACKs are not ECN-capable, so the mark is not the network's."""
    with Talk() as t:
        agreed(t)
        t.write(MSS)
        t.out()
        arrive(t, ". 1:1 ack 1001", CE)
        arrive(t, "P. 1:101 ack 1001", ECT0)
        t.advance(0.1)
        assert {m[0] for m in marks(t)} == {"."}


# ---- Sender (6.1.2, 6.1.5) -----------------------------------------------------------------------------------------
def test_an_echo_halves_the_window_once_for_what_is_in_flight_and_nothing_is_sent_again() -> None:
    with Talk() as t:
        agreed(t)
        t.write(10 * MSS)
        assert [m[1] for m in marks(t)] == [ECT0] * 10
        arrive(t, ". 1:1 ack 1001")
        cwnd = t.info.cwnd
        arrive(t, ".E 1:1 ack 2001")
        assert t.info.ssthresh == cwnd // 2 or t.info.ssthresh == 5 * MSS
        once = t.info.ssthresh
        for n in range(3, 10):
            arrive(t, f".E 1:1 ack {n * MSS + 1}")
        assert t.info.ssthresh == once
        arrive(t, ".E 1:1 ack 10001")
        assert t.info.cwnd == once
        t.write(3 * MSS)
        sent = t.out()
        assert [s.flags for s in sent] == [".W", ".", "P."], "CWR once, on the first new segment"
        assert t.info.retransmits == 0
        t.peer("R 1:1")


def test_the_next_round_trip_may_halve_again() -> None:
    with Talk() as t:
        agreed(t)
        t.write(10 * MSS)
        t.out()
        arrive(t, ".E 1:1 ack 1001")
        arrive(t, ". 1:1 ack 10001")
        t.write(5 * MSS)
        t.out()
        first = t.info.ssthresh
        arrive(t, ".E 1:1 ack 11001")
        assert t.info.ssthresh < first
        t.peer("R 1:1")


def test_a_retransmission_is_not_marked_capable_and_cwr_follows_it() -> None:
    """6.1.5, 6.1.2: the window was reduced for a loss: the first new segment says so."""
    with Talk() as t:
        agreed(t)
        t.write(2 * MSS)
        t.out()
        t.advance(0.5)
        again = [s for s in t.out() if s.data]
        assert [(s.flags, s.ip.tos & 3) for s in again if s.ip] == [(".", NOT)]
        arrive(t, ". 1:1 ack 2001")
        t.write(MSS)
        assert marks(t)[-1] == ("P.W", ECT0)
        t.peer("R 1:1")


def test_without_agreement_ece_is_noise() -> None:
    with Talk() as t:
        t.established(opts="mss 1000")
        t.write(10 * MSS)
        t.out()
        arrive(t, ".E 1:1 ack 1001")
        assert t.info.ssthresh == 2**32 - 1
        t.peer("R 1:1")


def test_short_segments_keep_the_mark_on_the_short_way() -> None:
    """Requests and replies of one segment with timestamps leave by tcp_fast.c."""
    with Talk() as t:
        t.server()
        t.ts = (t.now, 0)
        arrive(t, "SEW 0:0 win 65535 <mss 1460, nop, ws 7>")
        t.out()
        arrive(t, ". 1:1 ack 1")
        t.accept()
        t.write(100)
        assert marks(t) == [("P.", ECT0)]
        t.peer("R 1:1")


def test_a_marking_queue_is_obeyed_without_a_loss() -> None:
    """20 Mbit/s, marks above 50 kB, room for 400 kB: no frame is lost, the rate holds."""
    with Bottleneck("cubic", rate=20_000_000, rtt_ms=20, queue=400_000, mark=50_000, ecn=1) as b:
        b.transfer(1)
        dropped = b.a.port.stats().queue_dropped if b.a.port else -1
        assert b.transfer(5) > 0.93 * 20_000_000
        assert b.a.port is not None
        assert b.a.port.stats().queue_dropped == dropped
        assert b.a.port.stats().marked > 10
        assert b.a.core.stats()["tcp_out_retransmits"] == 0
        assert lib.BYPASS_TCP_ECN == 28
