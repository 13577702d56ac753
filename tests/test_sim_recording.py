# SPDX-License-Identifier: Apache-2.0
"""Recorded frames: pcapng files, the recorder's ring, the recording device, failures that show their packets."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path

import dpkt
import pytest
from bypass._core import ffi, lib
from sim_ports import MS, pair, udp_frame

from bypass.core import Config, CoreStack
from bypass.sim import Fate, Faults, Network, Recorder


@pytest.fixture
def net() -> Iterator[Network]:
    with Network(seed=42) as network:
        yield network


def test_pcapng_tells_time_place_and_fate(net: Network, tmp_path: Path) -> None:
    a, b = pair(net, Faults(delay_ns=7))
    path = tmp_path / "x.pcapng"
    with net.capture(path, a, b):
        a.script([Fate.PASS, Fate.LOSE, Fate.CORRUPT])
        start = net.now_ns()
        for i in range(3):
            a.send(udp_frame(i))
        net.run(duration_ns=10)
    blocks = []
    with path.open("rb") as file:
        shb = dpkt.pcapng.SectionHeaderBlockLE(file.read(28))
        assert shb.bom == 0x1A2B3C4D
        raw = file.read()
    names = []
    while raw:
        size = int.from_bytes(raw[4:8], "little")
        kind = int.from_bytes(raw[:4], "little")
        if kind == 1:
            idb = dpkt.pcapng.InterfaceDescriptionBlockLE(raw[:size])
            names.append(idb.opts[0].data)
        else:
            blocks.append(dpkt.pcapng.EnhancedPacketBlockLE(raw[:size]))
        raw = raw[size:]
    assert names == [b"a", b"b"]
    seen = [
        (
            blk.iface_id,
            (blk.ts_high << 32 | blk.ts_low) - start,
            next((o.text for o in blk.opts if o.code == 1), ""),
        )
        for blk in blocks
    ]
    assert seen == [
        (0, 0, ""), (0, 0, "lost"), (0, 0, "corrupted on the way"), (1, 7, ""), (1, 7, ""),
    ]  # fmt: skip
    assert blocks[0].pkt_data == udp_frame(0)


def test_recorder_keeps_the_last_or_the_first() -> None:
    for keep_last in (True, False):
        recorder = Recorder(10_000, keep_last=keep_last)
        for i in range(1000):
            frame = bytes([i % 256]) * (1 + i % 300)
            lib.capture_add(recorder.c, i, 3, lib.CAPTURE_RX, frame, len(frame))
        frames = recorder.read()
        times = [f.time_ns for f in frames]
        assert recorder.dropped + len(frames) == 1000
        assert (
            times == list(range(1000 - len(frames), 1000)) if keep_last else times == list(range(len(frames)))
        )
        assert all(f.data == bytes([f.time_ns % 256]) * (1 + f.time_ns % 300) for f in frames)
        assert 5_000 < sum(len(f.data) + 24 for f in frames) <= 10_000
        assert recorder.read() == []


def test_recorder_survives_every_way_of_wrapping() -> None:
    rng = random.Random(3)
    for keep_last in (True, False):
        recorder = Recorder(4096, keep_last=keep_last, snap_len=700)
        expected: list[int] = []
        dropped = 0
        for i in range(20_000):
            frame = rng.randbytes(rng.choice([14, 60, 333, 900]))
            lib.capture_add(recorder.c, i, 0, 0, frame, len(frame))
            expected.append(i)
            if rng.random() < 0.1:
                got = recorder.read()
                times = [f.time_ns for f in got]
                assert all(len(f.data) == min(f.length, 700) for f in got)
                assert times == sorted(times)
                assert set(times) <= set(expected)
                assert recorder.dropped - dropped == len(expected) - len(times)
                if keep_last and times:
                    assert times == expected[-len(times) :]
                expected, dropped = [], recorder.dropped


def test_an_empty_recorder_takes_a_frame_of_its_whole_size() -> None:
    """Wherever the last one ended."""
    recorder = Recorder(1000)
    for size in (600, 976, 300, 976):
        lib.capture_add(recorder.c, 0, 0, 0, bytes(size), size)
        assert [f.length for f in recorder.read()] == [size]
    assert recorder.dropped == 0
    lib.capture_add(recorder.c, 0, 0, 0, bytes(977), 977)
    assert (recorder.read(), recorder.dropped) == ([], 1)


def test_reading_stops_where_the_next_frame_does_not_fit() -> None:
    recorder = Recorder(1000)
    for i in range(3):
        lib.capture_add(recorder.c, i, 0, 0, bytes(40), 40)
    buffer = ffi.new("uint8_t[]", 1000)
    assert lib.capture_read(recorder.c, buffer, 63) == 0
    assert lib.capture_read(recorder.c, buffer, 64) == 64
    assert lib.capture_read(recorder.c, buffer, 127) == 64
    assert lib.capture_read(recorder.c, buffer, 1000) == 64


def test_recording_device_counts_free_frames_as_the_device_below(net: Network) -> None:
    segment = net.wire()
    sender, port = segment.raw_port(), segment.port(frames=16)
    recorder = Recorder()
    dev = lib.capture_dev_create(port.dev, recorder.c, 0)
    batch = ffi.new("bypass_pkt[]", 16)
    for i in range(6):
        sender.send(udp_frame(i))
    assert dev.ops.rx_burst(dev, batch, 16) == 6
    assert dev.free_frames == port.dev.free_frames == 6
    assert dev.ops.alloc(dev, batch + 6, 2) == 2
    assert dev.free_frames == port.dev.free_frames == 4
    dev.ops.free(dev, batch, 8)
    assert dev.free_frames == port.dev.free_frames == 12
    assert [f.data for f in recorder.read()] == [udp_frame(i) for i in range(6)]
    lib.capture_dev_destroy(dev)


def test_recording_device_sees_both_directions_of_any_backend(net: Network) -> None:
    """What tcpdump cannot see on AF_XDP: the wrapper sits between a stack and its device."""
    a = net.stack("10.0.0.1/24")
    port = net.default_wire.port("b")
    recorder = Recorder()
    dev = lib.capture_dev_create(port.dev, recorder.c, 5)
    core = CoreStack(dev, flags=lib.BYPASS_F_ARP, now_ns=net.now_ns(), config=Config(conns=4))
    core.addr_add("10.0.0.2", 24)
    number = lib.sim_stack_add(net.c, core.c, port.dev)
    lib.capture_dev_now(dev, 77)
    server = core.socket(lib.BYPASS_DGRAM)
    core.bind(server, ("10.0.0.2", 7))
    with a.socket(socket.SOCK_DGRAM) as sock:
        sock.sendto(b"hello", ("10.0.0.2", 7))
        net.run(duration_ns=MS)
    got = core.recvfrom(server, 100)
    assert isinstance(got, tuple)
    assert got[0] == b"hello"
    frames = recorder.read()
    assert [(f.interface, f.time_ns, f.sent) for f in frames] == [
        (5, 77, False),
        (5, 77, True),
        (5, 77, False),
    ]
    assert frames[0].data[12:14] == b"\x08\x06"
    assert frames[2].data.endswith(b"hello")
    core.close_socket(server)
    lib.sim_stack_del(net.c, number)
    core.close()
    assert dev.free_frames == port.dev.free_frames
    lib.capture_dev_destroy(dev)
    assert port.stats().held == 0


def test_a_failure_names_its_seed_and_shows_its_packets(tmp_path: Path) -> None:
    path = tmp_path / "failed.pcapng"
    net = Network(seed=4711)

    def failing() -> None:
        with net.explain_failure(path):
            a, b = net.stack("10.0.0.1/24"), net.stack("10.0.0.2/24")
            with b.create_server(("10.0.0.2", 80)), a.create_connection(("10.0.0.2", 80)):
                raise RuntimeError("something is wrong")

    with pytest.raises(RuntimeError) as failure:
        failing()
    net.close()
    [note] = failure.value.__notes__
    assert "4711" in note
    assert str(path) in note
    assert path.stat().st_size > 500
