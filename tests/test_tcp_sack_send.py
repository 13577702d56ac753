# SPDX-License-Identifier: Apache-2.0
"""TCP: what the sender makes of selective acknowledgments (RFC 2018 5, RFC 2883, RFC 6675), true ones and lies."""

from __future__ import annotations

import pytest
from recovery_talk import MSS, RTT, ack, after, begin, each, edge, numbers, state, window
from tcp_talk import Talk


def test_only_the_holes_are_sent_again() -> None:
    """RFC 2018 5: segments that are SACKed are not retransmitted."""
    with Talk() as t:
        begin(t, 10)
        assert after(t, 0, ack(0, (1, 3), (4, 6), (7, 10))) == [0, 3, 6]
        t.peer(ack(10))
        assert t.info.state == "ESTABLISHED"
        assert t.counted()["tcp_out_retransmits"] == 3


def test_holes_are_filled_from_the_lowest() -> None:
    """RFC 6675 4, NextSeg() rule 1: the smallest sequence number that is lost."""
    with Talk() as t:
        begin(t, 10)
        assert each(t, ack(0, (5, 6), (7, 8)), ack(0, (5, 6), (7, 8), (9, 10))) == [[], [0]]
        assert each(t, ack(1, (5, 6), (7, 8), (9, 10))) == [[1, 2]]
        assert each(t, ack(3, (5, 6), (7, 8), (9, 10))) == [[3, 4, 6]]


def test_new_data_follows_when_nothing_is_lost_any_more() -> None:
    """RFC 6675 4, NextSeg() rule 2: new data, as far as window and pipe go."""
    with Talk() as t:
        begin(t)
        said = each(t, *(ack(0, (1, n)) for n in range(2, 11)))
        assert said[:3] == [[10], [11], [0]]  # limited transmit, then the hole
        assert [n for s in said[3:] for n in s] == [12, 13]  # half of what is delivered


def test_a_segment_of_which_the_peer_has_a_part_is_sent_again_whole() -> None:
    """RFC 2018 5: only what is covered entirely is SACKed."""
    with Talk() as t:
        begin(t, 10)
        t.peer(f". 1:1 ack 1 <sack {edge(1) + 1}:{edge(10)}>")
        assert numbers(t) == [0, 1]


def test_a_hole_in_what_was_sacked_stays_a_hole_however_blocks_are_repeated() -> None:
    with Talk() as t:
        begin(t, 10)
        t.peer(*[ack(0, (1, 2), (3, 4), (5, 6))] * 20)
        assert numbers(t) == [0]  # pipe is 4 then, the window 5
        t.peer(*[ack(2, (3, 4), (5, 6))] * 20)
        assert numbers(t) == [2]
        t.peer(*[ack(4, (5, 6))] * 20)
        assert numbers(t) == [4]
        t.peer(ack(10))
        assert t.counted()["tcp_out_retransmits"] == 3


def test_an_ack_that_is_late_does_not_take_a_block_back() -> None:
    """RFC 2018 5: once SACKed, a segment stays so until it is acknowledged or a timeout forgets it."""
    with Talk() as t:
        begin(t, 10)
        assert after(t, 0, ack(0, (1, 10))) == [0]
        assert each(t, ack(0, (1, 2)), ack(0, (5, 6)), ack(0)) == [[], [], []]
        t.peer(ack(10))
        assert t.counted()["tcp_out_retransmits"] == 1


def test_a_timeout_does_not_send_what_the_peer_has() -> None:
    """RFC 6675 5.1: SACK information is used after a timeout too."""
    with Talk() as t:
        begin(t, 10)
        assert after(t, 0, ack(0, (4, 10))) == [0, 1, 2, 3]
        t.advance(0.4)  # all four were lost again
        assert numbers(t) == [0]
        assert after(t, 0.01, ack(1, (4, 10))) == [1, 2]
        assert after(t, 0.01, ack(3, (4, 10))) == [3]
        t.peer(ack(10))
        assert t.counted()["tcp_out_retransmits"] == 8


