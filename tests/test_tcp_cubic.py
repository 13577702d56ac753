# SPDX-License-Identifier: Apache-2.0
"""CUBIC: the curve of RFC 9438 against its formula in exact arithmetic, HyStart++ (RFC 9406), and the sawtooth."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
from cc_bench import EV_LOSS, EV_RTO, EV_UNDO, INFINITE, MSS, US, Bottleneck, ByHand
from conversation import Conversation

from bypass.core import CoreStack

C, BETA = Fraction(4, 10), Fraction(7, 10)
RTT_US = 40_000


@pytest.fixture
def stack() -> Iterator[CoreStack]:
    with Conversation() as c:
        yield c.stack


def cube_root(v: Fraction) -> Fraction:
    low, high = Fraction(0), Fraction(1 << 20)
    for _ in range(80):
        mid = (low + high) / 2
        low, high = (mid, high) if mid**3 <= v else (low, mid)
    return low


def w_cubic(t: Fraction, w_max: Fraction, cwnd_epoch: Fraction) -> Fraction:
    """RFC 9438 4.2, in segments; t in seconds."""
    k = cube_root((w_max - cwnd_epoch) / C)
    return C * (t - k) ** 3 + w_max


def after_a_loss(stack: CoreStack, cwnd: int, *, mss: int = MSS) -> ByHand:
    """In the congestion avoidance that follows a loss at `cwnd`; RTT 40 ms."""
    h = ByHand(stack, "cubic", mss=mss, cwnd=cwnd)
    h.cc.srtt_us = RTT_US
    h.cc.cwnd = h.reduce(EV_LOSS)
    return h


def a_round(h: ByHand, rtt_us: int = RTT_US) -> None:
    """A window is acknowledged in 32 ACKs over a round trip."""
    left, n = int(h.cc.cwnd), 32
    for i in range(n):
        h.cc.now_us += rtt_us // n
        part = left // (n - i)
        left -= part
        h.ack(part, rtt_us=rtt_us)


@pytest.mark.parametrize("segments", [1000, 20_000, 500_000])
def test_the_window_follows_the_curve(stack: CoreStack, segments: int) -> None:
    """RFC 9438 4.2, 4.4, 4.5: each ACK moves cwnd towards W(t + RTT): after a round trip it was at W(t), so that
    the window lies between the two; concave below W_max, convex above."""
    h = after_a_loss(stack, segments * MSS)
    begin = int(h.cc.now_us)
    epoch = Fraction(int(h.cc.cwnd), MSS)
    seen = 0
    k = cube_root((segments - epoch) / C)
    while Fraction(int(h.cc.now_us) - begin, US) < k * 3 / 2:
        a_round(h)
        t = Fraction(int(h.cc.now_us) - begin - RTT_US // 32, US)
        low = w_cubic(t - Fraction(RTT_US, US), Fraction(segments), epoch)
        high = w_cubic(t + Fraction(RTT_US, US), Fraction(segments), epoch)
        cwnd = Fraction(int(h.cc.cwnd), MSS)
        slack = 2 + segments // 10_000
        assert low - slack <= cwnd <= high + slack, (float(t), float(low), float(cwnd), float(high))
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("mss", [48, 1448, 8948])
def test_the_largest_window_overflows_nowhere(stack: CoreStack, mss: int) -> None:
    """2^30 bytes, the largest that there are, lost and regained: never more than the half more that 4.4 allows."""
    h = after_a_loss(stack, 1 << 30, mss=mss)
    assert h.cc.cwnd == (1 << 30) * 7 // 10
    last = int(h.cc.cwnd)
    for _ in range(3000):
        h.cc.now_us += 100_000
        h.ack(int(h.cc.cwnd), rtt_us=100_000)
        assert last <= h.cc.cwnd <= last * 3 // 2 + mss
        last = h.cc.cwnd = min(int(h.cc.cwnd), 1 << 30)
    assert last == 1 << 30, "it comes back"
    h.cc.now_us += 10_000_000 * US  # four months without an ACK
    h.ack(1 << 20)
    assert h.cc.cwnd >= 1 << 30


def test_seven_tenths_remain(stack: CoreStack) -> None:
    """RFC 9438 4.6; at least two segments."""
    assert after_a_loss(stack, 100 * MSS).cc.cwnd == 70 * MSS
    assert after_a_loss(stack, 2 * MSS).cc.cwnd == 2 * MSS


def test_a_small_window_grows_as_renos_would(stack: CoreStack) -> None:
    """RFC 9438 4.3: alpha 9/17 of a segment a round trip until the window of before, then a whole one."""
    h = after_a_loss(stack, 10 * MSS)
    est = Fraction(int(h.cc.cwnd))
    for _ in range(14):
        before = int(h.cc.cwnd)
        a_round(h, 10_000)
        alpha = Fraction(9, 17) if est < 10 * MSS else Fraction(1)
        est += alpha * MSS
        assert abs(h.cc.cwnd - est) < MSS / 2, (before, int(h.cc.cwnd), float(est))
    assert h.cc.cwnd > 10 * MSS


def test_a_flow_that_loses_again_sooner_gives_room(stack: CoreStack) -> None:
    """RFC 9438 4.7, fast convergence: W_max is 0.85 of the window, not the window: the plateau lies lower."""
    h = after_a_loss(stack, 1000 * MSS)
    h.cc.cwnd = 800 * MSS
    h.cc.cwnd = h.reduce(EV_LOSS)
    begin = int(h.cc.now_us)
    k = cube_root((Fraction(680) - Fraction(560)) / C)
    while Fraction(int(h.cc.now_us) - begin, US) < k:
        a_round(h)
    assert abs(h.cc.cwnd / MSS - 680) < 8


def test_a_flow_that_loses_at_the_same_window_keeps_its_plateau(stack: CoreStack) -> None:
    """RFC 9438 4.7 counts in segments: a few bytes less at each loss are not a flow that gives way."""
    h = after_a_loss(stack, 1000 * MSS)
    h.cc.cwnd = 1000 * MSS - 100
    h.cc.cwnd = h.reduce(EV_LOSS)
    begin = int(h.cc.now_us)
    k = cube_root((Fraction(1000) - Fraction(700)) / C)
    while Fraction(int(h.cc.now_us) - begin, US) < k:
        a_round(h)
    assert abs(h.cc.cwnd / MSS - 1000) < 8


def test_after_a_timeout_the_curve_begins_at_its_flat_point(stack: CoreStack) -> None:
    """RFC 9438 4.8: K is 0 and W_max the window where congestion avoidance begins."""
    h = ByHand(stack, "cubic", cwnd=1000 * MSS)
    h.cc.srtt_us = RTT_US
    h.reduce(EV_RTO)
    h.cc.cwnd = h.cc.ssthresh
    start = int(h.cc.cwnd)
    for _ in range(25):
        a_round(h)
    t = Fraction(25 * RTT_US + RTT_US, US)
    assert h.cc.cwnd <= start + (C * t**3 + 20) * MSS


def test_a_needless_reduction_is_forgotten(stack: CoreStack) -> None:
    """RFC 9438 4.9.1: W_max, K and the epoch are as before; the window goes on where it was on the curve."""
    h = after_a_loss(stack, 1000 * MSS)
    for _ in range(20):
        a_round(h)
    twin = after_a_loss(stack, 1000 * MSS)
    for _ in range(20):
        a_round(twin)
    cwnd, ssthresh = int(h.cc.cwnd), int(h.cc.ssthresh)
    h.reduce(EV_LOSS)
    h.cc.cwnd, h.cc.ssthresh = cwnd, ssthresh
    h.event(EV_UNDO)
    for _ in range(20):
        a_round(h)
        a_round(twin)
        assert h.cc.cwnd == twin.cc.cwnd


def test_time_in_which_the_program_was_the_limit_does_not_count(stack: CoreStack) -> None:
    """RFC 9438 5.8: after a pause the window is where it was, not where the curve would have led."""
    h, twin = (after_a_loss(stack, 1000 * MSS) for _ in range(2))
    for x in (h, twin):
        for _ in range(10):
            a_round(x)
    h.cc.now_us += 30 * US
    h.cc.paused = 1
    h.ack(MSS, rtt_us=RTT_US)
    h.cc.paused = 0
    twin.ack(MSS, rtt_us=RTT_US)
    assert h.cc.cwnd == twin.cc.cwnd
    for _ in range(10):
        a_round(h)
        a_round(twin)
    assert abs(h.cc.cwnd - twin.cc.cwnd) < 2 * MSS


def test_a_window_that_a_pause_shrank_comes_back_no_faster_than_in_slow_start(stack: CoreStack) -> None:
    """RFC 2861 3.1, RFC 9438 4.3: Reno's estimate is of before; one ACK does not bring all of it back."""
    h = after_a_loss(stack, 10 * MSS)
    for _ in range(30):
        a_round(h, 10_000)
    h.cc.cwnd = int(h.cc.cwnd) * 3 // 4
    h.cc.ssthresh = before = int(h.cc.cwnd)
    h.cc.now_us += 10_000
    h.ack(2 * MSS, rtt_us=10_000)
    assert before < h.cc.cwnd <= before + 2 * MSS


