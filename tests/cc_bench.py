# SPDX-License-Identifier: Apache-2.0
"""Congestion control under test: one algorithm called by hand, and transfers over a simulated bottleneck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from bypass._core import ffi, lib

from bypass.core import Config, CoreStack
from bypass.sim.network import Faults, Network

MSS = 1448
INFINITE = 2**32 - 1
US = 1_000_000
OPEN, CWR, RECOVERY, LOSS = 0, 2, 3, 4
EV_LOSS, EV_RTO, EV_ECN, EV_RECOVERED, EV_UNDO, EV_RESTART = range(6)


class ByHand:
    """The view of one connection and the functions of one algorithm; nothing else exists.

    Args:
        stack: any stack: where the table is looked up.
    """

    def __init__(self, stack: CoreStack, name: str, *, mss: int = MSS, cwnd: int | None = None) -> None:
        self.ops: Any = lib.bypass_cc_table(stack.c, name.encode())
        assert self.ops != ffi.NULL
        self.state = ffi.new("uint64_t[]", lib.BYPASS_CC_BYTES // 8)
        self.cc: Any = ffi.new("struct bypass_cc *")
        self.cc.state = self.state
        self.cc.mss, self.cc.cwnd, self.cc.ssthresh = mss, cwnd or 10 * mss, INFINITE
        self.cc.min_rtt_us, self.cc.now_us = INFINITE, 1_000_000
        self.cc.limited = 1
        self.cc.snd_nxt = self.cc.cwnd
        self.delivered = 0
        if self.ops.init != ffi.NULL:
            self.ops.init(self.cc)

    def ack(self, acked: int, **sample: int) -> None:
        """An ACK of so many bytes, in answer to which as many leave."""
        self.delivered += acked
        self.cc.snd_una = (self.cc.snd_una + acked) % 2**32
        self.cc.in_flight = self.cc.flight_size = self.cc.cwnd
        told = ffi.new(
            "struct bypass_cc_sample *",
            {"acked": acked, "delivered": acked, "delivered_all": self.delivered, **sample},
        )
        self.cc.held_back = 0
        self.ops.acked(self.cc, told)
        self.cc.snd_nxt = (self.cc.snd_una + self.cc.cwnd) % 2**32

    def reduce(self, event: int, flight: int | None = None) -> int:
        """What the stack does when a loss, a timeout or a mark is found; the new ssthresh."""
        self.cc.flight_size = self.cc.cwnd if flight is None else flight
        self.cc.ssthresh = self.ops.ssthresh(self.cc, event)
        if self.ops.event != ffi.NULL:
            self.ops.event(self.cc, event)
        return int(self.cc.ssthresh)

    def event(self, event: int) -> None:
        self.ops.event(self.cc, event)


@dataclass
class Row:
    """One look at the sender: seconds, bytes, microseconds."""

    at: float
    cwnd: int
    ssthresh: int
    srtt_us: int
    received: int


class Bottleneck:
    """Senders to one receiver, each over a path of its own with this rate, round trip and queue.

    Attributes:
        rows: what tcp_info said every `every_ms`.
    """

    def __init__(
        self,
        cc: str,
        *,
        rate: int,
        rtt_ms: float,
        queue: int = 0,
        mark: int = 0,
        loss: float = 0.0,
        ecn: int = 2,
        seed: int = 1,
        sndbuf: int = 4 << 20,
        **options: int,
    ) -> None:
        self.net = Network(seed)
        half = round(rtt_ms * 500_000)
        self.net.wire(faults=Faults(delay_ns=half))
        config = Config(conns=4, sndbuf=sndbuf, rcvbuf=4 << 20, ecn=ecn)
        there = Faults(delay_ns=half, rate_bps=rate, queue_bytes=queue, mark_bytes=mark, loss=loss)
        self.a = self.net.stack("10.0.0.1/24", config=config, frames=16384, faults=there)
        self.b = self.net.stack("10.0.0.2/24", config=config, frames=16384)
        self.a.core.cc_default(cc)
        self.b.core.cc_default(cc if cc == "dctcp" else "cubic")
        listener = self.b.core.socket(lib.BYPASS_STREAM)
        self.b.core.bind(listener, ("10.0.0.2", 80))
        self.b.core.listen(listener, 4)
        self.client = self.a.core.socket(lib.BYPASS_STREAM)
        for name, value in options.items():
            self.a.core.setopt(self.client, getattr(lib, f"BYPASS_{name}"), value)
        self.a.core.connect(self.client, ("10.0.0.2", 80))
        self.net.run(lambda: bool(self.b.core.ready(listener)), duration_ns=5_000_000_000)
        self.server = self.b.core.accept(listener)
        self.received = 0
        self.rows: list[Row] = []
        self.start = self.net.now_ns()

    def info(self) -> Any:
        return self.a.core.tcp_info(self.client)

    def transfer(self, seconds: float, every_ms: int = 20) -> float:
        """Sends all the time; the bits a second that arrived in this call."""
        data, room = bytes(1 << 20), bytearray(1 << 20)
        begin, before = self.net.now_ns(), self.received
        end, look = begin + round(seconds * 1e9), begin

        def step() -> bool:
            nonlocal look
            while self.a.core.send(self.client, data) > 0:
                pass
            while (got := self.b.core.recv_into(self.server, room)) > 0:
                self.received += got
            now = self.net.now_ns()
            if now >= look:
                look = now + every_ms * 1_000_000
                i = self.info()
                self.rows.append(Row((now - self.start) / 1e9, i.cwnd, i.ssthresh, i.srtt_us, self.received))
            return now >= end

        assert self.net.run(step, duration_ns=round(seconds * 1e9) + 1_000_000_000)
        return (self.received - before) * 8e9 / (self.net.now_ns() - begin)

    def close(self) -> None:
        self.net.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
