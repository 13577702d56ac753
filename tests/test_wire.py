# SPDX-License-Identifier: Apache-2.0
"""Whole frames: whatever arrives, the stack counts it once, gives its frame back and goes on; what it sends, an
independent parser (dpkt) reads as it was meant."""

from __future__ import annotations

import dpkt
from bypass._core import lib
from conversation import ALL, KERNEL, OUR_MAC, PEER, PEER_MAC, US, Conversation
from hypothesis import given, settings
from hypothesis import strategies as st
from support import examples

from bypass.testing import mutated_frames
from bypass.testing.wire import ETH_IPV4, ICMP, UDP, checksum, echo, eth, ipv4

REFUSED = ("eth_in", "arp_in", "ip_in", "ip_frag", "icmp_in", "udp_in", "tcp_in")


@settings(max_examples=examples(300))
@given(st.lists(mutated_frames(), min_size=1, max_size=30), st.sampled_from([ALL, KERNEL]))
def test_no_frame_harms_the_stack(rain: list[bytes], flags: int) -> None:
    with Conversation(flags=flags) as c:
        sock = c.udp(7)
        c.udp(80, peer=(PEER, 9))
        listener = c.stack.socket(lib.BYPASS_STREAM)
        c.stack.bind(listener, ("0.0.0.0", 9))
        c.stack.listen(listener, 4)
        for frame in rain:
            c.inject(frame)
        while not isinstance(c.stack.recvfrom(sock, 2000), int):
            pass
        c.sent()
        c.advance(100)
        c.sent()
        if flags & lib.BYPASS_F_PING:
            c.stack.nexthop_set(PEER, PEER_MAC)
            c.inject_ip(ipv4(PEER, US, ICMP, echo(8, 1, 1, b"alive?")))
            assert echo(0, 1, 1, b"alive?") in [p.payload for p in c.sent_ip()]


@settings(max_examples=examples(300))
@given(mutated_frames())
def test_each_frame_is_counted_under_one_name(frame: bytes) -> None:
    """Exactly one reason to refuse, or what it was; TCP counts its segments and their fates by itself."""
    with Conversation() as c:
        c.udp(7)
        c.inject(frame)
        moved = {k: v for k, v in c.counted().items() if k.startswith(REFUSED)}
        reasons = {k for k in moved if k not in ("tcp_in", "ip_frag_in", "icmp_in_error")}
        if not any(k.startswith("tcp") for k in moved):
            assert sum(moved.values()) >= 1
            assert len(reasons) == 1 or "icmp_in_error" in moved or "ip_frag_in" in moved, moved
        c.sent()


@settings(max_examples=examples(200))
@given(st.binary(max_size=1472), st.integers(1, 65535), st.integers(1, 255), st.integers(0, 255))
def test_an_independent_parser_reads_what_is_sent(data: bytes, port: int, ttl: int, tos: int) -> None:
    with Conversation() as c:
        sock = c.udp(7)
        c.stack.setopt(sock, lib.BYPASS_IP_TTL, ttl)
        c.stack.setopt(sock, lib.BYPASS_IP_TOS, tos)
        c.stack.sendto(sock, data, (PEER, port))
        [frame] = c.sent()
        parsed = dpkt.ethernet.Ethernet(frame)
        assert (parsed.dst, parsed.src, parsed.type) == (PEER_MAC, OUR_MAC, ETH_IPV4)
        head = parsed.data
        assert (head.ttl, head.tos, head.p, head.len) == (ttl, tos, UDP, 28 + len(data))
        assert checksum(frame[14:34]) == 0
        assert (head.data.sport, head.data.dport, head.data.ulen) == (7, port, 8 + len(data))
        assert bytes(head.data.data) == data
        right = dpkt.ip.IP(
            src=head.src, dst=head.dst, p=UDP, data=dpkt.udp.UDP(sport=7, dport=port, data=data)
        )
        right.data.ulen = 8 + len(data)
        assert (
            dpkt.ethernet.Ethernet(bytes(eth(OUR_MAC, PEER_MAC, ETH_IPV4, bytes(right)))).data.data.sum
            == head.data.sum
        )
