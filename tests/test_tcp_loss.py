# SPDX-License-Identifier: Apache-2.0
"""TCP: round trips and timeouts (RFC 6298), congestion windows (RFC 5681, 6928), fast recovery (RFC 6582, 3042)."""

from __future__ import annotations

import errno
import os
from itertools import pairwise

import pytest
from bypass._core import lib
from tcp_talk import Talk

from bypass.core import Config
from bypass.sim import Fate, Faults, Network

MSS = 1000
OPTS = f"mss {MSS}"


def seg(first: int, n: int = 1, flags: str = ".") -> str:
    """The spec of n full segments from segment number `first` (0: bytes 1..1000)."""
    return f"{flags} {1 + first * MSS}:{1 + (first + n) * MSS}"


def ack(n: int, win: int | None = None) -> str:
    """The peer has the first n segments."""
    return f". 1:1 ack {1 + n * MSS}" + ("" if win is None else f" win {win}")


def numbers(t: Talk) -> list[int]:
    """What left, as numbers of segments."""
    got = t.out()
    assert all(len(s.data) == MSS for s in got), [str(s) for s in got]
    return [(s.seq - 1) // MSS for s in got]


def fill(t: Talk) -> int:
    """Writes while there is room; how many segments left."""
    n = 0
    while t.stack.ready(t.sock) & lib.BYPASS_OUT:
        t.write(MSS)
        n += len(numbers(t))
    return n + len(numbers(t))


# ---- Round trips and timeouts -------------------------------------------------------------------------------------
def test_the_first_round_trip_sets_the_timeout() -> None:
    """RFC 6298 2.2: SRTT = R, RTTVAR = R/2, RTO = SRTT + 4 RTTVAR."""
    with Talk() as t:
        t.established(rtt=0.4)
        assert (t.info.srtt_us, t.info.rttvar_us, t.info.rto_us) == (400_000, 200_000, 1_200_000)


def test_further_round_trips_are_smoothed() -> None:
    """RFC 6298 2.3: alpha 1/8, beta 1/4."""
    with Talk() as t:
        t.established(rtt=0.4)
        t.write(100)
        t.out()
        t.advance(0.8)
        t.peer(". 1:1")
        assert (t.info.srtt_us, t.info.rttvar_us) == (450_000, 250_000)
        assert t.info.rto_us == 1_450_000


def test_the_timeout_is_at_least_200_ms_above_the_round_trip() -> None:
    with Talk() as t:
        t.established(rtt=0.001)
        for _ in range(30):
            t.write(100)
            t.out()
            t.advance(0.001)
            t.peer(". 1:1")
        assert 200_000 <= t.info.rto_us <= 202_000


def test_timeouts_double_up_to_two_minutes_and_then_give_up() -> None:
    with Talk() as t:
        conn = t.established()
        t.write(100)
        s = "P. 1:101"
        t.hears(s)
        t.mark()
        t.at(0.2, s, 0.6, s, 1.4, s, 3.0, s, 6.2, s, 12.6, s, 25.4, s, 51.0, s, 102.2, s)
        t.at(102.4, s, 222.4, s, 342.4, s, 462.4, s, 582.4, s, 702.4, s)
        t.silence(119)
        assert t.taken(conn) == 0
        t.advance(2)
        assert t.taken(conn) & lib.BYPASS_ERR
        assert t.stack.recv(conn, 1) == -errno.ETIMEDOUT
        assert t.stack.recv(conn, 1) == b""
        assert t.state() == ""


def test_the_timer_starts_over_with_each_acknowledgment_of_something_new() -> None:
    """RFC 6298 5.3."""
    with Talk() as t:
        t.established(opts=OPTS)
        t.write(2 * MSS)
        t.out()
        t.advance(0.15)
        t.peer(ack(1))
        t.mark()
        rto = t.info.rto_us / 1e6
        t.at(rto, seg(1, flags="P."))


def test_no_round_trip_is_taken_from_a_segment_that_was_sent_twice() -> None:
    """Karn, RFC 6298 3; and the doubled timeout stays until there is a valid one (RFC 6298 5.7)."""
    with Talk() as t:
        t.established(rtt=0.01)
        before = t.info.srtt_us
        t.write(100)
        t.hears("P. 1:101")
        t.mark()
        t.advance(0.7)
        assert len(t.out()) == 2
        t.peer(". 1:1 ack 101")
        assert t.info.srtt_us == before
        t.write(100)
        t.hears("P. 101:201")
        rto = 4 * t.info.rto_us / 1e6
        t.at(rto, "P. 101:201")
        t.peer(". 1:1 ack 201")
        t.write(100)
        t.hears("P. 201:301")
        t.advance(0.01)
        t.peer(". 1:1 ack 301")
        t.write(100)
        t.hears("P. 301:401")
        t.at(t.info.rto_us / 1e6, "P. 301:401")


def test_what_waited_behind_a_retransmission_gives_no_round_trip() -> None:
    with Talk() as t:
        t.established(opts=OPTS, rtt=0.01)
        before = t.info.srtt_us
        t.write(4 * MSS)
        t.out()
        t.advance(0.5)  # the first was lost; timeout
        assert numbers(t)[0] == 0
        t.peer(ack(4))
        assert t.info.srtt_us == before


def test_timestamps_tell_which_transmission_was_answered() -> None:
    """RFC 7323 4: a round trip even from a retransmission."""
    with Talk() as t:
        t.established(ts=True, opts="mss 1460, nop, nop, ts 1000 0", rtt=0.1)
        t.write(100)
        t.advance(0.5)
        t.out()  # the retransmission's timestamp is echoed
        t.advance(0.05)
        t.peer(". 1:1 ack 101")
        assert t.info.srtt_us < 400_000
        assert t.info.rttvar_us > 0


@pytest.mark.parametrize("dsack", [False, True])
def test_the_age_of_a_copy_whose_ack_was_lost_is_no_round_trip(dsack: bool) -> None:
    """The echo of an earlier transmission: its ACK was lost, or is late. A D-SACK (RFC 2883) says that this one answers
    the last; without it the timeout stays backed off until something sent once is acknowledged (RFC 6298 5.7)."""
    opts = "mss 1000, sackok, nop, nop, ts 1000 0"
    with Talk() as t:
        t.established(ts=True, opts=opts, rtt=0.1)
        srtt, rto = t.info.srtt_us, t.info.rto_us
        t.write(100)
        [first] = t.out()
        t.advance(1.5)
        again = t.out()
        assert len(again) == t.info.retransmits >= 2
        t.advance(0.2)
        age_us = (t.now - again[-1].at_ns) // 1000
        block = ", nop, nop, sack 1:101" if dsack else ""
        t.peer(f". 1:1 ack 101 <nop, nop, ts 9000 {first.opts['ts'][0]}{block}>")
        if dsack:
            assert t.info.srtt_us == pytest.approx(srtt + (age_us - srtt) / 8, abs=2000)
        else:
            assert (t.info.srtt_us, t.info.rto_us) == (srtt, rto)


def test_the_window_grows_by_what_has_arrived_when_a_timeout_was_a_mistake() -> None:
    """RFC 9438 4.9: window and curve are as they were, and time has gone on: the ACK that tells counts as others do."""
    with Talk() as t:
        t.established(opts=f"{OPTS}, sackok", rtt=0.1)
        fill(t)
        t.peer(ack(10))
        fill(t)
        before = t.info.cwnd
        t.advance(3)  # nothing arrives, several timeouts
        t.out()
        assert t.info.cwnd == MSS
        t.peer(ack(11))  # of what was repeated; new data goes (RFC 5682)
        assert t.info.cwnd < before
        t.out()
        t.peer(ack(14))
        assert t.info.cwnd > before


# ---- The congestion window ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mss", "segments"), [(1460, 10), (1000, 10), (536, 10)])
def test_the_first_window_is_ten_segments(mss: int, segments: int) -> None:
    """RFC 6928 2."""
    with Talk() as t:
        t.established(opts=f"mss {mss}")
        t.write(60 * mss)
        assert len(t.out()) == segments


def test_slow_start_doubles_the_window_each_round_trip() -> None:
    with Talk(sndbuf=1 << 20, frames=2048) as t:
        t.established(opts=f"{OPTS}, nop, ws 7")
        sent = fill(t)
        acked = 0
        for expected in (20, 40, 80):
            new = 0
            while acked < sent:
                acked += 1
                t.peer(ack(acked, 60000))
                new += fill(t)
            assert new == expected
            sent += new
        t.peer("R 1:1")


def test_congestion_avoidance_adds_a_segment_each_round_trip() -> None:
    with Talk(sndbuf=1 << 20, frames=2048) as t:
        t.established(opts=f"{OPTS}, nop, ws 7")
        t.write(10 * MSS)
        t.out()
        t.advance(0.3)  # timeout: ssthresh becomes 5 segments
        t.out()
        t.peer(ack(10, 60000))
        assert t.info.ssthresh == 5 * MSS
        acked = high = 10
        high += fill(t)
        rounds = []
        for _ in range(12):
            rounds.append(high - acked)
            end = high
            while acked < end:
                acked += 1
                t.peer(ack(acked, 60000))
                high += fill(t)
        assert [b - a for a, b in pairwise(rounds[1:])] == [1] * 10, rounds
        t.peer("R 1:1")


def test_an_ack_of_many_segments_opens_the_window_by_two_at_most() -> None:
    """RFC 3465 2.2."""
    with Talk() as t:
        t.established(opts=OPTS)
        t.write(40 * MSS)
        assert len(t.out()) == 10
        t.peer(ack(10))
        assert t.info.cwnd == 12 * MSS
        assert len(t.out()) == 12


def test_a_window_that_is_not_used_does_not_grow() -> None:
    """RFC 7661, RFC 5681 3.1: only a full window says that the network bears more."""
    with Talk() as t:
        t.established(opts=OPTS)
        cwnd = t.info.cwnd
        for _ in range(50):
            t.write(10)
            t.out()
            t.peer(". 1:1")
        assert t.info.cwnd == cwnd


def test_after_a_pause_sending_starts_with_no_more_than_the_first_window() -> None:
    """RFC 5681 4.1."""
    with Talk(sndbuf=1 << 20, frames=2048) as t:
        t.established(opts=f"{OPTS}, nop, ws 7")
        for n in range(1, 101):
            t.write(MSS)
            t.write(MSS)
            t.peer(ack(n, 60000))
        t.peer(ack(200, 60000))
        numbers(t)
        assert t.info.cwnd > 20 * MSS
        t.advance(5)
        assert fill(t) == 10


# ---- Fast retransmit and recovery ---------------------------------------------------------------------------------
def ten_in_flight(t: Talk, more: int = 20) -> None:
    t.established(opts=OPTS, rtt=0.01)
    t.write((10 + more) * MSS)
    assert numbers(t) == list(range(10))
    t.advance(0.01)


def test_the_third_duplicate_ack_retransmits() -> None:
    with Talk() as t:
        ten_in_flight(t, more=0)
        t.peer(ack(0))
        t.peer(ack(0))
        assert numbers(t) == []
        t.peer(ack(0))
        assert numbers(t) == [0]
        t.peer(ack(0))
        assert numbers(t) == []
        assert t.counted()["tcp_fast_retransmits"] == 1


def test_limited_transmit_sends_new_segments_on_the_first_two_duplicates() -> None:
    """RFC 3042."""
    with Talk() as t:
        ten_in_flight(t)
        t.peer(ack(0))
        assert numbers(t) == [10]
        t.peer(ack(0))
        assert numbers(t) == [11]
        t.peer(ack(0))
        assert numbers(t) == [0]
        # RFC 5681 3.2 step 2: what limited transmit sent does not count
        assert t.info.ssthresh == 5 * MSS
        t.peer("R 1:1")


@pytest.mark.parametrize(
    "other",
    [
        "P. 1:2 ack 1",  # carries data
        ". 1:1 ack 1 win 60000",  # changes the window
        "F. 1:1 ack 1",
    ],
)
def test_what_is_no_duplicate_does_not_count(other: str) -> None:
    """RFC 5681 2."""
    with Talk() as t:
        ten_in_flight(t, more=0)
        t.peer(ack(0), ack(0), other)
        assert [s.seq for s in t.out() if s.data] == []


def test_one_loss_in_a_window_halves_it_once() -> None:
    with Talk() as t:
        ten_in_flight(t)
        t.peer(*[ack(0)] * 9)  # nine segments arrived behind the hole
        got = numbers(t)
        assert got[:3] == [10, 11, 0]
        assert t.info.ssthresh == 5 * MSS
        assert t.info.cwnd == 5 * MSS
        high = max(got) + 1
        t.peer(ack(high))
        assert t.info.cwnd <= 6 * MSS
        assert t.counted()["tcp_fast_retransmits"] == 1
        assert t.counted().get("tcp_timeouts", 0) == 0
        t.peer("R 1:1")


def test_a_partial_ack_retransmits_the_next_hole_at_once() -> None:
    """RFC 6582 3.2 step 3: segments 0, 3 and 7 are lost."""
    with Talk() as t:
        ten_in_flight(t, more=0)
        t.peer(*[ack(0)] * 7)
        assert numbers(t) == [0]
        ssthresh = t.info.ssthresh
        t.peer(ack(3))
        assert numbers(t) == [3]
        t.peer(ack(7))
        assert numbers(t) == [7]
        t.peer(ack(10))
        assert t.info.ssthresh == ssthresh, "one cut for one window"
        moved = t.counted()
        assert (moved["tcp_partial_acks"], moved["tcp_fast_retransmits"]) == (2, 1)
        assert "tcp_timeouts" not in moved
        assert t.state() == "ESTABLISHED"


def test_duplicates_at_the_end_of_a_recovery_do_not_begin_another() -> None:
    """RFC 6582 3.2 step 2 and 4: they come from segments that were sent needlessly, and tell of no loss."""
    with Talk() as t:
        ten_in_flight(t, more=30)
        t.advance(0.5)  # timeout
        t.out()
        t.peer(ack(10))  # everything had arrived; only the ACKs were lost
        numbers(t)
        ssthresh = t.info.ssthresh
        t.peer(ack(10), ack(10), ack(10), ack(10))  # answers to what was sent twice
        got = numbers(t)
        assert 10 not in got
        assert t.info.ssthresh == ssthresh
        t.peer(ack(12))
        numbers(t)
        t.peer(ack(12), ack(12), ack(12))
        assert 12 in numbers(t), "a loss after it is seen again"
        t.peer("R 1:1")


def test_a_lost_retransmission_is_left_to_the_timer() -> None:
    with Talk() as t:
        ten_in_flight(t, more=0)
        t.peer(ack(0), ack(0), ack(0))
        assert numbers(t) == [0]
        t.mark()
        t.peer(*[ack(0)] * 6)
        assert numbers(t) == []
        rto = t.info.rto_us / 1e6
        t.advance(rto + 0.002)
        assert numbers(t) == [0]
        assert t.info.cwnd == MSS
        t.peer(ack(1))
        assert numbers(t) == [1, 2], "slow start over what is not acknowledged"
        t.peer(ack(10))


def test_a_timeout_sends_one_segment_and_then_slow_starts() -> None:
    """RFC 5681 3.1: cwnd one segment, ssthresh half of the flight. (With more to send F-RTO comes first: RFC 5682.)"""
    with Talk() as t:
        ten_in_flight(t, more=0)
        t.advance(t.info.rto_us / 1e6)
        assert numbers(t) == [0]
        assert (t.info.cwnd, t.info.ssthresh) == (MSS, 5 * MSS)
        t.peer(ack(1))
        assert numbers(t) == [1, 2]
        t.peer(ack(2))
        assert numbers(t) == [3, 4]
        t.peer(ack(3))
        assert numbers(t) == [5, 6]
        t.peer("R 1:1")


def test_a_second_timeout_of_the_same_data_does_not_cut_again() -> None:
    with Talk() as t:
        ten_in_flight(t)
        t.advance(3)
        assert set(numbers(t)) == {0}
        assert t.info.ssthresh == 5 * MSS
        t.peer("R 1:1")


def test_a_fast_retransmission_that_the_device_delays_is_not_forgotten() -> None:
    """The frame is still the device's when the third duplicate comes: it goes when the device lets go."""
    with Talk() as t:
        t.established(opts=OPTS, rtt=0.01)
        t.faults(complete_ns=50_000_000)
        t.write(10 * MSS)
        assert numbers(t) == list(range(10))
        t.advance(0.01)
        t.peer(ack(0), ack(0), ack(0))
        assert numbers(t) == []
        t.advance(0.05)
        assert numbers(t) == [0]
        t.faults()
        t.advance(0.06)
        t.peer(ack(10))


def test_an_ack_of_a_part_of_a_segment_is_honoured() -> None:
    with Talk() as t:
        t.established(opts=OPTS)
        t.write(2 * MSS)
        t.out()
        t.peer(". 1:1 ack 501")
        t.advance(0.3)
        t.hears(". 501:1001")
        t.peer(". 1:1 ack 1601")
        t.advance(1)
        assert {(s.seq, s.end) for s in t.out()} == {(1601, 2001)}
        t.peer(". 1:1 ack 2001")
        assert t.info.snd_queued == 0


def test_old_acks_change_nothing() -> None:
    with Talk() as t:
        ten_in_flight(t, more=0)
        t.peer(ack(10))
        t.write(MSS)
        t.out()
        t.peer(ack(3), ack(3), ack(3), ack(3))
        t.silence(0.1)
        assert t.info.snd_una == (t.iss or 0) + 1 + 10 * MSS - 2**32


def test_acks_of_what_was_never_sent_are_answered_and_ignored() -> None:
    """RFC 9293 3.10.7.4, RFC 5961 5.2."""
    with Talk() as t:
        t.established(opts=OPTS)
        t.write(MSS)
        t.out()
        t.peer(ack(2))
        t.hears(". 1001:1001 ack 1")
        assert t.counted()["tcp_in_bad_ack"] == 1
        t.advance(1)
        t.out()
        t.peer(". 1:1 ack -70000")
        t.hears(". 1001:1001 ack 1")
        t.peer(ack(1))


def test_a_transfer_survives_the_loss_of_every_seventh_segment() -> None:
    """Arithmetic of the recovery, with a peer that acknowledges as RFC 5681 4.2 says."""
    with Talk(sndbuf=1 << 20, frames=2048) as t:
        t.established(opts=OPTS)
        total = 300
        have: set[int] = set()
        count = edge = 0
        for _ in range(3000):
            while t.wrote <= total * MSS and t.stack.ready(t.sock) & lib.BYPASS_OUT:
                t.write(MSS)
            new = numbers(t)
            for n in new:
                count += 1
                if count % 7:
                    have.add(n)
                while edge in have:
                    edge += 1
                t.peer(ack(edge))
            if edge == total:
                break
            if not new:
                t.advance(0.05)
        assert edge == total
        t.out()
        assert t.info.snd_queued == 0


@pytest.mark.skipif("san" in os.environ.get("BYPASS_BUILD", ""), reason="2 GB are too much with sanitizers")
def test_a_loss_after_two_gigabytes_is_still_recovered_from() -> None:
    """What the first loss left behind must be forgotten: half of the sequence space later it would look as if it were
    ahead."""
    net = Network(1)
    net.wire(faults=Faults(delay_ns=50_000))
    config = Config(conns=4, sndbuf=1 << 20, rcvbuf=1 << 20)
    a, b = (net.stack(f"10.0.0.{i}/24", config=config, mtu=9000) for i in (1, 2))
    listener = b.core.socket(lib.BYPASS_STREAM)
    b.core.bind(listener, ("10.0.0.2", 80))
    b.core.listen(listener, 1)
    client = a.core.socket(lib.BYPASS_STREAM)
    a.core.connect(client, ("10.0.0.2", 80))
    net.run(duration_ns=10_000_000)
    server = b.core.accept(listener)
    data, room = bytes(1 << 20), bytearray(1 << 20)
    received = 0

    def transfer(n: int) -> None:
        nonlocal received
        end = received + n

        def step() -> bool:
            nonlocal received
            while a.core.send(client, data) > 0:
                pass
            while (got := b.core.recv_into(server, room)) > 0:
                received += got
            return received >= end

        assert net.run(step, duration_ns=60_000_000_000)

    assert a.port is not None
    transfer(1 << 20)
    a.port.script([Fate.LOSE])
    transfer(2200 << 20)
    before = a.core.stats()
    assert before["tcp_fast_retransmits"] == 1
    a.port.script([Fate.LOSE])
    transfer(16 << 20)
    after = a.core.stats()
    assert after["tcp_fast_retransmits"] - before["tcp_fast_retransmits"] == 1
    assert after["tcp_timeouts"] == before["tcp_timeouts"]
    net.close()
