# SPDX-License-Identifier: Apache-2.0
"""The simulator keeps its promises: determinism, each impairment as asked for, the clock, clean ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import wire as w
from bypass._core import ffi, lib
from exchange import Conditions, exchange_in, talk_of
from sim_ports import A_MAC, B_MAC, MS, number, pair, send_many, tcp_frame, udp_frame

from bypass.sim import DeviceFaults, Fate, Faults, Network, RawPort, SimulationError
from bypass.testing import play


@pytest.fixture
def net() -> Iterator[Network]:
    with Network(seed=42) as network:
        yield network


# ---- Determinism --------------------------------------------------------------------------------------------------


def recording(seed: int, path: Path) -> bytes:
    """The pcapng file of an exchange with everything that can go wrong."""
    with Network(seed) as net:
        net.wire(
            faults=Faults(
                loss=0.03,
                duplicate=0.03,
                corrupt=0.03,
                reorder=0.03,
                delay_ns=MS,
                jitter_ns=MS,
                rate_bps=10**8,
            )
        )
        a, b = net.stack("10.0.0.1/24", name="a"), net.stack("10.0.0.2/24", name="b")
        with net.capture(path):
            play(net, a, b, talk_of((100_000, 50_000)))
    return path.read_bytes()


def test_same_seed_same_packets(tmp_path: Path) -> None:
    first = recording(1, tmp_path / "1.pcapng")
    assert first == recording(1, tmp_path / "2.pcapng")
    assert first != recording(2, tmp_path / "3.pcapng")
    assert len(first) > 150_000


def test_secrets_of_stacks_follow_the_seed_and_differ() -> None:
    def words(seed: int, stream: int) -> bytes:
        sim = lib.sim_create(seed, 0)
        env = ffi.new("struct bypass_env *")
        assert lib.sim_env(sim, env, stream) == 0
        buf = ffi.new("uint8_t[]", 32)
        assert lib.sim_random(env.ctx, buf, 32) == 0
        out = ffi.buffer(buf)[:]
        lib.sim_destroy(sim)
        return out

    assert words(1, 0) == words(1, 0)
    assert len({words(1, 0), words(1, 1), words(2, 0), words(2, 1)}) == 4


# ---- Impairments --------------------------------------------------------------------------------------------------


def test_perfect_wire_delivers_everything_in_order_at_once(net: Network) -> None:
    a, b = pair(net)
    for i in range(100):
        a.send(udp_frame(i))
    got = b.recv()
    assert [number(f) for _, f in got] == list(range(100))
    assert {t for t, _ in got} == {net.now_ns()}


@pytest.mark.parametrize("kind", ["loss", "duplicate", "corrupt", "reorder"])
def test_each_fault_comes_as_often_as_asked_for_and_alone(net: Network, kind: str) -> None:
    n = 20_000
    got, a = send_many(net, Faults(**{kind: 0.1}), n)
    s = a.stats()
    counts = {"loss": s.lost, "duplicate": s.duplicated, "corrupt": s.corrupted, "reorder": s.reordered}
    # Five standard deviations of a binomial distribution: a fair generator misses it once in two million seeds.
    assert abs(counts.pop(kind) - 0.1 * n) < 5 * (n * 0.1 * 0.9) ** 0.5
    assert not any(counts.values())
    assert len(got) == n - s.lost + s.duplicated
    if kind != "corrupt":
        assert {f for _, f in got} <= {udp_frame(i, 20) for i in range(n)}
    order = [number(f) for _, f in got]
    assert (order == sorted(order)) == (kind != "reorder" and kind != "corrupt")


def test_faults_together_are_each_as_often(net: Network) -> None:
    n = 20_000
    _, a = send_many(net, Faults(loss=0.05, duplicate=0.1, corrupt=0.15, reorder=0.2), n)
    s = a.stats()
    for count, p in ((s.lost, 0.05), (s.duplicated, 0.1), (s.corrupted, 0.15), (s.reordered, 0.2)):
        assert abs(count - p * n) < 5 * (n * p * (1 - p)) ** 0.5


def test_impossible_probabilities_are_refused(net: Network) -> None:
    with pytest.raises(ValueError, match="probability"):
        net.wire(faults=Faults(loss=1.5)).raw_port()
    with pytest.raises(ValueError, match="sum"):
        net.wire(faults=Faults(loss=0.6, corrupt=0.6)).raw_port()


@pytest.mark.parametrize("kind", ["udp", "tcp"])
@pytest.mark.parametrize("size", [0, 1, 20, 1000, 1001])
def test_checksums_find_every_corruption(net: Network, kind: str, size: int) -> None:
    a, b = pair(net, Faults(corrupt=1.0))
    make = udp_frame if kind == "udp" else tcp_frame
    places = set()
    for i in range(2000):
        good = make(i, size)
        a.send(good)
        [(_, bad)] = b.recv()
        assert len(bad) == len(good)
        flips = [(at, x ^ y) for at, (x, y) in enumerate(zip(good, bad, strict=True)) if x != y]
        assert 1 <= sum(mask.bit_count() for _, mask in flips) <= 3
        assert min(at for at, _ in flips) >= 14
        assert len({(at - 14) // 2 for at, _ in flips}) == 1, "more than one 16-bit word"
        places |= {at for at, _ in flips}
        assert not intact(bad), f"not noticed: {flips}"
        assert intact(good)
    if size == 1000:
        assert len(places) > 700, "only a part of the packet is ever hit"


def flipped(a: RawPort, b: RawPort, frame: bytes, times: int) -> dict[int, int]:
    """Bits that corruption flipped, by offset in the frame."""
    masks: dict[int, int] = {}
    for _ in range(times):
        a.send(frame)
        [(_, bad)] = b.recv()
        for at, (x, y) in enumerate(zip(frame, bad, strict=True)):
            if x != y:
                masks[at] = masks.get(at, 0) | x ^ y
    return masks


def test_corruption_spares_what_a_checksum_depends_on_or_does_not_cover(net: Network) -> None:
    a, b = pair(net, Faults(corrupt=1.0))
    masks = flipped(a, b, udp_frame(0, 1), 5000)
    assert masks[14] == 0xF0, "the header length decides what the sum covers"
    assert not {38, 39} & set(masks), "so does UDP's length"
    assert set(masks) == set(range(14, 47)) - {38, 39}, "everything else is hit"

    fragment = w.ipv4("10.0.0.1", "10.0.0.2", w.UDP, bytes(8), frag=1)
    assert {38, 39} <= set(flipped(a, b, w.eth(B_MAC, A_MAC, w.ETH_IPV4, fragment), 2000)), (
        "there is none here"
    )

    packet = b"\x60" + bytes(5) + b"\x11\x40" + bytes(32) + bytes(8)
    masks = flipped(a, b, w.eth(B_MAC, A_MAC, 0x86DD, packet), 3000)
    assert set(masks) == set(range(14 + 8, 14 + 48)), "IPv6 has no checksum of its header"


def intact(frame: bytes) -> bool:
    """What a receiver accepts: lengths that agree, right checksums."""
    ip = frame[14:]
    if ip[0] >> 4 != 4 or ip[0] & 15 != 5 or w.checksum(ip[:20]) or int.from_bytes(ip[2:4], "big") != len(ip):
        return False
    src, dst = socket.inet_ntoa(ip[12:16]), socket.inet_ntoa(ip[16:20])
    return w.checksum(w.pseudo(src, dst, ip[9], len(ip) - 20) + ip[20:]) == 0


def test_frames_without_a_checksum_are_lost_instead_of_corrupted(net: Network) -> None:
    a, b = pair(net, Faults(corrupt=1.0))
    a.send(w.eth(w.BROADCAST, A_MAC, w.ETH_ARP, w.arp(1, A_MAC, "10.0.0.1", bytes(6), "10.0.0.2")))
    assert b.recv() == []
    assert (a.stats().lost, a.stats().corrupted) == (1, 0)


def test_delay_is_exact_and_jitter_keeps_the_order(net: Network) -> None:
    a, b = pair(net, Faults(delay_ns=3 * MS))
    start = net.now_ns()
    a.send(udp_frame(0))
    net.run(duration_ns=3 * MS - 1)
    assert b.recv() == []
    net.run(duration_ns=1)
    assert [t for t, _ in b.recv()] == [start + 3 * MS]

    a.set_faults(Faults(delay_ns=3 * MS, jitter_ns=2 * MS))
    sent = {}
    for i in range(1000):
        a.send(udp_frame(i))
        sent[i] = net.now_ns()
        net.run(duration_ns=100_000)
    net.run(duration_ns=10 * MS)
    got = [(t, number(f)) for t, f in b.recv()]
    assert [i for _, i in got] == list(range(1000))
    delays = [t - sent[i] for t, i in got]
    assert min(delays) >= 3 * MS
    assert max(delays) <= 5 * MS
    assert max(delays) - min(delays) > 1.5 * MS


def test_reordered_frames_come_late_within_their_bound(net: Network) -> None:
    a, b = pair(net, Faults(reorder_ns=5 * MS, delay_ns=MS))
    a.script([Fate.REORDER] * 500)
    start = net.now_ns()
    for i in range(500):
        a.send(udp_frame(i))
    net.run(duration_ns=100 * MS)
    times = [t - start - MS for t, _ in b.recv()]
    assert len(times) == 500
    assert min(times) > 0
    assert max(times) <= 5 * MS
    assert times == sorted(times)


def test_rate_and_queue(net: Network) -> None:
    frame = udp_frame(0, 954)  # 1000 bytes
    assert len(frame) == 1000
    a, b = pair(net, Faults(rate_bps=7_000_000, queue_bytes=50_000))
    start = net.now_ns()
    for _ in range(80):
        a.send(frame)
    net.run(duration_ns=10**9)
    times = [t - start for t, _ in b.recv()]
    # One frame is on the line, 49 wait with it until the queue's 50,000 bytes are used up.
    assert len(times) == 50
    assert a.stats().queue_dropped == 30
    exact = [(i + 1) * 8_000_000_000_000 // 7_000_000 for i in range(50)]
    assert all(abs(t - e) <= 1 for t, e in zip(times, exact, strict=True)), "the rate drifts"


def test_mtu_of_the_wire_drops_what_is_larger(net: Network) -> None:
    a, b = pair(net, Faults(mtu=600))
    a.send(udp_frame(1, 600 - 20 - 8 - 4))
    a.send(udp_frame(2, 600 - 20 - 8 - 3))
    assert [number(f) for _, f in b.recv()] == [1]
    assert a.stats().oversize == 1


def test_script_decides_frame_by_frame(net: Network) -> None:
    a, b = pair(net)
    a.script([Fate.LOSE, Fate.PASS, Fate.DUPLICATE, Fate.REORDER, Fate.PASS])
    for i in range(7):
        a.send(udp_frame(i))
    net.run(duration_ns=10 * MS)
    assert [number(f) for _, f in b.recv()] == [1, 2, 2, 4, 5, 6, 3]


def test_hub_reaches_everybody_and_switch_only_whom_it_concerns(net: Network) -> None:
    for switch, expected in ((False, [1, 1]), (True, [1, 0])):
        segment = net.wire(switch=switch)
        ports = [segment.port(mac=f"02:00:00:00:00:0{i}") for i in (1, 2, 3)]
        ports[0].script([])
        sender = segment.raw_port()
        sender.send(w.eth(B_MAC, A_MAC, w.ETH_IPV4, bytes(46)))
        assert [p.stats().rx_frames for p in ports] == [expected[1], 1, expected[1]]
        sender.send(w.eth(w.BROADCAST, A_MAC, w.ETH_IPV4, bytes(46)))
        assert [p.stats().rx_frames for p in ports] == [expected[1] + 1, 2, expected[1] + 1]


def test_slots_of_the_wire_are_used_again(net: Network) -> None:
    segment = net.wire(faults=Faults(delay_ns=MS))
    a, b = segment.raw_port(), segment.raw_port(in_flight=3)
    for i in range(1000):
        a.send(udp_frame(i, i))
        a.send(udp_frame(i + 1, 7))
        net.run(duration_ns=2 * MS)
        assert [f for _, f in b.recv()] == [udp_frame(i, i), udp_frame(i + 1, 7)]
        assert (b.stats().in_flight_dropped, b.stats().misuse) == (0, 0)


def test_a_raw_port_sees_all_frames_of_a_switch(net: Network) -> None:
    segment = net.wire(switch=True)
    sender, target, watcher = segment.raw_port(), segment.port(mac="02:00:00:00:00:02"), segment.raw_port()
    sender.send(udp_frame(1))
    assert target.stats().rx_frames == 1
    assert [f for _, f in watcher.recv()] == [udp_frame(1)]


def test_memory_on_the_wire_and_in_the_port_is_bounded(net: Network) -> None:
    segment = net.wire(faults=Faults(delay_ns=MS))
    a, b = segment.raw_port(), segment.port(in_flight=10, frames=16)
    for i in range(30):
        a.send(udp_frame(i))
    assert (b.stats().in_flight, b.stats().in_flight_dropped) == (10, 20)
    net.run(duration_ns=2 * MS)
    for i in range(10):
        a.send(udp_frame(i))
    net.run(duration_ns=2 * MS)
    assert (b.stats().rx_waiting, b.stats().no_frame) == (16, 4)


# ---- Clock --------------------------------------------------------------------------------------------------------


def test_idle_network_says_so_instead_of_waiting_for_ever(net: Network) -> None:
    a = net.stack("10.0.0.1/24")
    with a.create_server(("10.0.0.1", 80)) as server, pytest.raises(SimulationError, match="block for ever"):
        server.accept()


def test_run_stops_where_it_was_told(net: Network) -> None:
    start = net.now_ns()
    assert net.run(duration_ns=5 * MS)
    assert net.now_ns() == start + 5 * MS
    assert not net.run(lambda: False, until_ns=start + 9 * MS)
    assert net.now_ns() == start + 9 * MS
    assert net.run(lambda: True)


def test_calls_between_runs_happen_at_the_clock_s_time(net: Network) -> None:
    """A stack that slept for long knows what time it is when the program calls it: its timers start then."""
    stack, raw = net.stack("10.0.0.1/24"), net.raw_port()
    net.run(duration_ns=1000 * 10**9)
    start = net.now_ns()
    with stack.socket() as sock:
        sock.setblocking(False)
        with net.lock:
            stack.core.nexthop_set("10.0.0.9", raw.mac)
        assert sock.connect_ex(("10.0.0.9", 80)) == errno.EINPROGRESS
        net.run(duration_ns=1_500_000_000)
    first, second = (t - start for t, _ in raw.recv())
    assert first == 0
    assert 10**9 <= second < 10**9 + 2 * MS, "RFC 6298: one second"


def test_a_raw_port_may_answer_as_frames_come(net: Network) -> None:
    """A peer in Python: it answers ARP."""
    stack, raw = net.stack("10.0.0.1/24"), net.raw_port(mac="02:00:00:00:00:99")

    def answer(_time_ns: int, frame: bytes) -> None:
        if frame[12:14] == b"\x08\x06" and frame[38:42] == w.ip("10.0.0.9"):
            raw.send(w.eth(A_MAC, raw.mac, w.ETH_ARP, w.arp(2, raw.mac, "10.0.0.9", A_MAC, "10.0.0.1")))

    raw.on_frame = answer
    with stack.socket(socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("10.0.0.9", 9))
        net.run(duration_ns=MS)
    assert stack.stats()["arp_in_reply"] == 1
    raw.on_frame = None
    assert raw.recv() == []


# ---- Ends ---------------------------------------------------------------------------------------------------------


def test_closing_a_network_resets_what_is_open_and_leaves_nothing() -> None:
    net = Network(seed=1)
    a, b = net.stack("10.0.0.1/24"), net.stack("10.0.0.2/24")
    server = b.create_server(("10.0.0.2", 80))
    client = a.create_connection(("10.0.0.2", 80))
    client.sendall(b"unread" * 1000)
    net.run(duration_ns=MS)
    net.close()  # raises when a frame is left
    net.close()
    assert a.port is not None
    with pytest.raises(SimulationError, match="closed"):
        a.port.stats()
    for sock in (server, client):
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            sock.getsockname()
        sock.close()


def test_a_whole_simulation_is_the_same_again() -> None:
    """The building block of the exchange tests: nothing counts but what it is told."""
    bad = Faults(loss=0.05, corrupt=0.05, reorder=0.05, duplicate=0.05, jitter_ns=MS)
    c = Conditions(7, 65536, 4096, (1500, 576), (256, 256), (bad, bad), (DeviceFaults(alloc_fail=0.05),) * 2)
    ends = {exchange_in(c, talk_of((30_000, 20_000))).now_ns() for _ in range(2)}
    assert len(ends) == 1
