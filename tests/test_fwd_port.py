# SPDX-License-Identifier: Apache-2.0
"""The device of shared mode: no frame is ever in two places whatever application and bypass-fwd do in whatever order;
who sleeps is woken and who is awake costs no system call; and bypass-fwd believes nothing that stands in the memory."""

from __future__ import annotations

import errno
import os
import random
import select
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import pytest
from c_library import Library
from fwd_support import DEV, Port, built
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import examples

FRAMES, RING = 64, 16
NEAR_WRAP = st.sampled_from([0, 2**32 - 16, 2**32 - 32, 2**31 - 16])
SOME = st.integers(0, 12)


@pytest.fixture
def port(fwd_library: Library) -> Iterator[Port]:
    p = Port(*fwd_library)
    yield p
    p.close()


class Frames(RuleBasedStateMachine):
    """The model: which frames the caller holds, which of them are being sent, what is on its way each way."""

    @initialize(first=NEAR_WRAP)
    def open(self, first: int) -> None:
        self.p = Port(*built(), first=first, frames=FRAMES, rx_ring=RING, tx_ring=RING)
        self.held: set[int] = set()
        self.sending: set[int] = set()
        self.rx: deque[tuple[bytes, int, int]] = deque()
        self.unpublished = 0
        self.tx: deque[tuple[bytes, int]] = deque()
        self.stamp = 0

    def bytes_of(self, length: int) -> bytes:
        self.stamp = (self.stamp + 1) % 256
        return bytes([self.stamp]) * length

    # ---- the application
    @rule(n=SOME)
    def alloc(self, n: int) -> None:
        free = self.p.nd.free_frames
        got = self.p.alloc(n)
        assert len(got) == min(n, free)
        assert not self.held & set(got)
        assert all(self.p.meta(f).off == 256 and self.p.meta(f).len == 0 for f in got)
        self.held |= set(got)

    @rule(n=SOME)
    def free(self, n: int) -> None:
        chosen = sorted(self.held)[:n]
        self.p.free(chosen)
        self.held -= set(chosen)

    @rule(n=SOME)
    def rx_burst(self, n: int) -> None:
        got = self.p.rx_burst(n)
        assert len(got) == min(n, len(self.rx) - self.unpublished)
        assert (self.p.word("app_sleeps")[0] == 1) == (len(got) < n), "it may sleep now, or comes again"
        for f in got:
            data, queue, entry = self.rx.popleft()
            m = self.p.meta(f)
            assert self.p.data(f) == data
            assert (m.queue, m.entry, m.rule, m.hash) == (queue, entry, 3, 4)
            assert f not in self.held
            self.held.add(f)

    @rule(n=SOME, queue=st.integers(0, 1), length=st.sampled_from([14, 60, 1500, 1792]))
    def tx_burst(self, n: int, queue: int, length: int) -> None:
        chosen = sorted(self.held - self.sending)[:n]
        sent = [(self.bytes_of(length), queue) for _ in chosen]
        for f, (data, _) in zip(chosen, sent, strict=True):
            self.p.write(f, data, queue)
        took = self.p.tx_burst(chosen)
        assert 0 <= took <= len(chosen)
        assert took == len(chosen) or self.p.counters().tx_full
        self.sending |= set(chosen[:took])
        self.tx += sent[:took]

    @rule(n=st.integers(1, 12))
    def reap(self, n: int) -> None:
        done = self.p.reap(n)
        assert set(done) <= self.held & self.sending
        assert len(done) == len(set(done))
        self.sending = {f for f in self.sending if self.p.meta(f).holders & DEV}
        assert not self.sending & set(done)

    @precondition(lambda self: self.sending)
    @rule()
    def a_frame_under_transmission_is_refused(self) -> None:
        before = self.p.counters().tx_invalid
        assert self.p.tx_burst([min(self.sending)]) == -errno.EINVAL
        assert self.p.counters().tx_invalid == before + 1

    @rule(bad=st.sampled_from([(256, 13), (256, 1793), (2047, 14), (2048, 14), (65535, 65535)]))
    def bad_offsets_and_lengths_are_refused(self, bad: tuple[int, int]) -> None:
        for f in sorted(self.held - self.sending)[:1]:
            m = self.p.meta(f)
            kept = m.off
            m.off, m.len = bad
            assert self.p.tx_burst([f]) == -errno.EINVAL
            m.off = kept

    @rule()
    def freeing_what_is_not_held_changes_nothing(self) -> None:
        others = [f for f in range(FRAMES) if f not in self.held][:2]
        before = self.p.audit().bad_free
        self.p.free([*others, FRAMES, 0xFFFFFFFF])
        assert self.p.audit().bad_free == before + len(others) + 2

    @rule()
    def kick(self) -> None:
        assert self.p.kick() == 0

    # ---- bypass-fwd
    @rule(n=SOME, length=st.integers(14, 1792), queue=st.integers(0, 1), entry=st.integers(0, 9))
    def deliver(self, n: int, length: int, queue: int, entry: int) -> None:
        for _ in range(n):
            data = self.bytes_of(length)
            if self.p.deliver(data, queue=queue, entry=entry, rule=3, hash=4, flags=2):
                self.rx.append((data, queue, entry))
                self.unpublished += 1

    @rule()
    def publish(self) -> None:
        self.p.publish()
        self.unpublished = 0

    @rule(n=SOME)
    def take(self, n: int) -> None:
        for got in self.p.take(n):
            assert got == self.tx.popleft()

    @rule()
    def another_bypass_fwd_goes_on_where_this_one_ended(self) -> None:
        self.publish()
        p = self.p
        size = p.lib.port_mem_size(p.config)
        assert p.lib.peer_attach(p.peer, p.mem, size, p.config, p.fwd_end.fileno()) == 0

    # ---- always
    @invariant()
    def every_frame_is_in_one_place(self) -> None:
        if not hasattr(self, "p"):
            return
        audit = self.p.audit()
        assert audit.misplaced == 0
        assert audit.stack + audit.stack_tx == len(self.held)
        assert audit.stack_tx == len(self.sending & self.held)
        self.sending &= self.held
        assert audit.free == self.p.nd.free_frames
        assert audit.rx >= min(RING, audit.rx + audit.free), "a frame is free while reception is short of one"
        assert not self.p.peer.cut
        for name in ("rx_bad_slot", "tx_bad_slot"):
            assert getattr(self.p.peer.n, name) == 0
        assert self.p.counters().rx_bad == 0

    def teardown(self) -> None:
        if hasattr(self, "p"):
            self.p.close()


