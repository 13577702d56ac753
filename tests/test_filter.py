# SPDX-License-Identifier: Apache-2.0
"""The filter device: every frame goes to exactly one place, whatever is in it and however full the kernel is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import wire as w
from bypass._core import ffi, lib
from filter_support import DROP, FILTER_LOOKS, FILTER_QUEUE, PASS, STEER, Scene, frame, judge, pass_all
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_ports import burst, meta_of, udp_frame
from support import examples

from bypass.core import CoreStack
from bypass.dpdk_backend.filter import FilterDevice
from bypass.sim import DeviceFaults, Faults, Network
from bypass.stack_api import Stack

WRITES, READS = lib.EXCEPTION_WRITES, lib.EXCEPTION_READS


@pytest.fixture
def net() -> Iterator[Network]:
    with Network(seed=7) as network:
        yield network


def test_each_verdict_has_its_way(net: Network) -> None:
    with Scene(net) as s:
        frames = [frame(mark, bytes([n])) for n, mark in enumerate([STEER, PASS, DROP, PASS, STEER])]
        s.send(frames)
        meta: list[object] = []
        assert s.received(meta=meta) == [frames[0], frames[4]]
        assert s.to_kernel() == [frames[1], frames[3]]
        assert [(m.entry, m.rule, m.hash, m.flags) for m in meta] == [  # type: ignore[attr-defined]
            (16, 7, 0xABCD, lib.BYPASS_RX_VERDICT)
        ] * 2
        counters = s.filter.counters()
        assert (counters["steered"], counters["passed"], counters["dropped"]) == (2, 2, 1)


def test_without_a_kernel_what_it_would_get_is_handed_up(net: Network) -> None:
    with Scene(net, kernel=False) as s:
        frames = [frame(STEER), frame(PASS), frame(DROP)]
        s.send(frames)
        meta: list[object] = []
        assert s.received(meta=meta) == frames[:2]
        assert [m.flags for m in meta] == [lib.BYPASS_RX_VERDICT, 0]  # type: ignore[attr-defined]


def test_a_verdict_of_the_device_below_is_not_taken_for_ours(net: Network) -> None:
    with Scene(net, kernel=False) as s, ExitStack() as ends:
        above = FilterDevice(s.dev, ffi.NULL, None, None, pass_all)
        ends.callback(above.close)
        s.send([frame(STEER)])
        out = ffi.new("bypass_pkt[8]")
        assert above.dev.ops.rx_burst(above.dev, out, 8) == 1
        assert meta_of(s.port.dev, out[0]).flags & lib.BYPASS_RX_VERDICT == 0
        above.dev.ops.free(above.dev, out, 1)


def test_the_rate_holds_and_what_exceeds_it_is_counted(net: Network) -> None:
    with Scene(net, rate=1000, burst=4) as s:
        s.send(frame(PASS, bytes([n])) for n in range(10))
        assert s.received() == []
        assert len(s.to_kernel()) == 4
        s.filter.now(1 + 2_000_000)  # two packets' time
        s.send(frame(PASS, bytes([n])) for n in range(20, 25))
        s.received()
        assert s.to_kernel() == [frame(PASS, bytes([20])), frame(PASS, bytes([21]))]
        s.filter.now(10**12)  # a long time: no more than a burst
        s.send(frame(PASS) for _ in range(9))
        s.received()
        assert len(s.to_kernel()) == 4
        assert s.exception is not None
        assert s.exception.counters()["over_rate"] == 6 + 3 + 5


def test_a_flood_for_the_kernel_does_not_starve_what_is_steered(net: Network) -> None:
    with Scene(net) as s:
        s.send(frame(PASS) for _ in range(FILTER_LOOKS // 2))
        s.send([frame(STEER)])
        assert s.received() == [frame(STEER)], "found behind them in one call"
        assert len(s.to_kernel()) == WRITES, "and so much for the kernel in each"


def test_who_looked_at_enough_comes_again(net: Network) -> None:
    """The device below need not wake for what was there already."""
    with Scene(net) as s:
        assert s.received() == []
        assert not s.is_awake()
        s.send(frame(DROP) for _ in range(2 * FILTER_LOOKS))
        s.send([frame(STEER)])
        assert s.received(32) == []
        assert s.is_awake()
        found = 0
        while s.is_awake():
            found += len(s.received(32))
        assert found == 1
        assert s.filter.counters()["again"] == 1


def test_a_full_kernel_delays_then_drops_and_wakes_when_it_has_room(net: Network) -> None:
    with Scene(net) as s:
        assert s.exception is not None
        total = 4 * FILTER_QUEUE
        sent = [frame(PASS, n.to_bytes(2, "big")) for n in range(total)]
        for data in sent:  # nobody reads at the kernel's end
            s.send([data])
            s.received()
        waiting, full = s.filter.counters()["waiting"], s.exception.counters()["full"]
        assert waiting == FILTER_QUEUE
        assert full == total - FILTER_QUEUE - s.exception.counters()["passed"] > 0
        s.received()
        got = s.to_kernel()
        assert s.is_awake(), "there is room again"
        while s.filter.counters()["waiting"]:
            assert s.received() == []
            got += s.to_kernel()
        assert got == sent[: len(got)], "in order, the latest are lost"
        assert not s.is_awake()


def test_frames_that_wait_are_given_back_at_the_end(net: Network) -> None:
    with Scene(net) as s:
        s.send(frame(PASS) for _ in range(3 * WRITES))
        s.received()
        assert s.filter.counters()["waiting"] > 0
        assert s.port.stats().held > 0


# ---- From the kernel -------------------------------------------------------------------------------------------
def test_the_kernels_frames_leave_by_the_port(net: Network) -> None:
    with Scene(net) as s:
        assert s.kernel is not None
        frames = [frame(b"K", bytes([n]) * 100) for n in range(3)]
        for data in frames:
            s.kernel.send(data)
        assert s.is_awake()
        s.received()
        assert s.on_wire() == frames
        s.reap()
        assert not s.is_awake()
        assert s.filter.counters()["from_kernel"] == 3


def test_a_device_that_stops_in_the_middle_is_kicked_again(net: Network) -> None:
    with Scene(net) as s:
        assert s.kernel is not None
        s.port.set_device_faults(DeviceFaults(kick_again=1))
        s.kernel.send(frame(b"K"))
        s.received()
        assert s.is_awake()
        s.port.set_device_faults(DeviceFaults())
        s.received()
        s.received()
        assert not s.is_awake()
        s.reap()


def test_so_many_of_the_kernels_frames_a_call(net: Network) -> None:
    with Scene(net) as s:
        assert s.kernel is not None
        kernels = READS + 5
        for _ in range(kernels):
            try:
                s.kernel.send(frame(b"K"))
            except BlockingIOError:  # the socket's own limit (net.unix.max_dgram_qlen)
                kernels = s.filter.counters()["from_kernel"]
                break
        s.received()
        first = len(s.on_wire())
        assert 0 < first <= READS


def test_a_full_ring_holds_the_kernels_frames_back_and_the_stacks_go_first(net: Network) -> None:
    with Scene(net, tx_ring=4) as s:
        assert s.kernel is not None
        assert s.transmit(frame(STEER, bytes([n])) for n in range(6)) == 4
        for n in range(3):
            s.kernel.send(frame(b"K", bytes([n])))
        s.received()
        assert s.filter.counters()["from_kernel"] == 0
        s.reap()
        assert s.transmit([frame(STEER, b"\x06")]) == 1
        s.received()
        s.reap()
        s.received()
        assert s.on_wire()[4:] == [frame(STEER, b"\x06"), *(frame(b"K", bytes([n])) for n in range(3))]
        s.reap()


def test_while_the_stack_finds_the_ring_full_the_kernel_sends_one_a_call(net: Network) -> None:
    with Scene(net, tx_ring=4) as s:
        assert s.kernel is not None
        for n in range(3):
            s.kernel.send(frame(b"K", bytes([n])))
        assert s.transmit(frame(STEER) for _ in range(6)) == 4
        s.reap()
        s.received()
        assert s.filter.counters()["from_kernel"] == 1
        s.reap()
        assert s.transmit([frame(STEER)]) == 1, "all fit: no more priority"
        s.received()
        assert s.filter.counters()["from_kernel"] == 3
        s.reap()


def test_a_ring_that_stays_full_costs_the_kernel_its_frame(net: Network) -> None:
    with Scene(net, tx_ring=1) as s:
        assert s.kernel is not None
        assert s.transmit([frame(STEER)]) == 1
        s.kernel.send(frame(b"K"))
        s.received()
        assert s.is_awake(), "no descriptor tells when the ring has room"
        for _ in range(2000):
            s.received()
        assert not s.is_awake()
        assert s.filter.counters()["from_kernel_full"] == 1
        assert s.port.stats().held == 0
        s.reap()


def test_a_frame_that_waits_goes_out_also_when_the_kernels_device_was_deleted(net: Network) -> None:
    """Else who sleeps on the device would be woken for it for ever."""
    with Scene(net, tx_ring=1) as s:
        assert s.kernel is not None
        assert s.exception is not None
        assert s.transmit([frame(STEER)]) == 1
        s.kernel.send(frame(b"K"))
        s.received()
        s.exception.c.gone = 1
        s.received()
        assert s.is_awake()
        s.reap()
        s.received()
        assert not s.is_awake()
        assert s.on_wire() == [frame(STEER), frame(b"K")]
        s.reap()


def test_without_free_frames_the_kernels_are_lost_and_counted(net: Network) -> None:
    with Scene(net, frames=64) as s:
        assert s.kernel is not None
        held = burst(s.dev, 64)
        s.kernel.send(frame(b"K"))
        s.received()
        assert s.filter.counters()["from_kernel_no_frame"] == 1
        assert not s.is_awake()
        s.dev.ops.free(s.dev, ffi.new("bypass_pkt[]", held), len(held))


def test_what_is_longer_than_the_mtu_is_lost_whole(net: Network) -> None:
    with Scene(net) as s:
        assert s.kernel is not None
        assert s.exception is not None
        fits = frame(b"K", b"x" * (1500 + 18 - 15))
        for data in (fits, fits + b"y", b"short"):
            s.kernel.send(data)
        s.received()
        assert s.filter.counters()["from_kernel"] == 1
        assert s.exception.counters()["read_errors"] == 2
        s.reap()


# ---- VLAN -----------------------------------------------------------------------------------------------------
def test_the_ports_vlan_is_untagged_for_the_stack_only(net: Network) -> None:
    with Scene(net, vlan=7) as s:
        tci = 0xA007  # with a priority, which is not part of the VLAN's number
        mine, kernels = frame(STEER, b"1", tci), frame(PASS, b"2", tci)
        other, bare = frame(STEER, b"3", 8), frame(STEER, b"4")
        s.send([mine, kernels, other, bare])
        assert s.received() == [frame(STEER, b"1")]
        assert s.to_kernel() == [other, bare, kernels], "as on the wire; what nobody judges is first"
        assert s.filter.counters()["other_vlan"] == 2


def test_the_stacks_frames_are_tagged_once(net: Network) -> None:
    with Scene(net, vlan=7, tx_ring=2) as s:
        pkts = ffi.new("bypass_pkt[]", 3)
        assert s.dev.ops.alloc(s.dev, pkts, 3) == 3
        for n, pkt in enumerate(pkts):
            m = meta_of(s.port.dev, pkt)
            data = frame(STEER, bytes([n]))
            ffi.memmove(s.dev.mem + pkt * s.dev.stride + m.off, data, len(data))
            m.len = len(data)
        assert s.dev.ops.tx_burst(s.dev, pkts, 3) == 2
        s.reap()
        assert s.dev.ops.tx_burst(s.dev, pkts + 2, 1) == 1, "the one that found no room comes again"
        s.reap()
        s.dev.ops.free(s.dev, pkts, 3)
        assert s.on_wire() == [frame(STEER, bytes([n]), 7) for n in range(3)]


def test_the_device_finds_the_checksum_behind_the_tag(net: Network) -> None:
    with Scene(net, vlan=7, caps=lib.BYPASS_CAP_TX_CSUM) as s:
        good = udp_frame(1)
        start = w.checksum(w.pseudo("10.0.0.1", "10.0.0.2", w.UDP, len(good) - 34)) ^ 0xFFFF
        partial = good[:40] + start.to_bytes(2, "big") + good[42:]
        [pkt] = burst(s.dev, 1)
        m = meta_of(s.port.dev, pkt)
        ffi.memmove(s.dev.mem + pkt * s.dev.stride + m.off, partial, len(partial))
        m.len, m.flags, m.csum_start, m.csum_off = len(partial), lib.BYPASS_TX_CSUM, 34, 6
        batch = ffi.new("bypass_pkt[]", [pkt])
        assert s.dev.ops.tx_burst(s.dev, batch, 1) == 1
        s.dev.ops.free(s.dev, batch, 1)
        assert s.on_wire() == [good[:12] + b"\x81\x00\x00\x07" + good[12:]]
        s.reap()


def test_the_kernels_frames_are_tagged_by_the_kernel(net: Network) -> None:
    with Scene(net, vlan=7) as s:
        assert s.kernel is not None
        for data in (frame(b"K", vlan=7), frame(b"K", vlan=9), frame(b"K")):
            s.kernel.send(data)
        s.received()
        assert s.on_wire() == [frame(b"K", vlan=7), frame(b"K", vlan=9), frame(b"K")]
        s.reap()


def tagged_stack(net: Network, address: str, vlan: int, ends: ExitStack) -> Stack:
    """A stack on the network's wire, all of whose frames have a tag there."""
    port = net.default_wire.port(caps=lib.BYPASS_CAP_TX_CSUM | lib.BYPASS_CAP_RX_CSUM)
    filtered = FilterDevice(port.dev, ffi.NULL, None, vlan, judge)
    ends.callback(filtered.close)
    env = ffi.new("struct bypass_env *")
    assert lib.sim_env(net.c, env, vlan) == 0
    flags = lib.BYPASS_F_ARP | lib.BYPASS_F_PING | lib.BYPASS_F_RST
    core = CoreStack(filtered.dev, flags=flags, now_ns=net.now_ns(), env=env, owner=(net, filtered))
    core.addr_add(address, 24)
    number = lib.sim_stack_add(net.c, core.c, port.dev)
    stack = net._stacks[number] = Stack(core, net, name=address, port=port)
    return stack


