# SPDX-License-Identifier: Apache-2.0
"""TCP: losses by time, and the probe at the tail (RACK-TLP, RFC 8985)."""

from __future__ import annotations

from recovery_talk import MSS, PLAIN, RTT, SACK, SACK_TS, ack, after, begin, each, numbers, state, window
from tcp_talk import TICK, Talk

WINDOW = RTT / 4  # for reordering, at first


# ---- What is lost (6.2) ----------------------------------------------------------------------------------------------
def test_what_was_sent_before_what_arrived_is_lost_after_a_quarter_of_a_round_trip() -> None:
    """RFC 8985 6.2 step 4: fewer than three are SACKed, so what may be late is waited for; step 5: by a timer."""
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (2, 3))) == [[]]
        assert after(t, WINDOW - TICK) == []
        assert after(t, 2 * TICK) == [0]
        assert state(t) == "recovery"


def test_with_three_sacked_nothing_is_waited_for() -> None:
    """RFC 8985 6.2 step 4: DupThresh, as long as the path has not reordered."""
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (1, 3)), ack(0, (1, 4))) == [[], [0]]


def test_on_a_path_that_reorders_three_sacked_prove_nothing() -> None:
    """RFC 8985 6.2 steps 3 and 4: an original that arrives behind later ones shows it."""
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (1, 2)), ack(2)) == [[], []]  # 0 was late
        assert t.counted()["tcp_reordered"] == 1
        assert each(t, ack(2, (3, 9))) == [[]]
        assert after(t, WINDOW - TICK) == []
        assert after(t, 2 * TICK) == [2]


def test_segments_that_are_late_by_less_than_the_window_are_not_sent_again() -> None:
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (1, 3))) == [[]]
        assert after(t, WINDOW / 2, ack(3)) == []
        assert state(t) == "open"
        t.peer(ack(10))
        assert "tcp_out_retransmits" not in t.counted()


def test_what_was_sent_after_what_arrived_is_not_called_lost() -> None:
    """RFC 8985 6.2 step 5: order of sending, not of numbers, tells; what left last has time to arrive."""
    with Talk() as t:
        begin(t)
        assert each(t, ack(0, (1, 4))) == [[0]]
        assert each(t, ack(0, (1, 7))) == [[10]]
        assert after(t, RTT, ack(10)) != []
        assert {n for n in numbers(t) if n <= 10} == set()
        assert t.counted()["tcp_out_retransmits"] == 1


def test_a_lost_retransmission_is_found_by_what_was_sent_after_it() -> None:
    """RFC 8985 6.2 step 5, 3: what was sent again has a time of its own; no timeout is needed."""
    with Talk() as t:
        begin(t)
        assert each(t, ack(0, (1, 4))) == [[0]]
        assert each(t, ack(0, (1, 7)), ack(0, (1, 10))) == [[10], [11, 12, 13]]
        assert after(t, RTT, ack(0, (1, 11)))[:1] == [0]  # 10 was sent after 0
        counted = t.counted()
        assert counted["tcp_lost_retransmits"] == 1
        assert "tcp_timeouts" not in counted


def test_an_ack_that_is_too_quick_for_the_retransmission_is_the_originals() -> None:
    """RFC 8985 6.2 step 2: sooner than the smallest round trip; it must not make others look overdue."""
    with Talk() as t:
        begin(t, 10)
        assert after(t, 0, ack(0, (6, 10))) == [0, 1, 2, 3]
        assert after(t, 0.01, ack(0, (3, 4), (6, 10))) == [4]  # 3's original
        assert after(t, RTT / 2) == []
        assert t.counted().get("tcp_lost_retransmits", 0) == 0


def test_late_originals_acknowledged_with_the_first_block_are_what_rack_measures() -> None:
    """RFC 8985 6.2 step 2: the round trip is that of all that this ACK delivers, not only of its blocks."""
    with Talk() as t:
        begin(t)
        assert 10 in after(t, 0, ack(2))
        assert 9 not in after(t, RTT, ack(9, (10, 11)))  # 2 to 8 took two round trips: so may 9
        assert after(t, WINDOW + TICK)[:1] == [9]


