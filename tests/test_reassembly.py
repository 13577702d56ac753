# SPDX-License-Identifier: Apache-2.0
"""Reassembly of IPv4 datagrams: whole or not at all, bounded in time and frames."""

from __future__ import annotations

import itertools
import random

import pytest
from bypass._core import lib
from conversation import PEER, US, Conversation
from hypothesis import given, settings
from hypothesis import strategies as st
from support import examples
from wire import ICMP, MF, TCP, UDP, echo, fragments, icmp, ipv4, tcp, udp

from bypass.core import Config


def pattern(n: int) -> bytes:
    return bytes(i % 251 for i in range(n))


def datagram(n: int, src: str = PEER) -> bytes:
    return ipv4(src, US, UDP, udp(src, US, 9, 7, pattern(n)))


def piece(offset: int, data: bytes, *, more: bool, ident: int = 1, proto: int = UDP) -> bytes:
    return ipv4(PEER, US, proto, data, ident=ident, frag=(MF if more else 0) | offset // 8)


def test_three_pieces_in_every_order_become_one_datagram() -> None:
    pieces = fragments(datagram(40), 16, 1)
    assert len(pieces) == 3
    with Conversation() as c:
        sock = c.udp(7)
        for order in itertools.permutations(pieces):
            c.inject_ip(*order)
            assert c.read(sock) == (pattern(40), (PEER, 9))
            assert c.held() == 0
        assert c.counted()["ip_frag_reassembled"] == 6


@pytest.mark.parametrize("n", [1473, 2000, 3000, 9000, 65507])
def test_datagrams_larger_than_a_frame_arrive_whole(n: int) -> None:
    with Conversation(frames=1024) as c:
        sock = c.udp(7)
        pieces = fragments(datagram(n), 1480, 1)
        random.Random(n).shuffle(pieces)
        c.inject_ip(*pieces)
        assert c.read(sock) == (pattern(n), (PEER, 9))
        assert c.held() == 0
        c.nothing()


def test_datagrams_interleave() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        many = [fragments(datagram(50 + i), 24, i) for i in range(10)]
        for row in zip(*many, strict=True):
            c.inject_ip(*row)
        assert sorted(len(c.read(sock)[0]) for _ in many) == list(range(50, 60))


def test_the_key_is_source_destination_protocol_and_identification() -> None:
    first, second = fragments(datagram(40), 24, 1)
    other_id = fragments(datagram(40), 24, 2)[1]
    other_source = fragments(datagram(40, src="192.0.2.3"), 24, 1)[1]
    other_proto = piece(24, second[20:], more=False, proto=ICMP)
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(first, other_id, other_source, other_proto)
        assert c.stack.recv(sock, 100) == -11
        c.inject_ip(second)
        assert c.read(sock)[0] == pattern(40)


def test_a_reassembled_ping_is_answered() -> None:
    with Conversation() as c:
        c.inject_ip(*fragments(ipv4(PEER, US, ICMP, echo(8, 1, 1, pattern(1000))), 400, 5))
        [reply] = c.sent_ip()
        assert reply.payload == echo(0, 1, 1, pattern(1000))


def test_a_tcp_segment_in_pieces_is_a_segment() -> None:
    segment = tcp(PEER, US, 9, 7, 1, 0, 2, 100)
    with Conversation() as c:
        c.inject_ip(*fragments(ipv4(PEER, US, TCP, segment), 8, 5))
        [reset] = c.sent_ip()  # nobody listens
        assert reset.proto == TCP
        assert reset.payload[13] & 4


def test_a_tcp_segment_or_ping_larger_than_a_frame_is_dropped_and_counted() -> None:
    with Conversation() as c:
        c.inject_ip(*fragments(ipv4(PEER, US, TCP, tcp(PEER, US, 9, 7, 1, 0, 2, 100, bytes(3000))), 1480, 5))
        c.inject_ip(*fragments(ipv4(PEER, US, ICMP, echo(8, 1, 1, bytes(3000))), 1480, 6))
        c.nothing()
        assert c.counted()["ip_frag_too_large"] == 2
        assert c.held() == 0


def test_a_large_datagram_with_a_bad_checksum_is_dropped() -> None:
    packet = bytearray(datagram(5000))
    packet[4000] ^= 1
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(*fragments(bytes(packet), 1480, 5))
        assert c.stack.recv(sock, 100) == -11
        assert c.counted()["udp_in_bad_checksum"] == 1


def test_a_large_datagram_that_is_longer_than_it_came_is_dropped() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        lie = ipv4(PEER, US, UDP, udp(PEER, US, 9, 7, bytes(3000), size=3009, csum=0))
        c.inject_ip(*fragments(lie, 1480, 5))
        assert c.stack.recv(sock, 100) == -11
        assert c.counted()["udp_in_bad_length"] == 1


def test_a_large_datagram_finds_its_buffer_full_or_the_chunks_used_up() -> None:
    with Conversation(config=Config(conns=16, chunks=8)) as c:
        sock = c.udp(7)
        c.inject_ip(*fragments(datagram(9000), 1480, 5))
        assert c.counted()["udp_in_no_memory"] == 1
        c.stack.setopt(sock, lib.BYPASS_SO_RCVBUF, 4096)
        c.inject_ip(*fragments(datagram(9000), 1480, 6))
        assert c.counted()["udp_in_full"] == 1
        assert c.stack.recv(sock, 100) == -11
        assert c.held() == 0
        assert c.stack.audit()["chunks"] == 0


def test_a_large_datagram_without_checksum_is_taken() -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(*fragments(ipv4(PEER, US, UDP, udp(PEER, US, 9, 7, pattern(3000), csum=0)), 1480, 5))
        assert c.read(sock)[0] == pattern(3000)


def test_a_large_datagram_for_nobody_is_unreachable_and_quotes_its_first_piece() -> None:
    with Conversation() as c:
        pieces = fragments(datagram(3000), 1480, 5)
        c.inject_ip(*pieces)
        [error] = c.sent_ip()
        assert error.payload == icmp(3, 3, bytes(4), pieces[0][:548])


def test_a_reassembled_datagram_for_nobody_is_quoted_as_if_it_had_come_whole() -> None:
    with Conversation() as c:
        c.inject_ip(*fragments(datagram(100), 40, 5))
        [error] = c.sent_ip()
        whole = ipv4(PEER, US, UDP, datagram(100)[20:], ident=5, frag=0)
        assert error.payload == icmp(3, 3, bytes(4), whole)


def test_the_first_piece_may_have_options() -> None:
    whole = udp(PEER, US, 9, 7, pattern(40))
    first = ipv4(PEER, US, UDP, whole[:24], ident=1, frag=MF, options=b"\1" * 40)
    second = piece(24, whole[24:], more=False)
    with Conversation() as c:
        sock = c.udp(7)
        for order in ((first, second), (second, first)):
            c.inject_ip(*order)
            assert c.read(sock)[0] == pattern(40)


def test_padding_behind_the_udp_length_is_cut_off() -> None:
    for n in (40, 3000):
        inner = udp(PEER, US, 9, 7, pattern(n)) + b"\xee" * 600
        with Conversation() as c:
            sock = c.udp(7)
            c.inject_ip(*fragments(ipv4(PEER, US, UDP, inner), 1480 if n > 40 else 24, 5))
            assert c.read(sock)[0] == pattern(n)


# ---- Attacks ------------------------------------------------------------------------------------------------------
def test_an_exact_duplicate_does_no_harm() -> None:
    first, second, third = fragments(datagram(40), 16, 1)
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(first, first, third, third, second)
        assert c.read(sock)[0] == pattern(40)
        assert c.counted()["ip_frag_duplicate"] == 2


OVERLAPS = {
    "the same place, other bytes": piece(16, b"\xff" * 16, more=True),
    "shifted back": piece(8, bytes(16), more=True),
    "shifted forth": piece(24, bytes(16), more=True),
    "inside": piece(16, bytes(8), more=True),
    "around": piece(8, bytes(40), more=True),
    "over the header": piece(0, bytes(24), more=True),
}


@pytest.mark.parametrize("what", OVERLAPS)
def test_an_overlap_condemns_the_datagram(what: str) -> None:
    """RFC 5722, for IPv4 too: what is left of it is dropped as well, until its time is over."""
    pieces = fragments(datagram(56), 16, 1)
    with Conversation() as c:
        sock = c.udp(7)
        c.inject_ip(pieces[0], pieces[1], OVERLAPS[what])
        assert c.held() == 0
        c.inject_ip(*pieces)
        assert c.stack.recv(sock, 100) == -11
        moved = c.counted()
        assert moved["ip_frag_overlap"] == 1
        assert moved["ip_frag_after_overlap"] == 4
        c.advance(30)
        c.inject_ip(*pieces)
        assert c.read(sock)[0] == pattern(56)


BAD = {
    "beyond 65535": piece(65528, bytes(8), more=False),
    "not a multiple of eight": piece(0, bytes(20), more=True),
    "empty": piece(16, b"", more=True),
}


@pytest.mark.parametrize("what", BAD)
def test_an_impossible_fragment_is_counted_and_not_kept(what: str) -> None:
    with Conversation() as c:
        c.inject_ip(BAD[what])
        assert c.counted() == {"ip_frag_in": 1, "ip_frag_bad": 1}
        assert c.held() == 0


def test_two_ends_condemn_the_datagram() -> None:
    with Conversation() as c:
        c.inject_ip(piece(32, bytes(8), more=False), piece(16, bytes(8), more=False))
        assert c.counted()["ip_frag_bad"] == 1
        c.inject_ip(piece(32, bytes(8), more=False, ident=2), piece(48, bytes(8), more=False, ident=2))
        assert c.counted()["ip_frag_bad"] == 1
        assert c.held() == 0


def test_an_end_in_front_of_what_came_condemns_the_datagram() -> None:
    with Conversation() as c:
        c.inject_ip(piece(32, bytes(8), more=True), piece(16, bytes(8), more=False))
        assert c.counted()["ip_frag_bad"] == 1
        assert c.held() == 0


def test_bytes_behind_the_end_condemn_the_datagram() -> None:
    with Conversation() as c:
        c.inject_ip(piece(16, bytes(8), more=False), piece(24, bytes(8), more=True))
        assert c.counted()["ip_frag_bad"] == 1
        assert c.held() == 0


def test_header_and_payload_together_may_not_exceed_65535() -> None:
    """Each piece is possible; with the options of the first the whole is not."""
    first = ipv4(PEER, US, UDP, bytes(1400), ident=1, frag=MF, options=b"\1" * 40)
    rest = [piece(at, bytes(1400), more=True) for at in range(1400, 64400, 1400)]
    last = piece(64400, bytes(1112), more=False)
    with Conversation(frames=1024) as c:
        c.inject_ip(first, *rest, last)
        assert c.counted()["ip_frag_bad"] == 1
        assert c.held() == 0


# ---- Time and memory ----------------------------------------------------------------------------------------------
def test_after_thirty_seconds_the_sender_is_told_and_the_frames_are_free() -> None:
    first, second, _ = fragments(datagram(40), 16, 1)
    with Conversation() as c:
        c.inject_ip(first)
        c.advance(29)
        c.inject_ip(second)  # does not prolong it
        c.nothing()
        assert c.held() == 2
        c.advance(1)
        [error] = c.sent_ip()
        assert error.payload == icmp(11, 1, bytes(4), first)
        assert c.held() == 0
        assert c.counted()["ip_frag_timeout"] == 1


def test_without_the_first_piece_nobody_is_told() -> None:
    with Conversation() as c:
        c.inject_ip(fragments(datagram(40), 16, 1)[1])
        c.advance(31)
        c.nothing()
        assert c.counted()["ip_frag_timeout"] == 1


def test_the_number_of_datagrams_is_bounded() -> None:
    with Conversation(config=Config(conns=64, frags=8)) as c:
        sock = c.udp(7)
        for i in range(20):
            c.inject_ip(fragments(datagram(40), 24, i)[0])
        assert c.held() == 8
        assert c.counted()["ip_frag_too_many"] == 12
        for i in range(12, 20):  # the latest are still there
            c.inject_ip(fragments(datagram(40), 24, i)[1])
            assert c.read(sock)[0] == pattern(40)


def test_the_frames_are_bounded_to_an_eighth_of_the_pool() -> None:
    with Conversation(frames=256) as c:
        for i in range(100):
            c.inject_ip(*fragments(datagram(4000), 1480, i)[:2])
            assert c.held() <= 32
        assert c.stack.audit()["frags"] <= 16


def test_one_datagram_cannot_take_more_than_the_share() -> None:
    with Conversation(frames=256) as c:
        for i in range(100):
            c.inject_ip(piece(8 + 16 * i, bytes(8), more=True))
        assert c.held() == 0
        moved = c.counted()
        assert moved["ip_frag_too_many"] == 1
        assert moved["ip_frag_after_overlap"] >= 60


def test_256_pieces_are_the_most() -> None:
    with Conversation(frames=4096) as c:
        c.inject_ip(*(piece(8 * i, bytes(8), more=True) for i in range(300)))
        assert c.held() == 0
        assert c.counted()["ip_frag_too_many"] == 1


def test_fragments_end_with_the_stack() -> None:
    with Conversation() as c:
        c.inject_ip(*(fragments(datagram(40), 16, i)[1] for i in range(20)))
        assert c.held() == 20


# ---- Against a model ----------------------------------------------------------------------------------------------
@st.composite
def jumbled(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int]]]:
    """A payload and ranges (start, end) of it that are sent, in this order; most of them cover it, some overlap."""
    n = draw(st.integers(1, 30))
    cuts = sorted(draw(st.sets(st.integers(1, n), max_size=6)) | {0, n})
    ranges = list(itertools.pairwise(cuts)) if len(cuts) > 1 else [(0, n)]
    extra = draw(st.lists(st.sampled_from(ranges), max_size=2))
    if draw(st.booleans()):
        start = draw(st.integers(0, n - 1))
        extra.append((start, draw(st.integers(start + 1, n))))
    lost = draw(st.integers(0, 9))
    sent = draw(st.permutations(ranges + extra))
    return draw(st.binary(min_size=8 * n, max_size=8 * n)), list(sent) if lost else list(sent)[1:]


def model(ranges: list[tuple[int, int]], total: int) -> bool:
    """Whether the datagram is delivered: all of it came before any range overlapped a kept one inexactly."""
    kept: set[tuple[int, int]] = set()
    for r in ranges:
        if r in kept:
            continue
        if any(r[0] < k[1] and k[0] < r[1] for k in kept):
            return False
        kept.add(r)
        if sum(e - s for s, e in kept) == total:
            return True
    return False


@settings(max_examples=examples(400))
@given(jumbled())
def test_what_is_delivered_is_what_the_model_says(case: tuple[bytes, list[tuple[int, int]]]) -> None:
    payload, ranges = case
    whole = udp(PEER, US, 9, 7, payload[8:])
    total = len(whole) // 8
    with Conversation() as c:
        sock = c.udp(7)
        for start, end in ranges:
            c.inject_ip(piece(start * 8, whole[start * 8 : end * 8], more=end < total))
        expected = model(ranges, total) and (total > 1 or bool(ranges))
        got = c.stack.recvfrom(sock, 1000)
        if expected:
            assert not isinstance(got, int)
            assert got[0] == payload[8:]
        elif (0, total) not in ranges:  # a piece that is the whole is no fragment
            assert got == -11
