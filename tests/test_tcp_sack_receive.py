# SPDX-License-Identifier: Apache-2.0
"""TCP: the selective acknowledgments that we send (RFC 2018 4, RFC 2883), and what is held ahead of a hole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tcp_talk import Talk, stream

OPTS = "mss 1460, sackok"
TS = "mss 1460, sackok, nop, nop, ts 1000 0"


def blocks(t: Talk) -> list[tuple[str, ...]]:
    """The SACK blocks of each ACK since the last call."""
    return [s.opts.get("sack", ()) for s in t.out()]


def sacked(t: Talk, spec: str) -> Any:
    """A segment arrives; the blocks of the one ACK that answers it."""
    t.peer(spec)
    [got] = blocks(t)
    return got


# ---- RFC 2018 ---------------------------------------------------------------------------------------------------
def test_an_ack_with_a_hole_reports_the_block_that_is_there() -> None:
    """RFC 2018 4: whenever the highest cumulative ACK is below data held."""
    with Talk() as t:
        t.established(opts=OPTS)
        t.peer("P. 101:201")
        t.hears(". 1:1 ack 1 <sack 101:201>")
        t.peer("P. 1:101")
        t.hears(". 1:1 ack 201 <>")
        assert t.read() == stream(1, 201)


def test_without_sack_permitted_there_are_no_blocks() -> None:
    """RFC 2018 2: never unless the peer's SYN permitted it."""
    with Talk() as t:
        t.established()
        t.peer("P. 101:201", "P. 101:201")
        assert set(blocks(t)) == {()}


def test_an_active_open_permits_and_sends_blocks_when_the_answer_permits_them() -> None:
    for answer, expected in ((OPTS, ("101:201",)), ("mss 1460", ())):
        with Talk() as t:
            t.established(passive=False, opts=answer)
            assert sacked(t, "P. 101:201") == expected


def test_the_block_that_changed_last_comes_first() -> None:
    """RFC 2018 4: the first block holds the segment that triggered the ACK, the others repeat the latest reports."""
    with Talk() as t:
        t.established(opts=OPTS)
        assert sacked(t, ". 201:301") == ("201:301",)
        assert sacked(t, ". 601:701") == ("601:701", "201:301")
        assert sacked(t, ". 401:501") == ("401:501", "601:701", "201:301")
        assert sacked(t, ". 701:801") == ("601:801", "401:501", "201:301")
        assert sacked(t, ". 301:401") == ("201:501", "601:801")


@pytest.mark.parametrize(("opts", "most"), [(OPTS, 4), (TS, 3)])
def test_as_many_blocks_as_the_options_hold(opts: str, most: int) -> None:
    """RFC 2018 3: four, three beside timestamps; the oldest reports make room."""
    with Talk() as t:
        t.established(opts=opts, ts="ts" in opts)
        expected: list[str] = []
        for first in range(201, 1601, 200):
            expected.insert(0, f"{first}:{first + 100}")
            assert sacked(t, f". {first}:{first + 100}") == tuple(expected[:most])


def test_blocks_go_when_the_hole_is_filled() -> None:
    with Talk() as t:
        t.established(opts=OPTS)
        t.peer(". 201:301", ". 401:501")
        t.out()
        assert sacked(t, ". 1:201") == ("401:501",)
        assert sacked(t, ". 301:401") == ()
        assert t.read() == stream(1, 501)


def test_data_carries_blocks_where_they_fit_and_else_an_ack_behind_it_does() -> None:
    """A full segment has no room: the report must not be lost with it."""
    with Talk() as t:
        t.established(opts=OPTS)
        t.write(1000)
        [data] = t.out()
        assert "sack" not in data.opts
        t.peer(". 101:201 ack 1001")
        assert blocks(t) == [("101:201",)]
        t.write(100)
        assert blocks(t) == [("101:201",)]
        t.peer(". 101:101 ack 1101")
        t.write(1460 * 3)
        sizes = [(len(s.data), s.opts.get("sack")) for s in t.out()]
        assert sizes == [(1460, None)] * 3
        t.peer(". 301:401 ack 1101")  # with it leaves nothing new: a bare ACK
        assert blocks(t) == [("301:401", "101:201")]


def test_an_ack_that_is_due_is_not_swallowed_by_a_full_segment() -> None:
    with Talk() as t:
        t.established(opts=OPTS)
        t.win = 0
        t.peer(". 1:1 ack 1 win 0")
        t.write(2920)
        t.out()
        t.peer(". 101:201 ack 1 win 65535")  # opens the window and leaves a hole
        got = [(len(s.data), s.opts.get("sack")) for s in t.out()]
        assert got == [(1460, None), (1460, None), (0, ("101:201",))]


# ---- RFC 2883 ---------------------------------------------------------------------------------------------------
def test_a_duplicate_below_the_acknowledgment_is_reported_once() -> None:
    """RFC 2883 4.1: the whole segment came before."""
    with Talk() as t:
        t.established(opts=OPTS)
        t.peer("P. 1:501")
        t.advance(1)
        t.out()
        assert sacked(t, "P. 1:501") == ("1:501",)
        t.peer("P. 501:601")
        t.advance(1)
        assert blocks(t) == [()]