def test_a_duplicate_report_widens_the_window_for_sixteen_recoveries() -> None:
    """RFC 8985 6.2 step 4: a D-SACK in a round adds a quarter of the smallest round trip; 16 recoveries without one
    take it back."""
    with Talk() as t:
        begin(t, 10)
        t.peer(ack(0, (2, 3)))
        assert after(t, WINDOW + TICK) == [0]
        t.peer(ack(10))
        t.peer(ack(10, (0, 1)))  # it was late
        at = 10
        waited = []
        for _ in range(17):
            t.write(2 * MSS)
            assert numbers(t) == [at, at + 1]
            t.advance(RTT)
            t.peer(ack(at, (at + 1, at + 2)))
            since = t.now
            while not (got := t.out()):
                t.advance(0.001)
            waited.append((got[0].at_ns - since) / 1e9 / WINDOW)
            t.advance(RTT)
            t.peer(ack(at + 2))
            at += 2
        assert all(1.9 < w < 2.2 for w in waited[:15]), waited
        assert 0.9 < waited[-1] < 1.2, waited


def test_the_window_for_reordering_is_at_most_a_round_trip() -> None:
    """RFC 8985 6.2 step 4: SRTT bounds it, however many duplicates are reported."""
    with Talk() as t:
        begin(t, 10)
        t.peer(ack(0, (2, 3)))
        after(t, WINDOW + TICK)
        at = 10
        t.peer(ack(at))
        for _ in range(12):  # a round each
            t.peer(ack(at, (0, 1)))
            t.write(2 * MSS)
            numbers(t)
            at += 2
            t.advance(RTT)
            t.peer(ack(at))
        srtt = t.info.srtt_us / 1e6
        t.write(4 * MSS)
        numbers(t)
        t.advance(RTT)
        t.peer(ack(at, (at + 1, at + 2)))
        assert after(t, srtt - 2 * TICK) == []
        assert after(t, 4 * TICK) == [at]


def test_after_a_timeout_what_left_just_before_is_not_sent_again() -> None:
    """RFC 8985 6.3: only the first segment and what is overdue count as lost."""
    with Talk() as t:
        begin(t)
        assert each(t, ack(0, (1, 4))) == [[0]]
        assert after(t, 0.25, ack(0, (1, 10))) == [10, 11, 12, 13]
        assert after(t, 0.1) == [0]
        assert state(t) == "loss"
        again = after(t, 0.01, ack(10))
        assert again[0] > 13, "what left 60 ms before the timeout is on its way"


# ---- The probe at the tail (7) --------------------------------------------------------------------------------------
def test_a_lost_tail_is_probed_after_two_round_trips() -> None:
    """RFC 8985 7.2, 7.3: with nothing new to send, the last segment again; its SACK tells what is missing."""
    with Talk() as t:
        begin(t, 10)
        t.peer(ack(7))
        srtt = t.info.srtt_us / 1e6
        assert after(t, 2 * srtt) == []
        assert after(t, 0.002 + TICK) == [9]
        assert after(t, RTT, ack(7, (9, 10))) == [7]
        assert after(t, RTT, ack(8, (9, 10))) == [8]
        assert t.counted()["tcp_out_loss_probes"] == 1


def test_the_probe_is_new_data_when_there_is_some() -> None:
    """RFC 8985 7.3, whatever the congestion window says."""
    with Talk() as t:
        begin(t, 20)
        assert numbers(t) == []
        assert after(t, 2 * RTT - RTT + 0.002 + TICK) == [10]  # one round trip has passed already


def test_the_probe_is_the_last_segment_when_the_receiver_has_no_room_for_new_data() -> None:
    """RFC 8985 7.3: the peer's window holds for it."""
    with Talk() as t:
        t.win = 10 * MSS
        begin(t, 20)
        assert after(t, RTT + 0.002 + TICK) == [9]


def test_a_single_segment_is_probed_later_for_its_ack_may_be_delayed() -> None:
    """RFC 8985 7.2: the worst delay of an ACK is added; but the probe is not later than the timeout would be."""
    with Talk() as t:
        begin(t, 1)
        assert after(t, 0.19) == []
        assert after(t, 0.02) == [0]
        assert t.counted()["tcp_out_loss_probes"] == 1


