# SPDX-License-Identifier: Apache-2.0
"""Frames for raw ports, and ports as a stack sees them: what the tests of the simulator share."""

from __future__ import annotations

import random
from typing import Any

import wire as w
from bypass._core import ffi

from bypass.sim import Faults, Network, Port, RawPort

A_MAC, B_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
MS = 1_000_000


def udp_frame(n: int, size: int = 200) -> bytes:
    """A UDP packet with the number n in it."""
    data = n.to_bytes(4, "big") + random.Random(n).randbytes(size)
    packet = w.ipv4("10.0.0.1", "10.0.0.2", w.UDP, w.udp("10.0.0.1", "10.0.0.2", 1, 2, data))
    return w.eth(B_MAC, A_MAC, w.ETH_IPV4, packet)


def tcp_frame(n: int, size: int) -> bytes:
    data = random.Random(n).randbytes(size)
    segment = w.tcp("10.0.0.1", "10.0.0.2", 1, 2, n, 0, w.ACK, 1000, data)
    return w.eth(B_MAC, A_MAC, w.ETH_IPV4, w.ipv4("10.0.0.1", "10.0.0.2", w.TCP, segment))


def pair(net: Network, faults: Faults | None = None) -> tuple[RawPort, RawPort]:
    """Two raw ports on a wire; the first one's frames meet the faults."""
    wire = net.wire()
    a, b = wire.raw_port("a"), wire.raw_port("b")
    a.set_faults(faults or Faults())
    return a, b


def send_many(
    net: Network, faults: Faults, n: int, gap_ns: int = 10_000
) -> tuple[list[tuple[int, bytes]], RawPort]:
    """n numbered frames, one each gap_ns: what arrived, and the sending port."""
    a, b = pair(net, faults)
    for i in range(n):
        a.send(udp_frame(i, 20))
        net.run(duration_ns=gap_ns)
    net.run(duration_ns=10**10)
    return b.recv(), a


def number(frame: bytes) -> int:
    return int.from_bytes(frame[42:46], "big")


def burst(dev: Any, n: int) -> list[int]:
    out = ffi.new("bypass_pkt[]", n)
    return list(out[0 : dev.ops.alloc(dev, out, n)])


def meta_of(dev: Any, frame: int) -> Any:
    return ffi.cast("struct bypass_pkt_meta *", ffi.cast("uint8_t *", dev.meta) + frame * dev.meta_stride)


def receive(port: Port) -> tuple[bytes, Any]:
    """The oldest received frame and its metadata, as a stack takes them."""
    out = ffi.new("bypass_pkt[1]")
    assert port.dev.ops.rx_burst(port.dev, out, 1) == 1
    meta = meta_of(port.dev, out[0])
    data = ffi.buffer(port.dev.mem + out[0] * port.dev.stride + meta.off, meta.len)[:]
    copy = ffi.new("struct bypass_pkt_meta *", meta[0])
    port.dev.ops.free(port.dev, out, 1)
    return data, copy
