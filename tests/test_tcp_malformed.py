# SPDX-License-Identifier: Apache-2.0
"""TCP: segments cut off, bent and lying: nothing crashes, each is counted, no connection changes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from bypass._core import lib
from conversation import PEER, US
from hypothesis import given, settings
from hypothesis import strategies as st
from support import examples
from tcp_talk import Talk, stream
from wire import TCP, checksum, ipv4, pseudo

# what -> the spec of a good segment
SEGMENTS = {
    "syn": "S 0:0 win 65535 <mss 1460, nop, ws 7, nop, nop, ts 5 0>",
    "data": "P. 1:41 ack 1 win 65535 <nop, nop, ts 1005 0>",
    "fin": "F. 1:11 ack 1 win 65535",
    "reset": "R. 1:1 ack 1",
    "unknown options": "P. 1:5 ack 1 <hex fd0a010203040506, nop, nop, hex 220401020000>",
}
REFUSED = ("tcp_in_short", "tcp_in_bad_offset", "tcp_in_bad_checksum", "tcp_in_bad_options")


def listening(t: Talk) -> None:
    t.server()


def connecting(t: Talk) -> None:
    t.client()
    t.out()


def half_open(t: Talk) -> None:
    t.server()
    t.peer("S 0:0")
    t.out()


def established(t: Talk) -> None:
    t.established()


STATES = {f.__name__: f for f in (listening, connecting, half_open, established)}


def tcp_of(packet: bytes) -> bytes:
    return packet[20:]


def rechecked(segment: bytes) -> bytes:
    """With a checksum that is right for whatever stands there."""
    if len(segment) < 18:
        return segment
    zero = segment[:16] + b"\0\0" + segment[18:]
    value = checksum(pseudo(PEER, US, TCP, len(segment)) + zero)
    return segment[:16] + value.to_bytes(2, "big") + segment[18:]


@pytest.mark.parametrize("begin", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("what", SEGMENTS)
def test_a_segment_cut_off_anywhere_is_refused_and_counted(begin: Callable[[Talk], None], what: str) -> None:
    with Talk() as t:
        begin(t)
        before = (t.state(), t.stack.audit())
        good = tcp_of(t.segment(SEGMENTS[what]))
        t.counted()
        for n in range(len(good)):
            t.inject_ip(ipv4(PEER, US, TCP, good[:n]))
            moved = t.counted()
            assert sum(moved.get(k, 0) for k in REFUSED) == 1, (n, moved)
        t.silence(0.1)
        assert (t.state(), t.stack.audit()) == before


@pytest.mark.parametrize("what", SEGMENTS)
def test_no_flipped_bit_goes_unnoticed(what: str) -> None:
    with Talk() as t:
        t.established()
        good = tcp_of(t.segment(SEGMENTS[what]))
        t.counted()
        for i in range(len(good) * 8):
            bad = bytearray(good)
            bad[i // 8] ^= 1 << (i % 8)
            t.inject_ip(ipv4(PEER, US, TCP, bytes(bad)))
        moved = t.counted()
        assert sum(moved.get(k, 0) for k in REFUSED) == len(good) * 8
        t.silence(0.1)
        assert t.state() == "ESTABLISHED"


@pytest.mark.parametrize("begin", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("what", SEGMENTS)
def test_a_segment_cut_off_by_its_sender_never_crashes(begin: Callable[[Talk], None], what: str) -> None:
    """The checksum is right: only the lengths lie."""
    for n in range(18, 80):
        with Talk() as t:
            begin(t)
            good = tcp_of(t.segment(SEGMENTS[what]))
            t.inject_ip(ipv4(PEER, US, TCP, rechecked(good[:n])))
            t.sent()


@pytest.mark.parametrize("offset", range(16))
def test_every_data_offset_is_bounded_by_the_packet(offset: int) -> None:
    with Talk() as t:
        t.established()
        good = bytearray(tcp_of(t.segment("P. 1:21 ack 1")))
        good[12] = offset << 4
        good[20:40] = b"\x01" * 20
        t.inject_ip(ipv4(PEER, US, TCP, rechecked(bytes(good))))
        moved = t.counted()
        if 5 <= offset <= 10:
            assert t.read() == (b"\x01" * (40 - 4 * offset) or -11)
        else:
            assert moved["tcp_in_bad_offset"] == 1
        t.sent()


def test_reserved_bits_and_ecn_flags_are_ignored() -> None:
    """RFC 9293 3.1: must be ignored in received segments."""
    with Talk() as t:
        t.established()
        good = bytearray(tcp_of(t.segment("P. 1:21 ack 1")))
        good[12] |= 0x0F
        good[13] |= 0xC0
        t.inject_ip(ipv4(PEER, US, TCP, rechecked(bytes(good))))
        assert t.read() == stream(1, 21)
        t.sent()


@given(
    seed=st.integers(0, 1 << 32),
    begin=st.sampled_from(list(STATES.values())),
    specs=st.lists(st.sampled_from(list(SEGMENTS.values())), min_size=1, max_size=12),
)
@settings(max_examples=examples(150))
def test_bent_segments_never_break_the_stack(
    seed: int, begin: Callable[[Talk], None], specs: list[str]
) -> None:
    """Some bytes of good segments are changed and the checksum is made right. Whatever is answered is well-formed."""
    rng = random.Random(seed)
    with Talk(rcvbuf=rng.choice([4096, 1 << 20]), chunks=rng.choice([8, 1024])) as t:
        begin(t)
        for spec in specs:
            bad = bytearray(tcp_of(t.segment(spec)))
            for _ in range(rng.randrange(4)):
                bad[rng.randrange(4, len(bad))] = rng.choice([0, 1, 2, 8, 127, 255, rng.randrange(256)])
            if rng.random() < 0.2:
                bad = bad[: rng.randrange(len(bad))]
            t.inject_ip(ipv4(PEER, US, TCP, rechecked(bytes(bad))))
            if rng.random() < 0.3:
                t.advance(rng.choice([0.05, 1, 100]))
        for frame in t.sent():
            t.parse(frame)
        if t.sock >= 0:
            t.stack.abort(t.sock)
            assert t.stack.audit()["handles"] == (1 if t.listener >= 0 else 0)
        elif t.listener >= 0:
            assert t.stack.ready(t.listener) in (0, lib.BYPASS_IN)
        t.sent()