def test_before_any_round_trip_is_known_the_probe_waits_a_second() -> None:
    """RFC 8985 7.2: as the first timeout (RFC 6298 2.1), which comes with it then."""
    with Talk() as t:
        t.server()
        t.peer(f"S 0:0 <{SACK}>")
        t.advance(3.5)
        assert len(t.out()) == 3  # repeated: no round trip is taken from it (Karn)
        t.peer(". 1:1 ack 1")
        t.accept()
        t.write(2 * MSS)
        assert numbers(t) == [0]  # the first window is one segment then (RFC 6928 2)
        assert after(t, 0.99) == []
        assert after(t, 0.02) == [1]


def test_there_is_one_probe_and_then_the_timeout() -> None:
    """RFC 8985 7.3: no second probe before the first is answered; the timeout counts from the probe."""
    with Talk() as t:
        begin(t, 10)
        t.peer(ack(7))
        t.mark()
        got = t.at(0.202, ". 9001:10001 ack 1".replace(". ", "P. "), 0.502, ". 7001:8001 ack 1")
        assert len(got) == 2
        assert state(t) == "loss"


def test_until_the_probe_is_answered_progress_starts_the_timeout_and_not_another_probe() -> None:
    """RFC 8985 7.3."""
    with Talk() as t:
        begin(t, 10)
        t.peer(ack(7))
        assert after(t, 0.21) == [9]
        t.peer(ack(8))
        rto = t.info.rto_us / 1e6
        assert after(t, rto - TICK) == []
        assert after(t, 2 * TICK) == [8]
        assert state(t) == "loss"


def test_new_data_puts_the_probe_off_but_not_beyond_the_timeout() -> None:
    """RFC 8985 7.2: the timer starts over; the oldest segment's timeout bounds it."""
    with Talk() as t:
        begin(t, 2)
        for n in range(2, 6):  # until 0.29 after the first
            t.write(MSS)
            assert numbers(t) == [n], "no probe so far"
            t.advance(0.0475)
        assert after(t, 0.02) == [5], "the timeout of the first is 0.3"
        assert t.counted()["tcp_out_loss_probes"] == 1


def test_a_probe_that_repairs_a_loss_costs_the_window_a_reduction() -> None:
    """RFC 8985 7.4.2: nobody else told of the loss."""
    with Talk() as t:
        begin(t, 10)
        t.peer(ack(9))
        before = window(t)[0]
        assert after(t, 0.42) == [9]
        t.write(MSS)  # so that the ACK says more than the probe
        numbers(t)
        assert after(t, RTT, ack(11)) == []
        assert t.counted()["tcp_loss_probe_repairs"] == 1
        assert window(t)[0] <= before / 2


def test_a_probe_that_was_needless_costs_nothing() -> None:
    """RFC 8985 7.4.2: a D-SACK says that the original had arrived; only its ACK was late."""
    with Talk() as t:
        begin(t, 10)
        t.peer(ack(9))
        before = window(t)
        assert after(t, 0.42) == [9]
        t.peer(ack(10, (9, 10)))
        assert window(t)[0] >= before[0]
        t.write(2 * MSS)
        numbers(t)
        t.advance(RTT)
        t.peer(ack(12))
        assert "tcp_loss_probe_repairs" not in t.counted()


def test_without_sack_there_is_no_probe() -> None:
    """RFC 8985 7.1: it needs SACK."""
    with Talk() as t:
        begin(t, 10, opts=PLAIN)
        t.peer(ack(7))
        assert after(t, 0.29) == []
        assert after(t, 0.02) == [7]
        assert "tcp_out_loss_probes" not in t.counted()


def test_a_timestamp_tells_that_an_ack_is_the_originals() -> None:
    """RFC 8985 6.2 step 2: TSecr is older than the retransmission."""
    with Talk() as t:
        begin(t, 10, opts=SACK_TS)
        assert t.ts is not None
        old = t.ts[1]
        assert after(t, 0, ack(0, (6, 10))) == [0, 1, 2, 3]
        t.advance(RTT)
        t.peer(ack(0, (4, 5), (6, 10), more=f"nop, nop, ts 3000 {old}"))
        assert t.counted().get("tcp_lost_retransmits", 0) == 0