def test_stacks_talk_through_a_vlan_and_lost_frames(net: Network) -> None:
    """ARP, handshakes, retransmissions and checksums that the device completes, all with a tag in front."""
    with ExitStack() as ends:
        net.wire(faults=Faults(loss=0.03, reorder=0.02, delay_ns=50_000))
        seen = net.raw_port()
        a, b, other = (tagged_stack(net, f"10.0.0.{n}", v, ends) for n, v in ((1, 7), (2, 7), (3, 9)))
        data = random.Random(1).randbytes(300_000)
        with b.create_server(("10.0.0.2", 80)) as server, a.socket() as client, other.socket() as stranger:
            got = exchange(net, client, server, data)
            assert got == data
            stranger.settimeout(1)
            with pytest.raises(OSError, match=r"timed out|No route"):
                stranger.connect(("10.0.0.2", 80))
        assert a.stats()["tcp_out_retransmits"] > 0
        tags = {frame[12:16] for _, frame in seen.recv()}
        assert tags == {b"\x81\x00\x00\x07", b"\x81\x00\x00\x09"}
        for stack in (a, b, other):
            stack.close()


def exchange(net: Network, client: Any, server: Any, data: bytes) -> bytes:
    """Sends all through a connection; what arrives."""
    client.setblocking(False)
    server.setblocking(False)
    client.connect_ex(("10.0.0.2", 80))
    connection, sent, got = None, 0, b""
    while len(got) < len(data):
        assert net.now_ns() < 600 * 10**9, "it stands still"
        net.run(duration_ns=10**6)
        with suppress(BlockingIOError, OSError):
            if sent < len(data):
                sent += client.send(data[sent:])
        with suppress(BlockingIOError):
            connection = connection or server.accept()[0]
            connection.setblocking(False)
            got += connection.recv(1 << 20)
    connection.close()  # type: ignore[union-attr]
    return got