class TestFrames(Frames.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=examples(100), stateful_step_count=60)

    @pytest.fixture(autouse=True)
    def device(self, fwd_library: Library) -> None:
        """The device is compiled before the first example."""


@pytest.mark.parametrize("how", range(4))
def test_the_audit_notices_when_the_books_are_wrong(port: Port, how: int) -> None:
    port.lib.fwd_spoil(port.port, how)
    assert port.lib.port_audit(port.port, port.ffi.new("struct frame_audit *")) == -errno.EIO


# ---- Making ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 63},
        {"frames": 65537},
        {"rx_ring": 24},
        {"rx_ring": 8},
        {"tx_ring": 0},
        {"tx_ring": 1 << 17},
        {"fill_target": 17},
        {"rx_ring": 64, "fill_target": 64},
        {"mtu": 1779},
        {"mtu": 67},
        {"frame_size": 3000},
        {"frame_size": 2 * 2048, "mtu": 1779 + 2048},
        {"frame_size": 17 * 2048},
        {"queues": 0},
    ],
)
def test_a_configuration_without_sense_is_refused_by_all(fwd_library: Library, wrong: dict[str, int]) -> None:
    ffi, lib = fwd_library
    good = {"frames": 64, "rx_ring": 16, "tx_ring": 16, "mtu": 1500, "queues": 1}
    cfg = ffi.new("struct port_config *", good)
    size = lib.port_mem_size(cfg)
    raw = ffi.new("uint8_t[]", size + 4096)
    mem = ffi.cast("void *", (int(ffi.cast("uintptr_t", raw)) + 4095) & -4096)
    assert lib.port_init(mem, size - 1, cfg) == -errno.ENOMEM
    assert lib.port_init(mem, size, cfg) == 0
    bad = ffi.new("struct port_config *", good | wrong)
    assert lib.port_mem_size(bad) == 0
    assert lib.port_init(mem, size, bad) == -errno.EINVAL
    assert lib.peer_attach(ffi.new("struct peer *"), mem, size, bad, -1) == -errno.EINVAL


