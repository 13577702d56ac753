# SPDX-License-Identifier: Apache-2.0
"""TCP: the window in recovery (PRR, RFC 9937; limited transmit, RFC 3042), and recoveries that were a mistake: F-RTO
(RFC 5682), Eifel (RFC 3522), D-SACK (RFC 3708), and the response (RFC 4015)."""

from __future__ import annotations

import pytest
from recovery_talk import (
    MSS,
    PLAIN,
    PLAIN_TS,
    RTT,
    SACK,
    SACK_TS,
    ack,
    after,
    begin,
    each,
    numbers,
    state,
    window,
)
from tcp_talk import TICK, Talk

UNLIMITED = (2**32 - 1) / MSS


# ---- The window in recovery -----------------------------------------------------------------------------------------
def test_limited_transmit_sends_a_new_segment_for_each_of_the_first_two_blocks() -> None:
    """RFC 3042 2, with SACK: pipe shrinks by what is SACKed; the window does not grow."""
    with Talk() as t:
        begin(t)
        assert each(t, ack(0, (2, 3)), ack(0, (2, 4))) == [[10], [11]]
        assert window(t)[0] == 10


def test_without_sack_two_duplicates_allow_two_new_segments_and_a_third_none() -> None:
    """RFC 3042 2: no more than two beyond the window; outside of recovery, however many come."""
    with Talk() as t:
        begin(t, opts=PLAIN)
        said = each(t, ack(0), ack(0), ack(0))
        assert said == [[10], [11], [0]]
        assert after(t, RTT, ack(12)) == [12, 13, 14, 15, 16]
        assert each(t, *[ack(12)] * 4) == [[17], [18], [], []]  # no recovery at its end (RFC 6582 3.2)


def test_the_first_retransmission_does_not_wait_for_the_window() -> None:
    """RFC 9937 6.2: at least one segment when recovery begins, though far more than ssthresh is out."""
    with Talk() as t:
        begin(t)
        assert each(t, ack(0, (1, 2)), ack(0, (1, 3)), ack(0, (1, 4))) == [[10], [11], [0]]
        assert window(t)[1] == 5


def test_the_window_shrinks_in_proportion_to_what_is_delivered() -> None:
    """RFC 9937 6.2: while more than ssthresh is out, ssthresh / RecoverFS of what is delivered goes out."""
    with Talk() as t:
        begin(t)
        sent = each(t, *(ack(0, (1, n)) for n in range(2, 11)))
        in_recovery = sum(map(len, sent[2:]))
        assert in_recovery == 3  # 7 delivered, 5 of 10 at a time; 3.5 are 3 whole segments
        assert max(map(len, sent)) == 1


def test_when_much_is_lost_sending_goes_on_as_in_slow_start() -> None:
    """RFC 9937 6.2: less than ssthresh is out: what is delivered, and a segment more on an ACK that makes progress and
    tells of no loss (SafeACK)."""
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (8, 10)), ack(0, (7, 10))) == [[], []]
        t.advance(RTT / 4 + TICK)
        first = numbers(t)
        assert first[0] == 0
        assert len(first) <= 3
        assert len(after(t, RTT, ack(1, (7, 10)))) == 2  # one delivered: one and SafeACK's


def test_new_losses_are_not_progress() -> None:
    """RFC 9937 6.2: no SafeACK by an ACK that tells of more loss, or that is not cumulative: packet conservation."""
    with Talk() as t:
        begin(t, 30)
        assert each(t, ack(0, (6, 9))) == [[0, 1, 2]]
        assert each(t, ack(0, (6, 10))) == [[3]]


def test_a_bad_ack_in_recovery_adds_nothing() -> None:
    """RFC 9937 6.2: an ACK that delivers nothing sends nothing."""
    with Talk() as t:
        begin(t)
        assert each(t, ack(0, (1, 4))) == [[0]]
        assert each(t, *[ack(0, (1, 4))] * 5) == [[]] * 5
        assert each(t, ack(0), ack(0)) == [[], []]


def test_recovery_ends_with_ssthresh_as_the_window() -> None:
    """RFC 9937 6.2, last step: one half, once; the ACK that ends it does not grow the window besides."""
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (1, 10))) == [[0]]
        t.advance(RTT)
        t.peer(ack(10))
        assert window(t) == (5, 5)
        assert state(t) == "open"


