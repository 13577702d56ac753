# SPDX-License-Identifier: Apache-2.0
"""The filter device on a simulated wire: a kernel that is a socket, and frames that say what verdict they want."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable
from typing import Any

from bypass._core import ffi, lib
from sim_ports import A_MAC, B_MAC, meta_of

from bypass.dpdk_backend.filter import ExceptionPath, FilterDevice
from bypass.sim import Network

STEER, PASS, DROP = b"S", b"P", b"D"
VERDICTS = {
    STEER[0]: lib.CLASSIFY_STEER,
    DROP[0]: lib.CLASSIFY_DROP,
}  # by a frame's first payload byte; others pass
MARK_AT = 14
FILTER_LOOKS, FILTER_QUEUE = lib.FILTER_LOOKS, lib.FILTER_QUEUE


@ffi.callback("void(struct classifier *, const struct classify_frame *, uint32_t, struct classify_result *)")
def judge(_: Any, frames: Any, n: int, results: Any) -> None:
    for i in range(n):
        data = ffi.buffer(frames[i].data, frames[i].len)[:]
        mark = data[MARK_AT] if len(data) > MARK_AT else 0
        results[i].verdict = VERDICTS.get(mark, lib.CLASSIFY_PASS)
        results[i].entry, results[i].rule, results[i].hash = len(data), 7, 0xABCD


@ffi.callback("void(struct classifier *, const struct classify_frame *, uint32_t, struct classify_result *)")
def pass_all(_: Any, frames: Any, n: int, results: Any) -> None:
    for i in range(n):
        results[i].verdict = lib.CLASSIFY_PASS


def frame(mark: bytes, rest: bytes = b"", vlan: int | None = None) -> bytes:
    tag = b"" if vlan is None else b"\x81\x00" + vlan.to_bytes(2, "big")
    return B_MAC + A_MAC + tag + b"\x88\xb5" + mark + rest


class Scene:
    """A raw port `wire`, a port with a filter in front of it, and the kernel's end of the exception path."""

    def __init__(
        self,
        net: Network,
        *,
        rate: int = 1_000_000,
        burst: int = 100_000,
        vlan: int | None = None,
        kernel: bool = True,
        **sizes: int,
    ) -> None:
        segment = net.wire()
        self.wire = segment.raw_port()
        self.port = segment.port(**sizes)
        self.kernel: socket.socket | None = None
        self.exception: ExceptionPath | None = None
        if kernel:
            self.kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self.exception = ExceptionPath(ours.detach(), rate, burst)
        self.filter = FilterDevice(self.port.dev, ffi.NULL, self.exception, vlan, judge)
        self.dev = self.filter.dev
        self.filter.now(1)

    def close(self) -> None:
        self.filter.close()
        if self.kernel is not None and self.exception is not None:
            self.exception.close()
            self.kernel.close()
        stats = self.port.stats()
        assert (stats.held, stats.misuse) == (0, 0), "every frame is where it belongs"

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def send(self, frames: Iterable[bytes]) -> None:
        for data in frames:
            self.wire.send(data)

    def received(self, most: int = 64, meta: list[Any] | None = None) -> list[bytes]:
        """One rx_burst: what is handed up, freed at once."""
        out = ffi.new("bypass_pkt[]", most)
        n = self.dev.ops.rx_burst(self.dev, out, most)
        assert n >= 0
        found = []
        for pkt in out[0:n]:
            m = meta_of(self.port.dev, pkt)
            found.append(ffi.buffer(self.dev.mem + pkt * self.dev.stride + m.off, m.len)[:])
            if meta is not None:
                meta.append(ffi.new("struct bypass_pkt_meta *", m[0]))
        self.dev.ops.free(self.dev, out, n)
        assert self.dev.free_frames == self.port.dev.free_frames
        return found

    def to_kernel(self) -> list[bytes]:
        assert self.kernel is not None
        found = []
        while select.select([self.kernel], [], [], 0)[0]:
            found.append(self.kernel.recv(65536))
        return found

    def transmit(self, frames: Iterable[bytes]) -> int:
        """As a stack does. How many the device took; all are let go of."""
        batch = list(frames)
        pkts = ffi.new("bypass_pkt[]", len(batch))
        assert self.dev.ops.alloc(self.dev, pkts, len(batch)) == len(batch)
        for pkt, data in zip(pkts, batch, strict=True):
            m = meta_of(self.port.dev, pkt)
            ffi.memmove(self.dev.mem + pkt * self.dev.stride + m.off, data, len(data))
            m.len = len(data)
        sent = int(self.dev.ops.tx_burst(self.dev, pkts, len(batch)))
        self.dev.ops.free(self.dev, pkts, len(batch))
        return sent

    def reap(self) -> None:
        done = ffi.new("bypass_pkt[]", 256)
        assert self.dev.ops.reap(self.dev, done, 256) >= 0

    def on_wire(self) -> list[bytes]:
        return [data for _, data in self.wire.recv()]

    def is_awake(self) -> bool:
        """Whether who sleeps on the device would wake."""
        fd = self.dev.ops.wait_fd(self.dev)
        return bool(select.select([fd], [], [], 0)[0])