def test_jumbo_frames_go_both_ways_and_what_does_not_fit_goes_nowhere(fwd_library: Library) -> None:
    port = Port(*fwd_library, mtu=9000, frame_size=10240)
    try:
        data = random.Random(9).randbytes(9014)
        assert port.deliver(data)
        port.publish()
        assert port.receive() == [data]
        port.send(data)
        assert [sent for sent, _ in port.take()] == [data]
        assert port.deliver(bytes(10240 - 256))
        assert not port.deliver(bytes(10240 - 255))
        port.publish()
        assert port.receive() == [bytes(10240 - 256)]
        port.room = port.ffi.new("uint8_t[]", 9013)  # of the device's frame
        port.send(data)
        assert port.take() == []
        assert port.peer.n.tx_bad_slot == 1
        port.reap()
        port.audit()
    finally:
        port.close()


def test_another_mac_address_and_mtu_of_the_device_are_the_ports(port: Port) -> None:
    mac = bytes.fromhex("020000007701")
    for how, mtu in ((port.receive, 1400), (port.kick, 1500), (port.receive, 9000)):
        port.lib.peer_about(port.peer, mac, mtu)
        how()
        assert bytes(port.nd.mac) == mac
        assert port.nd.mtu == min(mtu, 1778), "never more than a frame holds"
        mac = mac[:5] + bytes([mac[5] + 1])


def test_attaching_to_what_is_no_port_fails(fwd_library: Library) -> None:
    ffi, lib = fwd_library
    raw = ffi.new("uint8_t[]", 12288)
    mem = ffi.cast("void *", (int(ffi.cast("uintptr_t", raw)) + 4095) & -4096)
    assert lib.port_attach(ffi.new("struct port *"), mem, 4096, -1, -1) == -errno.EINVAL


def test_a_relative_goes_on_with_the_same_frames(port: Port) -> None:
    """A second view, as a forked process has: what one allocated, the other frees."""
    other = port.ffi.new("struct port *")
    size = port.lib.port_mem_size(port.config)
    assert port.lib.port_attach(other, port.mem, size, port.eventfd, port.app_end.fileno()) == 0
    got = port.alloc(10)
    assert other.nd.free_frames == port.nd.free_frames + 10
    port.lib.port_sync(other)
    assert other.nd.free_frames == port.nd.free_frames
    nd = port.lib.port_netdev(other)
    nd.ops.free(nd, port.ffi.new("bypass_pkt[]", got), 10)
    assert port.audit().bad_free == 0
    port.lib.port_sync(port.port)
    assert port.nd.free_frames == FRAMES - RING


# ---- Sleep and wake-up -------------------------------------------------------------------------------------------
def readable(port: Port) -> bool:
    return bool(select.select([port.app_end], [], [], 0)[0])


def test_a_busy_application_costs_no_system_call(port: Port) -> None:
    port.lib.port_wait_announced(port.port, 1)
    for i in range(100):
        port.deliver(b"x" * 60)
        port.publish()
        port.send(bytes([i]) * 60)
        assert port.kick() == 0
        assert len(port.receive()) == 1
        assert len(port.take()) == 1
        port.reap()
    assert port.counters().rings == 0
    assert port.counters().rings_saved == 100
    assert port.peer.n.rings == 0


def test_a_sleeping_application_is_woken_once(port: Port) -> None:
    assert port.receive() == []  # from here on it may sleep
    for _ in range(5):
        port.deliver(b"x" * 60)
        port.publish()
    assert readable(port)
    assert port.peer.n.rings == 1
    assert len(port.receive()) == 5
    assert not readable(port)
    assert port.counters().woken == 1


def test_who_got_fewer_frames_than_asked_for_is_woken_too(port: Port) -> None:
    """bypass_poll() does not ask again then, and its caller sleeps."""
    port.deliver(b"x" * 60)
    port.publish()
    assert len(port.receive()) == 1
    port.deliver(b"x" * 60)
    port.publish()
    assert readable(port)
    assert len(port.receive()) == 1
    assert not readable(port)


def test_who_got_all_it_asked_for_comes_again_without_being_rung(port: Port) -> None:
    for _ in range(3):
        for _ in range(8):
            port.deliver(b"x" * 60)
        port.publish()
        port.free(port.rx_burst(8))
    assert port.peer.n.rings == 0


