# SPDX-License-Identifier: Apache-2.0
"""DCTCP (RFC 8257): the window follows the share of marked bytes; the receiver tells of each mark."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cc_bench import CWR, EV_ECN, EV_LOSS, MSS, OPEN, Bottleneck, ByHand
from conversation import Conversation
from tcp_talk import Talk
from test_tcp_ecn import CE, ECT0, arrive

from bypass.core import CoreStack


@pytest.fixture
def stack() -> Iterator[CoreStack]:
    with Conversation() as c:
        yield c.stack


def one_window(h: ByHand, marked: float) -> None:
    """A window is acknowledged in 50 ACKs, this share of which carry ECE."""
    window = int(h.cc.cwnd)
    for i in range(50):
        h.ack(window // 50, ece=int(i < 50 * marked))


def alpha(h: ByHand) -> float:
    return 2 * (1 - h.reduce(EV_ECN) / float(h.cc.cwnd))


def settled(stack: CoreStack, marked: float, windows: int = 200) -> ByHand:
    h = ByHand(stack, "dctcp", cwnd=1000 * MSS)
    h.cc.ssthresh = h.cc.cwnd
    h.cc.limited = 0  # the window stays as it is
    h.cc.ca_state = CWR
    for _ in range(windows):
        one_window(h, marked)
    return h


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_alpha_becomes_the_share_of_marked_bytes(stack: CoreStack, share: float) -> None:
    """3.3: and the window is cut by half of it."""
    assert alpha(settled(stack, share)) == pytest.approx(share, abs=0.04)


def test_alpha_moves_a_sixteenth_in_a_window(stack: CoreStack) -> None:
    """4.2: g; it begins at 1, so that the first reduction halves."""
    h = ByHand(stack, "dctcp", cwnd=1000 * MSS)
    h.cc.limited = 0
    assert alpha(h) == 1.0
    for n in range(1, 12):
        before = alpha(h)
        one_window(h, 0)
        if n > 1:  # the first window began with the first ACK
            assert alpha(h) == pytest.approx(before * 15 / 16, rel=0.08)


def test_no_marks_bring_alpha_to_nothing(stack: CoreStack) -> None:
    assert settled(stack, 0, 1000).reduce(EV_ECN) == 1000 * MSS


def test_a_loss_halves(stack: CoreStack) -> None:
    """3.5."""
    h = settled(stack, 0)
    assert h.reduce(EV_LOSS) == 500 * MSS


def test_windows_grow_as_renos_between_marks(stack: CoreStack) -> None:
    h = ByHand(stack, "dctcp", cwnd=100 * MSS)
    h.cc.ssthresh = h.cc.cwnd
    h.cc.ca_state = OPEN
    for _ in range(10):
        for _ in range(int(h.cc.cwnd) // MSS):
            h.ack(MSS)
    assert h.cc.cwnd == 110 * MSS


def test_it_asks_for_ecn_by_itself() -> None:
    with Talk(cc="dctcp") as t:
        t.client()
        assert [s.flags for s in t.out()] == ["SEW"]
        t.peer("R. 0:0 ack 1")


def test_the_receiver_tells_of_each_mark_and_of_its_end_at_once() -> None:
    """3.2: when the mark changes, what came before is acknowledged immediately, with the old value."""
    with Talk(cc="dctcp") as t:
        t.server()
        arrive(t, "SEW 0:0 win 65535 <mss 1000, nop, ws 7>")
        t.out()
        arrive(t, ". 1:1 ack 1")
        t.accept()
        t.option("TCP_QUICKACK", 0)
        arrive(t, "P. 1:1001 ack 1", ECT0)
        t.out()
        arrive(t, "P. 1001:1501 ack 1", ECT0)
        pending = [(s.flags, s.ack) for s in t.out()]
        arrive(t, "P. 1501:2501 ack 1", CE)
        got = pending + [(s.flags, s.ack) for s in t.out()]
        assert (".", 1501) in got
        t.advance(0.1)
        got += [(s.flags, s.ack) for s in t.out()]
        assert (".E", 2501) in got
        arrive(t, "P. 2501:3501 ack 1", ECT0)
        t.advance(0.1)
        assert [(s.flags, s.ack) for s in t.out()][-1] == (".", 3501), "no CWR is needed"


def test_it_holds_the_queue_near_the_threshold() -> None:
    """RFC 8257 1: 200 Mbit/s, 2 ms, marks above 60 kB: the queue stays within a third of it, the rate is whole."""
    rate, threshold = 200_000_000, 60_000
    with Bottleneck("dctcp", rate=rate, rtt_ms=2, queue=1_000_000, mark=threshold) as b:
        b.transfer(1)
        b.rows.clear()
        assert b.transfer(2) > 0.93 * rate
        queues = [(r.srtt_us - 2000) * rate / 8e6 for r in b.rows]
        assert threshold * 0.67 < min(queues)
        assert max(queues) < threshold * 1.33
        assert b.a.core.stats()["tcp_out_retransmits"] == 0