# ---- HyStart++ ---------------------------------------------------------------------------------------------
def to_round(h: ByHand, rtts: list[int]) -> None:
    """Whole round trips, two segments an ACK."""
    for rtt in rtts:
        end = int(h.cc.snd_nxt)
        while 0 < (left := (end - int(h.cc.snd_una)) % 2**32) < 2**31:
            h.cc.now_us += rtt // 16
            h.ack(min(2 * MSS, left), rtt_us=rtt)


def test_slow_start_doubles_while_the_round_trip_stays(stack: CoreStack) -> None:
    h = ByHand(stack, "cubic", cwnd=16 * MSS)
    to_round(h, [40_000] * 5)
    assert h.cc.cwnd == 16 * 32 * MSS
    assert h.cc.ssthresh == INFINITE


def test_slow_start_ends_before_loss_when_the_round_trip_grows(stack: CoreStack) -> None:
    """RFC 9406 4.2: an eighth (within 4 to 16 ms) more: growth is a quarter as fast for five rounds, then
    congestion avoidance begins."""
    h = ByHand(stack, "cubic", cwnd=32 * MSS)
    to_round(h, [40_000, 40_000, 46_000])  # the last ACK of 40 ms belongs to the third round
    top = int(h.cc.cwnd)
    to_round(h, [46_000])
    assert top < h.cc.cwnd < 2 * top
    sizes = [int(h.cc.cwnd)]
    for _ in range(4):
        to_round(h, [46_000])
        sizes.append(int(h.cc.cwnd))
    assert all(b / a == pytest.approx(1.25, rel=0.06) for a, b in pairwise(sizes))
    to_round(h, [46_000])
    assert h.cc.ssthresh < INFINITE
    assert h.cc.ssthresh >= sizes[-2]