def test_frames_that_come_just_before_sleeping_are_seen(port: Port) -> None:
    port.lib.port_wait_announced(port.port, 1)
    port.deliver(b"x" * 60)
    port.publish()
    assert port.peer.n.rings == 0
    assert port.lib.port_wait_begin(port.port) == 1


def test_who_announces_sleep_polls_without_being_rung(port: Port) -> None:
    port.lib.port_wait_announced(port.port, 1)
    for _ in range(10):
        assert port.receive() == []
        port.deliver(b"x" * 60)
        port.publish()
        assert len(port.receive()) == 1
    assert port.peer.n.rings == 0
    assert port.lib.port_wait_begin(port.port) == 0
    port.deliver(b"x" * 60)
    port.publish()
    assert readable(port)
    assert len(port.receive()) == 1
    assert not readable(port)


def test_a_ring_that_comes_after_its_frames_were_taken_does_not_keep_it_awake(port: Port) -> None:
    """bypass-fwd shows frames, the application takes them and goes to sleep, and only then the ring arrives."""
    assert port.receive() == []
    port.word("app_sleeps")[0] = 2  # PORT_RUNG: said, not yet written
    assert port.receive() == []
    port.fwd_end.send(b"\0")
    assert readable(port)
    assert port.receive() == []
    assert not readable(port)
    port.deliver(b"x" * 60)
    port.publish()
    assert readable(port), "it still asks for wake-ups"


def test_bypass_fwd_is_rung_only_while_it_sleeps(port: Port) -> None:
    def rung() -> bool:
        try:
            return os.eventfd_read(port.eventfd) > 0
        except BlockingIOError:
            return False

    port.send(b"x" * 60)
    assert port.kick() == 0
    assert not rung()
    port.lib.peer_sleeps(port.peer, 1)
    assert port.lib.peer_tx_avail(port.peer, 64) == 1  # what came before is seen
    port.send(b"x" * 60)
    assert (port.kick(), port.kick()) == (0, 0)
    assert rung()
    assert port.counters().rings == 1
    port.lib.peer_sleeps(port.peer, 0)
    assert port.kick() == 0
    assert not rung()


# ---- Rings -------------------------------------------------------------------------------------------------------
def test_a_slot_is_used_again_when_its_frame_was_reaped_and_not_before(port: Port) -> None:
    held = port.alloc(RING + 8)
    for f in held:
        port.write(f, b"x" * 60)
    assert port.tx_burst(held) == RING
    assert len(port.take()) == RING
    assert port.reap(1) == held[:1]
    assert port.tx_burst(held[RING:]) == 1
    assert port.reap() == held[1:RING]
    assert port.tx_burst(held[RING + 1 :]) == 7


def test_a_position_of_bypass_fwd_without_sense_is_not_believed(port: Port) -> None:
    port.send(b"x" * 60)
    for word in ("rx_done", "tx_done"):
        for value in (RING + 1, 2**31, 2**32 - 1):
            port.word(word)[0] = value
            assert port.rx_burst() == []
            assert port.reap() == []
    assert port.audit().tx == 1


# ---- The interface -----------------------------------------------------------------------------------------------
def test_a_link_that_is_down_is_told_and_recovers(port: Port) -> None:
    port.lib.peer_link(port.peer, 1)
    port.send(b"x" * 60)
    assert port.kick() == -errno.ENETDOWN
    port.lib.peer_link(port.peer, 0)
    assert port.kick() == 0
    assert len(port.take()) == 1


@pytest.mark.parametrize("who", ["bypass-fwd", "application"])
def test_when_it_is_gone_every_frame_comes_back(port: Port, who: str) -> None:
    held = port.alloc(4)
    for f in held:
        port.write(f, b"x" * 60)
    assert port.tx_burst(held) == 4
    port.send(b"y" * 60)
    port.deliver(b"z" * 60)
    port.publish()
    if who == "application":
        port.lib.port_set_gone(port.port)
    else:
        port.lib.peer_link(port.peer, 2)
    assert len(port.receive()) == 1  # what was there
    with pytest.raises(OSError, match="No such device"):
        port.rx_burst()
    assert port.kick() == -errno.ENXIO
    assert port.tx_burst(held) == -errno.ENXIO
    assert sorted(port.reap()) == sorted(held)
    port.free(held)
    assert port.counters().tx_abandoned == 5
    audit = port.audit()
    assert (audit.free, audit.rx) == (FRAMES - RING, RING)


