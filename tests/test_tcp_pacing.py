# SPDX-License-Identifier: Apache-2.0
"""Pacing and delivery rate: segments leave at a rate, whatever the timer's grain; what TCP_INFO says was delivered."""

from __future__ import annotations

import socket

import pytest
from bypass._core import lib
from cc_bench import Bottleneck
from tcp_talk import TICK, Talk

from bypass.sim.network import Network

MSS = 1000
OPTS = f"mss {MSS}, nop, ws 7"


def ack(n: int) -> str:
    return f". 1:1 ack {n + 1} win 512"


def times(t: Talk) -> list[float]:
    return [(s.at_ns - t._mark) / 1e9 for s in t.out() if s.data]


def test_a_limit_spaces_segments() -> None:
    """100 kB/s: one segment of 1000 bytes each 10 ms, a tick of the wheel late at most, and none early."""
    with Talk(sndbuf=1 << 20, frames=1024) as t:
        t.established(opts=OPTS, rtt=0.01)
        t.option("SO_MAX_PACING_RATE", 100_000)
        t.mark()
        t.write(10 * MSS)
        t.advance(0.2)
        got = times(t)
        assert len(got) == 10
        for n, at in enumerate(got):
            assert n * 0.01 - 0.0016 <= at <= n * 0.01 + TICK, got
        t.peer("R 1:1")


@pytest.mark.parametrize("rate", [10_000, 1_000_000, 50_000_000])
def test_late_ticks_do_not_add_up(rate: int) -> None:
    """Over a long time the rate is met within a hundredth, for segments far apart and for many in a tick."""
    seconds = 20 if rate < 100_000 else 1
    with Bottleneck("cubic", rate=1_000_000_000, rtt_ms=2, queue=4 << 20, SO_MAX_PACING_RATE=rate) as b:
        b.transfer(0.5)
        got = b.transfer(seconds) / 8
        assert got == pytest.approx(rate, rel=0.01 if rate >= 1_000_000 else 0.1)


def test_a_pause_saves_up_no_burst() -> None:
    """No more than a tick and a half, which a late timer may need: the second segment may be that much early."""
    with Talk(sndbuf=1 << 20, frames=1024) as t:
        t.established(opts=OPTS, rtt=0.01)
        t.option("SO_MAX_PACING_RATE", 100_000)
        t.write(2 * MSS)
        t.advance(0.05)
        t.out()
        t.peer(ack(2 * MSS))
        t.advance(0.15)
        t.mark()
        t.write(5 * MSS)
        t.advance(0.1)
        got = times(t)
        assert all(at >= n * 0.01 - 0.0016 for n, at in enumerate(got)), got
        assert len(got) == 5
        t.peer("R 1:1")


def test_a_pause_forgives_no_debt() -> None:
    """One segment each 100 ms although each is acknowledged at once."""
    with Talk(sndbuf=1 << 20, frames=1024) as t:
        t.established(opts=OPTS, rtt=0.01)
        t.option("SO_MAX_PACING_RATE", 10_000)
        t.mark()
        sent: list[float] = []
        for n in range(1, 6):
            t.write(MSS)
            while len(sent) < n:
                t.advance(0.005)
                sent += times(t)
            t.peer(ack(n * MSS))
        assert sent[-1] >= 4 * 0.1 - 0.0016
        t.out()


def test_the_limit_is_taken_off_at_once() -> None:
    with Talk(sndbuf=1 << 20, frames=1024) as t:
        t.established(opts=OPTS, rtt=0.01)
        t.option("SO_MAX_PACING_RATE", 1000)
        t.write(10 * MSS)
        assert len(times(t)) < 10
        t.option("SO_MAX_PACING_RATE", 0)
        t.settle()
        t.advance(0.005)
        assert t.stack.getopt(t.sock, lib.BYPASS_SO_MAX_PACING_RATE) == 0
        assert t.info.snd_nxt - t.info.snd_una in (10 * MSS, 10 * MSS - 2**32)
        t.out()
        t.peer("R 1:1")