def test_the_ack_that_ends_a_recovery_does_not_grow_the_window_besides() -> None:
    """RFC 9937 6.2; RFC 5681 3.1 (3) counts from there: five segments for one."""
    with Talk() as t:
        begin(t, 10, opts=PLAIN)
        t.peer(*[ack(0)] * 9)
        assert numbers(t) == [0]
        t.advance(RTT)
        t.peer(ack(10))
        t.write(20 * MSS)
        assert numbers(t) == [10, 11, 12, 13, 14]
        t.advance(RTT)
        sizes = []
        for n in range(11, 16):
            t.peer(ack(n))
            sizes.append(window(t)[0])
        assert sizes == [5, 5, 5, 5, 6]


def test_a_window_that_had_shrunk_below_ssthresh_ends_there_too() -> None:
    """RFC 9937 6.2, last step."""
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (8, 10)), ack(0, (7, 10))) == [[], []]
        assert after(t, RTT / 4 + TICK) == [0]
        assert window(t) == (1, 5)
        t.advance(RTT)
        t.peer(ack(10))
        assert window(t) == (5, 5)


def test_two_losses_of_one_window_halve_it_once() -> None:
    """RFC 6675 5: until what was out when it began is acknowledged, more losses are of the same recovery."""
    with Talk() as t:
        begin(t)
        t.peer(ack(0, (1, 4)))
        t.advance(RTT)
        t.peer(ack(4, (5, 10)))
        assert window(t)[1] == 5
        assert state(t) == "recovery"


# ---- F-RTO ---------------------------------------------------------------------------------------------------------
def timed_out(t: Talk, opts: str = SACK, segments: int = 30) -> None:
    """Ten are out; their ACKs are late. The probe, where there is one, and the first again."""
    begin(t, segments, opts=opts)
    t.advance(0.6)
    assert numbers(t)[-1] == 0
    assert state(t) == "loss"
    assert window(t)[0] == 1


@pytest.mark.parametrize("opts", [SACK, PLAIN])
def test_acks_of_originals_after_a_timeout_undo_it(opts: str) -> None:
    """RFC 5682 2.1 and 3.1: two ACKs that advance, the second of what was not sent again; then RFC 4015 3.2: the window
    is what it was."""
    with Talk() as t:
        timed_out(t, opts)
        first = after(t, 0.01, ack(1))
        assert len(first) == 2, "step 2.b: two new segments"
        assert min(first) >= 10
        assert [n for n in after(t, 0.01, ack(2)) if n < 10] == []
        assert state(t) in ("open", "disorder")
        assert window(t)[0] >= 10
        assert window(t)[1] == UNLIMITED
        assert t.counted()["tcp_undone_timeouts"] == 1
        t.peer(ack(10))
        assert [n for n in numbers(t) if n < 10] == []


def test_a_duplicate_after_the_new_data_says_that_the_timeout_was_right() -> None:
    """RFC 5682 2.1 step 3.a: what is missing is sent again, in slow start."""
    with Talk() as t:
        timed_out(t, PLAIN)
        assert min(after(t, 0.01, ack(1))) >= 10
        assert after(t, 0.01, ack(1))[:1] == [1]
        assert state(t) == "loss"
        assert "tcp_undone_timeouts" not in t.counted()


def test_a_block_above_the_hole_after_the_new_data_says_so_too() -> None:
    """RFC 5682 3.1 step 3.a, with SACK."""
    with Talk() as t:
        timed_out(t)
        new = after(t, 0.01, ack(1))
        assert min(new) >= 10
        assert after(t, 0.01, ack(1, (new[0], new[0] + 1)))[:1] == [1]
        t.advance(0.01)
        t.peer(ack(10, (new[0], new[0] + 1)))  # that 2 to 9 had arrived proves nothing any more
        assert "tcp_undone_timeouts" not in t.counted()


def test_without_new_data_to_send_recovery_goes_on_as_usual() -> None:
    """RFC 5682 2.1 step 2.b: nothing to ask with."""
    with Talk() as t:
        timed_out(t, segments=10)
        assert after(t, 0.01, ack(1))[:1] == [1]


def test_without_room_at_the_peer_recovery_goes_on_as_usual() -> None:
    """RFC 5682 2.1 step 2.b: new data does not fit its window."""
    with Talk() as t:
        t.win = 10 * MSS
        timed_out(t)
        t.peer(". 1:1 ack 1001 win 9000")
        assert numbers(t)[:1] == [1]


def test_a_timeout_within_a_recovery_asks_no_questions() -> None:
    """RFC 5682 2.1 step 1: what was sent again before the timeout would make the answer worthless."""
    with Talk() as t:
        begin(t)
        assert each(t, ack(0, (1, 4))) == [[0]]
        t.advance(0.31)
        assert state(t) == "loss"
        assert numbers(t) == [0]
        assert after(t, 0.01, ack(4))[:1] == [4]


