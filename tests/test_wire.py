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
from wire import BROADCAST, ETH_ARP, ETH_IPV4, ICMP, TCP, UDP, arp, checksum, echo, eth, icmp, ipv4, tcp, udp

REFUSED = ("eth_in", "arp_in", "ip_in", "ip_frag", "icmp_in", "udp_in", "tcp_in")

addresses = st.sampled_from(
    [PEER, US, "192.0.2.3", "198.51.100.7", "0.0.0.0", "127.0.0.1", "224.0.0.1", "192.0.2.255"]
)
ports = st.sampled_from([7, 9, 80, 4000]) | st.integers(0, 65535)
payloads = st.binary(max_size=200) | st.integers(0, 1400).map(bytes)


@st.composite
def udp_packets(draw: st.DrawFn) -> bytes:
    src, data = draw(addresses), draw(payloads)
    size = draw(st.none() | st.integers(0, 65535))
    csum = draw(st.none() | st.sampled_from([0, 1, 0xFFFF]))
    return ipv4(src, US, UDP, udp(src, US, draw(ports), draw(ports), data, size=size, csum=csum))


@st.composite
def tcp_packets(draw: st.DrawFn) -> bytes:
    src, seq, ack = draw(addresses), draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**32 - 1))
    options = draw(st.binary(max_size=40) | st.just(b"\2\4\5\xb4\1\3\3\7"))
    flags, window, data = draw(st.integers(0, 255)), draw(st.integers(0, 65535)), draw(payloads)
    return ipv4(
        src, US, TCP, tcp(src, US, draw(ports), draw(ports), seq, ack, flags, window, data, options=options)
    )


@st.composite
def icmp_packets(draw: st.DrawFn) -> bytes:
    quote = ipv4(US, PEER, UDP, udp(US, PEER, 7, 9, b"")) if draw(st.booleans()) else draw(payloads)
    kind = draw(st.sampled_from([0, 3, 4, 5, 8, 11, 12]) | st.integers(0, 255))
    return ipv4(
        draw(addresses),
        US,
        ICMP,
        icmp(kind, draw(st.integers(0, 20)), draw(st.binary(min_size=4, max_size=4)), quote),
    )


@st.composite
def odd_packets(draw: st.DrawFn) -> bytes:
    frag = draw(st.integers(0, 0xFFFF) | st.sampled_from([0, 0x2000, 1, 0x2001]))
    options = draw(st.integers(0, 10).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n)))
    total = draw(st.none() | st.integers(0, 0xFFFF))
    ihl = draw(st.none() | st.integers(0, 15))
    proto = draw(st.sampled_from([ICMP, TCP, UDP]) | st.integers(0, 255))
    dst = draw(st.just(US) | addresses)
    return ipv4(draw(addresses), dst, proto, draw(payloads), frag=frag, options=options, total=total, ihl=ihl)


arps = st.builds(
    arp,
    st.integers(0, 3),
    st.sampled_from([PEER_MAC, OUR_MAC, BROADCAST]),
    addresses,
    st.just(bytes(6)),
    addresses,
)
macs = st.sampled_from([OUR_MAC] * 6 + [BROADCAST, PEER_MAC])
packets = udp_packets() | tcp_packets() | icmp_packets() | odd_packets()
frames = st.builds(eth, macs, st.just(PEER_MAC), st.just(ETH_IPV4), packets) | st.builds(
    eth, macs, st.just(PEER_MAC), st.just(ETH_ARP), arps
)


@st.composite
def torn(draw: st.DrawFn) -> bytes:
    """A frame, sometimes with flipped bits, cut short or with something behind."""
    frame = bytearray(draw(frames))
    for bit in draw(st.lists(st.integers(0, len(frame) * 8 - 1), max_size=3)):
        frame[bit // 8] ^= 1 << bit % 8
    cut = draw(st.none() | st.integers(14, len(frame)))
    return (bytes(frame[:cut]) + draw(st.binary(max_size=30)))[:1514]


@settings(max_examples=examples(300))
@given(st.lists(torn(), min_size=1, max_size=30), st.sampled_from([ALL, KERNEL]))
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
@given(torn())
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