def test_a_segment_that_is_partly_old_reports_its_old_part() -> None:
    """RFC 2883 4.2."""
    with Talk() as t:
        t.established(opts=OPTS)
        t.peer("P. 1:501")
        t.advance(1)
        t.out()
        t.peer("P. 301:601")
        t.advance(1)
        assert blocks(t) == [("301:501",)]


def test_a_duplicate_of_data_held_ahead_is_followed_by_its_block() -> None:
    """RFC 2883 4.1, the example with out-of-order data."""
    with Talk() as t:
        t.established(opts=OPTS)
        t.peer(". 1001:1501", ". 501:1001", ". 2001:2501")
        t.out()
        assert sacked(t, ". 501:1001") == ("501:1001", "501:1501", "2001:2501")
        assert sacked(t, ". 3001:3501") == ("3001:3501", "501:1501", "2001:2501")


def test_a_duplicate_below_a_hole_is_reported_before_the_blocks() -> None:
    with Talk() as t:
        t.established(opts=OPTS)
        t.peer(". 1:501", ". 1001:1501")
        t.out()
        assert sacked(t, ". 1:501") == ("1:501", "1001:1501")


@pytest.mark.parametrize(
    ("segment", "expected"),
    [
        ("1251:1751", ("1251:1501", "1001:1751")),  # over the end
        ("751:1251", ("1001:1251", "751:1501")),  # over the beginning
        ("751:1751", ("1001:1501", "751:1751")),  # around
    ],
)
def test_overlaps_with_data_held_ahead_report_the_common_part(
    segment: str, expected: tuple[str, ...]
) -> None:
    """RFC 2883 4.2.2."""
    with Talk() as t:
        t.established(opts=OPTS)
        t.peer(". 1001:1501")
        t.out()
        assert sacked(t, f". {segment}") == expected


def test_a_retransmission_that_reaches_beyond_its_hole_reports_what_was_here() -> None:
    with Talk() as t:
        t.established(opts=OPTS)
        t.peer(". 1001:1501")
        t.out()
        t.peer(". 1:1201")
        [ack] = t.out()
        assert (ack.ack, ack.opts["sack"]) == (1501, ("1001:1201",))


def test_nothing_is_reported_of_a_probe_without_data() -> None:
    """Keepalives and window probes of one old sequence number are no duplicates."""
    with Talk() as t:
        t.established(opts=OPTS)
        t.peer("P. 1:101")
        t.advance(1)
        t.out()
        assert sacked(t, ". 100:100") == ()


# ---- Any order --------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=40), st.integers(1, 40)
)
def test_blocks_are_exactly_what_is_held(pieces: list[tuple[int, int]], unit: int) -> None:
    """Against a set of byte numbers: every block reported is whole and held, the first holds what came."""
    with Talk() as t:
        t.established(opts=OPTS)
        have: set[int] = set()
        nxt = 1
        for at, size in pieces:
            first, end = 1 + at * unit, 1 + (at + size) * unit
            old = set(range(first, end)) & (have | set(range(1, nxt)))
            t.peer(f". {first}:{end}")
            have |= set(range(first, end))
            while nxt in have:
                nxt += 1
            acks = t.out()
            if not acks:  # in order: delayed
                assert nxt >= end
                t.advance(0.1)
                acks = t.out()
            [ack] = acks
            assert ack.ack == nxt
            got = [tuple(map(int, b.split(":"))) for b in ack.opts.get("sack", ())]
            if old:
                a, b = got.pop(0)
                assert set(range(a, b)) <= old
            assert bool(got) == bool({n for n in have if n > nxt})
            for a, b in got:
                assert set(range(a, b)) <= have
                assert a - 1 not in have
                assert b not in have
            if end > nxt:
                assert got[0][0] <= first
                assert got[0][1] >= end
        assert t.read() == (stream(1, nxt) if nxt > 1 else -11)


# ---- Bounds -----------------------------------------------------------------------------------------------------
def test_a_sender_of_every_second_segment_gets_a_bounded_number_of_ranges() -> None:
    """What would be one too many counts as lost; the rest arrives when the holes are filled."""
    with Talk(conns=64, chunks=4096, frames=4096) as t:
        t.established(opts=OPTS)
        for first in range(20001, 1, -20):  # descending
            t.peer(f". {first}:{first + 10}")
        t.out()
        moved = t.counted()
        assert moved["tcp_ooo_refused"] == 1000 - 512
        t.peer(*(f". {first}:{first + 1000}" for first in range(1, 20001, 1000)))
        t.out()
        assert t.info.rcv_queued == 20000 + 10  # 20001:20011 was held
        assert t.read() == stream(1, 20011)


def test_when_chunks_run_short_the_range_furthest_ahead_goes_first() -> None:
    """RFC 2018 8: the receiver may throw away what it reported; it is sent again."""
    with Talk(chunks=16) as t:
        t.established(opts=OPTS)
        for first in range(3001, 3025, 2):
            t.peer(f". {first}:{first + 1}")
        for first in range(1, 2501, 100):
            t.peer(f". {first}:{first + 100}")
        t.out()
        assert t.counted()["tcp_ooo_pruned"] == 2
        t.peer(". 2501:3001")
        assert t.out()[-1].ack == 3002, "the first is still there"