# ---- Nonsense ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", [RING + 1, 1000, 2**31, 2**32 - 1])
@pytest.mark.parametrize("word", ["rx_posted", "tx_posted"])
def test_a_position_without_sense_cuts_the_application_off(port: Port, word: str, by: int) -> None:
    done = {"rx_posted": "rx_done", "tx_posted": "tx_done"}[word]
    port.word(word)[0] = (port.word(done)[0] + by) % 2**32
    assert not port.deliver(b"x" * 60) if word == "rx_posted" else port.take() == []
    assert port.peer.cut
    assert port.take() == []
    assert not port.deliver(b"x" * 60)


@pytest.mark.parametrize(
    ("word", "value"),
    [(0, FRAMES), (0, 2**32 - 1), (1, 13 << 16 | 256), (1, 1793 << 16), (1, 14 << 16 | 2035), (1, 2**32 - 1)],
)
def test_a_descriptor_without_sense_is_skipped(port: Port, word: int, value: int) -> None:
    port.send(b"x" * 60)
    port.send(b"y" * 60)
    port.lib.fwd_tx_slot(port.port, 0)[word] = value
    assert [data for data, _ in port.take()] == [b"y" * 60]
    assert port.peer.n.tx_bad_slot == 1


def test_queues_that_there_are_not_become_some_that_there_are(port: Port) -> None:
    port.send(b"x" * 60)
    port.lib.fwd_tx_slot(port.port, 0)[2] = 0xFFFF
    assert port.take() == [(b"x" * 60, 1)]


def test_a_posted_frame_that_there_is_not_is_not_written(port: Port) -> None:
    port.lib.fwd_rx_slot(port.port, 0)[0] = FRAMES
    assert not port.deliver(b"x" * 60)
    assert port.deliver(b"y" * 60)
    port.publish()
    assert port.peer.n.rx_bad_slot == 1
    assert port.word("rx_done")[0] == 2
    frame = port.lib.fwd_rx_slot(port.port, 1)[0]
    assert port.ffi.buffer(port.nd.mem + frame * 2048 + 256, 60)[:] == b"y" * 60


def test_a_full_doorbell_does_not_block(port: Port) -> None:
    with suppress(BlockingIOError):
        while port.fwd_end.send(b"\0", socket.MSG_DONTWAIT):
            pass
    port.word("app_sleeps")[0] = 1
    port.deliver(b"x" * 60)
    port.publish()
    assert port.peer.n.rings_failed == 1


def test_an_application_that_has_hung_up_does_not_hurt(port: Port) -> None:
    port.app_end.close()
    port.word("app_sleeps")[0] = 1
    port.deliver(b"x" * 60)
    port.publish()
    assert port.peer.n.rings_failed == 1


@pytest.mark.parametrize("seed", range(20))
def test_any_memory_is_survived(port: Port, seed: int) -> None:
    """The whole memory is random, again and again; the sanitizers watch (SAN=1)."""
    rng = random.Random(seed)
    size = port.lib.port_mem_size(port.config)
    memory = port.ffi.buffer(port.mem, size)
    taken = 0
    for _ in range(50):
        memory[:] = rng.randbytes(size)
        for word, done in (("rx_posted", "rx_done"), ("tx_posted", "tx_done")):
            if rng.random() < 0.9:  # else it would be cut off before anything happens
                port.word(word)[0] = (getattr(port.peer, done) + rng.randrange(RING + 1)) % 2**32
        for _ in range(8):
            port.deliver(rng.randbytes(rng.randrange(14, 1793)))
        port.publish()
        taken += len(port.take())
        if port.peer.cut:
            port.lib.peer_attach(port.peer, port.mem, size, port.config, port.fwd_end.fileno())
        if rng.random() < 0.5:  # descriptors with sense among the others
            port.lib.fwd_tx_slot(port.port, port.peer.tx_done)[0] = 0
            port.lib.fwd_tx_slot(port.port, port.peer.tx_done)[1] = 60 << 16 | 256
            port.word("tx_posted")[0] = (port.peer.tx_done + 1) % 2**32
            taken += len(port.take())
    assert taken, "something was taken, or nothing was tried"