# ---- Anything -------------------------------------------------------------------------------------------------
JUNK = st.one_of(
    st.binary(min_size=14, max_size=80),
    st.builds(
        frame,
        st.sampled_from([STEER, PASS, DROP]),
        st.binary(max_size=40),
        st.sampled_from([None, 7, 8, 4095]),
    ),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wire"), st.lists(JUNK, max_size=40)),
        st.tuples(st.just("kernel"), JUNK),
        st.tuples(st.just("turn"), st.integers(1, 64)),
        st.tuples(st.just("read"), st.none()),
        st.tuples(st.just("time"), st.integers(0, 10**7)),
    ),
    max_size=30,
)


@settings(max_examples=examples(60))
@given(STEPS, st.sampled_from([None, 7]), st.booleans(), st.sampled_from([1, 3, 1000]))
def test_no_frame_is_lost_doubled_or_changed(
    steps: list[tuple[str, object]], vlan: int | None, kernel: bool, at_once: int
) -> None:
    now = 1
    with (
        Network(seed=1) as net,
        Scene(net, vlan=vlan, kernel=kernel, rate=1000, burst=at_once, frames=256) as s,
    ):
        sent: list[bytes] = []
        up: list[bytes] = []
        passed: list[bytes] = []
        for step, what in [*steps, *[("turn", 64)] * 20]:
            if step == "wire":
                s.send(what)  # type: ignore[arg-type]
                sent += what  # type: ignore[operator]
            elif step == "kernel" and s.kernel is not None:
                s.kernel.send(what)  # type: ignore[arg-type]
            elif step == "turn":
                up += s.received(what)  # type: ignore[arg-type]
                s.reap()
                passed += s.to_kernel() if s.kernel is not None else []
            elif step == "time":
                now += what  # type: ignore[operator]
                s.filter.now(now)
        c = s.filter.counters()
        e = s.exception.counters() if s.exception is not None else {}
        received = s.port.stats().rx_frames
        assert c["steered"] + c["passed"] + c["dropped"] == received
        assert c["waiting"] == 0
        assert e.get("passed", 0) == len(passed)
        if kernel:
            assert c["passed"] == len(passed) + e["over_rate"] + e["full"] + e["errors"]
            assert c["steered"] == len(up)
        judged = [data for data in sent if vlan is None or is_tagged(data, vlan)]
        foreign = [data for data in sent if data not in judged]
        assert is_part(up, [data if vlan is None else data[:12] + data[16:] for data in judged])
        assert is_part([data for data in passed if data in judged], judged), "as on the wire"
        assert is_part([data for data in passed if data not in judged], foreign)


def is_tagged(data: bytes, vlan: int) -> bool:
    tci = int.from_bytes(data[14:16], "big")
    return len(data) >= 18 and data[12:14] == b"\x81\x00" and tci & 0xFFF == vlan


def is_part(some: list[bytes], of: list[bytes]) -> bool:
    """In their order, none twice."""
    rest = iter(of)
    return all(any(data == other for other in rest) for data in some)
