# SPDX-License-Identifier: Apache-2.0
"""BBR: the states of draft-cardwell-iccrg-bbr-congestion-control-00, by hand and on a wire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cc_bench import EV_RTO, MSS, OPEN, RECOVERY, US, Bottleneck, ByHand
from conversation import Conversation

from bypass.core import CoreStack

RATE = 6_250_000  # bytes a second: 50 Mbit/s
RTT = 40_000
BDP = RATE * RTT // US
HIGH, MARGIN = 739 / 256, 0.99


@pytest.fixture
def stack() -> Iterator[CoreStack]:
    with Conversation() as c:
        yield c.stack


class Path(ByHand):
    """BBR on a path that delivers `rate` and takes `rtt`, a round trip at a time."""

    rate = RATE
    rtt = RTT
    sent: int

    def round(self, *, lost: int = 0, app_limited: int = 0, in_flight: int | None = None) -> None:
        """A window's worth of ACKs, eight of them, each with the delivery rate that the path had."""
        begun = self.delivered
        window = int(self.cc.cwnd)
        for i in range(8):
            part = window // 8
            self.cc.now_us += max(self.rtt, window * US // self.rate) // 8
            rate = min(self.rate, max(window * US // self.rtt, 1))
            flight = min(window, int(self.cc.cwnd)) if in_flight is None else in_flight
            self.ack_flight(
                part,
                flight,
                prior_delivered=begun,
                rate_bytes=rate * self.rtt // US,
                interval_us=self.rtt,
                rtt_us=self.rtt + max(0, window * US // self.rate - self.rtt),
                app_limited=app_limited,
                lost=lost if i == 0 else 0,
                prior_in_flight=flight,
            )

    def trickle(self, part: int, us: int, prior: int = 2 * BDP) -> None:
        """One ACK, so much later than the last one; the path holds a bandwidth-delay product."""
        self.cc.now_us += us
        self.ack_flight(
            part,
            BDP,
            prior_delivered=max(self.delivered - BDP, 0),
            rate_bytes=BDP,
            interval_us=self.rtt,
            rtt_us=self.rtt,
            prior_in_flight=prior,
        )

    def ack_flight(self, part: int, flight: int, **sample: int) -> None:
        self.cc.srtt_us = self.rtt
        cwnd = int(self.cc.cwnd)
        self.delivered += part
        self.cc.in_flight = flight
        self._call(part, sample)
        assert self.cc.cwnd >= min(cwnd, 4 * MSS) or self.cc.ca_state == RECOVERY

    def _call(self, part: int, sample: dict[str, int]) -> None:
        from bypass._core import ffi

        told = ffi.new(
            "struct bypass_cc_sample *",
            {"acked": part, "delivered": part, "delivered_all": self.delivered, **sample},
        )
        self.cc.held_back = 0
        self.ops.acked(self.cc, told)

    def gain(self) -> float:
        return float(self.cc.pacing_rate / (self.rate * MARGIN))


def steady(stack: CoreStack) -> Path:
    """In PROBE_BW, having learned the path."""
    p = Path(stack, "bbr")
    for _ in range(20):
        p.round()
    p.round(in_flight=BDP)
    assert p.gain() < 1.3
    return p


def test_startup_paces_at_two_over_ln_two(stack: CoreStack) -> None:
    """4.3.2; before the first round trip a millisecond is assumed."""
    p = Path(stack, "bbr")
    assert p.cc.pacing_rate == pytest.approx(10 * MSS * 1000 * HIGH * MARGIN, rel=0.01)


def test_startup_ends_after_three_rounds_without_a_quarter_more(stack: CoreStack) -> None:
    """4.3.2.2: and not before; then the queue is drained below the path's rate, 4.3.3."""
    p = Path(stack, "bbr")
    rounds = 0
    while p.cc.cwnd < 3 * BDP:
        p.round()
        rounds += 1
        assert rounds < 20
    for _ in range(6):
        p.round(in_flight=3 * BDP)
    assert p.gain() == pytest.approx(1000 / 2885, rel=0.02), "DRAIN"
    p.round(in_flight=BDP // 2)
    assert p.gain() > 0.7, "PROBE_BW"


def test_an_idle_program_does_not_end_startup(stack: CoreStack) -> None:
    """4.3.2.2: rounds that the program limited tell nothing."""
    p = Path(stack, "bbr")
    for _ in range(20):
        p.round(app_limited=1)
    assert p.cc.ssthresh == 2**32 - 1


def test_the_gains_go_round(stack: CoreStack) -> None:
    """4.3.4.2: a phase of 5/4, one of 3/4, six of 1, a round trip each."""
    p = steady(stack)
    gains: list[float] = []
    for _ in range(8 * 8 * 4):
        p.cc.now_us += RTT // 8
        p.ack_flight(
            BDP // 8,
            BDP,
            prior_delivered=p.delivered - BDP,
            rate_bytes=BDP,
            interval_us=RTT,
            rtt_us=RTT,
            prior_in_flight=2 * BDP,
        )
        gain = round(p.gain(), 2)
        if not gains or gains[-1] != gain:
            gains.append(gain)
    cycle = "".join({1.25: "u", 0.75: "d", 1.0: "-"}[g] for g in gains)
    assert "ud-ud-" in cycle, cycle


@pytest.mark.parametrize(("short", "ends"), [(-100, True), (200, False)])
def test_probing_for_bandwidth_ends_when_the_pipe_is_fuller(stack: CoreStack, short: int, ends: bool) -> None:
    """4.3.4.3: not before a quarter more is in flight, with room for pieces, the piece that goes next included."""
    p = steady(stack)
    piece = int(RATE * 1.25 * MARGIN) >> 10
    prior = BDP * 5 // 4 + 2 * piece + 2 * MSS - short
    gains = []
    for _ in range(24 * 100):
        p.trickle(BDP // 105, p.rtt // 100, prior)
        gains.append(round(p.gain(), 2))
    assert (gains[-800:].count(1.25) < 800) == ends


def test_the_window_is_twice_what_the_path_holds(stack: CoreStack) -> None:
    """4.2.3: gain 2, and room for three pieces of a millisecond; here ACKs come a hundred in a round trip."""
    p = steady(stack)
    for _ in range(40 * 100):
        p.trickle(BDP // 105, p.rtt // 100)
    piece = p.cc.pacing_rate >> 10
    assert 2 * BDP * 0.98 <= p.cc.cwnd <= 2 * BDP + 4 * piece + 4 * MSS + BDP // 50


def test_acks_that_come_in_bunches_get_room(stack: CoreStack) -> None:
    """As Linux: half of the path's content is acknowledged at once, twice in a round trip: as much more may be in
    flight, or the sender would pause for the next bunch. That is forgotten ten rounds after
    they come one by one again."""
    p = steady(stack)
    for _ in range(40):
        p.trickle(BDP // 2, p.rtt // 2)
    assert p.cc.cwnd > 2.45 * BDP
    for _ in range(40 * 100):
        p.trickle(BDP // 105, p.rtt // 100)
    assert p.cc.cwnd < 2.2 * BDP


def test_a_policer_is_found_and_obeyed_for_48_rounds(stack: CoreStack) -> None:
    """As Linux: two intervals of four rounds at the same rate with more than a fifth lost: no more probing above it
    for a while."""
    p = steady(stack)
    p.rate = RATE // 4
    for _ in range(13):
        p.round(lost=int(p.cc.cwnd) // 3, in_flight=BDP // 4)
    gains = []
    for _ in range(70):
        p.round()
        gains.append(round(p.gain(), 1))
    assert set(gains[:40]) == {1.0}
    assert min(gains[44:]) < 0.8, "it may have gone: the gains go round again"


def test_losses_of_a_tenth_are_no_policer(stack: CoreStack) -> None:
    p = steady(stack)
    gains = []
    for _ in range(50):
        p.round(lost=int(p.cc.cwnd) // 12, in_flight=BDP)
        gains.append(round(p.gain(), 1))
    assert 1.2 in gains[25:]


def test_every_ten_seconds_the_pipe_is_emptied(stack: CoreStack) -> None:
    """4.3.5 PROBE_RTT: four segments for 200 ms when no shorter round trip was seen; then the window is back."""
    p = steady(stack)
    before = int(p.cc.cwnd)
    p.cc.min_rtt_us = RTT
    shrunk = 0
    start = int(p.cc.now_us)
    while p.cc.now_us < start + 12 * US:
        p.rtt = RTT + 10
        p.cc.now_us += RTT
        part = min(int(p.cc.cwnd), BDP)
        flight = int(p.cc.cwnd)
        p.ack_flight(
            part,
            flight,
            prior_delivered=p.delivered - part,
            rate_bytes=BDP,
            interval_us=RTT,
            rtt_us=RTT + 10,
            prior_in_flight=flight,
        )
        if p.cc.cwnd == 4 * MSS:
            shrunk += 1
            assert p.cc.held_back
    assert 4 <= shrunk <= 8
    assert p.cc.cwnd >= before * 0.9


def test_the_bandwidth_of_ten_rounds_ago_is_forgotten(stack: CoreStack) -> None:
    """4.1.1.3: BtlBwFilterLen."""
    p = steady(stack)
    p.rate = RATE // 4
    for _ in range(9):
        p.round(in_flight=BDP)
    assert p.cc.pacing_rate > RATE * 0.7
    for _ in range(4):
        p.round(in_flight=BDP)
    assert p.cc.pacing_rate < RATE * 0.4


def test_recovery_conserves_packets_for_a_round_and_gives_the_window_back(stack: CoreStack) -> None:
    """4.2.3.4."""
    p = steady(stack)
    for _ in range(3):
        p.round(in_flight=BDP)
    before = int(p.cc.cwnd)
    p.reduce(0)
    p.cc.ca_state = RECOVERY
    p.ack_flight(MSS, BDP, prior_delivered=p.delivered, lost=10 * MSS, prior_in_flight=BDP)
    assert p.cc.cwnd == BDP + MSS
    p.cc.ca_state = OPEN
    p.ack_flight(MSS, BDP, prior_delivered=p.delivered, prior_in_flight=BDP)
    assert p.cc.cwnd >= before * 0.95


def test_a_timeout_makes_startup_possible_again_only_before_the_pipe_was_full(stack: CoreStack) -> None:
    p = steady(stack)
    p.reduce(EV_RTO)
    p.round(in_flight=BDP)
    assert p.gain() < 1.3


@pytest.mark.parametrize("rate", [12_500_000_000, 1250])
def test_rates_from_ten_kilobits_to_a_hundred_gigabits(stack: CoreStack, rate: int) -> None:
    """No product overflows: 100 Gbit/s over 80 ms fill the largest window, 10 kbit/s still move four segments."""
    p = Path(stack, "bbr")
    p.rate, p.rtt = rate, 80_000
    for _ in range(60):
        p.round()
    assert p.cc.pacing_rate == pytest.approx(rate, rel=2)
    want = min(2 * rate * 80_000 // US, 1 << 30)
    assert p.cc.cwnd >= min(max(want, 4 * MSS), 1 << 30) * 0.9
    assert p.cc.cwnd <= 1 << 30


# ---- On a wire -------------------------------------------------------------------------------------------------
def test_a_hundredth_lost_does_not_slow_it() -> None:
    """50 Mbit/s, 40 ms, 1 % loss: more than nine tenths of the path's payload rate, where Reno gets a tenth."""
    with Bottleneck("bbr", rate=50_000_000, rtt_ms=40, queue=250_000, loss=0.01) as b:
        b.transfer(1.5)
        assert b.transfer(5) > 0.9 * 50_000_000
    with Bottleneck("reno", rate=50_000_000, rtt_ms=40, queue=250_000, loss=0.01) as b:
        b.transfer(1.5)
        assert b.transfer(5) < 0.2 * 50_000_000


def test_it_leaves_a_deep_queue_empty() -> None:
    """50 Mbit/s, 40 ms, room for 1.3 s: after STARTUP the smoothed round trip stays within 15 ms of the path's."""
    with Bottleneck("bbr", rate=50_000_000, rtt_ms=40, queue=8_000_000) as b:
        b.transfer(2)
        b.rows.clear()
        assert b.transfer(4) > 0.93 * 50_000_000
        assert sum(r.srtt_us for r in b.rows) / len(b.rows) < 48_000
        assert max(r.srtt_us for r in b.rows) < 58_000


def test_it_probes_the_round_trip_and_goes_on() -> None:
    with Bottleneck("bbr", rate=10_000_000, rtt_ms=20, queue=500_000) as b:
        b.transfer(9)
        b.rows.clear()
        b.transfer(3)
        assert min(r.cwnd for r in b.rows) == 4 * MSS
        assert b.transfer(1) > 0.92 * 10_000_000


def test_a_small_send_buffer_does_not_keep_it_in_startup() -> None:
    """20 Mbit/s, 40 ms, a queue of a bandwidth-delay product. The buffer holds more than both, and less than STARTUP
    would have in flight: the program waits for it all the time and is not idle. Else BBR sends at 2.89 times the rate
    for ever, and loses the rest."""
    with Bottleneck("bbr", rate=20_000_000, rtt_ms=40, queue=100_000, SO_SNDBUF=260_000) as b:
        b.transfer(3)
        lost = b.info().retransmits
        b.rows.clear()
        assert b.transfer(5) > 0.93 * 20_000_000
        assert sum(r.srtt_us for r in b.rows) / len(b.rows) < 48_000
        assert b.info().retransmits - lost < 50