# ---- Eifel ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("opts", [SACK_TS, PLAIN_TS])
def test_an_old_timestamp_echoed_after_a_timeout_undoes_it_at_once(opts: str) -> None:
    """RFC 3522 3.2: the first ACK answers the original; RFC 4015 3.2."""
    with Talk() as t:
        begin(t, 10, opts=opts)
        assert t.ts is not None
        original = t.ts[1]
        t.advance(0.6)
        assert 0 in numbers(t)
        t.peer(ack(1, more=f"nop, nop, ts 5000 {original}"))
        assert [n for n in numbers(t) if n < 9] == []
        assert t.counted()["tcp_undone_timeouts"] == 1
        assert window(t)[0] >= 10
        assert window(t)[1] == UNLIMITED


def test_an_old_timestamp_echoed_after_a_fast_retransmission_undoes_it() -> None:
    """RFC 3522 3.2, RFC 4015 3.2."""
    with Talk() as t:
        begin(t, 10, opts=SACK_TS)
        assert t.ts is not None
        original = t.ts[1]
        assert each(t, ack(0, (1, 4))) == [[0]]
        assert window(t)[1] == 5
        t.advance(0.01)
        t.peer(ack(10, more=f"nop, nop, ts 5000 {original}"))
        assert t.counted()["tcp_undone_recoveries"] == 1
        assert window(t)[0] >= 10
        assert window(t)[1] == UNLIMITED


@pytest.mark.parametrize("echo", ["0", "own"])
def test_an_echo_of_the_retransmission_undoes_nothing(echo: str) -> None:
    """RFC 3522 3.2: neither does an echo of 0, which says nothing (RFC 7323 3.2)."""
    with Talk(peer_port=40001) as t:
        begin(t, 10, opts=SACK_TS)
        assert each(t, ack(0, (1, 4))) == [[0]]
        assert t.ts is not None
        assert t.ts[1] < 1 << 31, "0 looks older than this"
        t.advance(RTT)
        t.peer(ack(10, more=f"nop, nop, ts 5000 {t.ts[1] if echo == 'own' else 0}"))
        assert "tcp_undone_recoveries" not in t.counted()
        assert window(t) == (5, 5)


# ---- D-SACK ----------------------------------------------------------------------------------------------------------
def test_when_each_retransmission_was_a_duplicate_the_recovery_is_undone() -> None:
    """RFC 3708: a D-SACK for every one of them."""
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (2, 5))) == [[0]]
        assert after(t, 0.01, ack(1, (2, 6)), ack(1, (2, 7))) == [1]
        t.peer(ack(10))
        assert window(t)[0] < 10
        t.peer(ack(10, (0, 1)))
        assert "tcp_undone_recoveries" not in t.counted()
        t.peer(ack(10, (1, 2)))
        assert t.counted()["tcp_undone_recoveries"] == 1
        assert window(t)[0] >= 10
        assert window(t)[1] == UNLIMITED


def test_one_real_loss_among_needless_retransmissions_keeps_the_reduction() -> None:
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (2, 5))) == [[0]]
        assert after(t, 0.01, ack(1, (2, 6)), ack(1, (2, 7))) == [1]
        t.peer(ack(10), *[ack(10, (0, 1))])
        t.write(5 * MSS)
        numbers(t)
        t.advance(RTT)
        t.peer(ack(15))
        assert "tcp_undone_recoveries" not in t.counted()


def test_duplicate_reports_of_what_was_sent_once_undo_nothing() -> None:
    """RFC 2883 5: the network duplicates; a liar may claim it does. No retransmission, nothing to undo."""
    with Talk() as t:
        begin(t)
        before = window(t)
        t.peer(*[ack(0, (-1, 0)), ack(1, (0, 1)), ack(2, (0, 1)), ack(2, (0, 2))])
        assert not {"tcp_undone_recoveries", "tcp_undone_timeouts"} & set(t.counted())
        assert window(t)[1] == before[1]


def test_a_window_of_data_is_undone_once() -> None:
    """A liar could have all that is in flight marked and unmarked with every other ACK otherwise; the second recovery
    before all that was out at the first is acknowledged stays, and ends as any."""
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (5, 8))) == [[0, 1, 2]]
        t.advance(0.01)
        t.peer(ack(3, (0, 3), (5, 8)))  # "I had them all"
        assert t.counted()["tcp_undone_recoveries"] == 1
        t.advance(RTT)
        t.peer(ack(3, (5, 9)))
        assert after(t, RTT) == [3]
        assert state(t) == "recovery"
        t.peer(ack(4, (3, 4), (5, 9)))
        assert "tcp_undone_recoveries" not in t.counted()
        assert state(t) == "recovery"
        t.advance(RTT)
        t.peer(ack(10))
        assert window(t)[0] == window(t)[1]