def test_a_peer_that_takes_back_what_it_sacked_gets_it_again() -> None:
    """RFC 2018 8: a timeout with the first segment SACKed forgets all SACKs."""
    with Talk() as t:
        begin(t, 10)
        assert after(t, 0, ack(0, (1, 10))) == [0]
        t.peer(ack(1))  # an honest peer would acknowledge all ten
        t.advance(RTT)
        assert t.counted()["tcp_sack_reneged"] == 1
        sent = numbers(t)
        assert sent == [1]
        for n in range(2, 11):
            t.advance(0.01)
            t.peer(ack(n))
            sent += numbers(t)
        assert sorted(set(sent)) == list(range(1, 10))


def test_what_is_in_flight_excludes_what_arrived_and_what_is_lost() -> None:
    """RFC 6675 4, SetPipe(): of ten, four are SACKed and two lost: four are out, the window is five."""
    with Talk() as t:
        begin(t)
        t.peer(ack(0, (2, 6)))
        assert window(t)[1] == 5
        assert numbers(t) == [0]  # pipe 4: one may go
        assert each(t, ack(0, (2, 7))) == [[1]]


# ---- D-SACK ---------------------------------------------------------------------------------------------------------
def test_a_duplicate_report_is_no_selective_acknowledgment() -> None:
    """RFC 2883 4.1: a first block below the acknowledgment is about the past; it is no duplicate ACK either."""
    with Talk() as t:
        begin(t, 12)
        t.peer(ack(2))
        numbers(t)
        said = each(t, *[ack(2, (0, 1))] * 3)
        assert said == [[], [], []]
        assert t.counted()["tcp_in_dsacks"] == 3
        assert state(t) == "open"


def test_a_duplicate_within_the_second_block_is_recognised() -> None:
    """RFC 2883 4.2: above the acknowledgment the second block holds the first."""
    with Talk() as t:
        begin(t, 10)
        t.peer(ack(0, (2, 3), (1, 4)))
        assert t.counted()["tcp_in_dsacks"] == 1


@pytest.mark.parametrize(
    "blocks",
    [
        ((0, -50),),  # ends before it begins
        ((-70, -1),),  # below anything that was sent
        ((20, 25),),  # not sent yet
        ((5, 40),),  # ends there
        ((8, 8),),  # empty
    ],
)
def test_blocks_about_what_was_never_sent_change_nothing(blocks: tuple[tuple[int, int], ...]) -> None:
    """RFC 2018 5: what the peer cannot have is not believed."""
    with Talk() as t:
        begin(t)
        t.peer(*[ack(0, *blocks)] * 2)
        assert [n for n in numbers(t) if n < 10] == []
        assert t.counted()["tcp_sack_ignored"] >= 2
        t.peer(ack(10))
        assert state(t) == "open"


def test_sack_blocks_of_a_peer_that_did_not_agree_to_them_mean_nothing() -> None:
    """RFC 2018 2."""
    with Talk() as t:
        begin(t, 10, opts=f"mss {MSS}")
        t.peer(ack(0, (1, 10)))
        assert numbers(t) == []
        assert state(t) in ("open", "disorder")


def test_blocks_with_edges_inside_segments_lose_nothing() -> None:
    """A hostile receiver that cuts segments everywhere: what it does not have entirely comes again."""
    with Talk() as t:
        begin(t, 10)
        for cut in range(1, MSS, 111):
            t.peer(f". 1:1 ack 1 <sack {edge(1) + cut}:{edge(5) + cut} {edge(6) + cut}:{edge(9) + cut}>")
        t.advance(3)
        sent = set(numbers(t))
        for n in range(1, 11):
            t.peer(ack(n))
            t.advance(0.5)
            sent |= set(numbers(t))
        assert {0, 1, 6} <= sent
        assert t.info.state == "ESTABLISHED"
        assert t.stack.audit()["frames"] == 0