@pytest.mark.parametrize("value", [1, 12345, 2**31 - 1, 12_500_000_000, 2**38])
def test_limits_up_to_a_hundred_gigabits_are_kept(value: int) -> None:
    """Above 2 GB/s in units of 256 bytes."""
    with Talk() as t:
        t.server(SO_MAX_PACING_RATE=value)
        assert t.stack.getopt(t.listener, lib.BYPASS_SO_MAX_PACING_RATE) == pytest.approx(value, abs=256)


def test_python_sockets_set_it_by_linux_number() -> None:
    with Network(1) as net:
        net.wire()
        s = net.stack("10.0.0.1/24").socket()
        s.setsockopt(socket.SOL_SOCKET, 47, 1_000_000)
        assert s.getsockopt(socket.SOL_SOCKET, 47) == 1_000_000
        s.close()


def test_bbr_is_always_paced() -> None:
    """The initial window goes at once, as on Linux; what follows, at 2.89 windows in a round trip."""
    with Talk(cc="bbr", sndbuf=1 << 20, frames=1024) as t:
        t.established(opts=OPTS, rtt=0.1)
        t.mark()
        t.write(40 * MSS)
        t.advance(0.1)
        assert times(t) == [0] * 10
        t.peer(ack(10 * MSS))
        t.mark()
        t.advance(0.09)
        got = times(t)
        assert len(got) == 20
        assert 0.05 < got[-1] < 0.08
        t.peer("R 1:1")


# ---- Delivery rate (draft-cheng-iccrg-delivery-rate-estimation) ---------------------------------------------------
def test_the_delivery_rate_is_the_bottlenecks() -> None:
    with Bottleneck("cubic", rate=20_000_000, rtt_ms=20, queue=100_000) as b:
        b.transfer(2)
        assert b.info().delivery_rate == pytest.approx(20_000_000 / 8 * 1448 / 1514, rel=0.05)


def test_compressed_acks_do_not_raise_it() -> None:
    """3.3: the longer of sending and acknowledging counts: ten segments sent in 100 ms, acknowledged in an instant."""
    with Talk(sndbuf=1 << 20) as t:
        t.established(opts=OPTS, rtt=0.05)
        for _ in range(10):
            t.write(MSS)
            t.advance(0.01)
        for n in range(1, 11):
            t.peer(ack(n * MSS))
            if n < 10:
                assert t.info.delivery_rate <= 1.01 * 10 * MSS / 0.1
        t.out()


def test_an_idle_programs_rate_does_not_replace_the_paths() -> None:
    """3.4: a sample from a program that writes little is used only if it is higher."""
    with Talk(cc="dctcp", sndbuf=1 << 20) as t:  # its record outlives pauses
        t.established(opts=OPTS, rtt=0.05)
        t.write(10 * MSS)
        t.advance(0.05)
        t.peer(ack(10 * MSS))
        full = t.info.delivery_rate
        assert full == pytest.approx(10 * MSS / 0.05, rel=0.05)
        for n in range(1, 5):
            t.advance(0.01)
            t.write(50)
            t.advance(0.05)
            t.peer(ack(10 * MSS + 50 * n))
            assert t.info.delivery_rate == full
        t.out()


def test_less_than_a_segment_that_waits_is_little_too() -> None:
    """3.4: what Nagle's rule holds back does not fill the path."""
    with Talk(cc="dctcp", sndbuf=1 << 20) as t:
        t.established(opts=OPTS, rtt=0.05)
        t.write(10 * MSS + 50)
        t.advance(0.05)
        t.peer(ack(5 * MSS))
        t.write(50)
        t.peer(ack(10 * MSS))
        full = t.info.delivery_rate
        t.advance(0.05)
        t.peer(ack(10 * MSS + 100))
        assert t.info.delivery_rate == full
        t.out()


def test_a_higher_rate_counts_although_the_program_was_the_limit() -> None:
    """3.4: the path is at least that fast."""
    with Talk(cc="dctcp", sndbuf=1 << 20) as t:
        t.established(opts=OPTS, rtt=0.05)
        t.write(MSS)
        t.advance(0.05)
        t.peer(ack(MSS))
        slow = t.info.delivery_rate
        t.write(5 * MSS)
        t.advance(0.05)
        t.peer(ack(6 * MSS))
        assert t.info.delivery_rate == pytest.approx(5 * slow, rel=0.05)
        t.out()
