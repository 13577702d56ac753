# SPDX-License-Identifier: Apache-2.0
"""The twelve conditions. They were fixed before anything was measured under them; whoever changes one says so, and
measures all of it anew."""

from __future__ import annotations

from dataclasses import dataclass

MTU_FRAME = 1514  # bytes on the wire of a full packet, Ethernet header included


@dataclass(frozen=True, kw_only=True)
class Link:
    """One direction. Probabilities are 0..1.

    Attributes:
        rate_mbit: of Ethernet frames; delay_ms: one way; queue_bytes: tail drop beyond.
        loss: of each frame by itself. burst: a frame begins a burst of mean length burst_frames, all of it lost.
        reorder: a frame comes reorder_ms later than it should; jitter_ms: each comes 0..jitter_ms later, uniform, and
            order is not kept. duplicate: comes twice.
        outage_ms: nothing gets through at the end of each outage_every_ms.
        mark_bytes: ECN; more than so many waiting mark a packet.
    """

    rate_mbit: float
    delay_ms: float
    queue_bytes: int = 250_000
    mark_bytes: int = 0
    loss: float = 0
    burst: float = 0
    burst_frames: float = 0
    reorder: float = 0
    reorder_ms: float = 0
    jitter_ms: float = 0
    duplicate: float = 0
    outage_every_ms: float = 0
    outage_ms: float = 0

    def arguments(self, direction: str) -> list[str]:
        """As the program takes them (bench/goodput/main.c)."""
        named = {
            "rate_bps": self.rate_mbit * 1e6,
            "delay_ns": self.delay_ms * 1e6,
            "queue_bytes": self.queue_bytes,
            "mark_bytes": self.mark_bytes,
            "loss_ppm": self.loss * 1e6,
            "burst_ppm": self.burst * 1e6,
            "burst_end": 1e6 / self.burst_frames if self.burst else 0,
            "reorder_ppm": self.reorder * 1e6,
            "reorder_ns": self.reorder_ms * 1e6,
            "jitter_ns": self.jitter_ms * 1e6,
            "duplicate_ppm": self.duplicate * 1e6,
            "outage_every_ns": self.outage_every_ms * 1e6,
            "outage_ns": self.outage_ms * 1e6,
        }
        return [f"{direction}.{name}={round(value)}" for name, value in named.items() if value]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What one measurement meets. Data goes by `fwd`, acknowledgments come back by `rev`.

    Attributes:
        why: what it is there for.
        warmup_s, seconds: before, and during the measurement.
        transfer_bytes: instead of one connection without end: transfers of this size, one after another, each on a
            connection of its own; `parallel` such sequences at once.
        wires: how many independent runs are averaged for one figure, where chance decides much.
        use: of the rate, by congestion control that takes losses for congestion; how much work a run is.
    """

    name: str
    title: str
    why: str
    fwd: Link
    rev: Link
    warmup_s: float = 1
    seconds: float = 10
    transfer_bytes: int = 0
    parallel: int = 1
    wires: int = 1
    use: float = 1

    def arguments(self) -> list[str]:
        return [
            *self.fwd.arguments("fwd"),
            *self.rev.arguments("rev"),
            f"warmup_ms={round(self.warmup_s * 1000)}",
            f"ms={round(self.seconds * 1000)}",
        ]


CONDITIONS = (
    Condition(
        name="clean",
        title="100 Mbit/s, 20 ms, queue 1 BDP",
        why="is the link used at all, and does the queue's overflow at the end of slow start cost anything",
        fwd=Link(rate_mbit=100, delay_ms=10, queue_bytes=250_000),
        rev=Link(rate_mbit=100, delay_ms=10),
        seconds=6,
    ),
    Condition(
        name="long",
        title="100 Mbit/s, 100 ms, queue 1 BDP",
        why="a window of 1.25 to 2.5 MB: buffers, the growth of the window, hundreds of losses in one window",
        fwd=Link(rate_mbit=100, delay_ms=50, queue_bytes=1_250_000),
        rev=Link(rate_mbit=100, delay_ms=50),
        warmup_s=3,
    ),
    Condition(
        name="tiny",
        title="10 Mbit/s, 40 ms, queue of 5 packets",
        why="bursts of the sender's own making overflow it",
        fwd=Link(rate_mbit=10, delay_ms=20, queue_bytes=5 * MTU_FRAME),
        rev=Link(rate_mbit=10, delay_ms=20),
        warmup_s=2,
    ),
    Condition(
        name="bloat",
        title="10 Mbit/s, 40 ms, queue of 2 s",
        why="the round trip grows fiftyfold within a connection, and losses are noticed two seconds late",
        fwd=Link(rate_mbit=10, delay_ms=20, queue_bytes=2_500_000),
        rev=Link(rate_mbit=10, delay_ms=20),
        warmup_s=2,
        seconds=12,
    ),
    Condition(
        name="loss1",
        title="50 Mbit/s, 30 ms, 1 % random loss",
        why="one loss in many windows: fast recovery",
        fwd=Link(rate_mbit=50, delay_ms=15, queue_bytes=187_500, loss=0.01),
        rev=Link(rate_mbit=50, delay_ms=15),
        wires=3,
        use=0.1,
    ),
    Condition(
        name="loss3",
        title="50 Mbit/s, 30 ms, 3 % random loss",
        why="small windows, several losses in one, lost retransmissions",
        fwd=Link(rate_mbit=50, delay_ms=15, queue_bytes=187_500, loss=0.03),
        rev=Link(rate_mbit=50, delay_ms=15),
        wires=3,
        use=0.05,
    ),
    Condition(
        name="burst",
        title="50 Mbit/s, 30 ms, bursts of 8 lost, one in 1,000 frames",
        why="the end of a window with all its retransmissions is lost together",
        fwd=Link(rate_mbit=50, delay_ms=15, queue_bytes=187_500, burst=0.001, burst_frames=8),
        rev=Link(rate_mbit=50, delay_ms=15),
        wires=4,
        use=0.3,
    ),
    Condition(
        name="reorder",
        title="50 Mbit/s, 30 ms, 5 % of frames 3 ms late",
        why="each late frame is overtaken by a dozen: not a loss",
        fwd=Link(rate_mbit=50, delay_ms=15, queue_bytes=187_500, reorder=0.05, reorder_ms=3),
        rev=Link(rate_mbit=50, delay_ms=15),
        warmup_s=2,
        seconds=8,
    ),
    Condition(
        name="jitter",
        title="20 Mbit/s, 40 ms, each frame 0..10 ms late, 0.1 % twice",
        why="no order is left, of data or of acknowledgments",
        fwd=Link(rate_mbit=20, delay_ms=20, queue_bytes=100_000, jitter_ms=10, duplicate=0.001),
        rev=Link(rate_mbit=20, delay_ms=20, jitter_ms=10, duplicate=0.001),
        warmup_s=2,
        wires=3,
    ),
    Condition(
        name="satellite",
        title="1 Mbit/s, 400 ms, 1 % loss both ways, 1.5 s of nothing every 8 s",
        why="timeouts with backoff, then a full window again; each loss costs long",
        fwd=Link(
            rate_mbit=1, delay_ms=200, queue_bytes=50_000, loss=0.01, outage_every_ms=8000, outage_ms=1500
        ),
        rev=Link(rate_mbit=1, delay_ms=200, loss=0.01, outage_every_ms=8000, outage_ms=1500),
        warmup_s=4,
        seconds=24,
        wires=24,
    ),
    Condition(
        name="acks",
        title="20 Mbit/s against 0.5, 40 ms, 10 % of acknowledgments lost",
        why="the way back is as full as the way there, and has holes",
        fwd=Link(rate_mbit=20, delay_ms=20, queue_bytes=100_000),
        rev=Link(rate_mbit=0.5, delay_ms=20, queue_bytes=20_000, loss=0.1),
        warmup_s=2,
    ),
    Condition(
        name="short",
        title="20 Mbit/s, 40 ms, 2 % loss both ways, 100 kB at a time, 3 at once",
        why="handshakes, slow starts and tails: what is lost last has nothing behind it that would tell",
        fwd=Link(rate_mbit=20, delay_ms=20, queue_bytes=100_000, loss=0.02),
        rev=Link(rate_mbit=20, delay_ms=20, loss=0.02),
        warmup_s=0,
        seconds=14,
        transfer_bytes=100_000,
        parallel=3,
        wires=6,
    ),
)
BY_NAME = {c.name: c for c in CONDITIONS}
QUICK = ("clean", "loss1", "reorder")  # what a short run takes