def test_less_than_the_threshold_more_is_no_sign(stack: CoreStack) -> None:
    h = ByHand(stack, "cubic", cwnd=32 * MSS)
    to_round(h, [40_000, 40_000, 44_000, 44_000])
    assert h.cc.cwnd == 32 * 16 * MSS


def test_a_round_trip_that_falls_again_was_jitter(stack: CoreStack) -> None:
    """RFC 9406 4.2: back to slow start."""
    h = ByHand(stack, "cubic", cwnd=32 * MSS)
    to_round(h, [40_000, 40_000, 60_000, 40_000])
    before = int(h.cc.cwnd)
    to_round(h, [40_000])
    assert h.cc.cwnd >= before * 1.9


def test_eight_samples_are_needed(stack: CoreStack) -> None:
    """RFC 9406 4.3: N_RTT_SAMPLE."""
    h = ByHand(stack, "cubic", cwnd=14 * MSS)
    for rtt in (40_000, 90_000):
        for _ in range(7):
            h.ack(2 * MSS, rtt_us=rtt)
        h.cc.snd_nxt = h.cc.snd_una
    assert h.cc.ssthresh == INFINITE
    assert h.cc.cwnd == (14 + 28) * MSS


# ---- On a wire -----------------------------------------------------------------------------------------------
def test_the_sawtooth_fills_the_pipe() -> None:
    """20 Mbit/s, 40 ms and a queue of a bandwidth-delay product: losses come, reductions are to 0.7, and the
    bottleneck never runs dry."""
    with Bottleneck("cubic", rate=20_000_000, rtt_ms=40, queue=100_000) as b:
        b.transfer(3)
        b.rows.clear()
        assert b.transfer(20) > 0.93 * 20_000_000
        cuts = [(r.ssthresh, r.at) for r in b.rows]
        distinct = [s for i, (s, _) in enumerate(cuts) if i == 0 or s != cuts[i - 1][0]]
        assert len(distinct) >= 3, "losses"
        peaks = max(r.cwnd for r in b.rows)
        assert distinct[-1] == pytest.approx(0.7 * peaks, rel=0.1)
        assert b.a.core.stats()["tcp_timeouts"] == 0
