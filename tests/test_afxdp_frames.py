# SPDX-License-Identifier: Apache-2.0
"""No frame is ever in two places, whatever the stack and the kernel do in whatever order, and however the ring
indices wrap. The device is the real one with its debug checks; the kernel is a fake that keeps its own books."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from afxdp_fake import DEBUG, FakeDevice, build
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import examples

QUEUES, RING, FRAMES = 2, 8, 64
NEAR_WRAP = st.sampled_from([0, 1, 0xFFFFFFFF, 0xFFFFFFFA, 0x7FFFFFFC])
SOME = st.integers(0, 12)
QUEUE = st.integers(0, QUEUES - 1)
STACK, DEV, RX = 1, 2, 4

_built: Any = None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    global _built
    if _built is None:
        _built = build(tmp_path_factory.mktemp("afxdp"), "afxdp_fake", *DEBUG)
    return _built


class Frames(RuleBasedStateMachine):
    """The model: which frames the caller holds, which of those the device sends, what is on its way each way."""

    @initialize(first=NEAR_WRAP)
    def open(self, first: int) -> None:
        self.d = FakeDevice(
            *_built,
            first=first,
            queue_count=QUEUES,
            ring_size=RING,
            fill_size=16,
            fill_target=16,
            frames=FRAMES,
        )
        self.held: set[int] = set()
        self.sending: set[int] = set()
        self.rx: list[deque[tuple[int, int, int]]] = [deque() for _ in range(QUEUES)]
        self.tx: list[deque[int]] = [deque() for _ in range(QUEUES)]
        self.stamp = 0
        self.bad_completions = 0

    def next_stamp(self) -> int:
        self.stamp = (self.stamp + 1) % 256
        return self.stamp

    # ---- the caller
    @rule(n=SOME)
    def alloc(self, n: int) -> None:
        free = self.d.nd.free_frames
        got = self.d.alloc(n)
        assert len(got) == min(n, free)
        assert not self.held & set(got)
        assert all(self.d.meta(p).off == 128 and self.d.meta(p).len == 0 for p in got)
        self.held |= set(got)

    @rule(n=SOME)
    def free(self, n: int) -> None:
        chosen = sorted(self.held)[:n]
        self.d.free(chosen)
        self.held -= set(chosen)

    @rule(n=SOME)
    def rx_burst(self, n: int) -> None:
        for p in self.d.rx_burst(n):
            m = self.d.meta(p)
            byte, length, entry = self.rx[m.queue].popleft()
            assert self.d.data(p) == bytes([byte]) * length
            assert bool(m.flags & 2) == (entry >= 0)
            assert (m.entry, m.rule, m.hash) == ((entry, 3, 4) if entry >= 0 else (0, 0, 0))
            assert p not in self.held
            self.held.add(p)

    @rule(n=SOME, queue=QUEUE, length=st.sampled_from([14, 60, 1500, 1920]))
    def tx_burst(self, n: int, queue: int, length: int) -> None:
        chosen = [p for p in sorted(self.held - self.sending) if self.d.meta(p).off <= 2048 - length][:n]
        stamps = []
        for p in chosen:
            stamps.append(self.next_stamp())
            self.d.write(p, bytes([stamps[-1]]) * length, queue)
        took = self.d.tx_burst(chosen)
        assert 0 <= took <= len(chosen)
        assert took == len(chosen) or len(self.tx[queue]) + took == RING
        self.sending |= set(chosen[:took])
        self.tx[queue] += stamps[:took]

    @rule(n=st.integers(1, 12))
    def reap(self, n: int) -> None:
        done = self.d.reap(n)
        assert set(done) <= self.held & self.sending
        assert len(done) == len(set(done))
        self.sending -= set(done)
        self.sending = {p for p in self.sending if self.d.meta(p).holders & DEV}

    @precondition(lambda self: self.sending)
    @rule()
    def a_frame_under_transmission_is_refused(self) -> None:
        before = self.total("tx_invalid")
        assert self.d.tx_burst([min(self.sending)]) == -errno.EINVAL
        assert self.total("tx_invalid") == before + 1

    @rule(pkt=st.sampled_from([FRAMES, 0xFFFFFFFF]))
    def a_frame_that_is_none_is_refused(self, pkt: int) -> None:
        assert self.d.tx_burst([pkt]) == -errno.EINVAL

    @rule(bad=st.sampled_from([(128, 13), (128, 1921), (2047, 14), (2048, 14), (65535, 65535)]))
    def bad_offsets_and_lengths_are_refused(self, bad: tuple[int, int]) -> None:
        for p in sorted(self.held - self.sending)[:1]:
            m = self.d.meta(p)
            kept = m.off
            m.off, m.len = bad
            assert self.d.tx_burst([p]) == -errno.EINVAL
            m.off = kept

    @rule()
    def freeing_what_is_not_held_changes_nothing(self) -> None:
        others = [p for p in range(FRAMES) if p not in self.held][:2]
        before = self.d.audit().bad_free
        self.d.free([*others, FRAMES, 0xFFFFFFFF])
        assert self.d.audit().bad_free == before + len(others) + 2

    # ---- the kernel
    @rule(queue=QUEUE, n=SOME, length=st.integers(14, 1792), entry=st.integers(-1, 9))
    def packets_arrive(self, queue: int, n: int, length: int, entry: int) -> None:
        for _ in range(n):
            byte = self.next_stamp()
            result = self.d.lib.fake_rx(self.d.dev, queue, length, byte, entry)
            assert result in (0, -errno.ENOBUFS, -errno.ENOSPC)
            if result == 0:
                self.rx[queue].append((byte, length, entry))

    def expect_sent(self, queue: int, seen: list[int]) -> None:
        assert seen == [self.tx[queue].popleft() for _ in seen]

    @rule(queue=QUEUE, n=SOME)
    def kernel_takes(self, queue: int, n: int) -> None:
        self.expect_sent(queue, self.d.kernel_tx(queue, n))

    @rule(queue=QUEUE, n=SOME, reverse=st.booleans())
    def kernel_completes(self, queue: int, n: int, reverse: bool) -> None:
        self.d.lib.fake_complete(self.d.dev, queue, n, reverse)

    @rule(
        answer=st.sampled_from([0, errno.EAGAIN, errno.EBUSY, errno.ENOBUFS, errno.ENETDOWN]),
        budget=st.integers(0, 5),
        wakeup=st.booleans(),
    )
    def kick(self, answer: int, budget: int, wakeup: bool) -> None:
        left = [self.d.lib.fake_tx_left(self.d.dev, q) for q in range(QUEUES)]
        for queue in range(QUEUES):
            self.d.lib.fake_wakeup(self.d.dev, queue, wakeup, False)
        self.d.lib.fake_kick_answers(-answer, budget)
        self.d.lib.fake_kicks()
        result = self.d.kick()
        calls = self.d.lib.fake_kicks()
        assert result in (0, -errno.EAGAIN, -errno.ENETDOWN)
        if not wakeup or not any(left):
            assert calls == 0
            assert result == 0
        else:
            assert calls >= sum(1 for n in left if n)
            assert calls <= 8 * QUEUES
        for queue in range(QUEUES):
            for _ in range(left[queue] - self.d.lib.fake_tx_left(self.d.dev, queue)):
                self.tx[queue].popleft()

    @rule(queue=QUEUE, addr=st.integers(0, 2**64 - 1), length=st.integers(0, 2**32 - 1))
    def nonsense_is_received(self, queue: int, addr: int, length: int) -> None:
        while any(self.rx):  # so that the next descriptor is the bad one
            self.rx_burst(64)
        frame = addr // 2048
        if frame < FRAMES and self.d.meta(frame).holders == RX:
            return  # the frame would really be lost to the fake's books
        before = self.total("rx_bad")
        self.d.lib.fake_bad_rx(self.d.dev, queue, addr, length)
        assert self.d.rx_burst(64) == []
        assert self.total("rx_bad") == before + 1

    @rule(queue=QUEUE, addr=st.integers(0, 2**64 - 1))
    def nonsense_is_completed(self, queue: int, addr: int) -> None:
        frame = addr // 2048
        n = self.d.counters(queue)
        if (frame < FRAMES and self.d.meta(frame).holders & DEV) or n.tx_packets == n.tx_completed:
            return  # a frame that may complete; or nothing can, and nobody looks
        self.bad_completions += self.d.lib.fake_bad_completion(self.d.dev, queue, addr)
        self.reap(64)

    @rule(queue=QUEUE, by=st.sampled_from([17, 1000, 0x80000000, 0xFFFFFF00]))
    def torn_indices_are_not_believed(self, queue: int, by: int) -> None:
        self.rx_burst(64)  # what is there honestly
        self.reap(64)
        self.d.lib.fake_torn_indices(self.d.dev, queue, by)
        assert self.d.rx_burst(64) == []
        assert self.d.reap(64) == []
        self.d.lib.fake_torn_indices(self.d.dev, queue, 2**32 - by)

    # ---- always
    def total(self, name: str) -> int:
        return sum(getattr(self.d.counters(q), name) for q in range(QUEUES))

    @invariant()
    def every_frame_is_in_one_place(self) -> None:
        if not hasattr(self, "d"):
            return
        assert self.d.lib.fake_violations() == 0, self.d.ffi.string(self.d.lib.fake_violation())
        assert self.total("completion_bad") <= self.bad_completions
        audit = self.d.audit()
        assert audit.misplaced == 0
        assert audit.stack + audit.stack_tx == len(self.held)
        assert audit.stack_tx == len(self.sending & self.held)
        self.sending &= self.held  # of the others only the device knows
        census = self.d.census()
        for frame in range(FRAMES):
            holders = self.d.meta(frame).holders
            assert bool(holders & STACK) == (frame in self.held)
            assert census[frame] == (0 if holders == STACK else 1), (frame, holders)

    def teardown(self) -> None:
        if hasattr(self, "d"):
            self.d.close()


class TestFrames(Frames.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=examples(100), stateful_step_count=60)

    @pytest.fixture(autouse=True)
    def device(self, built: Any) -> None:
        """The device is compiled before the first example."""


@pytest.fixture
def dev(built: Any) -> Iterator[FakeDevice]:
    d = FakeDevice(*built, queue_count=2, ring_size=16, frames=128, fill_target=16)
    yield d
    assert d.lib.fake_violations() == 0
    d.close()


@pytest.mark.parametrize("how", range(5))
def test_the_checks_notice_when_the_books_are_wrong(built: Any, how: int) -> None:
    ffi, lib = built
    d = FakeDevice(ffi, lib, ring_size=16, frames=64, fill_target=16)
    d.lib.fake_spoil(d.dev, how)
    assert lib.afxdp_audit(d.dev, ffi.new("struct frame_audit *")) == -errno.EIO
    d.free(d.alloc(1))
    assert d.lib.fake_violations() == 2
    d.close()


def send(d: FakeDevice, n: int, queue: int = 0) -> tuple[list[int], int]:
    pkts = d.alloc(n)
    for i, p in enumerate(pkts):
        d.write(p, bytes([i]) * 60, queue)
    return pkts, d.tx_burst(pkts)


def test_a_full_tx_ring_gives_backpressure_and_recovers(dev: FakeDevice) -> None:
    pkts, took = send(dev, 20)
    assert took == 16
    assert dev.counters().tx_full == 1
    assert dev.tx_burst(pkts[16:]) == 0
    dev.lib.fake_torn_indices(dev.dev, 0, 1000)  # the kernel cannot have consumed what was never there
    assert dev.tx_burst(pkts[16:]) == 0
    dev.lib.fake_torn_indices(dev.dev, 0, 2**32 - 1000)
    assert len(dev.kernel_tx(0, 16)) == 16
    assert dev.tx_burst(pkts[16:]) == 4


def test_a_full_completion_ring_gives_backpressure_and_recovers(dev: FakeDevice) -> None:
    sent = 0
    while True:  # the kernel takes no more than it can complete, and nothing is reaped
        pkts, took = send(dev, 8)
        sent += took
        dev.free(pkts)
        if took < 8:
            break
        dev.kernel_tx(0, 64)
        dev.lib.fake_complete(dev.dev, 0, 64, 0)
    assert dev.audit().tx == sent == 32
    assert dev.kick() == -errno.EAGAIN
    assert dev.reap(64) == []
    assert dev.audit().tx == 16
    assert dev.kick() == 0
    dev.lib.fake_complete(dev.dev, 0, 64, 0)
    dev.reap(64)
    assert dev.audit().tx == 0
    assert dev.counters().tx_completed == sent


def test_no_kick_while_need_wakeup_is_clear(dev: FakeDevice) -> None:
    dev.lib.fake_wakeup(dev.dev, 0, 0, 0)
    send(dev, 3)
    assert dev.kick() == 0
    assert dev.lib.fake_kicks() == 0
    assert dev.counters().kicks_saved == 1
    dev.lib.fake_wakeup(dev.dev, 0, 1, 0)
    assert dev.kick() == 0
    assert dev.lib.fake_kicks() == 1
    assert dev.kick() == 0  # nothing left to send
    assert dev.lib.fake_kicks() == 0


def test_the_fill_ring_is_kicked_when_it_asks(dev: FakeDevice) -> None:
    dev.lib.fake_wakeup(dev.dev, 1, 1, 1)
    assert dev.kick() == 0
    assert dev.lib.fake_kicks() == 1
    assert dev.counters(1).kicks_rx == 1


def test_eagain_on_the_kick_loses_nothing(dev: FakeDevice) -> None:
    dev.lib.fake_kick_answers(-errno.EAGAIN, 1)
    send(dev, 12)
    assert dev.kick() == -errno.EAGAIN  # eight calls, a packet each
    assert dev.kick() == 0
    assert dev.counters().kick_again == 12
    assert dev.lib.fake_complete(dev.dev, 0, 64, 0) == 12
    assert dev.counters().tx_packets == 12


def test_ebusy_is_counted_and_the_packet_never_sent_again(dev: FakeDevice) -> None:
    """The kernel has taken the packet off the ring and completes it: the rest goes on without it."""
    dev.lib.fake_kick_answers(-errno.EBUSY, 1)
    pkts, _ = send(dev, 3)
    assert dev.kick() == 0
    assert dev.counters().kick_busy == 3
    assert dev.counters().tx_packets == 3
    dev.lib.fake_complete(dev.dev, 0, 64, 0)
    assert sorted(dev.reap(64)) == sorted(pkts)


@pytest.mark.parametrize("err", [errno.ENOBUFS, errno.ENOMEM])
def test_a_kick_short_of_memory_is_tried_again(dev: FakeDevice, err: int) -> None:
    dev.lib.fake_kick_answers(-err, 0)
    send(dev, 3)
    assert dev.kick() == -errno.EAGAIN
    assert dev.counters().kick_failed == 1
    dev.lib.fake_kick_answers(0, 64)
    assert dev.kick() == 0


def test_a_link_that_is_down_keeps_its_packets(dev: FakeDevice) -> None:
    dev.lib.fake_kick_answers(-errno.ENETDOWN, 0)
    send(dev, 3)
    assert dev.kick() == -errno.ENETDOWN
    dev.lib.fake_kick_answers(0, 64)
    assert dev.kick() == 0
    assert dev.lib.fake_complete(dev.dev, 0, 64, 0) == 3


def test_a_device_that_is_gone_gives_every_transmission_back(dev: FakeDevice) -> None:
    mine, _ = send(dev, 5)
    theirs, _ = send(dev, 7, queue=1)
    dev.free(theirs)
    dev.kernel_tx(1, 3)
    dev.lib.fake_kick_answers(-errno.ENXIO, 0)
    assert dev.kick() == -errno.ENXIO
    with pytest.raises(OSError, match="No such device or address"):
        dev.rx_burst(8)
    assert dev.tx_burst(mine) == -errno.ENXIO
    assert sorted(dev.reap(3) + dev.reap(64)) == sorted(mine)
    assert dev.reap(64) == []
    audit = dev.audit()
    assert (audit.tx, audit.stack_tx, audit.stack) == (0, 0, 5)
    dev.free(mine)
    assert dev.audit().free + dev.audit().rx == dev.frames
    assert dev.counters(0).tx_abandoned == 12


def test_fill_starvation_is_counted_and_ends_when_frames_come_back(dev: FakeDevice) -> None:
    """The stack keeps all it gets; nothing but its free() can end the famine, and it does so at once."""
    taken = dev.alloc(128)
    kept = []
    while dev.lib.fake_rx(dev.dev, 0, 60, 1, -1) == 0:
        kept += dev.rx_burst(1)
    assert dev.lib.fake_rx_frames(dev.dev, 0) == 0
    assert dev.counters().fill_starved > 0
    assert dev.alloc(1) == []
    dev.lib.fake_wakeup(dev.dev, 0, 1, 1)
    dev.lib.fake_kicks()
    dev.free(kept[:3])
    assert dev.lib.fake_rx_frames(dev.dev, 0) == 3
    assert dev.lib.fake_kicks() == 1  # the driver sleeps on its fill ring: it has to be told
    assert dev.lib.fake_rx(dev.dev, 0, 60, 9, -1) == 0
    assert dev.data(dev.rx_burst(8)[0]) == bytes([9]) * 60
    dev.free(taken)
    assert dev.lib.fake_rx_frames(dev.dev, 0) == 16


def test_starvation_ends_when_a_transmission_completes(dev: FakeDevice) -> None:
    pkts, took = send(dev, 16)
    assert took == 16
    others = dev.alloc(128)
    for _ in range(16):
        assert dev.lib.fake_rx(dev.dev, 0, 60, 1, -1) == 0
    kept = dev.rx_burst(16)
    dev.free(pkts)
    assert (len(kept), dev.lib.fake_rx_frames(dev.dev, 0)) == (16, 0)
    dev.kick()
    dev.lib.fake_complete(dev.dev, 0, 16, 0)
    assert dev.reap(64) == []
    assert dev.lib.fake_rx_frames(dev.dev, 0) == 16
    dev.free(others)


def test_reception_comes_before_allocation(dev: FakeDevice) -> None:
    """Unacknowledged data must not take the frames in which its acknowledgement has to arrive."""
    dev.alloc(128)
    for _ in range(4):
        assert dev.lib.fake_rx(dev.dev, 0, 60, 1, -1) == 0
    got = dev.rx_burst(4)
    dev.free(got)
    assert dev.alloc(4) == []
    assert dev.lib.fake_rx_frames(dev.dev, 0) == 16


def test_a_full_rx_ring_recovers(dev: FakeDevice, built: Any) -> None:
    d = FakeDevice(*built, ring_size=8, fill_size=32, fill_target=32, frames=128)
    results = [d.lib.fake_rx(d.dev, 0, 60, i, -1) for i in range(10)]
    assert results == [0] * 8 + [-errno.ENOSPC] * 2
    assert len(d.rx_burst(64)) == 8
    assert d.lib.fake_rx(d.dev, 0, 60, 99, -1) == 0
    assert d.data(d.rx_burst(64)[0]) == bytes([99]) * 60
    d.close()


@pytest.mark.parametrize(
    ("off", "length"), [(256, 1793), (256, 13), (256, 0), (256, 2**32 - 1), (15, 60), (2040, 14)]
)
def test_a_received_frame_with_nonsense_in_its_descriptor_goes_back_to_the_pool(
    dev: FakeDevice, off: int, length: int
) -> None:
    assert dev.lib.fake_odd_rx(dev.dev, 0, off, length) == 0
    assert dev.lib.fake_rx(dev.dev, 0, 60, 7, -1) == 0
    (pkt,) = dev.rx_burst(8)
    assert dev.data(pkt) == bytes([7]) * 60
    assert dev.counters().rx_bad == 1
    audit = dev.audit()
    assert (audit.stack, audit.rx, audit.free) == (1, 32, 95)


def test_no_queue_starves_another(dev: FakeDevice) -> None:
    for queue in (0, 1):
        for i in range(8):
            assert dev.lib.fake_rx(dev.dev, queue, 60, i, -1) == 0
    assert [dev.meta(p).queue for p in dev.rx_burst(4) + dev.rx_burst(4)] == [0] * 4 + [1] * 4


def test_a_verdict_of_an_earlier_life_is_not_believed(dev: FakeDevice) -> None:
    """A frame comes back with the magic number still in front of where packets begin, once from a verdict and
    once from data that was sent."""
    for _ in range(128):
        dev.lib.fake_rx(dev.dev, 0, 60, 1, 5)
        got = dev.rx_burst(1)
        assert dev.meta(got[0]).flags & 2
        dev.free(got)
    pkts = dev.alloc(96)
    for p in pkts:
        dev.write(p, (0x42595053).to_bytes(4, "little") * 200)
    dev.free(pkts)
    for _ in range(128):
        assert dev.lib.fake_rx(dev.dev, 0, 60, 1, -1) == 0
        got = dev.rx_burst(1)
        m = dev.meta(got[0])
        assert (m.flags, m.entry, m.rule, m.hash) == (0, 0, 0, 0)
        dev.free(got)


@pytest.mark.parametrize("rx_headroom", [0, 64])
def test_the_masked_base_is_recycled(built: Any, rx_headroom: int) -> None:
    d = FakeDevice(*built, ring_size=16, frames=64, fill_target=16, rx_headroom=rx_headroom, frame_size=4096)
    for _ in range(200):
        assert d.lib.fake_rx(d.dev, 0, 3000, 1, 1) == 0
        got = d.rx_burst(1)
        assert d.meta(got[0]).off == 256 + rx_headroom
        assert d.data(got[0]) == bytes([1]) * 3000
        d.free(got)
    assert set(d.census()) == {1}
    d.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ring_size": 0},
        {"ring_size": 24},
        {"fill_size": 24},
        {"frames": 32},
        {"frames": 1 << 25},
        {"frame_size": 1024},
        {"frame_size": 3000},
        {"fill_target": 64},
        {"fill_target": 8},
        {"queue_count": 0},
        {"queue_count": 65},
        {"queue_count": 2, "queues": [1, 1]},
        {"queue_count": 4, "frames": 64},
        {"tx_headroom": 100},
        {"mode": 3},
    ],
)
def test_a_configuration_without_sense_has_no_size(built: Any, wrong: dict[str, Any]) -> None:
    ffi, lib = built
    good = {"queue_count": 1, "ring_size": 32, "frames": 128, "frame_size": 2048}
    assert lib.afxdp_mem_size(ffi.new("struct afxdp_config *", good)) > 128 * 2048
    assert lib.afxdp_mem_size(ffi.new("struct afxdp_config *", good | wrong)) == 0
