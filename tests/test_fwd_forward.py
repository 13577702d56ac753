# SPDX-License-Identifier: Apache-2.0
"""bypass-fwd between its ports and the interface: what one application does costs another a bounded number of frames,
rates hold over virtual time, nothing that was checked is lost, and it sleeps only when nothing is to be done."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator

import pytest
from c_library import Library
from fwd_support import HOST, PEER, UDP, World, eth, ip, udp
from hypothesis import given, settings
from hypothesis import strategies as st
from support import examples

SECOND = 1_000_000_000
FOREVER = 2**64 - 1


@pytest.fixture
def world(fwd_library: Library) -> Iterator[World]:
    """Applications 1 to 3 with UDP ports 5001 to 5003."""
    w = World(*fwd_library)
    for app in (1, 2, 3):
        w.add(app)
        assert w.lease(app, UDP, HOST, 5000 + app) == 0
    yield w
    w.close()


def frame(app: int, number: int = 0, size: int = 100) -> bytes:
    data = number.to_bytes(4, "big").ljust(size - 42, b"\0")
    return eth(ip(udp(data, 5000 + app)))


def who(sent: bytes) -> tuple[int, int]:
    """(application, number) of frame()."""
    return int.from_bytes(sent[34:36], "big") - 5000, int.from_bytes(sent[42:46], "big")


def fill(world: World, app: int, first: int, size: int = 100) -> int:
    """Posts as many frames as fit. How many."""
    port, n = world.ports[app], 0
    port.reap()
    while got := port.alloc(1):
        port.write(got[0], frame(app, first + n, size))
        took = port.tx_burst(got)
        port.free(got)
        if not took:
            break
        n += 1
    return n


# ---- One does not hurt another -----------------------------------------------------------------------------------
def test_a_flood_leaves_the_others_their_share_of_every_round(world: World) -> None:
    sent: list[tuple[int, int]] = []
    posted = {1: 0, 2: 0, 3: 0}
    for _ in range(50):
        for app in (1, 2):
            posted[app] += fill(world, app, posted[app])
        world.ports[3].send(frame(3, posted[3]))
        posted[3] += 1
        world.round()
        batch = [who(f) for f in world.sent()]
        assert sum(app == 3 for app, _ in batch) == 1, "what one frame waits for is a round"
        assert all(n <= 32 for n in Counter(app for app, _ in batch).values())
        sent += batch
    per_app = Counter(app for app, _ in sent)
    assert per_app[1] == per_app[2] == 32 * 50
    for app in (1, 2, 3):
        numbers = [n for a, n in sent if a == app]
        assert numbers == list(range(len(numbers))), "in order, each once"


def test_a_slow_interface_is_shared_and_loses_nothing(world: World) -> None:
    """It takes 10 frames a round; three applications want to send 96."""
    world.lib.world_tx_limit(world.world, 10)
    sent: list[tuple[int, int]] = []
    posted = {1: 0, 2: 0, 3: 0}
    for _ in range(300):
        for app in posted:
            posted[app] += fill(world, app, posted[app])
        world.round()
        sent += [who(f) for f in world.sent()]
    assert len(sent) == 3000
    shares = Counter(app for app, _ in sent)
    assert shares.keys() == posted.keys()
    assert max(shares.values()) - min(shares.values()) <= 32
    for app in posted:
        numbers = [n for a, n in sent if a == app]
        assert numbers == list(range(len(numbers)))
    assert world.f.n.tx_dropped == 0


def test_a_port_that_is_full_loses_only_its_own(world: World) -> None:
    sizes = {1: 0, 2: 0}
    for i in range(300):
        for app in (1, 2):
            world.receive(eth(ip(udp(b"%d" % i, 53, 5000 + app), src=PEER, dst=HOST)))
        world.round()
        sizes[2] += len(world.ports[2].receive())  # 1 does not read
    assert sizes[2] == 300
    assert world.stats(2).rx_full == 0
    assert world.stats(1).rx_packets == 64
    assert world.stats(1).rx_full == 300 - 64
    assert len(world.ports[1].receive()) == 64


def test_an_application_that_is_cut_off_is_not_served_and_the_others_are(world: World) -> None:
    world.ports[1].send(frame(1))
    world.ports[1].word("tx_posted")[0] = 5000
    for app in (1, 2):
        world.receive(eth(ip(udp(b"x", 53, 5000 + app), src=PEER, dst=HOST)))
    assert [who(f) for f in world.pass_on(2, frame(2, 9))] == [(2, 9)]
    assert len(world.ports[2].receive()) == 1
    assert [world.stats(app).cut for app in (1, 2, 3)] == [1, 0, 0]


def test_descriptors_without_sense_are_counted_against_its_rate(world: World) -> None:
    """Else they would be a way to keep bypass-fwd busy for nothing."""
    world.rate(1, packets=10, packets_burst=5)
    port = world.ports[1]
    for i in range(40):
        port.send(frame(1, i))
        port.lib.fwd_tx_slot(port.port, i)[0] = 2**32 - 1
    world.round()
    assert world.stats(1).tx_bad_slot == 6  # the burst, and the one that makes it wait


# ---- Rates -------------------------------------------------------------------------------------------------------
@given(
    rate=st.sampled_from([20_000, 1_000_000, 12_500_000, 1_250_000_000]),
    burst=st.sampled_from([0, 3000, 100_000]),
    size=st.sampled_from([60, 700, 1514]),
    step=st.sampled_from([1000, 100_000, 10_000_000]),
)
@settings(max_examples=examples(40))
def test_bytes_over_any_time_stay_below_rate_and_burst(
    fwd_library: Library, rate: int, burst: int, size: int, step: int
) -> None:
    w = World(*fwd_library)
    try:
        w.add(1)
        assert w.lease(1, UDP, HOST, 5001) == 0
        w.rate(1, bytes=rate, bytes_burst=burst)
        start, total, posted, times = w.now, 0, 0, []
        for _ in range(200):
            posted += fill(w, 1, posted, size)
            w.round()
            for f in w.sent():
                total += len(f)
                times.append((w.now, total))
            until = w.sleep()
            if until is not None:  # it waits for its rate, not for us
                w.now = min(until, w.now + step)
        lasted = (w.now - start) / SECOND
        assert total <= rate * lasted + burst + size
        assert total >= rate * lasted * 0.99 - size
        for a, before in times[:: len(times) // 20 or 1]:
            for b, after in times[:: len(times) // 20 or 1]:
                if b > a:
                    assert after - before <= rate * (b - a) / SECOND + burst + size
    finally:
        w.close()


def test_packets_are_limited_too(world: World) -> None:
    world.rate(1, packets=100, packets_burst=10)
    posted = total = 0
    for _ in range(1000):
        posted += fill(world, 1, posted)
        world.round()
        total += len(world.sent())
        world.now += SECOND // 100
    assert 1000 <= total <= 1000 + 11
    assert world.stats(1).tx_limited > 0


def test_who_waits_for_its_rate_loses_nothing_and_delays_nobody(world: World) -> None:
    world.rate(1, bytes=100_000, bytes_burst=1000)
    posted, sent = 0, []
    for i in range(200):
        posted += fill(world, 1, posted)
        world.ports[2].send(frame(2, i))
        world.round()
        world.ports[2].reap()
        sent += [who(f) for f in world.sent()]
        assert sent[-1] == (2, i) or (2, i) in sent[-40:]
        world.now += SECOND // 1000
    numbers = [n for app, n in sent if app == 1]
    assert numbers == list(range(len(numbers)))
    assert 190 <= len(numbers) <= 220  # 100 bytes a millisecond, and the burst


def test_it_sleeps_until_the_rate_lets_it_go_on(world: World) -> None:
    world.rate(1, bytes=100_000, bytes_burst=1000)
    fill(world, 1, 0)
    assert world.round() == 11  # the burst, and the one that makes it wait
    world.sent()
    until = world.sleep()
    assert until is not None
    assert world.now < until <= world.now + 2_000_000
    world.now = until - 1000
    assert world.round() == 0
    world.now = until
    assert world.round() == 1


def test_a_new_rate_is_in_force_at_once(world: World) -> None:
    world.rate(1, bytes=100, bytes_burst=0)
    fill(world, 1, 0)
    world.round()
    assert len(world.sent()) == 1
    world.rate(1)
    world.round()
    assert len(world.sent()) == 32


# ---- Sleep -------------------------------------------------------------------------------------------------------
def test_it_sleeps_for_ever_when_nobody_wants_anything(world: World) -> None:
    world.round()
    assert world.sleep() == FOREVER
    assert all(p.word("fwd_sleeps")[0] == 1 for p in world.ports.values())
    world.ports[2].send(frame(2))
    assert world.ports[2].kick() == 0
    assert world.ports[2].counters().rings == 1
    world.lib.forward_wake(world.f)
    assert all(p.word("fwd_sleeps")[0] == 0 for p in world.ports.values())


def test_it_does_not_sleep_when_a_frame_was_posted_meanwhile(world: World) -> None:
    world.round()
    world.ports[3].send(frame(3))
    assert world.ports[3].kick() == 0
    assert world.ports[3].counters().rings == 0  # it is awake
    assert world.sleep() is None


def test_it_does_not_sleep_while_the_device_has_more_to_do(world: World) -> None:
    world.lib.world_kick_result(world.world, -errno.EAGAIN)
    world.round()
    assert world.sleep() is None
    world.lib.world_kick_result(world.world, 0)
    world.lib.world_tx_limit(world.world, 0)
    world.ports[1].send(frame(1))
    world.round()
    assert world.f.pending == 1
    assert world.sleep() is None


def test_a_link_that_is_down_is_told_to_all_and_lets_it_sleep(world: World) -> None:
    world.lib.world_kick_result(world.world, -errno.ENETDOWN)
    world.lib.world_tx_limit(world.world, 0)
    world.ports[1].send(frame(1))
    world.round()
    until = world.sleep()
    assert until is not None
    assert until < FOREVER
    assert [p.kick() for p in world.ports.values()] == [-errno.ENETDOWN] * 3
    world.add(4)
    assert world.ports[4].kick() == -errno.ENETDOWN  # who comes later knows it too
    world.lib.world_kick_result(world.world, 0)
    world.lib.world_tx_limit(world.world, 1000)
    world.lib.forward_link(world.f, 0)
    world.round()
    assert [who(f) for f in world.sent()] == [(1, 0)]


# ---- Ports -------------------------------------------------------------------------------------------------------
def test_as_many_ports_as_it_has(fwd_library: Library) -> None:
    w = World(*fwd_library)
    for app in range(1, 257):
        w.add(app, frames=64, rx_ring=16, tx_ring=16)
        assert w.lease(app, UDP, HOST, 5000 + app) == 0
    about = w.ffi.new("struct fwd_port_add *", {"app": 300, "cfg": w.ports[1].config[0]})
    size = w.lib.port_mem_size(w.ports[1].config)
    assert w.lib.forward_port_add(w.f, about, w.ports[1].mem, size, -1) == -errno.ENOSPC
    about.app = 7
    assert w.lib.forward_port_add(w.f, about, w.ports[1].mem, size, -1) == -errno.EEXIST
    about.app = 0
    assert w.lib.forward_port_add(w.f, about, w.ports[1].mem, size, -1) == -errno.EINVAL
    for app in range(1, 257):
        w.ports[app].send(frame(app, app))
    rounds = 0
    sent: set[tuple[int, int]] = set()
    while len(sent) < 256:
        w.round()
        sent |= {who(f) for f in w.sent()}
        rounds += 1
        assert rounds <= 8
    assert sent == {(app, app) for app in range(1, 257)}
    w.close()


def test_a_port_that_goes_takes_everything_of_it_along(world: World) -> None:
    assert world.lib.forward_entry(world.f, 5, 1) == 0
    fill(world, 1, 0)
    world.remove(1)
    world.receive(eth(ip(udp(b"x", 53, 5001), src=PEER, dst=HOST)), entry=5)
    world.round()
    assert world.sent() == []
    assert world.f.n.rx_nobody == 1
    assert world.lib.forward_port_del(world.f, 1) == -errno.ENOENT
    world.add(9)  # in its place
    world.receive(eth(ip(udp(b"x", 53, 5001), src=PEER, dst=HOST)), entry=5)
    world.round()
    assert world.ports[9].receive() == []


def test_no_frames_to_copy_to_is_no_loss(fwd_library: Library) -> None:
    w = World(*fwd_library, frames=64)
    w.add(1)
    assert w.lease(1, UDP, HOST, 5001) == 0
    w.lib.world_tx_limit(w.world, 40)
    sent: list[int] = []
    posted = 0
    for _ in range(40):
        posted += fill(w, 1, posted)
        w.round()
        sent += [who(f)[1] for f in w.sent()]
    assert sent == list(range(len(sent)))
    assert len(sent) >= 32 * 39
    w.close()
