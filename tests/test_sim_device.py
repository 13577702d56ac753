# SPDX-License-Identifier: Apache-2.0
"""The port of a simulated wire as a network device: who holds a frame, offloads, queues, bad days."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import wire as w
from bypass._core import ffi, lib
from exchange import talk_of
from sim_ports import A_MAC, B_MAC, MS, burst, meta_of, receive, udp_frame

from bypass.sim import DeviceFaults, Fate, Faults, Network, SimulationError
from bypass.testing import play


@pytest.fixture
def net() -> Iterator[Network]:
    with Network(seed=42) as network:
        yield network


def test_frames_are_held_by_whom_they_should(net: Network) -> None:
    port = net.wire().port(frames=16, tx_ring=2)
    dev, ops = port.dev, port.dev.ops
    frames = burst(dev, 100)
    assert len(frames) == 12, "a quarter is kept for reception"
    assert (dev.free_frames, port.stats().held) == (0, 12)
    batch = ffi.new("bypass_pkt[]", frames)
    for f in frames[:3]:
        meta = ffi.cast("struct bypass_pkt_meta *", ffi.cast("uint8_t *", dev.meta) + f * dev.meta_stride)
        assert (meta.off, meta.len, meta.holders) == (dev.headroom, 0, lib.BYPASS_HOLD_STACK)
        meta.len = 60
    assert ops.tx_burst(dev, batch, 3) == 2, "the ring holds two"
    assert port.stats().unreaped == 2
    ops.free(dev, batch, 1)  # the first: now only the device holds it
    done = ffi.new("bypass_pkt[]", 8)
    assert ops.reap(dev, done, 8) == 1
    assert done[0] == frames[1]
    assert dev.free_frames == 1
    assert port.stats().misuse == 0

    assert ops.tx_burst(dev, batch, 1) == 1, "a bad frame is skipped, not retried for ever"
    ops.free(dev, batch, 1)
    assert port.stats().misuse == 2, "sending and freeing what one does not hold"
    ops.free(dev, batch + 1, 11)
    assert port.stats().held == 0
    lib.sim_port_device_faults(dev, DeviceFaults().c())
    with pytest.raises(SimulationError, match="misuse"):
        net.close()


def test_a_device_vouches_only_for_what_is_intact(net: Network) -> None:
    segment = net.wire()
    a = segment.raw_port()
    with_offload, without = segment.port(caps=lib.BYPASS_CAP_RX_CSUM), segment.port()
    a.script([Fate.PASS, Fate.CORRUPT])
    for _ in range(2):
        a.send(udp_frame(1))
    assert [receive(with_offload)[1].flags for _ in range(2)] == [lib.BYPASS_RX_CSUM_OK, 0]
    assert [receive(without)[1].flags for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("size", [0, 1, 8, 1001])
def test_the_device_completes_checksums(net: Network, size: int) -> None:
    segment = net.wire()
    port, raw = segment.port(caps=lib.BYPASS_CAP_TX_CSUM), segment.raw_port()
    for i in range(200):
        good = udp_frame(i, size)
        start = w.checksum(w.pseudo("10.0.0.1", "10.0.0.2", w.UDP, len(good) - 34)) ^ 0xFFFF
        partial = good[:40] + start.to_bytes(2, "big") + good[42:]
        [frame] = burst(port.dev, 1)
        meta = meta_of(port.dev, frame)
        ffi.memmove(port.dev.mem + frame * port.dev.stride + meta.off, partial, len(partial))
        meta.len, meta.flags, meta.csum_start, meta.csum_off = len(partial), lib.BYPASS_TX_CSUM, 34, 6
        batch, done = ffi.new("bypass_pkt[]", [frame]), ffi.new("bypass_pkt[1]")
        assert port.dev.ops.tx_burst(port.dev, batch, 1) == 1
        port.dev.ops.free(port.dev, batch, 1)
        assert port.dev.ops.reap(port.dev, done, 1) == 0
        [(_, sent)] = raw.recv()
        assert sent == good


def test_a_computed_checksum_of_zero_is_sent_as_ones(net: Network) -> None:
    """RFC 768: zero would mean that there is none."""
    segment = net.wire()
    port, raw = segment.port(caps=lib.BYPASS_CAP_TX_CSUM), segment.raw_port()
    [frame] = burst(port.dev, 1)
    meta = meta_of(port.dev, frame)
    meta.len, meta.flags, meta.csum_start, meta.csum_off = 18, lib.BYPASS_TX_CSUM, 14, 0
    ffi.memmove(port.dev.mem + frame * port.dev.stride + meta.off, bytes(14) + b"\xff\x0f\x00\xf0", 18)
    batch = ffi.new("bypass_pkt[]", [frame])
    assert port.dev.ops.tx_burst(port.dev, batch, 1) == 1
    assert raw.recv()[0][1][14:16] == b"\xff\xff"
    port.dev.ops.free(port.dev, batch, 1)
    port.dev.ops.reap(port.dev, batch, 1)


def test_flows_spread_over_queues_and_each_keeps_its_own(net: Network) -> None:
    segment = net.wire()
    a, b = segment.raw_port(), segment.port(queues=4)
    seen: dict[int, set[int]] = {}
    for repeat in range(2):
        for flow in range(64):
            data = w.udp("10.0.0.1", "10.0.0.2", 1000 + flow, 53, bytes([repeat]))
            a.send(w.eth(B_MAC, A_MAC, w.ETH_IPV4, w.ipv4("10.0.0.1", "10.0.0.2", w.UDP, data)))
            seen.setdefault(flow, set()).add(receive(b)[1].queue)
    assert all(len(queues) == 1 for queues in seen.values())
    assert {q for queues in seen.values() for q in queues} == {0, 1, 2, 3}


def test_bytes_are_equal_with_checksum_offload_on_a_corrupting_wire(net: Network) -> None:
    net.wire(faults=Faults(corrupt=0.05, delay_ns=100_000))
    caps = lib.BYPASS_CAP_RX_CSUM | lib.BYPASS_CAP_TX_CSUM
    a, b = net.stack("10.0.0.1/24", caps=caps), net.stack("10.0.0.2/24", caps=caps)
    play(net, a, b, talk_of((300_000, 300_000)))


def test_a_late_completion_is_noticed_without_any_other_event(net: Network) -> None:
    """The clock stops when a transmission completes: the stack gets its frame back then, not with the next packet."""
    a = net.stack("10.0.0.1/24", tx_ring=4)
    net.raw_port(mac="02:00:00:00:00:99")
    assert a.port is not None
    a.port.set_device_faults(DeviceFaults(complete_ns=3 * MS))
    with a.socket(socket.SOCK_DGRAM) as sock:
        with net.lock:
            a.core.nexthop_set("10.0.0.9", bytes.fromhex("020000000099"))
        sock.sendto(b"x", ("10.0.0.9", 9))
        net.run(duration_ns=2 * MS)
        assert a.port.stats().unreaped == 1
        net.run(duration_ns=2 * MS)
        assert a.port.stats().unreaped == 0


@pytest.mark.parametrize(
    "faults",
    [
        DeviceFaults(alloc_fail=0.2),
        DeviceFaults(tx_short=0.5),
        DeviceFaults(kick_again=0.5),
        DeviceFaults(complete_ns=2 * MS),
        DeviceFaults(alloc_fail=0.1, tx_short=0.3, kick_again=0.3, complete_ns=MS),
    ],
)
def test_bytes_are_equal_over_a_bad_device(net: Network, faults: DeviceFaults) -> None:
    net.wire(faults=Faults(delay_ns=100_000))
    a, b = net.stack("10.0.0.1/24", frames=256, tx_ring=16), net.stack("10.0.0.2/24", frames=256, tx_ring=16)
    for stack in (a, b):
        assert stack.port is not None
        stack.port.set_device_faults(faults)
    play(net, a, b, talk_of((200_000, 200_000)))


@pytest.mark.parametrize("loss", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("keep", [1, 64])
def test_bytes_are_equal_over_a_device_that_gives_frames_back_late(
    net: Network, loss: float, keep: int
) -> None:
    """It lets go of a frame when more have followed, and the last ones never: what is lost goes again as a copy."""
    net.wire(faults=Faults(loss=loss, delay_ns=100_000))
    sizes = {"caps": lib.BYPASS_CAP_TX_LAZY, "frames": 512, "tx_ring": 128}
    a, b = net.stack("10.0.0.1/24", **sizes), net.stack("10.0.0.2/24", **sizes)
    for stack in (a, b):
        assert stack.port is not None
        stack.port.set_device_faults(DeviceFaults(keep=keep))
    play(net, a, b, talk_of((200_000, 200_000)))
    assert loss == 0.0 or a.core.stats()["tcp_out_retransmits"] > 0
    net.run(duration_ns=120 * 10**9)  # TIME_WAIT included
    for stack in (a, b):
        assert stack.port is not None
        assert stack.port.stats().held == 0


def test_carrier_lost_and_found(net: Network) -> None:
    a, b = net.stack("10.0.0.1/24"), net.stack("10.0.0.2/24")
    assert a.port is not None
    with b.create_server(("10.0.0.2", 80)) as server, a.create_connection(("10.0.0.2", 80)) as client:
        connection, _ = server.accept()
        a.port.set_device_faults(DeviceFaults(down=True))
        client.sendall(b"while it is down")
        assert not net.run(
            lambda: bool(b.core.ready(connection._handle) & lib.BYPASS_IN), duration_ns=5 * 10**9
        )
        a.port.set_device_faults(DeviceFaults())
        assert connection.recv(100) == b"while it is down"
        connection.close()
